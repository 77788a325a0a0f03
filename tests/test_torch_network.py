"""sample.py --checkpoint: the same images as from model.onnx, drawn in torch."""

import contextlib
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import HERE, python
from PIL import Image
from test_device import MockDevice

import ddpm_numpy
from support import device
from support.torch_network import TorchNetwork
from support.trained import load


def images_in(folder):
    """Return the images of a folder and its sub-folders, {name: (H, W, C)}."""
    paths = [path for path in folder.rglob("[!.]*") if path.is_file()]
    return {p.relative_to(folder).as_posix(): np.asarray(Image.open(p)).astype(int) for p in paths}


@pytest.fixture
def both(coloured, run, tmp_path):
    """Run sample.py with --onnx and --checkpoint; return the images of both, and the output."""

    def call(*flags):
        sources = {"onnx": ["--onnx", coloured / "model.onnx"],
                   "torch": ["--checkpoint", coloured, "--no-amp"]}  # fmt: skip
        for name, words in sources.items():
            (tmp_path / name).mkdir()
            said = run("sample.py", *words, *flags, cwd=tmp_path / name)
        return images_in(tmp_path / "onnx"), images_in(tmp_path / "torch"), said

    return call


FLAGS = ["--steps 5 --gif x.gif", "--steps 5 --sampler ddpm --class red blue",
         "--steps 5 --eta 0.5 --guidance 2", "--steps 5 --sampler ddim --seed 3", "-n 2",
         "--steps 5 --inpaint {0} {1}", "--t 300 --steps 9 --interpolate {0} {2}",
         "--class red --guidance 1 --t 20 --interpolate {0} {2}"]  # fmt: skip


@pytest.mark.parametrize("flags", FLAGS)
def test_checkpoint_draws_the_images_of_the_exported_file(flags, both, class_folder, tmp_path):
    """They differ by at most 1 of 255 in float32. The GIF, which has a palette, has the same size.

    The last batch is smaller than the others.
    """
    mask = np.zeros((8, 8), np.uint8)
    mask[:4] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    files = class_folder / "red" / "0.png", tmp_path / "mask.png", class_folder / "blue" / "0.png"
    words = flags.format(*map(str, files)).split()
    if "--interpolate" not in words:
        words += ["--dir", "out", "--batch", 4, *([] if "-n" in words else ["-n", 6])]
    onnx, in_torch, said = both(*words)
    assert "cpu, float32, training step " in said
    assert onnx.keys() == in_torch.keys() and len(onnx) >= (1 if "--interpolate" in words else 3)
    for name, image in onnx.items():
        assert image.shape == in_torch[name].shape
        assert name == "x.gif" or np.abs(image - in_torch[name]).max() <= 1


def test_checkpoint_needs_no_onnx_package(coloured, tmp_path):
    """Published weights need none, and a checkpoint file instead of its folder needs none."""
    hidden = "onnx", "onnxruntime", "onnxscript"
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); sys.modules |= dict.fromkeys({hidden})"
    words = ["--checkpoint", coloured / "checkpoint.pt", "-n", 2, "--steps", 2]
    python("-c", f"{code}; import sample; sample.main()", *words, cwd=tmp_path)
    assert (tmp_path / "samples.png").is_file()


def test_mistakes_are_one_line(coloured, run, tmp_path, monkeypatch):
    program = partial(run, "sample.py", cwd=tmp_path)
    words = ["--checkpoint", coloured]
    assert "not allowed with argument" in program(*words, "--onnx", "model.onnx", code=2)
    assert "--amp needs --checkpoint" in program("--amp", code=2)
    assert "nowhere does not exist" in program("--checkpoint", "nowhere", code=1)
    assert "--device cuda:7: " in program(*words, "--device", "cuda:7", code=1)
    assert 'device must be "auto"' in program(
        "--onnx", coloured / "model.onnx", "--device", "cuda:1", code=1
    )
    monkeypatch.setitem(sys.modules, "support.torch_network", None)
    assert "--checkpoint needs support.torch_network" in program(*words, code=1)
    assert not list(tmp_path.iterdir())


def test_folder_is_continued_with_the_same_weights_and_precision(coloured, run, tmp_path, tiny):
    program = partial(run, "sample.py", "--steps", 2, "--dir", "out", cwd=tmp_path)
    program("--checkpoint", coloured, "-n", 3)
    said = program("--checkpoint", coloured / "checkpoint.pt", "-n", 4)
    assert "out has 3 of the images already" in said
    other = "--amp" if "float32" in said else "--no-amp"
    assert "must be a new or empty" in program("--checkpoint", coloured, other, "-n", 5, code=1)
    tiny("--steps", 1)
    assert "must be a new or empty folder" in program("--checkpoint", "run", "-n", 5, code=1)


def test_device_computes_everything_but_the_noise(coloured, monkeypatch):
    """On a mock device without float64, only copies mix the device with the CPU."""
    meta = torch.device("meta")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # no meta
    monkeypatch.setattr(device, "choose_device", lambda name: meta)
    monkeypatch.setattr(device, "uses_bfloat16", lambda *_: True)
    network, shape = TorchNetwork(coloured, "meta", amp=True, batch=2), (2, 3, 8, 8)
    assert network.provider == "meta, bfloat16"
    image, x_T = np.zeros(shape[1:], np.float32), np.zeros(shape, np.float32)
    with MockDevice() as mock:
        for options in (
            {"sampler": "ddpm"},
            {"eta": 1.0},
            {"known": (image, image > 0)},
            {"x_T": x_T},
        ):
            noise = ddpm_numpy.noise_of(0, 0, shape)
            chain = network.reverse(np.array([0, 1]), 2, noise, steps=3, **options)
            assert all(x.is_meta and x0.is_meta for _, x, x0 in chain)
    assert mock.reads == 0


def test_full_batches_of_many_calls_are_compiled(coloured, monkeypatch):
    """They are compiled from 5,000 calls on, as in training; the last, smaller batch is not."""
    sizes = []

    def compiled(model):
        def call(x_t, *inputs):
            sizes.append(len(x_t))
            return model(x_t, *inputs)

        return call

    monkeypatch.setattr(device, "can_compile", lambda device: True)
    monkeypatch.setattr(device, "compiled", compiled)
    for images, expected in ((996, []), (1003, [4, 4])):
        network = TorchNetwork(coloured, "cpu", False, images=images, batch=4, steps=20)
        with torch.no_grad():
            for batch in (4, 3, 4):
                network.eps(torch.zeros(batch, 3, 8, 8), torch.zeros(batch, dtype=torch.int64))
        assert sizes == expected


def test_bfloat16_is_used_where_training_uses_it(coloured, monkeypatch):
    x, t = np.random.default_rng(0).standard_normal((2, 3, 8, 8), np.float32), torch.tensor([9, 99])
    for has in (True, False):
        monkeypatch.setattr(device, "has_bfloat16", lambda device, has=has: has)
        assert device.uses_bfloat16("v", torch.device("cpu")) == has
        assert not device.uses_bfloat16("x0", torch.device("cpu"))
    with pytest.raises(SystemExit, match="cuda:1 can only emulate bfloat16"):
        device.uses_bfloat16("v", torch.device("cuda:1"), True)
    with torch.no_grad():
        exact = load(coloured).eps(torch.from_numpy(x), t)
        for amp in (True, False):
            network = TorchNetwork(coloured, "cpu", amp)
            eps = network.eps(torch.from_numpy(x), t)
            output = network.forward(torch.from_numpy(x), t)
            assert eps.dtype == output.dtype == torch.float32 and network.amp == amp
            assert torch.equal(eps, exact) == (not amp)


def test_noise_is_drawn_while_the_network_computes(monkeypatch):
    """A thread draws it, one draw ahead, and in the same order."""
    drawn, default_rng = [], np.random.default_rng

    class Stream:
        def __init__(self, seed):
            self.stream = default_rng(seed)

        def standard_normal(self, *args, **kwargs):
            drawn.append(1)
            return self.stream.standard_normal(*args, **kwargs)

    monkeypatch.setattr(np.random, "default_rng", Stream)
    draw_noise, stream = ddpm_numpy.noise_of(0, 5, (1, 4)), default_rng((0, 5))
    for k in range(3):
        assert np.array_equal(draw_noise()[0], stream.standard_normal(4, np.float32))
        for _ in range(1000):
            if len(drawn) == k + 2:
                break
            time.sleep(0.01)
        assert len(drawn) == k + 2
