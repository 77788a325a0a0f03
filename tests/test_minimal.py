"""minimal.py in an empty folder, with few steps; its second half alone, without torch."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from ddpm import Diffusion, linear_betas

HERE = Path(__file__).parent.parent


def test_minimal(tmp_path, monkeypatch):
    """It skips what can't be read, and draws what ddpm.py and sample.py draw from its file."""
    code = (HERE / "minimal.py").read_text("utf-8")
    code = code.replace("10_000", "2").replace("linear_betas()", "linear_betas(9, 0.1, 0.5)")
    code = code.replace("(1, 2, 4, 4)", "(1,)")
    shutil.copy(HERE / "ddpm.py", tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "alone").mkdir()
    for name in "red", "blue":
        Image.new("RGB", (40, 30), name).save(tmp_path / "images" / f"{name}.png")
    whole = (tmp_path / "images" / "red.png").read_bytes()
    (tmp_path / "images" / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "images" / "._red.png").write_bytes(b"\0\5\x16\7")

    def run(code, *args, cwd=tmp_path):
        done = subprocess.run([sys.executable, "-c", code, *args], cwd=cwd, capture_output=True,
                              text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    monkeypatch.setattr(sys, "argv", ["minimal.py"])
    with pytest.raises(SystemExit, match=r"^usage: python minimal\.py"):
        exec(code, {})
    said, errors = run(code, "images")
    assert re.fullmatch("samples.png: 16 images .* on CPUExecutionProvider\n", said)
    assert re.search(r"loss=\d\.\d{3}", errors) and "arning" not in errors

    network = sample.Network(tmp_path / "model.onnx", "cpu")
    random, shape = np.random.default_rng(0), (16, 3, 32, 32)
    noise = [random.standard_normal(shape, np.float32) for _ in range(9)]
    assert np.abs(network(noise[0], 4)).mean() > 0.01  # the average has learnt; at first, eps is 0
    *_, (_, _, x0) = network.reverse(network, iter(noise).__next__)
    paper = Diffusion(linear_betas(9, 0.1, 0.5)).sample(
        lambda x, t: torch.from_numpy(network(x.numpy(), t.numpy())), shape,
        draw_noise=map(torch.from_numpy, noise).__next__,
    )  # fmt: skip
    with Image.open(tmp_path / "samples.png") as image:
        tiles = np.asarray(image)[::4, ::4].reshape(4, 32, 4, 32, 3).transpose(0, 2, 4, 1, 3)
    for expected in x0, paper.numpy():
        error = tiles.reshape(shape).astype(int) - sample.to_pixels(expected)
        assert np.abs(error).max() <= 1 and tiles.std() > 9

    shutil.copy(tmp_path / "model.onnx", tmp_path / "alone")
    second_half = code[code.index("# The lines from here on") :]
    run("import sys; sys.modules['torch'] = None\n" + second_half, cwd=tmp_path / "alone")
    first, second = ((tmp_path / name / "samples.png").read_bytes() for name in (".", "alone"))
    assert first == second
