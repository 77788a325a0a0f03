"""The programs of extras/ that draw with a model.onnx, and half.py, on the included networks."""

import re
import signal
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import posix
from PIL import Image

from extras.interpolate import interpolate
from images import from_pixels
from sample import Network, noise_of, sample, to_image, to_pixels
from test_ddpm import PAPER

HERE = Path(__file__).parent.parent
PLAIN, CLASSES = HERE / "docs" / "paper.onnx", HERE / "page" / "fashion-mnist.onnx"


@pytest.fixture
def run(run, tmp_path):
    """Run a program of extras/ in an empty folder; return what it printed."""
    return lambda name, *words, code=0: run(f"extras/{name}.py", *words, cwd=tmp_path, code=code)


@pytest.fixture(scope="module")
def drawn():
    """Return two images that a network draws, uint8 (2, 1, 32, 32)."""
    return to_pixels(sample(Network(PLAIN), 2, steps=10))


def cells(path, rows, columns):
    """Return the images of a grid, uint8 (rows, columns, H, W)."""
    with Image.open(path) as image:
        image = image.resize((columns * 34, rows * 34), resample=0)
    return np.asarray(image).reshape(rows, 34, columns, 34).swapaxes(1, 2)[..., 1:-1, 1:-1]


def test_half_keeps_the_noise_of_small_t(run, tmp_path):
    """Rounding x_t alone, in which the noise has a deviation of 0.01, would make 1 % at t = 0."""
    said = run("half", CLASSES, tmp_path / "half.onnx")
    errors = {int(t): float(error) for error, t in re.findall(r"([\d.]+)% at t = (\d+)", said)}
    assert [*errors] == [0, 10, 50, 100, 500, 999]
    assert 0.1 < errors[0] < 0.5 and 0 < errors[100] < 0.1
    exact, half = onnx.load(CLASSES), onnx.load(tmp_path / "half.onnx")
    onnx.checker.check_model(half)
    assert [*half.metadata_props] == [*exact.metadata_props]
    assert half.ByteSize() < 0.54 * exact.ByteSize()


@pytest.mark.parametrize("error", [0.021, float("nan")])
def test_half_writes_nothing_that_differs_much(run, tmp_path, monkeypatch, error):
    monkeypatch.setattr("extras.half.relative_errors", lambda *_: {0: 0.001, 10: error})
    assert "was not written" in run("half", PLAIN, tmp_path / "half.onnx", code=1)
    assert not (tmp_path / "half.onnx").exists()


def test_inpainting_keeps_the_image_outside_of_the_mask(run, drawn, tmp_path):
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
        assert "selects 30%" in run("inpaint", *words)
        results.append(cells(out, 2, 2).reshape(4, 32, 32).astype(int))
        assert (results[0] == results[-1]).all()
    assert (results[0][:, ~where] == drawn[0, 0][~where]).all()
    assert abs(results[0][0] - results[0][1])[where].mean() > 5


def test_interpolation_starts_from_mixtures_with_the_same_noise(run, drawn, tmp_path):
    network, (a, b) = Network(PLAIN), from_pixels(drawn)
    t, x_t, _ = next(interpolate(network, a, b, 300, 5, seed=3))
    noise, abar = noise_of(3, 0, 1, network.shape)()[0], PAPER.alphas_bar[300].item()
    ends = [abar**0.5 * image + (1 - abar) ** 0.5 * noise for image in (a, b)]
    assert t == 300 and x_t.dtype == np.float32
    np.testing.assert_allclose(x_t, np.linspace(*ends, 11), atol=1e-5)
    for k, name in enumerate("ab"):
        to_image(drawn[k]).save(tmp_path / f"{name}.png")
    words = [tmp_path / "a.png", tmp_path / "b.png", "--onnx", PLAIN, "--out", tmp_path / "out.png"]
    assert "11 mixtures" in run("interpolate", *words, "--t", 9)
    row = cells(tmp_path / "out.png", 1, 13)[0].astype(int)
    assert (row[[0, 12]] == drawn[:, 0]).all()
    assert abs(row[[1, 11]] - drawn[:, 0]).mean() < 8 > abs(row[6] - drawn[:, 0].mean(0)).mean()
    assert run("interpolate", *words, "--t", 9, "--steps", 11, code=1).endswith("--steps 1..t+1")


@pytest.mark.parametrize("name", ["inpaint", "interpolate"])
def test_values_that_are_not_finite_are_not_saved(name, run, drawn, tmp_path, monkeypatch):
    to_image(drawn[0]).save(tmp_path / "a.png")
    monkeypatch.setattr(Network, "__call__", lambda self, x_t, t, y=None: np.nan * x_t)
    words = [tmp_path / "a.png"] * 2
    said = run(name, *words, "--onnx", PLAIN, "--steps", 2, code=1)
    assert f"{name}.py: the network's output is not finite" in said
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@posix
def test_interrupt_ends_a_program_without_a_traceback(start, drawn, tmp_path):
    to_image(drawn[0]).save(tmp_path / "a.png")
    words = [tmp_path / "a.png"] * 2 + ["--out", tmp_path / "b.png", "--steps", 999]
    process = start("-m", "extras.inpaint", "--onnx", PLAIN, *words, cwd=HERE)
    while "step" not in (line := process.stdout.read(9)):
        assert line  # the program goes on
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and "Traceback" not in said


def test_curve_of_the_log(run, tmp_path):
    lines = [f"{k},{100 / k},1,0.001\n" for k in range(1, 1001)]
    (tmp_path / "log.csv").write_text("step,loss,grad_norm,lr\n" + "".join(lines))
    out = tmp_path / "loss.png"
    assert "1,000 steps" in run("plot", tmp_path / "log.csv", out)
    assert Image.open(out).size == (640, 440)
    (tmp_path / "log.csv").write_text("step,loss,grad_norm,lr\n")
    for log, why in (out, "codec"), (tmp_path / "log.csv", "input contained no data"):
        said = run("plot", log, tmp_path / "other.png", code=1)
        assert re.fullmatch(f"plot.py: .* can't be read: .*{why}.*", said)
