"""evaluate.py: the bound that it prints, and the rate-distortion curve that it saves."""

import itertools
import os
import signal
import sys
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from conftest import posix, read
from PIL import Image

import evaluate
from ddpm import Diffusion, linear_betas
from images import from_pixels
from support import device
from support.data import read_folder
from support.demo import demo_images
from support.plot import figure_class
from support.trained import load

BETAS = linear_betas(100, 1e-4, 0.2)


@pytest.fixture
def network(trained, tmp_path):
    """Return the averaged network of a run, whose checkpoint is saved with T = 100 for speed."""
    state = read(trained[0] / "run")
    state["config"]["diffusion"]["betas"] = BETAS.tolist()
    torch.save(state, tmp_path / "checkpoint.pt")
    return load(tmp_path).model


@pytest.fixture
def measure(network, image_folder, tmp_path, run):
    """Run evaluate.py on the images of a folder; return what it printed."""
    words = ["--data", image_folder, "--checkpoint", "checkpoint.pt"]
    return partial(run, "evaluate.py", *words, cwd=tmp_path)


def printed(said, name):
    """Return the number after a name in the output of evaluate.py."""
    line = next(line for line in said.splitlines() if line.startswith(f"  {name} "))
    return float(line.removeprefix(f"  {name} ").split()[0])


def test_bound_and_curve_are_those_of_ddpm_py(network, image_folder, tmp_path, measure):
    """Compare the program with Diffusion.vlb, and the curve with the sums that define it."""
    said = measure("--images", 5, "--batch", 3, "--seed", 2)
    assert "on 5 images" in said and "500/500" in said  # passes of the network: 5 x T
    x0 = from_pixels(torch.from_numpy(read_folder(image_folder, 8, most=5)[0]))
    x0 = x0[torch.randperm(5, generator=torch.Generator().manual_seed(2))]
    noise = torch.Generator().manual_seed(2)
    bounds = [Diffusion(BETAS).vlb(network, part, noise) for part in x0.split(3)]
    L_T, L_t, total, mse = (torch.cat(part).mean(0) for part in zip(*bounds, strict=True))
    rmse = 127.5 * mse.sqrt()
    for name, expected, error in (
        ("L_T", L_T, 1e-6), ("L_1 + .. + L_T-1", L_t[1:].sum(), 1e-3), ("L_0", L_t[0], 1e-3),
        ("total", total, 1e-3), ("RMSE", rmse[0], 1e-2),
    ):  # fmt: skip
        assert printed(said, name) == pytest.approx(expected.item(), abs=error)
    (curve,) = tmp_path.glob(f"rate-distortion-{image_folder.name}-5-images.csv")
    assert curve.read_text().startswith("t,L_t,rate,rmse\n")
    table = np.loadtxt(curve, delimiter=",", skiprows=1)
    assert table[:, 0].tolist() == list(range(100))
    np.testing.assert_allclose(table[:, 1], L_t, rtol=1e-3, atol=1e-6)
    for t in (0, 1, 50, 99):  # what is known before the step at t: L_T and the terms above t
        assert table[t, 2] == pytest.approx(L_T.item() + L_t[t + 1 :].sum().item(), rel=1e-3)
        assert table[t, 3] == pytest.approx(rmse[t].item(), rel=1e-3)
    assert Image.open(curve.with_suffix(".png")).size == (640, 440)


def test_float32_is_not_rounded_to_tf32(measure):
    """cuDNN rounds in convolutions and, if it is told to, torch rounds in matrix products."""
    device.prefer_speed()
    torch.backends.cudnn.allow_tf32 = True
    with warnings.catch_warnings(action="error"):  # torch may deprecate a way to say it
        measure("--images", 1)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32


def test_without_data_it_is_the_demo(network, tmp_path, run):
    """This holds for a network trained on the demo. --checkpoint may be a run folder."""
    state = read(tmp_path)
    state["config"]["train"]["data"] = None
    torch.save(state, tmp_path / "checkpoint.pt")
    words = ["--checkpoint", ".", "--images", 1, "--out", "new", "--variance", "small"]
    said = run("evaluate.py", *words, cwd=tmp_path)
    assert "(step 12) on 1 image of the demo" in said
    assert {p.suffix for p in (tmp_path / "new").iterdir()} == {".csv", ".png"}
    x0 = from_pixels(torch.from_numpy(demo_images()))
    x0 = x0[torch.randperm(216, generator=torch.Generator().manual_seed(0))][:1]
    bound = Diffusion(BETAS, "small").vlb(network, x0, torch.Generator().manual_seed(0))
    assert printed(said, "total") == pytest.approx(bound.total.item(), abs=1e-3)


def test_interrupt_keeps_what_is_measured(tmp_path, measure, monkeypatch):
    vlb, batches = Diffusion.vlb, itertools.count(1)

    def interrupted(*args):
        if next(batches) in (1, 4):  # at once, then after two batches
            raise KeyboardInterrupt
        return vlb(*args)

    monkeypatch.setattr(Diffusion, "vlb", interrupted)
    assert "stopped before a batch was" in measure(code=130)
    said = measure("--batch", 2, code=130)
    assert "on 4 images of" in said and "stopped after 4 of 12 images" in said
    total = printed(said, "L_1 + .. + L_T-1") + printed(said, "L_0")
    (curve,) = tmp_path.glob("rate-distortion-*-4-images.csv")
    table = np.loadtxt(curve, delimiter=",", skiprows=1)
    assert table[:, 1].sum() == pytest.approx(total, abs=1e-3)


@posix
def test_signal_ends_it_without_a_traceback(network, image_folder, tmp_path, start):
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        pytest.skip("nohup started the tests, so evaluate.py ignores SIGHUP")
    process = start("evaluate.py", "--data", image_folder, "--checkpoint", "checkpoint.pt",
                    "--batch", 1, cwd=tmp_path)  # fmt: skip
    assert any("bits/dim in the last batch" in line for line in process.stdout)
    process.send_signal(signal.SIGHUP)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and "evaluate.py: stopped" in said
    assert "Traceback" not in said


def test_without_matplotlib_it_writes_the_table(tmp_path, measure, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    figure_class.cache_clear()
    said = measure("--images", 1)
    figure_class.cache_clear()
    assert "matplotlib is missing: pip install matplotlib" in said
    assert {p.suffix for p in tmp_path.iterdir()} == {".pt", ".csv"}


def test_run_that_can_not_be_written_and_its_training_images(
    trained, image_folder, tmp_path, run, monkeypatch
):
    """The curve is then saved in the current folder."""
    folder = trained[0] / "run"
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder)
    words = ["--data", image_folder, "--images", 1, "--checkpoint", folder]
    said = run("evaluate.py", *words, cwd=tmp_path)
    assert f"the network was trained on a folder named {image_folder.name}; if the" in said
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".csv", ".png"]


def test_device_and_output_are_checked_before_images_are_read(trained, tmp_path, run, monkeypatch):
    monkeypatch.setattr(evaluate, "read_folder", None)
    (tmp_path / "file").touch()
    words = ["--checkpoint", trained[0] / "run", "--data", "."]
    assert "--device quantum" in run("evaluate.py", *words, "--device", "quantum", cwd=tmp_path,
                                     code=1)  # fmt: skip
    said = run("evaluate.py", *words, "--out", "file", cwd=tmp_path, code=1)
    assert "can't be written" in said and "is not a folder" in said


def test_errors_of_the_user_are_one_line(trained, image_folder, tmp_path, run):
    whole, image = ["--checkpoint", trained[0] / "run"], image_folder / "0.png"
    for words, said in (
        (["--data", image_folder], "run/checkpoint.pt does not exist; python train.py writes"),
        (["--checkpoint", "rnu"], "rnu does not exist"),
        (whole, "--data must be a folder of images"),
        ([*whole, "--data", "none"], "none: no such folder"),
        ([*whole, "--data", image_folder, "--out", image], "0.png is not a folder"),
    ):
        assert said in run("evaluate.py", *words, cwd=tmp_path, code=1)
    assert "must be at least 1" in run("evaluate.py", "--batch", 0, cwd=tmp_path, code=2)
