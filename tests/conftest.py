"""What the tests of the programs share: ways to run them, folders of images, and a small run."""

import contextlib
import copy
import io
import os
import re
import shlex
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from unittest import mock

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two processes with one thread each need less time than two processes with two threads each.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import networks
import numpy as np
import pytest
import torch
from PIL import Image

import export
from run import Settings, build

if sys.platform == "darwin":  # where gloo may not find the machine by its own name
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs a connection, nor waits for one
HERE = Path(__file__).parent.parent
TINY = "--image-size 8 --base-channels 8 --channel-mults 1 2 --num-res-blocks 1 --batch 8".split()
TINY += "--attention-resolutions 4 --device cpu".split()
COLOURS = {"blue": (40, 60, 220), "green": (40, 180, 60), "red": (220, 50, 40)}
posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals or torchrun")


def pytest_configure(config):
    """Hide accelerators except from `pytest -m gpu`, because the tests expect a CPU's numbers."""
    if not re.search(r"(?<!not )gpu", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
        torch.accelerator.current_accelerator = lambda check_available=True: None


def hear_signals():
    """Undo in a child process that `&` ignores Ctrl-C, and nohup a closed terminal."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


BEFORE = {} if sys.platform == "win32" else {"preexec_fn": hear_signals}


def command(*args):
    """Return the command that runs a program of the project, or other arguments, in Python."""
    words = [str(HERE / arg) if str(arg).endswith(".py") else str(arg) for arg in args]
    return [sys.executable, *words]


def python(*args, cwd, code=0, timeout=170):
    """Run a program in a process of its own; return what it printed."""
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    done = subprocess.run(
        command(*args), cwd=cwd, capture_output=True, text=True, timeout=timeout,
        env=environment, **BEFORE,
    )  # fmt: skip
    said = done.stderr + done.stdout
    assert done.returncode == code, said
    return said


@pytest.fixture
def start():
    """Start a program, to which bash appends `pipe`, in a process that ends with the test."""
    processes = []

    def call(*args, cwd, pipe=None):
        words = command(*args)
        words = ["bash", "-c", f"{shlex.join(words)} {pipe}"] if pipe else words
        process = subprocess.Popen(
            words, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, **BEFORE,
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


def read(folder):
    """Return the checkpoint in a folder."""
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def save_run(folder, shape, names=(), images="a digest", **given):
    """Save a small run whose averaged weights are random, none near zero; return its folder."""
    small = {"image_size": shape[-1], "base_channels": 8, "channel_mults": (1, 2), "amp": False}
    small |= {"num_res_blocks": 1, "attention_resolutions": (4,), "classes": bool(names)}
    settings = Settings(**small | given)
    torch.manual_seed(0)
    network, _ = build(settings, shape, names)
    state = {"settings": vars(settings), "shape": shape, "names": names, "images": images}
    state |= {"step": 0, "model": copy.deepcopy(network.state_dict()), "ema": network.state_dict()}
    state["optimizer"] = None
    for weights in network.parameters():
        weights.data += 0.1 * torch.randn_like(weights)
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "checkpoint.pt")
    return folder


def assert_same_run(a, b, rtol=0):
    """Compare the steps, weights and logs of two run folders, to the bit or to rounding."""
    one, other = read(a), read(b)
    assert one["step"] == other["step"]
    for part in ("model", "ema"):
        torch.testing.assert_close(one[part], other[part], rtol=rtol, atol=rtol / 10)
    a, b = (np.loadtxt(folder / "log.csv", delimiter=",", skiprows=1) for folder in (a, b))
    np.testing.assert_allclose(a, b, rtol=10 * rtol)


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


@contextlib.contextmanager
def restoring_signals():
    """Restore the handlers of signals at the end of the block."""
    names = {"SIGINT", "SIGTERM", "SIGHUP", "SIGPIPE"} & {*dir(signal)}
    handlers = [(getattr(signal, name), signal.getsignal(getattr(signal, name))) for name in names]
    try:
        yield
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)


def in_process(program, *args, code=0):
    """Run a program in this process, which takes less time; return what it printed.

    A user's mistake is a SystemExit with one line. Any other exception is passed on.
    """
    argv, status, message = [str(HERE / program), *map(str, args)], 0, ""
    out, errors = io.StringIO(), io.StringIO()
    with (
        restoring_signals(),
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(sys, "excepthook"),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
    ):
        try:
            import_module(program.removesuffix(".py").replace("/", ".")).main()
        except SystemExit as error:
            message = error.code if isinstance(error.code, str) else ""
            status = 1 if message else error.code
    said = errors.getvalue() + out.getvalue() + message
    assert status == code and "\n" not in message, said
    return said


@pytest.fixture
def program(monkeypatch):
    """Run a program in this process, and stay in its folder; return what it printed."""

    def call(program, *args, cwd, code=0):
        monkeypatch.chdir(cwd)
        return in_process(program, *args, code=code)

    return call


@pytest.fixture
def tiny(program, image_folder, tmp_path):
    """Train a tiny network on the image folder, in tmp_path; return what was printed."""

    def call(*words, code=0):
        return program("train.py", "--data", image_folder, *TINY, *words, cwd=tmp_path, code=code)

    return call


@pytest.fixture
def exported(monkeypatch):
    """Let export.py write a network in closed form; return a list of (network, shape) given."""
    given = []

    def write_onnx(network, diffusion, shape, names, path):
        given.append((network, shape))
        path.write_bytes(networks.onnx_file())

    monkeypatch.setattr(export, "write_onnx", write_onnx)
    return given
