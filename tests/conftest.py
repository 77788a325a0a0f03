"""What the tests of the programs share: ways to run them, folders of images, trained networks."""

import contextlib
import functools
import gc
import io
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two processes with one thread each need less time than two processes with two threads each.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from closed_forms import PAPER
from PIL import Image

import evaluate
import export
import sample
import train
from ddpm import Diffusion, UNet, linear_betas, timestep_embedding
from images import from_pixels
from support.demo import demo_images
from support.muon import Muon
from support.trained import Trained, load

if sys.platform == "darwin":  # where gloo may not find the machine by its own name
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs a connection, nor waits for one
HERE = Path(__file__).parent.parent
TINY = "--image-size 8 --base-channels 8 --channel-mults 1 2 --num-res-blocks 1 --batch 8".split()
TINY += "--attention-resolutions 4 --device cpu".split()
SMALL = dict(image_size=8, in_channels=3, base_channels=8, channel_mults=(1, 2), num_res_blocks=1,
             attention_resolutions=(4,), dropout=0.0)  # fmt: skip
COLOURS = {"blue": (40, 60, 220), "green": (40, 180, 60), "red": (220, 50, 40)}
posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals or torchrun")
MAINS = {f"{module.__name__}.py": module.main for module in (train, evaluate, export, sample)}


def pytest_configure(config):
    """Hide accelerators except from `pytest -m gpu`, because the tests expect a CPU's numbers."""
    if not re.search(r"(?<!not )gpu", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
        torch.accelerator.current_accelerator = lambda check_available=True: None


def command(*args):
    """Return the command that runs Python, or a program by its name, in a process of its own."""
    return [sys.executable, *(str(HERE / arg) if arg in MAINS else str(arg) for arg in args)]


def python(*args, cwd, code=0, timeout=170, **kwargs):
    """Run a program in a process of its own; return what it printed."""
    done = subprocess.run(
        command(*args), cwd=cwd, capture_output=True, text=True, timeout=timeout, **kwargs
    )
    said = done.stderr + done.stdout
    assert done.returncode == code, said
    return said


def call_main(patch, program, *args, cwd):
    """Run a program in this process, which takes less time, and restore the signal handlers."""
    patch.chdir(cwd)
    patch.setattr(sys, "argv", [program, *map(str, args)])
    with restoring_signals():
        MAINS[program]()


@contextlib.contextmanager
def restoring_signals():
    """Restore the handlers of signals at the end of the block."""
    numbers = [signal.SIGINT, signal.SIGTERM, *[signal.SIGHUP] * (sys.platform != "win32")]
    handlers = [(number, signal.getsignal(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)


def printed_by(function, *args, **kwargs):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        function(*args, **kwargs)
    return printed.getvalue()


def close_mapped_files():
    """Close unused memory-mapped files, because Windows does not let one replace them."""
    if sys.platform == "win32":
        gc.collect()


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a program in this process; return what it printed.

    An error of the user is a SystemExit with one line. Any other exception fails the test.
    """

    def call(program, *args, cwd, code=0):
        status, message = 0, ""
        try:
            call_main(monkeypatch, program, *args, cwd=cwd)
        except SystemExit as error:
            message = error.code if isinstance(error.code, str) else ""
            status = 1 if message else int(error.code or 0)
        except KeyboardInterrupt as error:
            status, message = 130, str(error)  # as a shell shows it
        close_mapped_files()
        said = capsys.readouterr()
        assert status == code, said.out + said.err + message
        assert "\n" not in message or message.startswith("stopped at step")
        return said.err + message + "\n" + said.out

    return call


# Runs a program as if the disk were full after 100 kB of a file.
FULL_DISK = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
del sys.argv[0]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class SmallDiT(torch.nn.Module):
    """A network of another kind: a small transformer, independent of the programs."""

    def __init__(self):
        super().__init__()
        nn = torch.nn
        self.patches, self.time = nn.Conv2d(3, 16, 2, stride=2), nn.Linear(16, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)) for _ in range(2)
        )
        self.last = nn.Linear(16, 12)

    def forward(self, x_t, t, y=None):
        temb = self.time(timestep_embedding(t, 16))[:, None]
        h = self.patches(x_t).flatten(2).transpose(1, 2)
        for block in self.blocks:
            h = h + block(h + temb)
        half_size = [side // 2 for side in x_t.shape[2:]]
        h = self.last(h).transpose(1, 2).unflatten(2, half_size)
        return torch.nn.functional.pixel_shuffle(h, 2)


@pytest.fixture
def wrap_step(monkeypatch):
    """Replace each step(k) of train.py by function(step, k)."""

    def call(function):
        algorithm_1 = train.algorithm_1
        monkeypatch.setattr(
            train, "algorithm_1", lambda *args: partial(function, algorithm_1(*args))
        )

    return call


@pytest.fixture
def start():
    """Start a program in a process of its own, which ends with the test."""
    processes = []

    def call(*args, cwd, **kwargs):
        process = subprocess.Popen(
            command(*args), cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=sys.platform != "win32", **kwargs,
        )  # fmt: skip
        processes.append(process)
        return process

    yield call
    for process in processes:
        if sys.platform == "win32":
            process.kill()
        else:  # with its children
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def colour_name(colour):
    """Return the name of the nearest of the COLOURS, or None if it is far."""
    far = {name: np.abs(colour - target).max() for name, target in COLOURS.items()}
    nearest = min(far, key=far.get)
    return nearest if far[nearest] < 60 else None


def listing(begins):
    """Return the Python code of the manual that begins with this text."""
    guide = (HERE / "docs" / "guide.md").read_text("utf-8")
    (code,) = re.findall(rf"```python\n({begins}.*?)```", guide, re.S)
    return code


def read(folder):
    """Return the checkpoint in a folder."""
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


class RunsCode:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Make twelve typical images, nested and of many modes, and files that are not images."""
    folder = tmp_path_factory.mktemp("image_folder")
    (folder / "deep" / "er").mkdir(parents=True)
    random = np.random.default_rng(0)
    for k in range(8):
        pixels = random.integers(0, 256, (12, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    image = Image.new("RGB", (20, 10), "red")
    image.save(folder / "deep" / "LOUD.JPG")
    image.convert("CMYK").save(folder / "deep" / "er" / "print.jfif", "JPEG")
    image.convert("P").save(folder / "deep" / "palette.gif")
    image.convert("L").save(folder / "deep" / "grey.webp")
    (folder / "deep" / "note.txt").write_text("not an image")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:60])
    (folder / ".hidden.png").write_bytes((folder / "0.png").read_bytes())
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory, image_folder):
    """Run the three commands with a tiny network; return their folder and what they printed."""
    folder = tmp_path_factory.mktemp("work")
    commands = (
        ["train.py", "--data", image_folder, *TINY, "--steps", 12],
        ["export.py"],
        ["sample.py", "--onnx", "model.onnx", "-n", 5, "--steps", 20],
    )
    with pytest.MonkeyPatch.context() as patch:
        said = [printed_by(call_main, patch, *words, cwd=folder) for words in commands]
    return folder, said


def write_three(source, folder):
    """Write None.onnx, half.onnx and int8.onnx; return what export.py printed, {kind: text}."""
    to_onnx, said = functools.cache(functools.partial(export.to_onnx, source)), {}
    with pytest.MonkeyPatch.context() as patch:  # float32 is needed thrice, and exported once
        patch.setattr(export, "to_onnx", lambda _, model: to_onnx(model))
        for kind in (None, "half", "int8"):
            said[kind] = printed_by(export.write_onnx, source, folder / f"{kind}.onnx", kind)
    assert len(list(folder.iterdir())) == 3
    return said


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Export a slightly trained network (random weights quantize worse) in three precisions.

    Returns the folder of None.onnx, half.onnx and int8.onnx, the Trained, and what export.py
    printed about each file.
    """
    folder, settings = tmp_path_factory.mktemp("files"), SMALL | {"base_channels": 16}
    torch.manual_seed(0)
    model, images = UNet(**settings), from_pixels(torch.from_numpy(demo_images()))
    optimizer = Muon(model, 0.04)
    for _ in range(120):
        optimizer.zero_grad()
        PAPER.loss(model, images[torch.randint(len(images), (16,))]).backward()
        optimizer.step()
    source = Trained(model.eval(), Diffusion(linear_betas(), "small"), settings, 7, "a test")
    return folder, source, write_three(source, folder)


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """Train and export the demo by the README's commands; return the folder of its model.onnx.

    One of the processes of pytest-xdist trains it for all.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "demo"
    try:
        folder.mkdir()
    except FileExistsError:
        began = time.monotonic()
        while not (folder / "exported").exists():
            assert time.monotonic() - began < 1300, "the other process did not train the demo"
            time.sleep(1)
        return folder
    python("train.py", cwd=folder, timeout=1200)
    python("export.py", cwd=folder)
    (folder / "exported").touch()
    return folder


@pytest.fixture(scope="session")
def class_folder(tmp_path_factory):
    """Make twenty images in each of three sub-folders, in the colour that names the folder."""
    folder, random = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name / "deeper").mkdir(parents=True)
        for k in range(20):
            pixels = np.array(colour) + random.integers(-30, 31, (8, 8, 3))
            place = folder / name / ("deeper" if k % 2 else "")
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{k}.png")
    (folder / "green" / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="session")
def coloured(class_folder, tmp_path_factory):
    """Return the run folder of a network that has learnt the three classes, with its model.onnx."""
    out = tmp_path_factory.mktemp("coloured") / "run"
    flags = "--classes --base-channels 16 --attention-resolutions --dropout 0 --batch 24 --no-flip"
    flags += " --predicts v --weighting min-snr --optimizer muon --lr 6e-3 --lr-decay --steps 160"
    words = ["--data", class_folder, "--out", out, *TINY, *flags.split()]
    with pytest.MonkeyPatch.context() as patch:
        call_main(patch, "train.py", *words, cwd=out.parent)
    export.write_onnx(load(out), out / "model.onnx")
    return out


@pytest.fixture
def tiny(run, image_folder, tmp_path):
    """Train a tiny network on the image folder, in tmp_path; return what was printed."""

    def call(*words, code=0):
        words = ["--data", image_folder, *TINY, *words]
        return run("train.py", *words, cwd=tmp_path, code=code)

    return call
