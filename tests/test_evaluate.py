"""extras/evaluate.py: the variational bound of a run."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from conftest import COLOURS, posix, save_run
from PIL import Image

from ddpm import Diffusion, linear_betas
from images import from_pixels, read_folder
from run import load
from test_ddpm import seeded

PROGRAM, BETAS = "extras/evaluate.py", linear_betas()[:40]  # T = 40 takes less time


@pytest.fixture
def save(tmp_path_factory):
    """Save a run, "plain" or with "classes"; return its folder."""

    def call(name, **given):
        given = {"betas": tuple(BETAS.tolist()), "data": "elsewhere"} | given
        names = [*COLOURS] if name == "classes" else ()
        return save_run(tmp_path_factory.mktemp(name), (3, 8, 8), names, **given)

    return call


@pytest.mark.parametrize("name, variance", [("plain", "large"), ("classes", "small")])
def test_bound_is_that_of_ddpm_py(name, variance, save, image_folder, class_folder, run, tmp_path):
    """Compare the program with Diffusion.vlb, and the curve with the sums that define it."""
    torch.backends.cudnn.allow_tf32 = True
    out, folder = save(name), {"plain": image_folder, "classes": class_folder}[name]
    words = "--checkpoint", out, "--data", folder, "--variance", variance, "--seed", 2
    said = run(PROGRAM, *words, "--images", 5, "--batch", 3, cwd=tmp_path)
    assert "on 5 images" in said and not torch.backends.cudnn.allow_tf32
    (network, _, state), noise, bounds = load(out), seeded(2), []
    images, labels, _ = read_folder(folder, 8, 3, state["names"])
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
    assert Image.open(out / "rate-distortion.png").size == (640, 440)


def test_interrupt_keeps_the_finished_batches(save, image_folder, tmp_path, run, monkeypatch):
    whole, batches = Diffusion.vlb, iter("ab")

    def vlb(*args):
        if not next(batches, None):
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(Diffusion, "vlb", vlb)
    words = "--data", image_folder, "--batch", 2, "--checkpoint", save("plain")
    assert "on 4 images" in run(PROGRAM, *words, cwd=tmp_path)


@posix
def test_training_images_are_recognised(save, image_folder, run, tmp_path):
    (tmp_path / "link").symlink_to(image_folder)
    for seen, says in (image_folder, True), (tmp_path, False), (tmp_path / "gone", False):
        words = "--data", "link", "--images", 1, "--checkpoint", save("plain", data=str(seen))
        said = run(PROGRAM, *words, cwd=tmp_path)
        assert ("--data has the training images" in said) == says and "on 1 images" in said


def test_mistakes_are_one_line(save, image_folder, tmp_path, run):
    """Without --data, the images are the demo's if the run is."""
    demo, data = save("plain", data=None), ["--data", image_folder]
    assert "on 1 images" in run(PROGRAM, "--checkpoint", demo, "--images", 1, cwd=tmp_path)
    must = "--data must be a folder of images that the network has not seen"
    for words, said in (
        (["--checkpoint", save("plain")], must), (["--device", "quantum"], "--device quantum: "),
        (["--checkpoint", save("plain", images=None, data=None)], must),
        ([*data, "--checkpoint", "rnu"], "rnu is not there; run"), (data, "demo is not there; run"),
        ([*data, "--checkpoint", save("classes")], "but the classes are"),
    ):  # fmt: skip
        assert said in run(PROGRAM, *words, cwd=tmp_path, code=1)
