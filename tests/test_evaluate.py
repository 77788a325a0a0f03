"""extras/evaluate.py, the bound of a run, and extras/torch_network.py, its network in torch."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from conftest import COLOURS, colour_name, posix, read
from PIL import Image

from ddpm import Diffusion, linear_betas
from extras import torch_network
from extras.torch_network import TorchNetwork
from images import from_pixels, read_folder
from run import load
from sample import Network, sample, sample_progressive
from test_ddpm import randn, seeded

PROGRAM, BETAS = "extras/evaluate.py", linear_betas()[:40]  # T = 40 takes less time
X = randn(2, 3, 8, 8)


@pytest.fixture(scope="module")
def save(trained, coloured, tmp_path_factory):
    """Save one of two runs, "plain" or "classes", with other settings in a folder, with T = 40."""

    def call(name, images="a digest", **settings):
        state = read(coloured if name == "classes" else trained[0] / "run") | {"images": images}
        state["settings"] |= {"betas": tuple(BETAS.tolist()), "amp": False} | settings
        folder = tmp_path_factory.mktemp(name)
        torch.save(state, folder / "checkpoint.pt")
        return folder

    return call


@pytest.fixture(scope="module")
def both(save, trained, coloured):
    """Return the networks of both runs, each in torch and as an exported file."""
    pairs = {"plain": trained[0] / "model.onnx", "classes": coloured / "model.onnx"}
    pairs = {name: (TorchNetwork(save(name), "cpu"), Network(pairs[name], "cpu")) for name in pairs}
    for _, file in pairs.values():
        file.betas = file.betas[:40]
    return pairs


def test_training_learns_the_classes(coloured):
    x0 = sample(Network(coloured / "model.onnx", "cpu"), 9, guidance=1.0, steps=10)
    colours = 127.5 * x0.mean((2, 3)) + 127.5
    assert [colour_name(colour) for colour in colours] == [*COLOURS] * 3


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


def test_network_in_torch_has_the_interface_of_the_file(both):
    for network, file in both.values():
        assert (network.shape, network.classes) == (file.shape, file.classes)
        assert (network.variance, network.provider) == (file.variance, "cpu, float32")
        np.testing.assert_array_equal(1 - network.betas, 1 - file.betas)
        for t in 7, np.array([7, 39]):
            for y in (None, np.array([0, 2])) if file.classes else (None,):
                eps = network(X, torch.from_numpy(t) if np.ndim(t) else t, y)
                np.testing.assert_allclose(eps, file(X.numpy(), t, y), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name, options", [
    ("plain", {"clip": False}), ("classes", {"guidance": 1.0}),  # all steps
    ("classes", {"steps": 5, "classes": ["red", "blue"], "guidance": 2.0, "first": 4, "seed": 3}),
    ("plain", {"steps": 7, "sampler": "ddim"}), ("plain", {"steps": 7, "sampler": "ddpm"}),
])  # fmt: skip
def test_images_are_those_of_the_exported_file(name, options, both):
    in_torch, expected = (sample(network, 3, **options) for network in both[name])
    assert in_torch.dtype == torch.float32 and expected.std() > 0.1
    np.testing.assert_allclose(in_torch, expected, rtol=0, atol=1 / 127.5)


def test_all_steps_are_the_loop_of_ddpm_py(both, monkeypatch):
    monkeypatch.setattr(Diffusion, "predict_x0", lambda self, x_t, t, eps: 0 * x_t + 0.5)
    for steps, sampler in (None, None), (40, "ddpm"), (40, "ddim"), (39, "ddpm"):
        _, _, x0 = next(sample_progressive(both["plain"][0], 2, steps=steps, sampler=sampler))
        assert (x0 == 0.5).all() == (steps != 39 and sampler != "ddim")


def test_bfloat16_is_used_where_the_run_used_it(save, both, monkeypatch):
    """The weights are converted once, those of the norms not at all."""
    exact, torch.backends.cudnn.allow_tf32 = both["plain"][0](X, 7), True
    for has, amp, kind in (True, True, "bfloat16"), (True, None, "float32"), (0, True, "float32"):
        monkeypatch.setattr(torch_network, "has_bfloat16", lambda device, has=has: has)
        network = TorchNetwork(save("plain", amp=amp), "cpu")
        eps, unet = network(X, 7), network.network
        assert network.provider == f"cpu, {kind}" and torch.equal(eps, exact) == (kind == "float32")
        assert torch.backends.cudnn.allow_tf32 == (kind == "bfloat16")
        assert unet.conv_in.weight.dtype == getattr(torch, kind)
        assert unet.norm_out.weight.dtype == eps.dtype == torch.float32
        torch.testing.assert_close(eps, exact, rtol=0, atol=0.1)
