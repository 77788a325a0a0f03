"""The documents: quotes are the code, listings and notebook run, names and commands exist."""

import importlib
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from closed_forms import PAPER
from conftest import HERE, MAINS, python
from nbclient import NotebookClient
from PIL import Image

import beyond
import ddpm_numpy
from ddpm import Diffusion, UNet, linear_betas
from docs import make_figures
from exact import exact_network
from images import to_pixels
from support.trained import eps_of

README = (HERE / "README.md").read_text("utf-8")
NAMES = "lesson", "beyond", "formulas", "guide", "notes"
LESSON, BEYOND, FORMULAS, GUIDE, NOTES = (
    (HERE / "docs" / f"{name}.md").read_text("utf-8") for name in NAMES
)
PAGES = {"README.md": README}
PAGES["benchmarks/ladder.md"] = (HERE / "benchmarks" / "ladder.md").read_text("utf-8")
PAGES |= dict(
    zip(
        [f"docs/{name}.md" for name in NAMES], [LESSON, BEYOND, FORMULAS, GUIDE, NOTES], strict=True
    )
)
TEST_NAMES = "".join(
    p.read_text("utf-8") for p in [HERE / "test_ddpm.py", *HERE.glob("tests/*.py")]
)


def blocks(page, language):
    """Return the code blocks of a page."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [code for its_language, code in fenced if its_language == language]


MINIMAL = (HERE / "minimal.py").read_text("utf-8")


def anchors(page):
    titles = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S), re.M)
    return {re.sub(r"[^a-z0-9 _-]", "", title.lower()).replace(" ", "-") for title in titles}


def test_quotes_are_the_code():
    """Every Python block of the README, the lesson, beyond.md and notes.md is in a program."""
    texts = [
        (HERE / name).read_text("utf-8").splitlines()
        for name in ("ddpm.py", "samplers.py", "beyond.py", "train.py", "exact.py", "minimal.py")
    ]
    programs = [[line.strip() for line in text] for text in texts]
    quotes = blocks(README + LESSON + BEYOND + NOTES, "python")
    assert len(quotes) >= 15
    for quote in quotes:
        lines = [line.strip() for line in quote.splitlines()]
        found = (lines == p[k : k + len(lines)] for p in programs for k in range(len(p)))
        assert any(found), quote


def test_equations_are_in_the_code_with_their_numbers():
    """All are, except for the definition (1) and for (16), which no line of code computes."""
    numbers = re.findall(r"\\tag\{(\d+)\}", LESSON)
    assert sorted(map(int, numbers)) == [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 14, 15, 16]
    for number in set(numbers) - {"1", "16"}:
        assert re.search(rf"\({number}\)", (HERE / "ddpm.py").read_text("utf-8")), number


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_page_is_well_formed(page):
    assert len(re.findall(r"^```", page, re.M)) % 2 == 0
    assert all('"""' not in code or code.count('"""') % 2 == 0 for code in blocks(page, "python"))
    for tag in ("details", "summary", "table", "tr", "td"):
        assert page.count(f"<{tag}>") == page.count(f"</{tag}>"), tag
    prose = re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S)
    for paragraph in re.sub(r"`[^`\n]*`", "", prose).split("\n"):
        assert paragraph.count("$") % 2 == 0, paragraph
        # GitHub takes a backslash before punctuation for Markdown's escape, also within $...$.
        for formula in re.findall(r"\$([^$]+)\$", paragraph):
            assert not re.search(r"\\[,;:!|{}]", formula) and formula == formula.strip(), formula
    lines = prose.splitlines()
    for line, below in pairwise(lines):
        if line.startswith("|") and not below.startswith("| ---"):  # a header may have a corner
            assert all(cell.strip() for cell in line.strip("|").split("|")), line


def test_parameters_by_part():
    """The table of the notes has the default U-Net's numbers, and adds up."""
    model = UNet()

    def count(*modules):
        return f"{sum(p.numel() for module in modules for p in module.parameters()):,}"

    for level, (down, up) in enumerate(zip(model.down, reversed(model.up), strict=True)):
        size = 32 >> level
        assert re.search(rf"^\| {size}x{size}.* \| {count(down)} \| {count(up)} \|$", NOTES, re.M)
    edges = count(model.conv_in, model.norm_out, model.conv_out)
    for number in (count(model.middle), count(model.time_mlp), edges, count(model)):
        assert number in NOTES.split("## The parameters")[1].split("\n## ")[0], number
    assert count(model) in README and count(model) in LESSON


def test_tests_that_the_pages_name_exist():
    names = re.findall(r"`(test_\w+)`", "".join(PAGES.values()))
    assert len(names) >= 15
    for name in names:
        assert f"def {name}(" in TEST_NAMES, name


def test_flags_files_and_anchors_exist(run, tmp_path):
    helps = {name: run(name, "--help", cwd=tmp_path) for name in MAINS}
    seen = set()
    for path, page in PAGES.items():
        for command in (
            line for block in blocks(page, "") for line in re.split(r"\n(?! )|&&", block)
        ):
            for name, its_help in helps.items():
                if name in command:
                    seen.add(name)
                    flags = re.findall(r"(?<= )--?[a-z][a-z-]*", command.split(name)[1])
                    assert all(re.search(rf"{flag}\b", its_help) for flag in flags), command
        for name in re.findall(r"\b(?:docs|page)/[\w-]+\.onnx", page):
            assert (HERE / name).is_file(), name
        for flag in re.findall(r"`(--[a-z][a-z0-9-]*)", page):
            assert any(re.search(rf"{flag}\b", its_help) for its_help in helps.values()), flag
        for link in re.findall(r"(?:\]\(|src=\")([^)\"]+)", page):
            if link.startswith("https://"):
                continue
            file, _, anchor = link.partition("#")
            target = ((HERE / path).parent / file).resolve() if file else (HERE / path).resolve()
            assert target.is_file() or target.is_dir(), link
            assert not anchor or anchor in anchors(target.read_text("utf-8")), link
    assert seen == set(helps)
    linked = re.findall(r'data-lesson="([^"]+)"', (HERE / "page" / "index.html").read_text("utf-8"))
    assert len(linked) >= 5 and set(linked) <= anchors(LESSON)


METHOD = """
import torch
from ddpm import Diffusion, UNet, linear_betas
diffusion, model = Diffusion(linear_betas(9, 0.01, 0.3)), UNet(8, 3, 8, (1, 2), 1, (4,))
optimizer = torch.optim.Adam(model.parameters())
for _ in range(2):
    optimizer.zero_grad()
    diffusion.loss(model, torch.rand(4, 3, 8, 8) * 2 - 1).backward()
    optimizer.step()
assert diffusion.sample(model.eval(), (2, 3, 8, 8)).isfinite().all()
"""
AFTER = (
    METHOD
    + """
from beyond import as_eps, guided, sample
x0 = sample(diffusion, as_eps(model, diffusion, "v"), (2, 3, 8, 8), steps=3)
assert x0.isfinite().all()
"""
)
CHECKPOINT = """
import torch
from beyond import as_eps, sample
from ddpm import Diffusion, UNet
state = torch.load("checkpoint.pt", weights_only=True)
assert UNet(**state["config"]["model"]).load_state_dict(state["ema"])
"""
SERVICE = """
import sys
from ddpm_numpy import Network, sample
from images import to_image, to_pixels
x0 = sample(Network("model.onnx"), 2, steps=3)
assert to_image(to_pixels(x0[0])).size == (8, 8) and "torch" not in sys.modules
"""
COPIES = {
    "the method": ["-c", METHOD],
    "what came after": ["-c", AFTER],
    "a checkpoint": ["-c", CHECKPOINT],
    "a service": ["-c", SERVICE],
    "the sampling program": ["sample.py", "--steps", "2", "-n", "2"],
    "training": ["train.py", "--steps", "1", "--base-channels", "8"],
    "export": ["export.py", "--checkpoint", "checkpoint.pt"],
    "evaluation": ["evaluate.py", "--checkpoint", "checkpoint.pt", "--data", "images"],
}


@pytest.mark.parametrize("what", COPIES)
def test_copied_files_suffice(what, trained, tmp_path):
    """Try each row of the README's table in an empty folder."""
    table = README.split("## Copy what you need")[1].split("\n## ")[0]
    (row,) = re.findall(rf"^\| [^|]*{what}.*", table, re.M)
    programs = {"train.py", "export.py", "evaluate.py"} - {COPIES[what][0]}
    for name in {*re.findall(r"`([\w.]+/?)`", row)} - programs:
        source = {"model.onnx": trained[0] / name, "checkpoint.pt": trained[0] / "run" / name}
        source = source.get(name, HERE / name)
        if source.is_dir():
            shutil.copytree(source, tmp_path / name)
        else:
            shutil.copy(source, tmp_path)
    assert list(tmp_path.iterdir())
    if what in ("export", "evaluation"):
        shutil.copy(trained[0] / "run" / "checkpoint.pt", tmp_path)
        (tmp_path / "images").mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / "0.png")
    subprocess.run([sys.executable, *COPIES[what]], cwd=tmp_path, check=True, capture_output=True)


def test_lines_of_build_on_it_run(trained, tmp_path, monkeypatch):
    """Run the manual's lines in order. Heun's samples are those of many steps of DDIM."""
    shutil.copytree(trained[0] / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    section = GUIDE.split("\n## Build on it")[1].split("\n## ")[0]
    names = {"array": np.zeros((2, 3, 8, 8), np.uint8)}
    for code in blocks(section, "python"):
        if "MyNet" not in code:
            exec(code, names)
    assert names["x0"].shape == (2, 3, 32, 32) and names["loss"].isfinite()
    x0, t = names["x0"], torch.tensor([5, 500])
    assert names["huber_loss"](names["model"], x0, t, torch.randn_like(x0)).isfinite()
    assert len(list(tmp_path.glob("images/*.png"))) == 2
    exact = exact_network(PAPER, torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).repeat(1, 1, 2, 2))
    x_T = torch.randn(20, 1, 2, 2)
    found = names["heun"](exact, x_T, PAPER.betas.tolist(), 100)
    fine = beyond.sample(PAPER, exact, x_T.shape, 1000, "ddim", x_T=x_T, clip=False)
    assert (found - fine).abs().max() < 0.05


def test_lines_of_measuring_arrange_images(class_folder, tmp_path, monkeypatch):
    """A tenth of the images, in their sub-folders, is set aside; CIFAR-10 becomes PNG files."""
    section = GUIDE.split("\n## Measuring")[1].split("\n## ")[0]
    split, cifar = blocks(section, "python")
    shutil.copytree(class_folder, tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    exec(split, {})
    folders = tmp_path / "images", tmp_path / "mine" / "test", tmp_path / "mine" / "train"
    files, test, train = ({p.relative_to(f) for p in f.rglob("*.*")} for f in folders)
    assert test | train == files and not test & train and len(test) == -(-len(files) // 10)
    image = Image.new("RGB", (32, 32), "red")
    datasets = SimpleNamespace(CIFAR10=lambda root, train, download: [(image, 3)] * (2 + train))
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(datasets=datasets))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    exec(cifar, {})
    assert [len([*tmp_path.glob(f"cifar10/{part}/*.png")]) for part in ("train", "test")] == [3, 2]


def test_minimal(tmp_path):
    """Run minimal.py in an empty folder; its loop is that of ddpm.py, and the README quotes it."""
    shutil.copy(HERE / "ddpm.py", tmp_path)
    code = MINIMAL.replace("10_000", "2").replace("linear_betas()", "linear_betas(9, 0.1, 0.5)")
    (tmp_path / "minimal.py").write_text(code)
    for name in "red", "blue":
        Image.new("RGB", (40, 30), name).save(tmp_path / f"{name}.png")
    said = python(tmp_path / "minimal.py", ".", cwd=tmp_path)
    assert said.endswith("drawing on CPUExecutionProvider\n") and "arning" not in said
    random, shape = np.random.default_rng(0), (16, 3, 32, 32)
    x0 = Diffusion(linear_betas(9, 0.1, 0.5)).sample(
        eps_of(tmp_path / "model.onnx"), shape, clip=False,
        draw_noise=lambda: torch.from_numpy(random.standard_normal(shape, np.float32)),
    )  # fmt: skip
    with Image.open(tmp_path / "samples.png") as image:
        tiles = np.asarray(image).astype(int).reshape(4, 32, 4, 32, 3).transpose(0, 2, 4, 1, 3)
    assert np.abs(tiles.reshape(shape) - to_pixels(x0.numpy())).max() <= 1 and tiles.std() > 9
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "model.onnx", tmp_path / "alone")
    no_torch = "import sys; sys.modules['torch'] = None\n"
    (end,) = (code for code in blocks(README, "python") if code.startswith("import"))
    assert MINIMAL.endswith(end)
    python("-c", no_torch + end, cwd=tmp_path / "alone")
    python("sample.py", "--steps", 2, "-n", 2, "--out", "two.png", cwd=tmp_path / "alone")
    first, second = ((tmp_path / name / "samples.png").read_bytes() for name in (".", "alone"))
    assert first == second


@pytest.mark.parametrize("program", ["train.py", "sample.py"])
def test_manual_has_every_flag(program, run, tmp_path):
    """Each flag is in the first column of the program's table."""
    flags = set(re.findall(r"^  (--?[a-z][a-z-]*)", run(program, "--help", cwd=tmp_path), re.M))
    section = GUIDE.split("\n## Training" if program == "train.py" else "\n## Sampling")[1]
    section = section.split("\n## ")[0]
    assert len(flags) > 10
    for flag in flags - {"-h"}:
        assert re.search(rf"^\| [^|]*`{flag}\b", section, re.M), flag


@pytest.fixture
def points(monkeypatch):
    """Return docs/points.py as a module."""
    monkeypatch.syspath_prepend(str(HERE / "docs"))
    return importlib.import_module("points")


def test_points_know_their_exact_noise(points):
    """Compare E[eps | x_t] of docs/points.py with averages over the nearest of 2 million x_t."""
    diffusion, random = Diffusion(linear_betas()), torch.manual_seed(0)
    for i in (100, 400):
        x0, noise = points.mixture(2_000_000), torch.randn(2_000_000, 2, 1, 1, generator=random)
        t, x_t = torch.tensor([i]), diffusion.q_sample(x0, torch.full((len(x0),), i), noise)
        for place in ([0.3, 0.2], [-0.4, -0.1]):
            near = (x_t.flatten(1) - torch.tensor(place)).norm(dim=1) < 0.05
            assert near.sum() > 300
            centre = x_t[near].mean(0, keepdim=True)
            exact = points.exact_network(diffusion, points.MEANS, std=points.STD)(centre, t)
            error = 5 * noise[near].std(0) / near.sum().sqrt()
            assert ((noise[near].mean(0) - exact[0]).abs() < error + 0.02).all()


def test_share_off_counts_the_far_points(points):
    data = torch.tensor([[0.0, 0.0], [1.0, 1.0]])[..., None, None]
    near_and_far = torch.tensor([[0.03, 0.03], [0.04, 0.04], [1.0, 0.96], [0.5, 0.5]])
    assert points.share_off(near_and_far[..., None, None], data) == 0.5


@pytest.mark.parametrize("steps, t", [(1000, 1), (1000, 199), (10, 1), (10, 5)])
def test_reverse_step_of_two_points_is_bayes_rule(steps, t):
    """Compare the mixture of posteriors with q(x_t | x_s) q(x_s) / q(x_t) on a fine grid."""
    (chain, _), x_t = make_figures.short_chain(steps), torch.tensor([0.1]).double()
    x, log_p, log_g = make_figures.reverse_step(chain, t, x_t, torch.linspace(-6, 6, 2001).double())
    bump = make_figures.log_normal(x_t, chain.alphas[t].sqrt() * x[0], chain.betas[t])
    joint = (bump + make_figures.log_two(chain, t - 1, x[0]).logsumexp(1)).softmax(0)
    dx = x[0, 1] - x[0, 0]
    torch.testing.assert_close(log_p[0].exp(), joint / dx, rtol=1e-3, atol=1e-5)
    for log_density in (log_p, log_g):  # both have the same mean and variance
        mean = (log_density[0].exp() * x[0]).sum() * dx
        moment = (log_density[0].exp() * (x[0] - mean) ** 2).sum() * dx
        assert mean.item() == pytest.approx(x[0, 1000].item(), abs=1e-5)
        assert moment.item() == pytest.approx((x[0, -1] - x[0, 1000]).item() ** 2 / 36, rel=1e-3)


def test_small_reverse_steps_are_nearly_gaussian():
    """Check the numbers in section 4 of the lesson, whose t counts from 1."""
    bits = [make_figures.distance_to_gaussian(Diffusion(linear_betas()), t - 1)
            for t in (2, 20, 50, 100, 200, 500)]  # fmt: skip
    assert bits[0] < 1e-16 and bits[1] < 1e-16
    assert bits[2:] == pytest.approx([6e-10, 1.5e-6, 2e-7, 2.1e-11], rel=0.05)
    ten, _ = make_figures.short_chain(10)
    assert make_figures.distance_to_gaussian(ten, 1) == pytest.approx(0.22, abs=0.01)


@pytest.mark.parametrize("name, rows, columns", [("recorded", 11, 12), ("smileys", 6, 9)])
def test_recordings_of_the_page_are_what_python_draws(name, rows, columns, tmp_path):
    """Except for the loss of the compression."""
    network = ddpm_numpy.Network(make_figures.PAGE / "emoji.onnx", "cpu")
    make_figures.draw_recorded(tmp_path, network)
    images = []
    for folder in (make_figures.PAGE, tmp_path):
        with Image.open(folder / f"{name}.webp") as image:
            images.append(np.asarray(image.convert("RGB"), int))
    assert images[0].shape == (rows * 32, columns * 32, 3)
    assert np.abs(images[0] - images[1]).mean() < 3
    assert images[0][-32:].std() > 60  # they are colourful


@pytest.mark.slow
def test_figures_are_made(trained, image_folder, tmp_path):
    flags = ["--onnx", trained[0] / "model.onnx", "--paper", trained[0] / "model.onnx"]
    flags += ["--data", image_folder, "--out", tmp_path / "docs"]
    python(HERE / "docs" / "make_figures.py", *flags, cwd=tmp_path, timeout=600)
    names = "by-t corrector ends interpolation paper rate-distortion rectangles schedule snr"
    names += " small-steps steps strip velocity"
    made = sorted((tmp_path / "docs").iterdir())
    names = [f"{name}.png" for name in [*names.split(), "two-points", "unet"]]
    assert [p.name for p in made] == sorted([*names, "reverse.gif"])
    for path in made:
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 10
            assert image.width >= 400 or path.suffix == ".gif"
    with Image.open(tmp_path / "docs" / "reverse.gif") as gif:
        assert gif.n_frames > 50 and gif.info["loop"] == 0
    shown = re.findall(r"(?:\]\(|src=\")(?:docs/)?(?:figures/)?([^)\"]+)", "".join(PAGES.values()))
    assert {path.name for path in made} <= set(shown)


@pytest.mark.slow
def test_points_are_learnt(tmp_path):
    """Run docs/points.py in a copy of the repository: check its output and its figures."""
    names = "ddpm.py samplers.py beyond.py exact.py docs/points.py docs/figures/field.png"
    for name in names.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(HERE / name, tmp_path / name)
    said = python(tmp_path / "docs" / "points.py", cwd=tmp_path, timeout=600)
    shares = {
        title.strip(): float(value)
        for title, value in re.findall(r"^(.*?) +([0-9.]+)% off the data$", said, re.M)
    }
    assert len(shares) == 10
    assert shares["mixture: Algorithm 2"] < 5 > shares["moons: Algorithm 2"]
    assert shares["moons: without z"] > 25 < shares["moons: the mean"]
    assert {p.name for p in (tmp_path / "docs" / "figures").glob("*.png")} == {
        "field.png",
        "guidance.png",
        "points.png",
    }


def test_commands_to_paste_end_on_a_cpu():
    """Each has --quick, the demo, or a flag for which the text says that it needs a GPU."""
    page = (HERE / "page" / "index.html").read_text("utf-8")
    commands = re.findall(r"^(?:python|torchrun .*) train\.py.*", "\n".join(PAGES.values()), re.M)
    commands += re.findall(r"<code>(python train\.py.*?)</code>", page)
    assert len(commands) >= 7
    slow = [c for c in commands if c.startswith("python") and "--data" in c and "--quick" not in c]
    flags = {re.sub(r" +#.*|^.* --data ./images ", "", command) for command in slow}
    ordered = "python train.py --data ./images"
    cifar = "python train.py --data cifar10/train --out cifar"
    assert flags == {ordered, cifar, "--out paper", "--init hf:google/ddpm-cifar10-32"}
    assert re.search(rf"for a GPU:\n\n```\n{ordered}\n", README)
    for command in re.findall(r"^python sample\.py.*(?:--inpaint|--interpolate).*", GUIDE, re.M):
        assert "--steps" in command


def said_in(notebook):
    """Return what the code cells of a notebook print; each must print or draw something."""
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert len(outputs) >= 15 and all(outputs)
    return "".join(output.get("text", "") for cell in outputs for output in cell)


WRONG = (  # a wrong answer to each exercise of the notebook
    "exercise_1(100)",
    "exercise_2(lambda x_t, x0_hat, abar_t, abar_s: abar_s**0.5 * x0_hat)",
    "exercise_3(L_T, linear_betas(100))",
    "exercise_4(rectangle, 216)",
    "exercise_5(lambda mse, posterior_variance, posterior_x0: posterior_variance + mse)",
    "exercise_6(lambda x_t, data, abar: data.mean(0).expand_as(x_t))",
)


def test_notebook_has_its_outputs():
    said = said_in(nbformat.read(HERE / "docs" / "ddpm.ipynb", 4))
    correct, different = map(
        int, re.search(r"(\d+) of 128 samples are correct, and show (\d+)", said).groups()
    )
    assert correct > 100 and different > 75
    assert float(re.search(r"T = 100: .* ([0-9.]+)% end at the single point", said)[1]) > 30
    assert said.count("Replace the ...") == len(WRONG)  # no output gives an exercise away


@pytest.mark.skipif(
    not (HERE / ".git").exists() or not shutil.which("git"), reason="there is nothing to clone"
)
def test_notebook_alone_clones_what_it_needs(tmp_path):
    first = next(
        c
        for c in nbformat.read(HERE / "docs" / "ddpm.ipynb", 4).cells
        if c.source.startswith("import")
    )
    assert "set REPOSITORY" in python("-c", first.source, cwd=tmp_path, code=1)
    code = first.source.replace('REPOSITORY = ""', f"REPOSITORY = {str(HERE)!r}")
    for _ in range(2):  # as when a cell is run again
        python("-c", f"{code}\nimport ddpm, points, support.data", cwd=tmp_path)
    assert (tmp_path / "ddpm" / "docs" / "points.py").is_file()


@pytest.mark.slow
def test_notebook_runs():
    """Run it from top to bottom, with fewer steps; it accepts its answers, not wrong ones."""
    notebook = nbformat.read(HERE / "docs" / "ddpm.ipynb", 4)
    (setup,) = (cell for cell in notebook.cells if "DEMO_STEPS, SAMPLES =" in cell.source)
    setup.source, count = re.subn(r"= 3000, \d+, 128\b", "= 30, 40, 16", setup.source)
    assert count == 1
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    for call in WRONG:
        said = f"try:\n    {call}\nexcept AssertionError as error:\n    print('wrong:', error)"
        notebook.cells.append(nbformat.v4.new_code_cell(said))
    here = {"metadata": {"path": str(HERE / "docs")}}
    NotebookClient(notebook, timeout=600, resources=here).execute()
    said = said_in(notebook)
    assert "of 16 samples are correct" in said and said.count("wrong: ") == len(WRONG)
