"""Classes and guidance: from sub-folders to samples of a class, by the programs."""

import contextlib
import sys
import types
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from closed_forms import randn, small_unet
from conftest import COLOURS, TINY, colour_name, listing, read, write_three
from PIL import Image

import ddpm_numpy
import train
from beyond import guided
from ddpm import Diffusion, linear_betas
from images import from_pixels, read_image
from support import data
from support.trained import Trained, load

NAMES = list(COLOURS)


@pytest.fixture
def draw(coloured, tmp_path, run):
    """Run sample.py with the network of the three classes; return what it printed."""
    return partial(run, "sample.py", "--onnx", coloured / "model.onnx", cwd=tmp_path)


def cells(path, rows, columns):
    """Return the names of the colours in a grid: a list for each row, with None if empty."""
    image = np.asarray(Image.open(path)).astype(float)
    side = image.shape[0] / rows
    image = image[:, image.shape[1] - round(columns * side) :]  # without the names of the rows

    def name(r, c):
        middle = image[int((r + 0.5) * side), int((c + 0.25) * side) : int((c + 0.75) * side)]
        return colour_name(middle.mean(0))

    return [[name(r, c) for c in range(columns)] for r in range(rows)]


def test_each_class_has_a_row(draw, tmp_path):
    assert "24 images of blue, green, red" in draw("--steps", 10)
    for name, row in zip(NAMES, cells(tmp_path / "samples.png", 3, 8), strict=True):
        assert row.count(name) >= 7
    names = np.asarray(Image.open(tmp_path / "samples.png").convert("L"))[:, :40]
    assert all((part < 128).any() for part in np.array_split(names, 3))  # written to the left


def test_classes_are_chosen_by_name(draw, tmp_path):
    """The images have the classes in turn, and the folder has a sub-folder for each class."""
    flags = "--class red blue --guidance 2 --steps 10".split()
    draw(*flags, *"-n 5 --dir out --gif x.gif".split())
    files = sorted(p.relative_to(tmp_path / "out").as_posix() for p in tmp_path.glob("out/*/*"))
    assert files == [*(f"blue/00000{k}.png" for k in (1, 3)),
                     *(f"red/00000{k}.png" for k in (0, 2, 4))]  # fmt: skip
    assert cells(tmp_path / "samples.png", 2, 3) == [["red"] * 3, ["blue", "blue", None]]
    with Image.open(tmp_path / "x.gif") as gif:
        assert gif.height == Image.open(tmp_path / "samples.png").height and gif.n_frames > 5
    draw(*flags, *"-n 9 --dir more --batch 4".split())  # the first images stay the same
    before, after = (
        read_image(tmp_path / folder / "blue" / "000003.png", 8, 3) for folder in ("out", "more")
    )
    assert np.abs(before.astype(int) - after).max() <= 1


def test_one_class_fills_a_square_and_more_have_one_row_each(draw, tmp_path):
    """A class that is named twice has only one row, too."""
    for flags, rows in (
        ("--class green -n 9", [["green"] * 3] * 3),
        ("--class red green -n 2", [["red"], ["green"]]),
        ("--class blue blue red -n 6 --dir out", [["blue"] * 3, ["red"] * 3]),
    ):
        said = draw(*flags.split(), "--guidance", 1, "--steps", 5)
        assert cells(tmp_path / "samples.png", len(rows), len(rows[0])) == rows
    assert "6 images of blue, red (" in said
    assert [len(list((tmp_path / "out" / name).iterdir())) for name in ("blue", "red")] == [3, 3]


def test_interpolation_within_a_class(draw, class_folder, tmp_path):
    ends = class_folder / "red" / "0.png", class_folder / "blue" / "0.png"
    draw(*"--class green --guidance 3 --t 990 --steps 50 --interpolate".split(), *ends)
    assert cells(tmp_path / "samples.png", 1, 13) == [["red", *["green"] * 11, "blue"]]


def test_guidance_in_numpy_is_that_of_ddpm_py(coloured):
    trained, network = load(coloured), ddpm_numpy.Network(coloured / "model.onnx", "cpu")
    x = np.random.default_rng(0).standard_normal((4, 3, 8, 8), np.float32)
    t, y = np.array([0, 10, 500, 999]), np.array([0, 1, 2, 0])
    for w in (0, 1.5, -1):
        model = guided(trained.eps, torch.from_numpy(y), w)
        with torch.no_grad():
            expected = model(*map(torch.from_numpy, (x, t))).numpy()
        eps = ddpm_numpy.guided(network, y, w)(x, t)
        assert eps.dtype == np.float32
        np.testing.assert_allclose(eps, expected, atol=1e-4)
    np.testing.assert_array_equal(network(x, t), network(x, t, np.full(4, 3)))  # no class


def test_files_of_each_precision_have_a_third_input(tmp_path):
    """The network has one level, because its export is faster."""
    settings = dict(image_size=8, in_channels=3, num_classes=3, channel_mults=(1,))
    model = small_unet(0.01, **settings, attention_resolutions=())
    write_three(Trained(model, Diffusion(linear_betas()), settings, 1, "", list("abc")), tmp_path)
    inputs = [("x_t", "tensor(float)", 4), ("t", "tensor(int64)", 1), ("y", "tensor(int64)", 1)]
    for path in tmp_path.iterdir():
        network = ddpm_numpy.Network(path, "cpu")
        assert [(i.name, i.type, len(i.shape)) for i in network.session.get_inputs()] == inputs
        assert network.classes == list("abc")


def test_bound_is_given_the_class(coloured, class_folder, tmp_path, run):
    """T is 100, because this is faster."""
    state = read(coloured)
    state["config"]["diffusion"]["betas"] = linear_betas(100, 1e-4, 0.2).tolist()
    torch.save(state, tmp_path / "checkpoint.pt")
    flags = ["--data", class_folder, "--checkpoint", ".", "--images", 6]
    said = run("evaluate.py", *flags, cwd=tmp_path)
    trained, random = load(tmp_path), torch.Generator().manual_seed(0)
    images, labels = data.read_folder(class_folder, 8, 3, 6, trained.classes)
    order = torch.randperm(len(images), generator=random)
    network = partial(trained.eps, y=torch.from_numpy(labels)[order])
    x0 = from_pixels(torch.from_numpy(images)[order])
    total = trained.diffusion.vlb(network, x0, random.manual_seed(0)).total.mean().item()
    assert "given the class of each" in said
    assert float(said.split("total")[1].split()[0]) == pytest.approx(total, abs=1e-3)


def test_diffusers_has_the_same_network(coloured, tmp_path, run):
    diffusers = pytest.importorskip("diffusers")
    flags = ["--checkpoint", coloured / "checkpoint.pt", "--to-diffusers", "theirs"]
    assert "class_labels" in run("export.py", *flags, cwd=tmp_path)
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "theirs", subfolder="unet").eval()
    ours, x = load(coloured).model, randn(4, 3, 8, 8)
    t, y = torch.tensor([0, 10, 500, 999]), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        expected = theirs(x, t, class_labels=y).sample
        torch.testing.assert_close(ours(x, t, y), expected, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------ the training


def test_a_tenth_of_the_labels_is_dropped(monkeypatch):
    """The labels belong to their images and do not depend on the number of processes."""
    images, labels = torch.arange(5).byte().view(5, 1, 1, 1), torch.tensor([2, 0, 1, 2, 0])
    seen = []

    class Network(torch.nn.Linear):
        """A network that records y and the images of a batch, seen at t = 0 with little noise."""

        def forward(self, x_t, t, y):
            k = ((x_t.flatten() / 0.99995 + 1) * 127.5).round().long()
            seen.append(torch.stack([labels[k], y]))
            return super().forward(x_t)

        no_sync = contextlib.nullcontext

    def drawn(processes, parts):
        """Return the true and the given labels of ten batches, (2, 2000)."""
        args = train.Settings(
            batch=200, flip=False, classes=tuple("abc"), accumulate=parts, warmup=0
        )
        monkeypatch.setattr(train, "WORLD", processes)
        seen.clear()
        for k, rank in product(range(10), range(processes)):
            monkeypatch.setattr(train, "RANK", rank)
            network = Network(1, 1)
            train.algorithm_1(network, network, torch.optim.Adam(network.parameters()),
                              Diffusion([1e-7]), images, labels, args)(k)  # fmt: skip
        return torch.cat(seen, 1)

    true, given = whole = drawn(1, 1)
    assert ((given == true) | (given == 3)).all()
    assert (given == 3).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(drawn(1, 3), whole) and torch.equal(drawn(2, 1), whole)


def test_labels_are_those_of_the_images_that_can_be_read(class_folder, tmp_path):
    for cache in (None, tmp_path, tmp_path):  # the third time, nothing is decoded
        images, labels = data.read_folder(class_folder, 8, classes=NAMES, cache=cache)
        assert labels.tolist() == [0] * 20 + [1] * 20 + [2] * 20
        expected = np.array([COLOURS[NAMES[label]] for label in labels])
        assert np.abs(images.mean((2, 3)) - expected).max() < 20


def test_resumed_run_equals_the_uninterrupted_run(class_folder, tmp_path, run):
    words = ["train.py", "--data", class_folder, *TINY, "--steps"]
    run(*words, 6, "--warmup", 1, "--out", "whole", "--classes", cwd=tmp_path)
    run(*words, 2, "--warmup", 1, "--out", "parts", "--classes", cwd=tmp_path)
    run(*words, 6, "--out", "parts", "--classes", cwd=tmp_path)
    whole, parts = read(tmp_path / "whole"), read(tmp_path / "parts")
    assert all(torch.equal(parts["ema"][name], whole["ema"][name]) for name in whole["ema"])
    assert whole["config"]["train"]["classes"] == NAMES
    said = run(*words, 6, "--out", "whole", cwd=tmp_path, code=1)
    assert "classes was ['blue', 'green', 'red'], now []" in said


def test_training_starts_from_weights_with_and_without_classes(
    trained, class_folder, coloured, tmp_path, run
):
    """The same classes keep their rows, new ones begin without effect, and others are lost."""
    flags = ["--data", class_folder, "--device", "cpu", "--batch", 8, "--steps", 1, "--lr", 0]

    def begun(weights, out, *more):
        run("train.py", *flags, "--init", weights, "--out", out, *more, cwd=tmp_path)
        return read(tmp_path / out)["model"]

    before, same = read(coloured)["ema"], begun(coloured, "same", "--classes", "--no-amp")
    assert all(torch.equal(same[name], before[name]) for name in before)
    plain = read(trained[0] / "run")["ema"]
    learns = begun(trained[0] / "run", "learns", "--classes")
    assert not learns.pop("class_embedding.weight").any()
    assert all(torch.equal(learns[name], plain[name]) for name in learns)
    begun(coloured, "none")  # the network is that of "no class"
    x, t = randn(3, 3, 8, 8), torch.tensor([0, 500, 999])
    with torch.no_grad():
        none, classes = (load(path).model(x, t) for path in (tmp_path / "none", coloured))
    torch.testing.assert_close(none, classes, rtol=0, atol=1e-5)


def test_folders_that_are_no_classes_are_one_line(class_folder, image_folder, tmp_path, run):
    (tmp_path / "one" / "red").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "red" / "0.png")
    for flags, said in (
        (["--data", image_folder], "outside of its sub-folders"),
        (["--data", class_folder / "red"], "outside of"),
        (
            ["--data", "one"],
            "needs images in two sub-folders or more, one for each class; found: red",
        ),
        ([], "--classes need --data"),
    ):
        assert said in run("train.py", *flags, "--classes", cwd=tmp_path, code=1)


def test_names_that_are_no_classes_are_one_line(
    draw, coloured, trained, image_folder, tmp_path, run
):
    said = draw("--class", "red", "--class", "pink", code=1)
    assert "no class pink; the classes are blue, green, red" in said
    ends = image_folder / "0.png", image_folder / "1.png"
    said = draw("--class", "red", "blue", "--interpolate", *ends, code=2)
    assert "at most one class" in said
    for flags, why in ((["--class", "red"], "has no classes"), (["--guidance", 1], "with classes")):
        assert why in run("sample.py", *flags, cwd=trained[0], code=1)
    flags = ["--data", image_folder, "--checkpoint", coloured]
    said = run("evaluate.py", *flags, cwd=tmp_path, code=1)
    assert "has images outside of the sub-folders, but the classes are blue" in said


def test_lines_for_torchvision_make_a_folder_of_classes(tmp_path, monkeypatch):
    """Run the manual's lines on a data set with torchvision's interface."""

    class Fake(list):
        classes = "T-shirt/top", "bag"

        def __init__(self, root, train, download):
            super().__init__((Image.new("L", (28, 28), k), k % 2) for k in range(5))

    fake = types.ModuleType("torchvision.datasets")
    fake.CIFAR10 = Fake
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", fake)
    monkeypatch.chdir(tmp_path)
    exec(listing("from pathlib"), {})
    classes = data.class_names("cifar10")
    assert classes == ["T-shirt or top", "bag"]
    images, labels = data.read_folder("cifar10", 8, classes=classes)
    assert labels.tolist() == [0, 0, 0, 1, 1] and images[:, 0, 0, 0].tolist() == [0, 2, 4, 1, 3]
