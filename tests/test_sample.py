"""sample.py: the library and the program alone in a folder, images, bad input, CUDA, signals."""

import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import HERE, posix
from networks import COLOURS, SHAPE, SMALL, eps, onnx_file
from PIL import Image

import sample


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Work in a folder that holds sample.py and a model.onnx of three classes, and no more."""
    shutil.copy(HERE / "sample.py", tmp_path)
    (tmp_path / "model.onnx").write_bytes(onnx_file())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def program(program, folder):
    """Run sample.py in this process, in the folder; return what it printed."""
    return partial(program, "sample.py", cwd=folder)


@pytest.fixture
def begin(start, folder):
    """Start sample.py, or Python code, in a process of its own, in the folder."""

    def call(*words, code=None, **options):
        program = ["-c", code] if code else [folder / "sample.py"]
        return start(*program, *words, cwd=folder, **options)

    return call


def said_by(process, status=0):
    """Return what a process printed until it ended with this status."""
    said, _ = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in said, said
    return said


LONG = "-n 9999 --batch 3 --steps 50 --dir all".split()


def images_in(folder):
    """Return the images that --dir has made, by their numbers: {number: int (C, H, W)}."""
    paths = {int(path.stem): path for path in folder.rglob("*.png")}
    return {k: np.asarray(Image.open(path)).astype(int).transpose(2, 0, 1)
            for k, path in sorted(paths.items())}  # fmt: skip


# ---------------------------------------------------------------- the library and the program alone


HINT = "; --guidance 1 makes them clearer, but less varied\n"
LIBRARY = """
import sys; sys.modules |= dict.fromkeys(['torch', 'PIL', 'tqdm', 'onnx'])
import onnxruntime, sample
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
network = sample.Network('model.onnx', 'cpu', options)
print(network.session.get_session_options().intra_op_num_threads, network.provider)
print(sample.sample(network, 2, ['red'], 1.0, 5, steps=5).shape)
"""


def test_library_needs_numpy_and_onnxruntime_alone(begin):
    assert said_by(begin(code=LIBRARY)) == "1 CPUExecutionProvider\n(2, 3, 4, 4)\n"


def test_program_alone(begin, folder):
    """It needs no torch either, and makes folders."""
    code = "import sys, runpy; sys.modules[sys.argv.pop()] = None\n"
    code += "runpy.run_path('sample.py', run_name='__main__')"
    words = "--steps", "60", "--out", "new/s.png", "--dir", "new/all"
    said = said_by(begin(*words, "torch", code=code))
    assert said.startswith(f"24 images in 60 steps on CPUExecutionProvider{HINT}")
    assert said.endswith("\nnew/s.png: 24 images of blue, green, red\n")
    assert {p.name for p in folder.iterdir()} == {"sample.py", "model.onnx", "new"}
    assert Image.open("new/s.png").size == (8 * 6 * 11, 3 * 6 * 11)  # about 512 pixels
    assert {p.name for p in Path("new/all").iterdir()} == {*COLOURS}
    for package in "onnxruntime", "PIL":  # before the work
        process = begin("--out", "none.png", package, code=code)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 1 and f"import of {package}" in said and "step/s" not in said


# --------------------------------------------------------------------------------------- the images


def test_image_k_depends_on_seed_and_k_alone(program, folder):
    """It depends neither on the batch nor on n, and --first goes on."""
    words = "--steps", 5, "--sampler", "ddpm", "--dir"
    program(*words, "a", "-n", 7)
    program(*words, "b", "-n", 4, "--batch", 2)
    said = program(*words, "c", "-n", 3, "--first", 4, "--batch", 2)
    assert said.endswith("3 images of green, red, blue\n")  # the rows of the grid
    program(*words, "d", "-n", 2, "--seed", 1)
    a, b, c, d = (images_in(folder / name) for name in "abcd")
    assert [*a] == [*b, *c] == [*range(7)]
    program(*words, "b", "-n", 3, "--first", 4)  # in the same folder
    assert [*images_in(folder / "b")] == [*range(7)]
    said = program(*words, "b", "-n", 2, "--first", 6, code=1)
    assert (
        "sample.py: b already has images with these numbers; to add others, use --first 7" in said
    )
    assert all(np.abs(a[k] - image).max() <= 1 for k, image in (b | c).items())  # rounding
    expected = np.random.default_rng((1, 2)).standard_normal(SHAPE, np.float32)
    assert (sample.noise_of(1, 2, 1, SHAPE)()[0] == expected).all()
    assert all(np.abs(x - y).max() > 3 for x, y in [(a[0], a[3]), (a[0], d[0]), (a[1], d[1])])


def test_program_draws_what_the_library_does(program, folder):
    """An empty folder is as good as a new one. The grid shows at most 256 images."""
    (folder / "all").mkdir()
    words = "--steps", 5, "--sampler", "ddim", "--guidance", 0.5, "--seed", 2, "--batch", 200
    said = program(*words, "-n", 300, "--dir", "all")
    assert said.endswith("samples.png: 256 images of blue, green, red\n") and "10/10" in said
    images, network = images_in(folder / "all"), sample.Network("model.onnx")
    x0 = sample.sample(network, 300, None, 0.5, 2, steps=5, sampler="ddim")
    for image, expected in zip(images.values(), sample.to_pixels(x0), strict=True):
        assert np.abs(image - expected).max() <= 1
    program("-n", 9, "--steps", 1, "--class", "red")
    assert Image.open("samples.png").size == (28 * 18, 28 * 18)  # not one row


@pytest.mark.parametrize("classes, n", [(0, 64), (1, 64), (2, 16), (99, 256)])
def test_number_of_images_is_that_of_the_classes(classes, n):
    args = sample.flags("").parse_args([])
    sample.complete(args, SimpleNamespace(betas=range(9), classes=[f"{k}" for k in range(classes)]))
    assert (args.n, args.steps) == (n, 9)


def test_full_disk_is_one_line(program, folder, monkeypatch):
    """It leaves no part of an image."""

    def fill(self, path, *args):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill)
    said = program("-n", 2, "--steps", 1, "--out", "s.png", code=1)
    assert said.endswith("s.png can't be written: [Errno 28] No space left on device")
    assert {path.name for path in folder.iterdir()} == {"sample.py", "model.onnx"}


def test_image_of_another_process_is_not_replaced(program, folder, monkeypatch):
    def late(network, args, stop):
        (folder / "all" / "red").mkdir(parents=True)
        (folder / "all" / "red" / "000002.png").write_text("mine")
        yield 0, np.zeros((3, *SHAPE), np.uint8)

    monkeypatch.setattr(sample, "batches", late)
    said = program("--dir", "all", code=1)
    assert "sample.py: another process has written all/red/000002.png" in said
    assert (folder / "all" / "red" / "000002.png").read_text() == "mine"


@pytest.mark.parametrize("guidance", [0, 2])
def test_classes_and_guidance_equal_torch(guidance, program, folder):
    """Compare the program, from the seed to the pixels, with ddpm.py on the same noise."""
    program("-n", 4, "--class", "red", "blue", "--guidance", guidance, "--seed", 3, "--dir", "out")
    noise, y = sample.noise_of(3, 0, 4, SHAPE), torch.tensor([2, 0, 2, 0])
    x0 = SMALL.sample(
        lambda x, t: (1 + guidance) * eps(x, t, y) - guidance * eps(x, t), (4, *SHAPE),
        draw_noise=lambda: torch.from_numpy(noise()),
    )  # fmt: skip
    for k, image in images_in(folder / "out").items():
        assert np.abs(image - ((x0[k] + 1) * 127.5).round().numpy()).max() <= 1
        assert (folder / "out" / ("red", "blue")[k % 2] / f"{k:06d}.png").exists()


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_shows_every_image_in_its_place(channels):
    x = np.linspace(-1, 1, 7 * channels * 20, dtype=np.float32).reshape(7, channels, 4, 5)
    near = [-2, -1, -0.9961, -0.9960, 1, 2]  # -0.99608 is in the middle of the first two
    assert sample.to_pixels(np.float32(near)).tolist() == [0, 0, 0, 1, 255, 255]
    pixels = sample.to_pixels(x)
    for rows, columns in (None, 3), (2, 4):
        image = np.atleast_3d(sample.grid(pixels, rows))
        height, width = 6 * (rows or 3), 7 * columns
        scale = round(512 / max(height, width))
        assert image.shape == (scale * height, scale * width, channels)
        cells = image[::scale, ::scale].reshape(rows or 3, 6, columns, 7, channels)
        for k in range(columns * (rows or 3)):
            row, column = (k % rows, k // rows) if rows else divmod(k, columns)
            cell = cells[row, 1:-1, column, 1:-1].transpose(2, 0, 1)
            assert (cell == (pixels[k] if k < 7 else 255)).all()
    assert sample.grid(pixels, 8) == sample.grid(pixels)  # fewer images than rows
    many = np.zeros((66, *pixels.shape[1:]), np.uint8)
    assert sample.grid(many, 33) == sample.grid(many)


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "code, said, flags",
    [
        (2, "invalid choice: 'sa-solver'", ["--sampler sa-solver"]),
        (2, "unrecognized arguments: --", ["--eta 1", "--step 5"]),
        (2, "-n: invalid int value: 'x'", ["-n x"]),
        (1, "-n and --batch must be at least 1, --first and --seed at least 0",
         ["-n 0", "--batch 0", "--first -1", "--seed -1"]),
        (1, "-n 257 needs --dir, because --out shows at most 256", ["-n 257"]),
        (1, "--out o.jpg must be a PNG file", ["--out o.jpg"]),
        (1, "must not be in --dir", ["--dir new --out new/a/0.png", "--dir . --first 9"]),
        (1, "sample.py: mine must be new or empty, unless --first is above 0", ["--dir mine"]),
        (1, "can't be written", ["--out mine/a.png/b.png", "--dir mine/a.png", "--out mine.png"]),
        (1, "--steps must be 1..1000", ["--steps 1001", "--steps 0"]),
        (1, "has the classes ['blue', 'green', 'red'], not 'pink'", ["--class red pink"]),
        (1, "has the classes [], not 'red'", ["--onnx plain.onnx --class red"]),
        (1, "guidance must be finite, and 0 without classes",
         ["--guidance nan", "--onnx plain.onnx --guidance 1"]),
        (1, "device must be", ["--device tpu"]),
        (1, "ONNX Runtime can't use CUDA", ["--device cuda"]),
        (1, "can't be opened", ["--onnx mine/a.png"]),
        (1, "nowhere.onnx is not there; run export.py first",
         ["--onnx nowhere.onnx --out new/x.png --dir new/all"]),
    ],
)  # fmt: skip
def test_wrong_flags_are_refused_before_sampling(code, said, flags, program, folder, monkeypatch):
    monkeypatch.setattr(sample, "batches", None)  # no step may be taken
    (folder / "mine").mkdir()
    (folder / "mine.png").mkdir()
    (folder / "plain.onnx").write_bytes(onnx_file(classes=False))
    (folder / "mine" / "a.png").write_text("mine")
    for words in flags:
        assert said in program(*words.split(), code=code)
    names = {"sample.py", "model.onnx", "plain.onnx", "mine", "mine.png", "a.png"}
    assert {path.name for path in folder.rglob("*")} == names
    assert (folder / "mine" / "a.png").read_text() == "mine"


def test_foreign_files_are_refused(program, folder):
    """Among them are classes whose images would leave the folder of --dir."""
    (folder / "model.onnx").write_bytes(onnx_file(betas=None))
    said = program("--dir", "out", code=1)
    assert "model.onnx was not written by export.py: it lacks ddpm.betas" in said
    for name in "..", "../../x", "/x", ".":
        (folder / "model.onnx").write_bytes(onnx_file(("a", "b", name)))
        said = program("--dir", "out", code=1)
        assert f"{name!r} can't be the name of a folder" in said


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_values_that_are_not_finite_are_not_saved(wrong, program, folder, monkeypatch):
    """What was finished before is. A single infinite eps is noticed, although x0_hat is clipped."""
    run, calls = onnxruntime.InferenceSession.run, []

    def fail_late(self, *args):
        calls.append(args)
        (eps,) = run(self, *args)
        return [np.where(len(calls) == 8, np.float32(wrong), eps)]

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", fail_late)
    words = "-n", 6, "--batch", 3, "--steps", 5
    said = program(*words, "--dir", "out", code=1)
    assert said.endswith("after 3 images, the network's output is not finite")
    assert "samples.png: 3 images of" in said and [*images_in(folder / "out")] == [0, 1, 2]
    Path("samples.png").unlink()
    calls[:] = [None] * 5
    assert "after 0 images" in program(*words, code=1) and not Path("samples.png").exists()


@pytest.mark.parametrize("factor, fault", [(1.02, None), (1.1, "wrong"), (np.nan, "wrong")])
def test_cuda_must_agree_with_the_eps_of_the_file(factor, fault, program, folder, monkeypatch):
    """TF32, which is less exact, must pass. minimal.py writes no answer to compare with."""
    cuda = "CUDAExecutionProvider"

    class Cuda(onnxruntime.InferenceSession):
        """A session on the CPU that claims to be on CUDA, and multiplies eps by the factor."""

        def __init__(self, path, options, providers, **_):
            assert providers[0][0] == cuda
            super().__init__(path, options, providers=["CPUExecutionProvider"])

        def get_providers(self):
            return [cuda]

        def run(self, *args):
            return [factor * eps for eps in super().run(*args)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Cuda)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [cuda])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: loaded.append(1))
    loaded = []
    for device in "cuda", "auto":
        monkeypatch.setattr(shutil, "which", lambda name, device=device: device == "auto")
        said = program("-n", 3, "--steps", 2, "--device", device, code=int(bool(fault)))
        assert ("eps on CUDA is wrong; use --dev" if fault else f"2 steps on {cuda}{HINT}") in said
        assert loaded.pop()
    (folder / "model.onnx").write_bytes(onnx_file(eps_of_example=None))
    assert "is wrong" not in program("-n", 3, "--steps", 2, code=int(factor != factor))


@pytest.mark.parametrize("package", ["onnxruntime", "onnxruntime-gpu"])
def test_card_that_cannot_be_used_is_said_in_a_line(package, program, monkeypatch):
    """The line says what to install; --device cuda ends with it."""
    found = ["CPUExecutionProvider", "CUDAExecutionProvider"][: 1 + (package[-1] == "u")]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: found)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    line = "ONNX Runtime can't use CUDA. If the driver is 580 or newer, "
    line += 'pip uninstall -y onnxruntime; pip install "onnxruntime-gpu[cuda,cudnn]"'
    said = program("-n", 1, "--steps", 1)
    assert f"{line}\n" in said and f"on CPUExecutionProvider{HINT}" in said
    assert program("--device", "cuda", code=1).endswith(f"sample.py: {line}")


# ------------------------------------------------------------------------------ signals and outputs


@posix
@pytest.mark.parametrize(
    "name, pipe",
    [("SIGINT", None), ("SIGTERM", None), ("SIGHUP", None), ("SIGINT", "2>&1 | tee log.txt")],
)
def test_signal_saves_the_batches_that_are_finished(name, pipe, begin, folder):
    """The exit status is that of the signal. Ctrl-C reaches both sides of a pipe."""
    process, number = begin(*LONG, pipe=pipe), getattr(signal, name)
    while not Path("all/blue/000003.png").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    os.killpg(process.pid, number)
    said, _ = process.communicate(timeout=60)
    n = len(images_in(folder / "all"))
    assert n > 0 and n % 3 == 0 and Path("samples.png").exists()
    if not pipe:
        assert process.returncode == -number
        assert f"samples.png: {min(n, 256)} images of blue, green, red\n" in said
        left = f"stopped after {n:,} of 9,999 images; for the rest, add --first {n} -n {9999 - n}\n"
        assert said.endswith(left)


@posix
@pytest.mark.parametrize("moment", [0.1, 0.3, 0.6])
def test_ctrl_c_at_any_moment_ends_the_program(moment, begin, folder):
    """What it has saved is whole."""
    process = begin(*LONG)
    time.sleep(moment)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    n = len(images_in(folder / "all"))
    assert n % 3 == 0 and Path("samples.png").exists() == (n > 0)
    # The interpreter has no handler in its first moments.
    at_start = process.returncode == 1 and n == 0 and "KeyboardInterrupt" in said
    assert process.returncode == -signal.SIGINT or at_start, said
