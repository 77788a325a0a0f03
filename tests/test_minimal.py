"""minimal.py: what it reads, and in an empty folder; its second half alone, without torch."""

import contextlib
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
CODE = (HERE / "minimal.py").read_text("utf-8")


def test_first_lines_read_images_or_say_why_not(tmp_path, monkeypatch, capsys):
    """16 bits are scaled, and transparency is white. Files that are in the way are not replaced."""
    monkeypatch.chdir(tmp_path)

    def run(*args, said=None):
        monkeypatch.setattr(sys, "argv", ["minimal.py", *args])
        refused = pytest.raises(SystemExit, match=rf"^[^\n]*{said}[^\n]*$")
        with refused if said else contextlib.nullcontext():
            exec(CODE[: CODE.index("# Algorithm 1")], names := {})
            return names["pixels"]

    run(".", said="there are no PNG, JPEG or WebP")
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.full((9, 9), 100 * 257, np.uint16)).save(tmp_path / "a.png")
    Image.new("RGB", (9, 9), (100, 100, 100)).save(tmp_path / "deep" / "b.webp", lossless=True)
    Image.new("LA", (9, 9), (100, 0)).save(tmp_path / "c.png")
    Image.new("L", (9, 9), 100).save(tmp_path / "d.gif")
    (tmp_path / "e.png").write_bytes((tmp_path / "a.png").read_bytes()[:50])
    capsys.readouterr()
    extremes = sorted((image.min(), image.max()) for image in run("."))
    assert extremes == [(100, 100)] * 2 + [(255, 255)]
    assert capsys.readouterr().out == "images: 3; files that can't be used: 2\n"
    (tmp_path / "samples.png").touch()
    run(".", said="run it in a writable folder without model.onnx and samples.png")


def test_minimal(tmp_path):
    """Ctrl-C ends the training, and it draws what ddpm.py and sample.py draw from its file."""
    code = CODE.replace("linear_betas()", "linear_betas(9, 0.1, 0.5)")
    line = "        loss.backward()\n"
    stop = "print(round(optimizer.param_groups[0]['lr'], 9)); raise KeyboardInterrupt"
    code = code.replace(line, f"{line}        if step == 8: {stop}\n")
    code = code.replace("16, (1, 2, 4, 4)", "8, (1,)")
    shutil.copy(HERE / "ddpm.py", tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "alone").mkdir()
    for name in "red", "blue":
        Image.new("RGB", (40, 30), name).save(tmp_path / "images" / f"{name}.png")

    def run(code, *args, cwd=tmp_path):
        done = subprocess.run([sys.executable, "-c", code, *args], cwd=cwd, capture_output=True,
                              text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    said, errors = run(code, "images", "10")
    lines = r"images: 2; .*\n0\.0008\nexporting .*\nsamples.png: 16 images .*CPU.*\n"
    assert re.fullmatch(lines, said), said  # the learning rate falls in the last quarter
    assert re.search(r"loss=\d\.\d{3}", errors) and "arning" not in errors
    assert "8/10 " in errors and "9/10 " not in errors and "| 9/9 " in errors

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
