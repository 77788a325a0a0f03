"""The programs of extras/: those that draw with a model.onnx, half.py and evaluate.py."""

import re
from functools import partial

import numpy as np
import onnx
import pytest
import torch
from conftest import COLOURS, HERE, posix, save_run
from PIL import Image

from ddpm import Diffusion, linear_betas
from docs import copies
from extras.interpolate import interpolate
from images import from_pixels, read_folder
from run import load
from sample import Network, noise_of, sample, to_image, to_pixels
from test_ddpm import PAPER, seeded

PLAIN, CLASSES = HERE / "docs" / "paper.onnx", HERE / "page" / "fashion-mnist.onnx"


@pytest.fixture
def program(program, tmp_path):
    """Run a program of extras/ in an empty folder; return what it printed."""
    return lambda name, *words, code=0: program(
        f"extras/{name}.py", *words, cwd=tmp_path, code=code
    )


@pytest.fixture(scope="module")
def drawn():
    """Return two images that a network draws, uint8 (2, 1, 32, 32)."""
    return to_pixels(sample(Network(PLAIN), 2, steps=10))


def cells(path, rows, columns):
    """Return the images of a grid, uint8 (rows, columns, H, W)."""
    with Image.open(path) as image:
        image = image.resize((columns * 34, rows * 34), resample=0)
    return np.asarray(image).reshape(rows, 34, columns, 34).swapaxes(1, 2)[..., 1:-1, 1:-1]


# What stays in float32 is a larger share of the file if all levels are equally wide.
@pytest.mark.parametrize("path, share", [(PLAIN, 0.54), (CLASSES, 0.6)])
def test_half_keeps_the_noise_of_small_t(program, tmp_path, path, share):
    """Rounding x_t alone, in which the noise has a deviation of 0.01, would make 1 % at t = 0."""
    said = program("half", path, tmp_path / "half.onnx")
    errors = {int(t): float(error) for error, t in re.findall(r"([\d.]+)% at t = (\d+)", said)}
    assert [*errors] == [0, 10, 50, 100, 500, 999]
    assert 0.1 < errors[0] < 0.5 and 0 < errors[100] < 0.1
    exact, half = onnx.load(path), onnx.load(tmp_path / "half.onnx")
    onnx.checker.check_model(half)
    assert [*half.metadata_props] == [*exact.metadata_props]
    assert half.ByteSize() < share * exact.ByteSize()


@pytest.mark.parametrize("error", [0.021, float("nan")])
def test_half_writes_nothing_that_differs_much(program, tmp_path, monkeypatch, error):
    monkeypatch.setattr("extras.half.relative_errors", lambda *_: {0: 0.001, 10: error})
    assert "was not written" in program("half", PLAIN, tmp_path / "half.onnx", code=1)
    assert not (tmp_path / "half.onnx").exists()


def test_inpainting_keeps_the_image_outside_of_the_mask(program, drawn, tmp_path):
    """A white mask, one of ones and white strokes on transparency say the same."""
    image, mask, out = (tmp_path / name for name in ("image.png", "mask.png", "out.png"))
    words = [image, mask, "--onnx", PLAIN, "--out", out, "-n", 4, "--steps", 5]
    to_image(drawn[0]).save(image)
    where = np.zeros((32, 32), bool)
    where[8:20, 4:30] = True
    results = []
    ones = where.astype(np.uint8)
    for pixels in 255 * ones, ones, np.stack([255 + 0 * ones, 255 * ones], 2):
        Image.fromarray(pixels).save(mask)
        program("inpaint", *words)
        results.append(cells(out, 2, 2).reshape(4, 32, 32).astype(int))
        assert (results[0] == results[-1]).all()
    assert (results[0][:, ~where] == drawn[0, 0][~where]).all()
    assert abs(results[0][0] - results[0][1])[where].mean() > 5


def test_interpolation_starts_from_mixtures_with_the_same_noise(program, drawn, tmp_path):
    network, (a, b) = Network(PLAIN), from_pixels(drawn)
    t, x_t, _ = next(interpolate(network, a, b, 300, 5, seed=3))
    noise, abar = noise_of(3, 0, 1, network.shape)()[0], PAPER.alphas_bar[300].item()
    ends = [abar**0.5 * image + (1 - abar) ** 0.5 * noise for image in (a, b)]
    assert t == 300 and x_t.dtype == np.float32
    np.testing.assert_allclose(x_t, np.linspace(*ends, 11), atol=1e-5)
    for k, name in enumerate("ab"):
        to_image(drawn[k]).save(tmp_path / f"{name}.png")
    words = [tmp_path / "a.png", tmp_path / "b.png", "--onnx", PLAIN, "--out", tmp_path / "out.png"]
    assert "11 mixtures" in program("interpolate", *words, "--t", 9)
    row = cells(tmp_path / "out.png", 1, 13)[0].astype(int)
    assert (row[[0, 12]] == drawn[:, 0]).all()
    assert abs(row[[1, 11]] - drawn[:, 0]).mean() < 8 > abs(row[6] - drawn[:, 0].mean(0)).mean()
    assert program("interpolate", *words, "--t", 9, "--steps", 11, code=1).endswith(
        "--steps 1..t+1"
    )


@pytest.mark.parametrize("name", ["inpaint", "interpolate"])
def test_values_that_are_not_finite_are_not_saved(name, program, drawn, tmp_path, monkeypatch):
    to_image(drawn[0]).save(tmp_path / "a.png")
    monkeypatch.setattr(Network, "__call__", lambda self, x_t, t, y=None: np.nan * x_t)
    words = [tmp_path / "a.png"] * 2
    said = program(name, *words, "--onnx", PLAIN, "--steps", 2, code=1)
    assert said.endswith("the network's output is not finite")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


# ------------------------------------------------------------------------------------- evaluate.py

BETAS = linear_betas()[:40]  # T = 40 takes less time
save = partial(save_run, shape=(3, 8, 8), betas=tuple(BETAS.tolist()), data="elsewhere")


@pytest.mark.parametrize("names, variance", [((), "large"), ([*COLOURS], "small")])
def test_bound_is_that_of_ddpm_py(names, variance, image_folder, class_folder, program, tmp_path):
    """Compare the program with Diffusion.vlb, and the curve with the sums that define it."""
    torch.backends.cudnn.allow_tf32 = True
    out, folder = save(tmp_path / "run", names=names), class_folder if names else image_folder
    words = "--checkpoint", out, "--data", folder, "--variance", variance, "--seed", 2
    said = program("evaluate", *words, "--images", 5, "--batch", 3)
    assert "on 5 images" in said and not torch.backends.cudnn.allow_tf32
    (network, _, state), noise, bounds = load(out), seeded(2), []
    images, labels, _ = read_folder(folder, 8, 3, names=state["names"])
    for index in torch.randperm(len(images), generator=seeded(2))[:5].split(3):
        eps = network if labels is None else partial(network, y=torch.from_numpy(labels)[index])
        x0 = from_pixels(torch.from_numpy(images)[index])
        bounds.append(Diffusion(BETAS, variance).vlb(eps, x0, noise))
    L_T, L_t, total, mse = (torch.cat(part).mean(0).numpy() for part in zip(*bounds, strict=True))
    rmse, numbers = 127.5 * mse**0.5, np.array(re.findall(r"^  \S.*?  +(\S+)", said, re.M), float)
    np.testing.assert_allclose(numbers, [L_T, L_t[1:].sum(), L_t[0], total, rmse[0]], 0, 1e-3)
    assert numbers[:3].sum() == pytest.approx(numbers[3], abs=2e-4)
    table = np.loadtxt(out / "rate-distortion.csv", delimiter=",", skiprows=1)
    rates = [L_T + L_t[t + 1 :].sum() for t in range(40)]  # what is known before the step at t
    np.testing.assert_allclose(table.T, [range(40), L_t, rates, rmse], rtol=1e-3, atol=1e-6)


@posix
def test_training_images_are_recognised(image_folder, program, tmp_path):
    (tmp_path / "link").symlink_to(image_folder)
    for seen, says in (image_folder, 1), (image_folder.parent, 1), (image_folder / "deep", 0):
        save(tmp_path / "run", data=str(seen))
        said = program("evaluate", "--data", "link", "--images", 1)
        assert said.count("--data has the training images") == says and "on 1 images" in said


def test_mistakes_of_evaluate_are_one_line(image_folder, program, tmp_path):
    """Without --data, the images are the demo's if the run is."""
    save(tmp_path / "a", data=None)
    assert "on 1 images" in program("evaluate", "--checkpoint", "a", "--images", 1)
    save(tmp_path / "b")
    save(tmp_path / "c", data=None, images=None)
    save(tmp_path / "d", names=[*COLOURS])
    data = ["--data", image_folder]
    must = "--data must be a folder of images that the network has not seen"
    for words, said in (
        (["--checkpoint", "b"], must), (["--checkpoint", "c"], must),
        ([*data, "--checkpoint", "d"], "but the classes are"),
        ([*data, "--checkpoint", "rnu"], "rnu is not there; run"), (data, "demo is not there; run"),
        (["--device", "quantum"], "--device quantum: "),
    ):  # fmt: skip
        assert said in program("evaluate", *words, code=1)


def test_page_shows_copies_beside_its_garments(tmp_path):
    """The exact network of three images, in the steps and from the noise of the page."""
    images = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    copies.record_exact(tmp_path / "exact.webp", images)
    steps = np.array(Image.open(tmp_path / "exact.webp").convert("L")).reshape(10, 32, 15, 32)
    ends = {tile.tobytes() for tile in steps[-1].swapaxes(0, 1)}
    assert ends <= {tile.tobytes() for tile in to_pixels(images.numpy())[:, 0]} and len(ends) > 1


def test_distances_to_the_nearest_images(tmp_path, monkeypatch, capsys):
    """Grey images at 0, 10 and 40, and samples at 11 and 100; copies.py lists the nearest first."""
    for folder, levels in {"data": (0, 10, 40), "samples": (11, 100)}.items():
        (tmp_path / folder).mkdir()
        for level in levels:
            Image.new("L", (32, 32), level).save(tmp_path / folder / f"{level}.png")
    words = "--data", tmp_path / "data", "--samples", tmp_path / "samples", "--out", tmp_path
    monkeypatch.setattr("sys.argv", ["copies.py", *map(str, words)])
    copies.main()
    first, second, *lines = capsys.readouterr().out.splitlines()
    assert re.match(r" *1\.0 .*11\.png", first) and re.match(r" *60\.0 .*100\.png", second)
    assert lines == [
        "samples to images: median 1.0, 5% below 3.9",  # torch's median of two is the lower one
        "images to other images: median 10.0, 5% below 10.0",
    ]
    drawn = np.asarray(Image.open(tmp_path / "nearest.png").convert("L"))
    assert {11, 100, 40} <= {*drawn.ravel().tolist()}
