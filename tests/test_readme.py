"""The README: its quotes are the code, its equation numbers and commands exist, its loop works."""

import re
import shutil

import numpy as np
import pytest
from conftest import HERE, MAINS, python
from PIL import Image

import sample

README = (HERE / "README.md").read_text()


def blocks(language):
    """The code blocks of the README."""
    return [part.split("\n", 1)[1] for part in README.split("```")[1::2]
            if part.split("\n")[0] == language]  # fmt: skip


def test_quotes_are_the_code():
    sources = [
        [line.strip() for line in (HERE / name).read_text().splitlines()]
        for name in ("ddpm.py", "train.py")
    ]
    method = README.split("## The method")[1].split("\n## ")[0]
    quotes = [block for block in blocks("python") if block in method]
    assert len(quotes) >= 9
    for quote in quotes:
        for part in quote.strip().split("\n...\n"):
            lines = [line.strip() for line in part.splitlines()]
            assert any(
                lines == source[k : k + len(lines)]
                for source in sources
                for k in range(len(source))
            ), part


def test_equations_are_in_the_code_with_their_numbers():
    numbers = re.findall(r"\\tag\{(\d+)\}", README)
    assert sorted(map(int, numbers)) == [2, 4, 5, 6, 7, 8, 11, 12, 13, 14, 15]
    for number in numbers:
        assert re.search(rf"\({number}\)", (HERE / "ddpm.py").read_text()), number


def test_loop_is_the_sampler(trained, tmp_path, monkeypatch):
    """The loop to paste draws the images of sample.py from the same noise, in few lines."""
    (code,) = (block for block in blocks("python") if "InferenceSession" in block)
    assert len(code.splitlines()) <= 22
    shutil.copy(trained[0] / "model.onnx", tmp_path)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    random = np.random.default_rng(0)
    network = sample.Network("model.onnx", 16, "cpu")
    chain = sample.sample_progressive(
        network, lambda: random.standard_normal(network.shape, np.float32), network.betas
    )
    for _, _, x0 in chain:
        last = x0
    pixels = sample.to_pixels(last).transpose(0, 3, 1, 2).astype(int)
    assert names["pixels"].shape == network.shape and names["pixels"].std() > 10
    assert np.abs(names["pixels"] - pixels).max() <= 1


def test_flags_files_and_anchors_exist(run, tmp_path):
    helps = {name: run(name, "--help", cwd=tmp_path) for name in MAINS}
    commands = [line for block in blocks("") for line in re.split(r"\n(?! )|&&", block)]
    seen = set()
    for command in commands:
        for name, its_help in helps.items():
            if name in command:
                seen.add(name)
                flags = re.findall(r"(?<= )--?[a-z][a-z-]*", command.split(name)[1])
                assert all(re.search(rf"{flag}\b", its_help) for flag in flags), command
    assert seen == set(helps)
    for flag in re.findall(r"`(--[a-z][a-z0-9-]*)", README):
        assert any(re.search(rf"{flag}\b", its_help) for its_help in helps.values()), flag
    for link in re.findall(r"(?:\]\(|src=\")([^)#\"]+)", README):
        assert link.startswith("https://") or (HERE / link).is_file(), link
    titles = re.findall(r"^#+ (.*)", README, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors
    linked = re.findall(r'data-readme="([^"]+)"', (HERE / "docs" / "index.html").read_text())
    assert len(linked) >= 5 and set(linked) <= anchors


def test_images_for_fid_are_cut_as_for_training(pictures, tmp_path):
    """The README's line that writes the real images, on a folder named ./images."""
    (line,) = re.findall(r'python -c "(import sample, train; .*)"\n', README)
    shutil.copytree(pictures, tmp_path / "images")
    python("-c", line, cwd=tmp_path, env={"PYTHONPATH": str(HERE)})
    assert len(list((tmp_path / "real").glob("*.png"))) == 12
    with Image.open(tmp_path / "real" / "0.png") as image:
        assert image.size == (32, 32) and image.mode == "RGB"


@pytest.mark.slow
def test_figures_are_made_from_a_run(trained, pictures, tmp_path):
    flags = ["--run", trained[0] / "run", "--data", pictures, "--out", tmp_path / "docs"]
    python(HERE / "docs" / "make_figures.py", *flags, cwd=tmp_path)
    names = ["bound-by-t", "forward", "loss-by-t", "rate-distortion", "schedule", "steps", "strip"]
    made = sorted((tmp_path / "docs").iterdir())
    assert [p.name for p in made] == sorted([*(f"{name}.png" for name in names), "reverse.gif"])
    for path in made:
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 10
            assert image.width >= 400 or path.suffix == ".gif"
    with Image.open(tmp_path / "docs" / "reverse.gif") as gif:
        assert gif.n_frames == sample.FRAMES + 2 and gif.info["loop"] == 0
    assert all(f"docs/{path.name}" in README for path in made)
