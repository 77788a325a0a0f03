"""The documents: quotes are the code, listings and notebook run, names and commands exist."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from conftest import HERE, in_process, python, save_run
from nbclient import NotebookClient
from PIL import Image

from arguments import command_line
from ddpm import Diffusion, linear_betas
from docs import make_figures, points

NAMES = ["docs/lesson.md", "docs/beyond.md", "docs/notes.md", "docs/guide.md", "README.md"]
NAMES += ["docs/formulas.md", "benchmarks/ladder.md", "CONTRIBUTING.md", "page/index.html"]
PAGES = {name: (HERE / name).read_text("utf-8") for name in NAMES}
LESSON, BEYOND, NOTES, GUIDE, README, *_ = PAGES.values()
TESTS = "".join(p.read_text("utf-8") for p in [HERE / "test_ddpm.py", *HERE.glob("tests/*.py")])


def blocks(page, language):
    """Return the code blocks of a page."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [code for its_language, code in fenced if its_language == language]


def section(page, title):
    """Return what is below a title of the second level."""
    return page.split(f"\n## {title}\n")[1].split("\n## ")[0]


def anchors(page):
    without_blocks = re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)", without_blocks, re.M)
    return {re.sub(r"[^a-z0-9 _-]", "", title.lower()).replace(" ", "-") for title in titles}


def test_quotes_are_the_code():
    """Every Python block of the README, the lesson, beyond.md and notes.md is in a program.

    So are those in the notebook's text.
    """
    names = "ddpm.py", "sample.py", "extras/exact.py", "docs/points.py"
    texts = [(HERE / name).read_text("utf-8").splitlines() for name in names]
    programs = [[line.strip() for line in text] for text in texts]
    cells = nbformat.read(HERE / "docs" / "ddpm.ipynb", 4).cells
    texts = [cell.source + "\n" for cell in cells if cell.cell_type == "markdown"]
    quotes = blocks(README + LESSON + BEYOND + NOTES + "".join(texts), "python")
    assert len(quotes) >= 15
    for quote in quotes:
        lines = [line.strip() for line in quote.splitlines()]
        found = (lines == p[k : k + len(lines)] for p in programs for k in range(len(p)))
        assert any(found), quote


def test_tests_files_links_and_anchors_exist():
    pages = "".join(PAGES.values())
    names = re.findall(r"`(test_\w+)`", pages)
    assert len(names) >= 15
    for name in names:
        assert f"def {name}(" in TESTS, name
    for name in re.findall(r"`([\w/]+\.py)`|\b((?:docs|page)/[\w-]+\.onnx)", pages):
        folders = HERE, HERE / "docs", HERE / "tests", HERE / "benchmarks"
        assert any((folder / "".join(name)).is_file() for folder in folders), name
    for path, page in PAGES.items():
        for link in re.findall(r"(?:\]\(|src=\"|href=\"(?=\.\.))(?!https://)([^)\"]+)", page):
            file, _, anchor = link.partition("#")
            target = ((HERE / path).parent / file).resolve() if file else (HERE / path).resolve()
            assert target.is_file() or target.is_dir(), link
            assert not anchor or anchor in anchors(target.read_text("utf-8")), link


def test_flags_exist(monkeypatch):
    """Each command has flags of its program, and each flag in a sentence is one of some program.

    The values of train.py's flags are within their ranges.
    """
    names = {"train.py", "export.py", "sample.py"}
    names |= {*re.findall(r"-m (extras\.\w+) ", "".join(PAGES.values()))}
    helps = {name: in_process(name, "--help") for name in names}
    assert len(helps) == 9
    for page in PAGES.values():
        commands = re.findall(r"\b((?:train|export|sample)\.py|extras\.\w+)\b([^\n`&]*)", page)
        for name, words in commands:
            for flag in re.findall(r"(?<= )--?[a-z][a-z-]*", words):
                assert re.search(rf"{flag}\b", helps[name]), (name, flag)
            if name == "train.py" and words.startswith(" --"):
                monkeypatch.setattr(sys, "argv", [name, *shlex.split(words, comments=True)])
                command_line("")
        for flag in re.findall(r"`(--[a-z][a-z0-9-]*)", page):
            assert any(re.search(rf"{flag}\b", text) for text in helps.values()), flag


FEW = {
    "train.py": "--steps 1 --base-channels 8 --batch 4 --no-compile",
    "sample.py": "--steps 2 -n 2",
}


def test_copied_files_suffice(tmp_path):
    """Try the first row of the README's table; test_sample.py and test_minimal.py the others."""
    rows = re.findall(r"^\| ([^|]*) \| ([^|]*) \|", section(README, "Copy what you need"), re.M)
    files = {goal.split(",")[0]: re.findall(r"`([\w.]+)`", names) for goal, names in rows[2:]}
    assert {*files} == {"the method", "sampling", "the whole pipeline"}
    assert files["sampling"] == ["sample.py", "model.onnx"]
    for name in files["the method"]:
        shutil.copy(HERE / name, tmp_path)
    words = sys.executable, "-m", "pytest", "-q", "test_ddpm.py", "-k", "bayes or stands"
    done = subprocess.run(words, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_training_imports_only_what_it_needs(tmp_path):
    code = """import sys, train
train.main({"steps": 1, "base_channels": 8, "batch": 4})
unused = {"quick", "extras", "onnx", "onnxruntime", "onnxscript", "matplotlib", "diffusers"}
assert not unused & sys.modules.keys()"""
    python("-c", code, cwd=tmp_path)


def test_every_imported_package_is_required():
    files = {path.stem: path.read_text("utf-8") for path in HERE.glob("*.py")}
    del files["test_ddpm"]
    names = {*re.findall(r"^ *(?:import|from) (\w+)", "\n".join(files.values()), re.M)}
    names -= {*sys.stdlib_module_names, *files, "extras", "pillow_heif"}  # the last is optional
    required = "".join((HERE / f"requirements{of}.txt").read_text() for of in ("", "-sample"))
    assert "filelock" in names
    for name in names:
        assert re.search(rf"^{name.replace('PIL', 'Pillow')}\b", required, re.M), name


def test_script_blocks_are_the_requirements():
    """The blocks by which uv runs sample.py and minimal.py name what they import (PEP 723)."""
    required = "".join((HERE / f"requirements{of}.txt").read_text() for of in ("", "-sample"))
    required = re.findall(r"^([\w-]+>=[\w.]+)", required, re.M)
    project = (HERE / "pyproject.toml").read_text()
    others = {"sample.py": {"torch", "filelock", "onnx", "onnxscript"}, "minimal.py": {"filelock"}}
    for name, unused in others.items():
        block = re.match(r"# /// script\n(.*?)# ///\n", (HERE / name).read_text("utf-8"), re.S)[1]
        unused = unused | {"onnxruntime-gpu"}
        names = {line for line in required if line.partition(">=")[0] not in unused}
        assert {*re.findall(r'"([\w-]+>=[\w.]+)"', block.partition("dependencies")[2])} == names
        assert re.search(r'requires-python = ".*"', block)[0] in project


@pytest.mark.slow
def test_uv_draws_without_an_installation(tmp_path):
    """The README's first line; minimal.py's packages are resolved, but not installed."""
    (line,) = re.findall(r"^uv (run [^#\n]*)", README, re.M)
    (tmp_path / "page").mkdir()
    for name in "sample.py", "minimal.py", "page/emoji.onnx":
        shutil.copy(HERE / name, tmp_path / name)
    for words in line.split(), ["export", "--script", "minimal.py"]:
        python("-m", "uv", *words, cwd=tmp_path)
    assert Image.open(tmp_path / "emoji.png").size > (256, 256)


@pytest.mark.slow
def test_commands_of_the_readme_run_in_their_order(
    program, exported, image_folder, class_folder, tmp_path
):
    """Paste them, with few steps: the demo and three runs do not get in each other's way."""
    shutil.copytree(image_folder, tmp_path / "images")
    shutil.copytree(class_folder, tmp_path / "fashion-mnist" / "train")
    (tmp_path / "docs").mkdir()
    shutil.copy(HERE / "docs" / "paper.onnx", tmp_path / "docs")
    commands = re.findall(r"python (?:train|export|sample)\.py[^`\n#&]*", README)
    assert len(commands) == 11
    for _, name, *words in map(str.split, commands):
        program(name, *words, *FEW.get(name, "").split(), cwd=tmp_path)
    runs = {"demo", "run", "run-clothes", "run-paper"}
    assert {p.parent.name for p in tmp_path.glob("*/checkpoint.pt")} == runs
    assert [shape for _, shape in exported] == [(3, 8, 8), (3, 32, 32), (3, 32, 32)]


def test_lines_of_build_on_it_run(tmp_path, monkeypatch):
    """Run the manual's lines in order."""
    save_run(tmp_path / "run", (3, 8, 8))
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in blocks(section(GUIDE, "Build on it"), "python"):
        if "MyNet" not in code:
            exec(code.replace("UNet(", "UNet(base_channels=16, "), names)  # a small one
    assert names["network"](torch.zeros(2, 6, 32, 32), torch.tensor([0, 9])).shape[1] == 6
    assert names["x0"].shape == (2, 3, 32, 32) and names["loss"].isfinite()


def test_lines_of_measuring_arrange_images(class_folder, tmp_path, monkeypatch):
    """A tenth of the images is set aside, and the images of a run become PNG files."""
    split, _, real = blocks(section(GUIDE, "Measuring"), "python")
    shutil.copytree(class_folder, tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    exec(split, {})
    with pytest.raises(SystemExit, match="mine exists"):
        exec(split, {})
    folders = tmp_path / "images", tmp_path / "mine" / "test", tmp_path / "mine" / "train"
    files, test, rest = ({p.relative_to(f) for p in f.rglob("*.*")} for f in folders)
    assert test | rest == files and not test & rest and len(test) == -(-len(files) // 10)
    exec(real, {})
    sizes = [Image.open(path).size for path in tmp_path.glob("real/*.png")]
    assert sizes == [(32, 32)] * (len(files) - 1)  # one is broken


def test_lines_for_clothes_write_the_folders_of_the_ruler(tmp_path, monkeypatch):
    pictures = [(Image.new("L", (28, 28), y), y) for y in range(10)]
    fake = SimpleNamespace(FashionMNIST=lambda *args, **options: pictures)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", fake)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(datasets=fake))
    monkeypatch.chdir(tmp_path)
    exec(blocks(section(GUIDE, "Better images"), "python")[0], {})
    for y, name in enumerate(np.load(HERE / "benchmarks" / "ruler.npz")["names"]):
        for part in "train", "test":
            assert Image.open(f"fashion-mnist/{part}/{name}/0000{y}.png").getpixel((0, 0)) == y


def test_lines_for_emoji_write_a_folder_for_each_subgroup(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noto, fluent = "emoji-datasource-google", "@lobehub/fluent-emoji-3d"
    for file in f"{noto}/img/google/64/1f63a.png", f"{fluent}/assets/1f63a.webp":
        file = Path("node_modules", file)
        file.parent.mkdir(parents=True)
        Image.new("RGBA", (256, 256), "red").save(file)
    emoji = [("1F63A", "arts & crafts"), ("1F63A", "skin-tone"), ("00", "flag")]
    emoji = [{"unified": name, "subcategory": kind} for name, kind in emoji]
    Path("node_modules", noto, "emoji.json").write_text(json.dumps(emoji))
    exec(blocks(section(GUIDE, "Better images"), "python")[1], {})
    written = {str(path): Image.open(path).size for path in Path("emoji").rglob("*.*")}
    folder = "emoji/arts-crafts"
    assert written == {f"{folder}/1f63a-{maker}.png": (64, 64) for maker in ("fluent", "noto")}


def test_small_reverse_steps_are_nearly_gaussian():
    """Check the numbers in section 4 of the lesson, whose t counts from 1."""
    bits = [make_figures.distance_to_gaussian(Diffusion(linear_betas()), t - 1)
            for t in (2, 20, 50, 100, 200, 500)]  # fmt: skip
    assert bits[0] < 1e-16 and bits[1] < 1e-16
    assert bits[2:] == pytest.approx([6e-10, 1.5e-6, 2e-7, 2.1e-11], rel=0.05)
    every_tenth = (make_figures.distance_to_gaussian(Diffusion(linear_betas()), t)
                   for t in range(5, 1000, 10))  # fmt: skip
    assert 10 * sum(every_tenth) == pytest.approx(1e-4, abs=5e-5)  # of all steps
    ten, _ = make_figures.short_chain(10)
    assert make_figures.distance_to_gaussian(ten, 1) == pytest.approx(0.22, abs=0.01)


def test_weights_of_the_losses_are_those_of_the_lesson():
    """Section 8 has the weights of the error of the noise, divided by their mean over t > 1."""
    small = Diffusion(linear_betas(), "small")
    snr = small.alphas_bar / (1 - small.alphas_bar)
    torch.testing.assert_close(small.bound_weights()[1:], (snr[:-1] / snr[1:] - 1) / 2)
    bound, image = "the bound, with the small variance", "the squared error of the image"
    for name, weights, rel in ((bound, small.bound_weights(), 0.02), (image, 1 / snr, 0.35)):
        (cells,) = re.findall(rf"^\| {name} \| ([0-9. |]+) \|$", LESSON, re.M)
        found = (weights / weights[1:].mean())[[1, 9, 99, 349, 999]].tolist()
        assert [*map(float, cells.split("|"))] == pytest.approx(found, rel=rel)


@pytest.mark.slow
def test_points_are_learnt(tmp_path, monkeypatch, capsys):
    """Run docs/points.py: check its output and its figures."""
    monkeypatch.setattr(points, "FIGURES", tmp_path)
    points.main()
    said = capsys.readouterr().out
    shares = re.findall(r"^ *(.*?) +([0-9.]+)% off the data$", said, re.M)
    shares = {title: float(value) for title, value in shares}
    assert len(shares) == 10
    assert shares["mixture: Algorithm 2"] < 5 > shares["moons: Algorithm 2"]
    assert shares["moons: without z"] > 25 < shares["moons: mean as target"]
    assert {path.stem for path in tmp_path.iterdir()} == {"field", "guidance", "points"}


WRONG = (  # wrong answers to the six exercises of the notebook
    "exercise_1(100)",
    "exercise_2(ddim, lambda x0_r, x0_t, lam_r, lam_t, lam_s: x0_t)",
    "exercise_2(lambda x_t, x0_hat, abar_t, abar_s: abar_s**0.5 * x0_hat, middle)",
    "exercise_3(L_T, linear_betas(100))",
    "exercise_4(rectangle, 216)",
    "exercise_5(lambda mse, posterior_variance, posterior_x0: posterior_variance + mse)",
    "exercise_6(lambda x_t, data, abar: data.mean(0).expand_as(x_t))",
)


@pytest.mark.skipif(
    not (HERE / ".git").exists() or not shutil.which("git"), reason="there is nothing to clone"
)
def test_notebook_alone_clones_what_it_needs(tmp_path):
    cells = nbformat.read(HERE / "docs" / "ddpm.ipynb", 4).cells
    first = next(cell for cell in cells if cell.source.startswith("import"))
    assert "set REPOSITORY" in python("-c", first.source, cwd=tmp_path, code=1)
    code = first.source.replace('REPOSITORY = ""', f"REPOSITORY = {str(HERE)!r}")
    code += "\nassert find_spec('points')"
    for _ in range(2):  # as when a cell is run again
        python("-c", code, cwd=tmp_path)
    assert (tmp_path / "ddpm" / "docs" / "points.py").is_file()


@pytest.mark.slow
def test_notebook_runs():
    """Run it from top to bottom, with fewer steps; it accepts its answers, not wrong ones."""
    notebook = nbformat.read(HERE / "docs" / "ddpm.ipynb", 4)
    (setup,) = (cell for cell in notebook.cells if "DEMO_STEPS, SAMPLES =" in cell.source)
    setup.source, count = re.subn(r"= 3000, \d+, 128\b", "= 30, 40, 16", setup.source)
    assert count == 1
    for cell in notebook.cells:  # fewer points and images
        cell.source = re.sub(r"\b1000(?=, 2, 1, 1)|(?<=n=)1000\b", "50", cell.source)
        cell.source = cell.source.replace("x0_all[::6]", "x0_all[::18]")
    for call in WRONG:
        said = f"try:\n    {call}\nexcept AssertionError as error:\n    print('wrong:', error)"
        notebook.cells.append(nbformat.v4.new_code_cell(said))
    here = {"metadata": {"path": str(HERE / "docs")}}
    NotebookClient(notebook, timeout=600, resources=here).execute()
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert len(outputs) >= 15 and all(outputs)  # each cell prints or draws something
    said = "".join(output.get("text", "") for cell in outputs for output in cell)
    assert "of 16 samples are correct" in said and said.count("wrong: ") == len(WRONG)
