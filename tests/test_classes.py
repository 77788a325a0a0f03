"""Classes and guidance: from sub-folders to samples of a class, by the programs."""

import json
import re
import sys
import types
from functools import partial

import numpy as np
import onnxruntime as ort
import pytest
import torch
from conftest import COLOURS, HERE, TINY, randn, read, small_unet
from PIL import Image

import ddpm_numpy
import export
import train
from beyond import guided
from ddpm import Diffusion, linear_betas
from images import from_pixels, read_image
from support import data
from support.trained import Trained, load


def cells(path, rows, columns):
    """The names of the colours in a grid: a list for each row, None if empty."""
    image = np.asarray(Image.open(path)).astype(float)
    side = image.shape[0] / rows
    image = image[:, image.shape[1] - round(columns * side) :]  # without the names of the rows
    names = []
    for r in range(rows):
        row = []
        for c in range(columns):
            middle = image[int((r + 0.5) * side), int((c + 0.25) * side) : int((c + 0.75) * side)]
            colour = middle.mean(0)
            far = {name: np.abs(colour - target).max() for name, target in COLOURS.items()}
            nearest = min(far, key=far.get)
            row.append(nearest if far[nearest] < 60 else None)
        names.append(row)
    return names


def test_each_class_has_a_row(coloured, tmp_path, run):
    said = run("sample.py", "--onnx", coloured / "model.onnx", "--steps", 10, cwd=tmp_path)
    assert "24 images of blue, green, red" in said
    for name, row in zip(COLOURS, cells(tmp_path / "samples.png", 3, 8), strict=True):
        assert row.count(name) >= 7
    names = np.asarray(Image.open(tmp_path / "samples.png").convert("L"))[:, :40]
    assert all((part < 128).any() for part in np.array_split(names, 3))  # written to the left


def test_classes_are_chosen_by_name(coloured, tmp_path, run):
    """Image k is of the k-th class in turn, and the folder has a sub-folder for each."""
    flags = ["--class", "red", "blue", "--guidance", 2, "--steps", 10, "-n", 5]
    flags += ["--dir", "out", "--gif", "x.gif", "--strip", "x.png"]
    run("sample.py", "--onnx", coloured / "model.onnx", *flags, cwd=tmp_path)
    files = sorted(p.relative_to(tmp_path / "out").as_posix() for p in tmp_path.glob("out/*/*"))
    assert files == ["blue/000001.png", "blue/000003.png", "red/000000.png", "red/000002.png",
                     "red/000004.png"]  # fmt: skip
    assert cells(tmp_path / "samples.png", 2, 3) == [["red"] * 3, ["blue", "blue", None]]
    with Image.open(tmp_path / "x.gif") as gif:
        assert gif.height == Image.open(tmp_path / "samples.png").height and gif.n_frames > 5
    # the first images are those of a larger number
    before = read_image(tmp_path / "out" / "blue" / "000003.png", 8, 3)
    flags = ["--class", "red", "blue", "--guidance", 2, "--steps", 10, "-n", 9, "--dir", "more"]
    run("sample.py", "--onnx", coloured / "model.onnx", *flags, "--batch", 4, cwd=tmp_path)
    after = read_image(tmp_path / "more" / "blue" / "000003.png", 8, 3)
    assert np.abs(before.astype(int) - after).max() <= 1


def test_one_class_fills_a_square(coloured, tmp_path, run):
    flags = ["--class", "green", "--steps", 5, "-n", 9]
    run("sample.py", "--onnx", coloured / "model.onnx", *flags, cwd=tmp_path)
    assert cells(tmp_path / "samples.png", 3, 3) == [["green"] * 3] * 3
    flags = ["--class", "red", "green", "--steps", 5, "-n", 2]
    run("sample.py", "--onnx", coloured / "model.onnx", *flags, cwd=tmp_path)
    assert cells(tmp_path / "samples.png", 2, 1) == [["red"], ["green"]]


def test_interpolation_within_a_class(coloured, class_folder, tmp_path, run):
    ends = class_folder / "red" / "0.png", class_folder / "blue" / "0.png"
    flags = ["--class", "green", "--guidance", 3, "--t", 990, "--steps", 50, "--interpolate", *ends]
    run("sample.py", "--onnx", coloured / "model.onnx", *flags, cwd=tmp_path)
    assert cells(tmp_path / "samples.png", 1, 13) == [["red", *["green"] * 11, "blue"]]


def test_guidance_in_numpy_is_that_of_ddpm_py(coloured):
    trained, network = load(coloured), ddpm_numpy.Network(coloured / "model.onnx", "cpu")
    x = np.random.default_rng(0).standard_normal((4, 3, 8, 8), np.float32)
    t, y = np.array([0, 10, 500, 999]), np.array([0, 1, 2, 0])
    assert network.classes == list(COLOURS)
    for w in (0, 1.5, -1):
        model = guided(trained.eps, torch.from_numpy(y), w)
        with torch.no_grad():
            expected = model(*map(torch.from_numpy, (x, t))).numpy()
        eps = ddpm_numpy.guided(network, y, w)(x, t)
        assert eps.dtype == np.float32
        np.testing.assert_allclose(eps, expected, atol=1e-4)
    np.testing.assert_array_equal(network(x, t), network(x, t, np.full(4, 3)))  # no class


@pytest.mark.parametrize("kind", ["half", "int8"])
def test_file_has_a_third_input(kind, tmp_path):
    """Of one level, which is exported faster. `coloured` is exported in float32."""
    settings = dict(image_size=8, in_channels=3, num_classes=3, channel_mults=(1,))
    model = small_unet(0.01, **settings, attention_resolutions=())
    trained = Trained(model, Diffusion(linear_betas()), settings, 1, "", list("abc"))
    export.write_onnx(trained, tmp_path / "model.onnx", kind)
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    inputs = {i.name: (i.type, len(i.shape)) for i in session.get_inputs()}
    assert inputs == {"x_t": ("tensor(float)", 4), "t": ("tensor(int64)", 1),
                      "y": ("tensor(int64)", 1)}  # fmt: skip
    names = session.get_modelmeta().custom_metadata_map["ddpm.classes"]
    assert json.loads(names) == list("abc")


def test_bound_is_given_the_class(coloured, class_folder, tmp_path, run):
    """With T = 100, which is faster."""
    state = read(coloured)
    state["config"]["diffusion"]["betas"] = linear_betas(100, 1e-4, 0.2).tolist()
    torch.save(state, tmp_path / "checkpoint.pt")
    said = run("evaluate.py", "--data", class_folder, "--checkpoint", ".", "--images", 6,
               cwd=tmp_path)  # fmt: skip
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
    said = run("export.py", "--checkpoint", coloured / "checkpoint.pt", "--to-diffusers", "theirs",
               cwd=tmp_path)  # fmt: skip
    assert "class_labels" in said
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "theirs", subfolder="unet").eval()
    ours, x = load(coloured).model, torch.randn(4, 3, 8, 8)
    t, y = torch.tensor([0, 10, 500, 999]), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        expected = theirs(x, t, class_labels=y).sample
        torch.testing.assert_close(ours(x, t, y), expected, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------ the training


def test_a_tenth_of_the_labels_is_dropped(monkeypatch):
    """The labels belong to their images, and do not depend on the number of processes."""
    images, labels = torch.arange(5).byte().view(5, 1, 1, 1), torch.tensor([2, 0, 1, 2, 0])
    seen = []

    def drawn(steps=10):
        """The true and the given labels of all batches, (2, steps * 200)."""
        seen.clear()
        for step in range(steps):
            for x0, y, *_ in train.draw_batch(step, images, labels, 1000, args):
                k = ((x0.flatten() + 1) * 127.5).round().long()
                seen.append(torch.stack([labels[k], y]))
        return torch.cat(seen, 1)

    args = types.SimpleNamespace(
        seed=0, batch=200, flip=False, accumulate=1, classes="abc", device=torch.device("cpu")
    )
    true, given = whole = drawn()
    assert ((given == true) | (given == 3)).all()
    assert (given == 3).float().mean().item() == pytest.approx(0.1, abs=0.02)
    args.accumulate = 3
    assert torch.equal(drawn(), whole)
    args.accumulate = 1
    monkeypatch.setattr(train, "WORLD", 2)
    halves = []
    for rank in (0, 1):
        monkeypatch.setattr(train, "RANK", rank)
        halves.append(drawn(1))
    assert torch.equal(torch.cat(halves, 1), whole[:, :200])


def test_labels_are_those_of_the_images_that_can_be_read(class_folder, tmp_path):
    names = list(COLOURS)
    for images, labels in (
        data.read_folder(class_folder, 8, classes=names),
        data.read_folder(class_folder, 8, classes=names, cache=tmp_path),  # decodes
        data.read_folder(class_folder, 8, classes=names, cache=tmp_path),
    ):
        assert labels.tolist() == [0] * 20 + [1] * 20 + [2] * 20
        expected = np.array([COLOURS[names[label]] for label in labels])
        assert np.abs(images.mean((2, 3)) - expected).max() < 20


def test_resumed_run_equals_the_uninterrupted_run(class_folder, tmp_path, run):
    flags = ["--data", class_folder, *TINY, "--classes"]
    run("train.py", *flags, "--steps", 12, "--warmup", 1, "--out", "whole", cwd=tmp_path)
    run("train.py", *flags, "--steps", 5, "--warmup", 1, "--out", "parts", cwd=tmp_path)
    run("train.py", *flags, "--steps", 12, "--out", "parts", cwd=tmp_path)
    whole, parts = read(tmp_path / "whole"), read(tmp_path / "parts")
    assert all(torch.equal(parts["ema"][name], whole["ema"][name]) for name in whole["ema"])
    assert whole["config"]["train"]["classes"] == list(COLOURS)
    flags.remove("--classes")
    said = run("train.py", *flags, "--steps", 12, "--out", "whole", cwd=tmp_path, code=1)
    assert "classes was ['blue', 'green', 'red'], now None" in said


def test_weights_without_classes_learn_some(class_folder, tmp_path, run):
    """They begin as they are; classes of the same names continue with their own rows."""
    flags = ["--data", class_folder, *TINY]
    run("train.py", *flags, "--steps", 3, "--out", "plain", cwd=tmp_path)
    run("train.py", *flags, "--classes", "--init", "plain", "--steps", 1, "--lr", 0,
        "--out", "classes", cwd=tmp_path)  # fmt: skip
    plain, classes = read(tmp_path / "plain")["ema"], read(tmp_path / "classes")["model"]
    assert not classes.pop("class_embedding.weight").any()
    assert all(torch.equal(plain[name], classes[name]) for name in classes)


def test_class_that_is_named_twice_has_one_row(coloured, tmp_path, run):
    """With every second image, not two of three of the other class."""
    words = ["--onnx", coloured / "model.onnx", "--class", "blue", "blue", "red", "-n", 6]
    said = run("sample.py", *words, "--steps", 2, "--dir", "out", cwd=tmp_path)
    assert "6 images of blue, red, " in said
    assert [len(list((tmp_path / "out" / name).iterdir())) for name in ("blue", "red")] == [3, 3]


def test_names_of_classes_may_come_from_a_generator(coloured):
    network = ddpm_numpy.Network(coloured / "model.onnx")
    assert network.labels((name for name in ["red", "blue"]), 3).tolist() == [2, 0, 2]


def test_weights_with_classes_keep_or_lose_them(class_folder, coloured, tmp_path, run):
    """The same names keep their rows. Without classes, the network is that of "no class"."""
    flags = ["--data", class_folder, "--device", "cpu", "--batch", 8, "--init", coloured]
    flags += ["--steps", 1, "--lr", 0]
    run("train.py", *flags, "--classes", "--no-amp", "--out", "same", cwd=tmp_path)
    same, before = read(tmp_path / "same")["model"], read(coloured)["ema"]
    assert all(torch.equal(same[name], before[name]) for name in before)
    run("train.py", *flags, "--out", "none", cwd=tmp_path)
    none, classes = load(tmp_path / "none"), load(coloured)
    x, t = randn(3, 3, 8, 8), torch.tensor([0, 500, 999])
    with torch.no_grad():
        torch.testing.assert_close(none.model(x, t), classes.model(x, t), rtol=0, atol=1e-5)


def test_folders_that_are_no_classes_are_one_line(class_folder, image_folder, tmp_path, run):
    for path, said in (
        (image_folder, "outside of its sub-folders"),
        (class_folder / "red", "outside of"),
    ):
        assert said in run("train.py", "--data", path, "--classes", cwd=tmp_path, code=1)
    (tmp_path / "one" / "red").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "red" / "0.png")
    said = run("train.py", "--data", "one", "--classes", cwd=tmp_path, code=1)
    assert "needs images in two sub-folders" in said
    assert "--classes need --data" in run("train.py", "--classes", cwd=tmp_path, code=1)


def test_names_that_are_no_classes_are_one_line(coloured, trained, image_folder, tmp_path, run):
    onnx = coloured / "model.onnx"
    said = run("sample.py", "--onnx", onnx, "--class", "red", "pink", cwd=tmp_path, code=1)
    assert "no class pink; there are blue, green, red" in said
    ends = [image_folder / "0.png", image_folder / "1.png"]
    said = run("sample.py", "--onnx", onnx, "--class", "red", "blue", "--interpolate", *ends,
               cwd=tmp_path, code=2)  # fmt: skip
    assert "at most one class" in said
    for flags in (["--class", "red"], ["--guidance", 1]):
        plain = trained[0] / "model.onnx"
        said = run("sample.py", "--onnx", plain, *flags, cwd=tmp_path, code=1)
        assert "has no classes" in said
    said = run(
        "evaluate.py", "--data", image_folder, "--checkpoint", coloured, cwd=tmp_path, code=1
    )
    assert "has images outside of the sub-folders, but the classes are blue" in said


def test_lines_for_torchvision_make_a_folder_of_classes(tmp_path, monkeypatch):
    """The manual's lines, on a data set with the interface of torchvision's."""

    class Fake(list):
        classes = "T-shirt/top", "bag"

        def __init__(self, root, train, download):
            super().__init__((Image.new("L", (28, 28), k), k % 2) for k in range(5))

    lines = re.search(
        r"```python\n(from pathlib.*?)```", (HERE / "docs/guide.md").read_text("utf-8"), re.S
    )
    fake = types.ModuleType("torchvision.datasets")
    fake.CIFAR10 = Fake
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", fake)
    monkeypatch.chdir(tmp_path)
    exec(lines.group(1), {})
    classes = data.class_names("cifar10")
    assert classes == ["T-shirt or top", "bag"]
    images, labels = data.read_folder("cifar10", 8, classes=classes)
    assert labels.tolist() == [0, 0, 0, 1, 1] and images[:, 0, 0, 0].tolist() == [0, 2, 4, 1, 3]
