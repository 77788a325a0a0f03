"""What the tests of the programs share: ways to run them, folders of images, trained networks."""

import contextlib
import functools
import gc
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import export
import sample
import train
from ddpm import Diffusion, UNet, linear_betas, timestep_embedding
from images import from_pixels
from support.data import demo_images
from support.trained import Trained, load
from test_ddpm import PAPER, VARIANCES, close, randn, small_unet  # noqa: F401

if sys.platform == "darwin":  # where gloo may not find the machine by its own name
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs a connection, nor waits for one
HERE = Path(__file__).parent.parent
TINY = "--image-size 8 --base-channels 8 --channel-mults 1 2 --num-res-blocks 1 --batch 8".split()
TINY += "--attention-resolutions 4 --device cpu".split()
COLOURS = {"blue": (40, 60, 220), "green": (40, 180, 60), "red": (220, 50, 40)}
CLASSES = (
    "--classes --image-size 8 --base-channels 16 --channel-mults 1 2 --num-res-blocks 1".split()
)
CLASSES += "--attention-resolutions 4 --dropout 0 --batch 32 --lr-decay --no-flip".split()
CLASSES += ["--device", "cpu"]
CLASSES += "--predicts v --weighting min-snr --optimizer muon --lr 6e-3".split()
posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals or torchrun")
MAINS = {f"{module.__name__}.py": module.main for module in (train, evaluate, export, sample)}


def pytest_configure(config):
    """Hide accelerators, but from `pytest -m gpu`, because the tests expect a CPU's numbers."""
    if not re.search(r"(?<!not )gpu", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
        torch.accelerator.current_accelerator = lambda check_available=True: None


def python(*args, cwd, code=0, timeout=170, **kwargs):
    """Run a program in a process of its own; returns what it printed."""
    args = [str(HERE / a) if a in MAINS else str(a) for a in args]
    done = subprocess.run(
        [sys.executable, *args], cwd=cwd, capture_output=True, text=True, timeout=timeout, **kwargs
    )
    said = done.stderr + done.stdout
    assert done.returncode == code, said
    return said


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a program in this process, which takes less time; returns what it printed.

    An error of the user is a SystemExit with one line. Any other exception fails the test.
    """
    numbers = [signal.SIGINT, signal.SIGTERM, *[signal.SIGHUP] * (sys.platform != "win32")]
    handlers = [(number, signal.getsignal(number)) for number in numbers]

    def call(program, *args, cwd, code=0):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [program, *map(str, args)])
        status, message = 0, ""
        try:
            MAINS[program]()
        except SystemExit as error:
            message = error.code if isinstance(error.code, str) else ""
            status = 1 if message else int(error.code or 0)
        gc.collect()  # closes memory-mapped files, which Windows does not let one remove
        said = capsys.readouterr()
        assert status == code, said.out + said.err + message
        assert "\n" not in message or message.startswith("stopped at step")
        return said.err + message + "\n" + said.out

    yield call
    for number, handler in handlers:
        signal.signal(number, handler)


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
    """A network of another kind, which knows nothing of the programs: a small transformer."""

    def __init__(self):
        super().__init__()
        nn = torch.nn
        self.patches = nn.Conv2d(3, 16, 2, stride=2)
        self.time = nn.Linear(16, 16)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(16), "mix": nn.Linear(16, 16)}) for _ in range(2)
        )
        self.last = nn.Linear(16, 12)

    def forward(self, x_t, t, y=None):
        B, _, H, W = x_t.shape
        temb = self.time(timestep_embedding(t, 16).to(self.time.weight.dtype))[:, None]
        h = self.patches(x_t).flatten(2).transpose(1, 2)
        for block in self.blocks:
            h = h + block["mix"](block["norm"](h) + temb.to(h.dtype))
        h = self.last(h).view(B, H // 2, W // 2, 3, 2, 2)
        return h.permute(0, 3, 1, 4, 2, 5).reshape(B, 3, H, W)


@pytest.fixture
def start():
    """Start a program in a process of its own, which does not outlive the test."""
    processes = []

    def call(*args, cwd, **kwargs):
        args = [str(HERE / a) if a in MAINS else str(a) for a in args]
        process = subprocess.Popen(
            [sys.executable, *args], cwd=cwd, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=sys.platform != "win32", **kwargs,
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
    """The checkpoint in a folder."""
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


class RunsCode:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Twelve images as people have them, nested and of many modes, and files that are none."""
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
    """The three commands on a tiny setting, in a folder of their own, and what they printed."""
    folder, warn = tmp_path_factory.mktemp("work"), ["-W", "always::ResourceWarning"]
    said = [python(*warn, "train.py", "--data", image_folder, *TINY, "--steps", 12, cwd=folder)]
    said.append(python(*warn, "export.py", cwd=folder))
    said.append(python(*warn, "sample.py", "--onnx", "model.onnx", "-n", 5, "--steps", 20,
                       cwd=folder))  # fmt: skip
    return folder, said


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A network that has learnt a little (random weights quantize worse), in three precisions.

    (the folder of None.onnx, half.onnx and int8.onnx, the Trained, what export.py printed of each)
    """
    folder = tmp_path_factory.mktemp("files")
    settings = dict(image_size=8, in_channels=3, base_channels=16, channel_mults=(1, 2),
                    num_res_blocks=1, attention_resolutions=(4,), dropout=0.0)  # fmt: skip
    torch.manual_seed(0)
    model, images = UNet(**settings), from_pixels(torch.from_numpy(demo_images()))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        PAPER.loss(model, images[torch.randint(len(images), (32,))]).backward()
        optimizer.step()
    source, said = (
        Trained(model.eval(), Diffusion(linear_betas(), "small"), settings, 7, "a test"),
        {},
    )
    to_onnx = functools.cache(lambda model: export_once(source, model))  # float32 is needed thrice
    with pytest.MonkeyPatch.context() as patch:
        export_once = export.to_onnx
        patch.setattr(export, "to_onnx", lambda _, model: to_onnx(model))
        for kind in (None, "half", "int8"):
            lines = []
            patch.setattr("builtins.print", lambda *words, lines=lines: lines.append(words[0]))
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


@pytest.fixture(scope="session")
def class_folder(tmp_path_factory):
    """Twenty images in each of three sub-folders, of the colour that the folder names."""
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
    """The run folder of a network that has learnt the three classes, with its model.onnx."""
    out = tmp_path_factory.mktemp("coloured") / "run"
    with pytest.MonkeyPatch.context() as patch:
        words = ["train.py", "--data", class_folder, "--out", out, *CLASSES, "--steps", 160]
        patch.setattr("sys.argv", [*map(str, words)])
        train.main()
    export.write_onnx(load(out), out / "model.onnx")
    return out
