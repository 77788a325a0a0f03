"""What the tests of the programs share: ways to run them, a folder of images, and a trained run."""

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import export
import sample
import train
from ddpm import Diffusion, UNet, linear_betas
from test_ddpm import PAPER

os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs a connection, nor waits for one
HERE = Path(__file__).parent.parent
TINY = "--image-size 8 --base-channels 8 --channel-mults 1 2 --num-res-blocks 1 --batch 8".split()
MAINS = {"train.py": train.main, "export.py": export.main, "sample.py": sample.main}


def python(*args, cwd, code=0, timeout=170, **kwargs):
    """Run a program in a process of its own; returns what it printed."""
    args = [str(HERE / a) if a in MAINS else str(a) for a in args]
    done = subprocess.run(
        [sys.executable, *args], cwd=cwd, capture_output=True, text=True, timeout=timeout, **kwargs
    )
    said = done.stderr + done.stdout
    assert done.returncode == code, said
    assert "Traceback" not in said, said
    return said


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a program in this process, which takes less time; returns what it printed."""

    def call(program, *args, cwd, code=0):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [program, *map(str, args)])
        numbers = set(signal.Signals) & {2, 15, getattr(signal, "SIGHUP", 2)}  # SIGINT, SIGTERM
        handlers = {number: signal.getsignal(number) for number in numbers}
        status, message = 0, ""
        try:
            sample.run_program(MAINS[program], program)
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
            message = error.code if isinstance(error.code, str) else ""
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        said = capsys.readouterr()
        assert status == code, said.out + said.err + message
        assert "\n" not in message
        return said.err + message + "\n" + said.out

    return call


def checkpoint(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Twelve images as people have them, nested and of many modes, and files that are none."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "deep" / "er").mkdir(parents=True)
    random = np.random.default_rng(0)
    for k in range(8):
        pixels = random.integers(0, 256, (12, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    image = Image.new("RGB", (20, 10), "red")
    image.save(folder / "deep" / "LOUD.JPG")
    image.convert("CMYK").save(folder / "deep" / "er" / "print.jpeg")
    image.convert("P").save(folder / "deep" / "palette.gif")
    image.convert("L").save(folder / "deep" / "grey.webp")
    (folder / "deep" / "note.txt").write_text("not an image")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:60])
    (folder / ".hidden.png").write_bytes((folder / "0.png").read_bytes())
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory, pictures):
    """The three commands on a tiny setting, in a folder of their own, and what they printed."""
    folder, warn = tmp_path_factory.mktemp("work"), ["-W", "always::ResourceWarning"]
    said = [python(*warn, "train.py", "--data", pictures, *TINY, "--steps", 12, cwd=folder)]
    said.append(python(*warn, "export.py", cwd=folder))
    said.append(python(*warn, "sample.py", "--onnx", "model.onnx", "-n", 5, "--steps", 20,
                       cwd=folder))  # fmt: skip
    return folder, said


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A network that has learnt a little (random weights quantize worse), in three precisions."""
    folder = tmp_path_factory.mktemp("files")
    settings = dict(image_size=8, in_channels=3, base_channels=16, channel_mults=(1, 2),
                    num_res_blocks=1, attention_resolutions=(4,), dropout=0.0)  # fmt: skip
    torch.manual_seed(0)
    model, images = UNet(**settings), train.demo_pictures().float() / 127.5 - 1
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        PAPER.loss(model, images[torch.randint(len(images), (32,))]).backward()
        optimizer.step()
    export_once = export.to_onnx
    source = train.Trained(model.eval(), Diffusion(linear_betas(), "small"), settings, 7, "a test")
    said, to_onnx = {}, functools.cache(lambda _, model: export_once(source, model))
    for kind in (None, "half", "int8"):
        with pytest.MonkeyPatch.context() as patch:
            lines = []
            patch.setattr("builtins.print", lambda *words, lines=lines: lines.append(words[0]))
            patch.setattr(export, "to_onnx", lambda _, model: to_onnx(None, model))
            export.write_onnx(source, folder / f"{kind}.onnx", kind)
        said[kind] = "\n".join(lines)
    assert len(list(folder.iterdir())) == 3
    return folder, source, said


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The demo, trained and exported by the README's commands: a folder with its model.onnx."""
    folder = tmp_path_factory.mktemp("demo")
    python("train.py", cwd=folder, timeout=1200)
    python("export.py", cwd=folder)
    return folder


FULL_DISK = """
import os, resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class RunsCode:
    """What a pickle can do: call anything."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def damaged(path, n):
    """Damages a file in n ways, one at a time: cut off, or with flipped bits; then mends it."""
    whole, random = path.read_bytes(), np.random.default_rng(0)
    for k in range(n):
        content = bytearray(whole)
        if k % 3 == 0:
            del content[random.integers(len(whole)) :]
        else:  # anywhere, or near the ends
            span = len(whole) if k % 3 == 1 else min(5000, len(whole))
            first = (len(whole) - span) * random.integers(2)
            for _ in range(1 + random.integers(4)):
                content[first + random.integers(span)] ^= 1 << random.integers(8)
        path.write_bytes(content)
        yield k
    path.write_bytes(whole)
