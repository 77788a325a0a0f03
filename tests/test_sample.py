"""The promises of sample.py: the network file, the samples, the outputs, signals; and the demo."""

import io
import itertools
import json
import os
import signal
import sys
import time
from functools import partial

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from closed_forms import PAPER
from conftest import FULL_DISK, HERE, posix, python
from PIL import Image

import beyond
import ddpm_numpy
from ddpm import Diffusion, linear_betas
from images import from_pixels, read_image
from support.demo import are_right
from support.trained import load


@pytest.fixture
def program(trained, tmp_path, run):
    """Run sample.py with the tiny network and five steps; return what it printed."""
    words = ["--onnx", trained[0] / "model.onnx", "--steps", 5]
    return partial(run, "sample.py", *words, cwd=tmp_path)


@pytest.fixture
def draw(program, tmp_path):
    """Run sample.py with --dir; return the images in the folder."""

    def call(folder, *flags):
        program("--dir", folder, *flags)
        return images_in(tmp_path / folder)

    return call


@pytest.fixture
def network(trained):
    """Return the network of model.onnx in torch, with the averaged weights."""
    return load(trained[0] / "run").model


def pixels_of(path):
    return np.asarray(Image.open(path)).astype(int)


def images_in(folder):
    """Return the images that --dir has made, in the order of their numbers: int (n, C, H, W)."""
    paths = sorted(folder.glob("[!.]*"))
    assert [path.name for path in paths] == [f"{k:06d}.png" for k in range(len(paths))]
    return np.stack([pixels_of(path) for path in paths]).transpose(0, 3, 1, 2)


def noise(n):
    """Return the noise that sample.py draws for n images, in torch."""
    draw_noise = ddpm_numpy.noise_of(0, 0, (n, 3, 8, 8))
    return lambda: torch.from_numpy(draw_noise())


def interrupted(number):
    """Return sample_progressive with Ctrl-C at the start of the chain with this number, from 1."""
    chains = itertools.count(1)

    def sample_progressive(*args, complete=ddpm_numpy.sample_progressive, **kwargs):
        if next(chains) == number:
            raise KeyboardInterrupt
        yield from complete(*args, **kwargs)

    return sample_progressive


# --------------------------------------------------------------------------------- the network file


def test_foreign_and_missing_models_are_one_line(trained, tmp_path, run):
    said = run("sample.py", cwd=tmp_path, code=1)
    assert "sample.py: model.onnx does not exist; python export.py writes it" in said
    for name in "run", "run/checkpoint.pt":
        said = run("sample.py", "--onnx", name, cwd=trained[0], code=1)
        assert f"if it is a run, first: python export.py --checkpoint {name}" in said
    said = run("sample.py", "--checkpoint", "model.onnx", cwd=trained[0], code=1)
    assert "model.onnx is not a checkpoint; sample.py draws from it with --onnx" in said
    whole = (trained[0] / "model.onnx").read_bytes()
    for content in (whole[: len(whole) // 2], b"garbage", b""):
        (tmp_path / "model.onnx").write_bytes(content)
        said = run("sample.py", cwd=tmp_path, code=1)
        assert "sample.py: model.onnx can't be opened by ONNX Runtime" in said
    proto = onnx.load_from_string(whole)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "model.onnx")
    said = run("sample.py", cwd=tmp_path, code=1)
    assert "model.onnx was not written by export.py: it lacks ddpm.betas" in said


@pytest.mark.parametrize(
    "name, said, values",
    [
        ("betas", "no schedule", [[0.1, 2.0], []]), ("betas", "do not fit", [{"a": 1}]),
        ("variance", "no schedule", ["x"]),
        ("image_shape", "do not fit", [[3, 8], [3, 8, "x"], [1, 8, 8], [3, 100_000, 100_000]]),
        ("classes", "do not fit", [[]]),
        ("classes", "classes are ['a', 'a', 'b']", [["a", "a", "b"]]),
        ("classes", "a class must not be named '\\x1b[31m'", [["a", "\x1b[31m", "b"]]),
        ("classes", "a class must not be named", [["blue", name, "red"] for name in (
            "../../x", "/x", "..", "", "a/b")]),
    ],
)  # fmt: skip
def test_metadata_that_do_not_fit_are_refused(name, said, values, coloured, tmp_path, run):
    """Among them are classes whose images would leave the folder of --dir."""
    proto = onnx.load(coloured / "model.onnx")
    entry = next(p for p in proto.metadata_props if p.key == f"ddpm.{name}")
    for value in values:
        entry.value = json.dumps(value)
        onnx.save(proto, tmp_path / "model.onnx")
        assert said in run("sample.py", "--dir", "out", "--steps", 1, cwd=tmp_path, code=1)
        assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_missing_packages_and_a_missing_gpu_are_one_line(program, monkeypatch):
    for package in ("numpy", "PIL", "tqdm"):
        code = f"import sys; sys.modules[{package!r}] = None; import sample"
        said = python("-c", code, cwd=HERE, code=1)
        assert said.startswith(f"sample.py needs {package}: pip install") and "Trace" not in said
    assert "on CPU, training step 12; to use a GPU, see Accelerators" in program("-n", 1)
    monkeypatch.setattr(ddpm_numpy.shutil, "which", lambda name: name)  # a GPU, but no libraries
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA])
    for search in ("find_spec", "find_library"):
        monkeypatch.setattr(ddpm_numpy, search, lambda name: None)
    said = program("-n", 1)
    assert "CUDA's libraries are missing: pip install -r requirements-cuda.txt" in said
    assert "Failed to load" not in said
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [])
    assert "ONNX Runtime can't use CUDA; see Accelerators" in program("--device", "cuda", code=1)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install onnxruntime" in program(code=1)


CUDA = "CUDAExecutionProvider"


class Cuda:
    """A session on the CPU that claims to be on CUDA, with the given method `run`."""

    def __init__(self, session, run):
        self.session, self.run = session, partial(run, session)

    def get_providers(self):
        return [CUDA, "CPUExecutionProvider"]

    def __getattr__(self, name):
        return getattr(self.session, name)


def wrong(session, names, feeds):
    """Return an eps that is NaN, as if the card lacked a kernel."""
    return [np.nan * eps for eps in session.run(names, feeds)]


def rough(session, names, feeds):
    """Return an eps that is off by 2%, which is more than TF32 causes."""
    return [1.02 * eps for eps in session.run(names, feeds)]


def turned(session, names, feeds):
    """Return an eps with rows and columns swapped, as after a mistake in the layout."""
    return [eps.swapaxes(2, 3) for eps in session.run(names, feeds)]


def failing(session, names, feeds):
    raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : libcudnn.so.9 is missing\nat line 7")


@pytest.mark.parametrize(
    "compute, fault",
    [(rough, None), (wrong, "wrong by nan%"), (turned, "eps that is wrong by "),
     (failing, "libcudnn.so.9 is missing'")],
)  # fmt: skip
def test_cuda_must_agree_with_the_eps_of_the_file(compute, fault, program, monkeypatch):
    """Otherwise, auto says so and uses the CPU, and cuda exits with a line."""
    complete = ddpm_numpy.open_session

    def open_session(path, device, options):
        session = complete(path, "cpu", options)
        return session if device == "cpu" else Cuda(session, compute)

    monkeypatch.setattr(ddpm_numpy, "open_session", open_session)
    said = program("-n", 1)
    assert ("model.onnx on CUDA" in said) == (fault is None)
    if fault:
        assert fault in said and "; using the CPU instead" in said and "on CPU" in said
        said = program("-n", 1, "--device", "cuda", code=1)
        assert fault in said and said.strip().endswith("; see Accelerators in docs/guide.md")
    monkeypatch.setattr(ddpm_numpy, "MAX_ERROR", 0.01)
    assert "wrong by 2%" in program("-n", 1) or fault


def test_cuda_that_does_not_start_or_gives_up_is_not_used(program, tmp_path, monkeypatch):
    """auto uses the CPU; cuda exits with a line, also if ONNX Runtime falls back to the CPU."""
    complete = onnxruntime.InferenceSession

    class Session:
        def __new__(cls, path, options=None, providers=()):
            if full and len(providers) > 1 and "damaged" not in str(path):
                raise Full("Failed to allocate memory")
            return complete(path, options, providers=["CPUExecutionProvider"])

    class Full(Exception):
        """An exception like ONNX Runtime's: neither a RuntimeError nor a ValueError."""

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(ddpm_numpy, "find_spec", lambda name: name)
    monkeypatch.setattr(ddpm_numpy.shutil, "which", lambda name: name)
    full = True
    said = program("-n", 1)
    assert "CUDA fails: 'Failed to allocate memory'; using the CPU instead" in said
    assert "can't be opened by ONNX Runtime" in program("-n", 1, "--device", "cuda", code=1)
    (tmp_path / "damaged.onnx").write_bytes(b"garbage")
    said = program("--onnx", "damaged.onnx", code=1)
    assert "can't be opened by ONNX Runtime" in said and "CUDA fails" not in said
    full = False
    assert "ONNX Runtime can't use CUDA" in program("-n", 1, "--device", "cuda", code=1)


def test_changed_answer_is_refused_on_cuda_only(trained, run, tmp_path, monkeypatch):
    """Files of earlier versions, without an answer, are opened."""
    proto, complete = onnx.load(trained[0] / "model.onnx"), ddpm_numpy.open_session
    (entry,) = (p for p in proto.metadata_props if p.key == "ddpm.eps_of_example")
    values = json.loads(entry.value)
    assert 32 < len(values) <= 64 and len(entry.value) < 1000
    entry.value = json.dumps([-value for value in values])
    onnx.save(proto, tmp_path / "model.onnx")
    program = partial(run, "sample.py", "-n", 1, "--steps", 1, cwd=tmp_path)
    assert "instead" not in program()
    monkeypatch.setattr(ddpm_numpy, "open_session", lambda path, device, options: (
        Cuda(complete(path, "cpu", options), lambda session, *args: session.run(*args))
    ))  # fmt: skip
    assert "CUDA computes an eps that is wrong by 200%" in program("--device", "cuda", code=1)
    proto.metadata_props.remove(entry)
    onnx.save(proto, tmp_path / "model.onnx")
    assert "model.onnx on CUDA" in program()


def test_sampling_and_decoding_need_no_torch(trained, tmp_path):
    """Importing sample.py does not load ONNX Runtime."""
    hidden = "torch", "onnx", "onnxscript", "ddpm", "support", "train", "export"
    code = f"import sys; sys.modules |= dict.fromkeys({hidden}); import sample; sample.main()"
    args = ["--onnx", trained[0] / "model.onnx", "-n", 2, "--steps", 3, "--out", "apart/s.png"]
    python("-c", code, *args, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(HERE)})
    assert (tmp_path / "apart" / "s.png").is_file()
    code = "import sys, sample, support.data; loaded = set(sys.modules)"
    code += "; print({'onnxruntime', 'torch', 'matplotlib'} & loaded)"
    assert python("-c", code, cwd=HERE).strip() == "set()"


# ------------------------------------------------------------------------------ the reverse process


def test_noise_is_standard_normal():
    draw_noise = ddpm_numpy.noise_of(0, 0, (100, 1, 10, 10))
    first, second = draw_noise(), draw_noise()
    assert first.dtype == np.float32 and not np.array_equal(first, second)
    assert abs(first.mean()) < 0.05 and abs(first.std() - 1) < 0.05
    assert np.abs(np.corrcoef(first.reshape(100, -1)) - np.eye(100)).max() < 0.6


def test_seed_fixes_each_image_at_any_batch_and_n(draw):
    a, b = draw("a", "-n", 7, "--batch", 7), draw("b", "-n", 7, "--batch", 3)
    c, d = draw("c", "-n", 2), draw("d", "-n", 2, "--seed", 1)
    assert (len(a), len(b), len(c)) == (7, 7, 2)
    assert np.abs(a - b).max() <= 1 and np.abs(a[:2] - c).max() <= 1  # rounding at most
    assert all(np.abs(x - y).max() > 30 for x, y in [*zip(c, d, strict=True), a[:2]])
    assert np.array_equal(a, draw("again", "-n", 7, "--batch", 7))


@pytest.mark.parametrize(
    "flags, sampler, eta",
    [("", "sa-solver", None), ("--sampler ddpm", "ddpm", None), ("--sampler ddim", "ddim", 0.0),
     ("--eta 0.5", "ddim", 0.5)],
)  # fmt: skip
def test_program_equals_the_torch_sampler(flags, sampler, eta, network, draw):
    """Compare sample.py, from the seed to the pixels, with ddpm.py and the EMA weights."""
    x0 = beyond.sample(PAPER, network, (2, 3, 8, 8), 5, sampler, eta, draw_noise=noise(2))
    pixels = draw("a", "-n", 2, *flags.split())
    assert np.abs(pixels - ((x0 + 1) * 127.5).round().numpy()).max() <= 1


def test_interpolation_between_two_images(network, image_folder, tmp_path, program):
    """The grid has the two images at its ends, and what ddpm.py draws between them."""
    files = [image_folder / "0.png", image_folder / "deep" / "LOUD.JPG"]
    program("--interpolate", *files, "--t", 30, 600, "--steps", 40, "--out", "i.png")
    image = pixels_of(tmp_path / "i.png")
    scale = 6  # as in every other grid
    assert image.shape[0] == 2 * 10 * scale and image.shape[2] == 3
    image = image[:, image.shape[1] - 13 * 10 * scale :]  # without "t = 30" and "t = 600"
    tiles = image[::scale, ::scale].reshape(2, 10, 13, 10, 3).transpose(0, 2, 4, 1, 3)
    tiles = tiles[..., 1:-1, 1:-1]  # (2, 13, C, H, W)
    ends = [read_image(file, 8, 3) for file in files]
    x0 = [torch.from_numpy(from_pixels(end))[None] for end in ends]
    for row, t in zip(tiles, (30, 600), strict=True):
        assert np.array_equal(row[0], ends[0]) and np.array_equal(row[12], ends[1])
        z = noise(1)
        same = z()
        x_t = [PAPER.q_sample(x, torch.tensor([t]), same) for x in x0]
        x_t = torch.cat([torch.lerp(x_t[0], x_t[1], k / 10) for k in range(11)])
        chain, steps = Diffusion(linear_betas()[: t + 1]), min(40, t + 1)
        out = beyond.sample(chain, network, x_t.shape, steps, x_T=x_t, draw_noise=z)
        assert np.abs(row[1:-1] - ((out + 1) * 127.5).round().numpy()).max() <= 1


CLEAR, BLACK, WHITE = (0, 0, 0, 0), (0, 0, 0, 255), (255, 255, 255, 255)
HALF = (0, 0, 8, 4)  # the upper one


@pytest.mark.parametrize(
    "mode, black, white, box, turned",
    [
        ("L", 0, 255, (3, 2, 8, 6), False), ("L", 0, 255, HALF, False), ("L", 0, 1, HALF, False),
        ("1", 0, 1, HALF, False), ("L", 0, 255, (0, 0, 0, 0), False),
        ("L", 0, 255, (0, 0, 8, 8), False), ("RGBA", CLEAR, WHITE, HALF, False),
        ("RGBA", BLACK, WHITE, HALF, False), ("RGBA", BLACK, (255, 255, 255, 254), HALF, False),
        ("RGBA", CLEAR, WHITE, (0, 0, 4, 8), True),
    ],
)  # fmt: skip
def test_inpainting_redraws_what_the_mask_selects(
    mode, black, white, box, turned, network, program, image_folder, tmp_path
):
    """ddpm.py does the same. The masks are like those people draw, and rotated by their EXIF."""
    mask, exif, selected = Image.new(mode, (8, 8), black), Image.Exif(), np.zeros((8, 8), bool)
    mask.paste(white, box)
    if turned:
        exif[0x112] = 6  # by 90 degrees: the left half is the upper one on the screen
    mask.save(tmp_path / "mask.png", exif=exif)
    left, top, right, bottom = HALF if turned else box
    selected[top:bottom, left:right] = True
    said = program("--inpaint", image_folder / "0.png", "mask.png", "-n", 2, "--dir", "out")
    assert f"the mask selects {selected.mean():.0%} of the image" in said
    drawn, image = images_in(tmp_path / "out"), read_image(image_folder / "0.png", 8, 3)
    known = torch.from_numpy(from_pixels(image)), torch.from_numpy(selected)
    x0 = beyond.sample(PAPER, network, (2, 3, 8, 8), 5, draw_noise=noise(2), known=known)
    assert np.abs(drawn - ((x0 + 1) * 127.5).round().numpy()).max() <= 1
    change = np.abs(drawn - image).max((0, 1))
    assert np.array_equal(change > 9, selected) and not change[~selected].any()


def test_samples_that_are_not_finite_are_not_saved(image_folder, tmp_path, program, monkeypatch):
    monkeypatch.setattr(ddpm_numpy.Network, "__call__", lambda self, x_t, *_: np.nan * x_t)
    good = image_folder / "0.png"
    for flags in (["--dir", "out"], ["--interpolate", good, good]):
        assert "not finite, so no image is saved" in program(*flags, code=1)
    assert not list(tmp_path.rglob("*.png"))


def test_long_sampling_says_what_fewer_steps_would_take(program):
    assert "100 steps; --steps 10 takes 10.0% of the time\n" in program("-n", 2, "--steps", 100)
    assert "--steps 10" not in program("-n", 2, "--steps", 20)


def test_bug_keeps_its_traceback(program, monkeypatch, tmp_path):
    monkeypatch.setattr(ddpm_numpy, "sample_progressive", lambda *_, **__: misspelt)  # noqa: F821
    with pytest.raises(NameError, match="misspelt"):
        program()
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------- the outputs


def test_files_of_a_folder_are_enlarged(program, tmp_path):
    for scale in 1, 3:
        said = program("-n", 2, "--dir", f"by{scale}", "--scale", scale)
        assert f"by{scale}: 2 images as PNG files" in said
    small, large = images_in(tmp_path / "by1"), images_in(tmp_path / "by3")
    assert np.array_equal(small.repeat(3, 2).repeat(3, 3), large)


def test_interrupted_folder_is_continued(program, tmp_path, monkeypatch):
    """The same command, also with a larger -n, continues it with the images of one command."""
    program("--batch", 2, "-n", 7, "--dir", "whole", "--out", "whole.png")
    words = ["--batch", 2, "--dir", "parts", "--out", "parts.png", "-n"]
    monkeypatch.setattr(ddpm_numpy, "sample_progressive", interrupted(1))
    program(*words, 6, "--seed", 5, code=130)  # without an image, other settings may follow
    monkeypatch.setattr(ddpm_numpy, "sample_progressive", interrupted(3))
    assert "stopped after 4 of 6" in program(*words, 6, code=130)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("*.png")}
    said = program(*words, 6)
    assert "parts has 4 of the images already" in said and "parts.png: 6 images (" in said
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    (tmp_path / "parts" / "000001.png").unlink()  # only what is missing is drawn
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("*.png")}
    said = program(*words, 7)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    said = program(*words, 7, "--gif", "x.gif")
    assert "x.gif is not saved, because the first images were drawn before" in said
    assert "has 7 of the images already\n" in said and said.rstrip().endswith("7 images")
    whole, parts = images_in(tmp_path / "whole"), images_in(tmp_path / "parts")
    assert len(whole) == 7 and np.abs(whole - parts).max() <= 1
    whole, parts = pixels_of(tmp_path / "whole.png"), pixels_of(tmp_path / "parts.png")
    assert np.abs(whole - parts).max() <= 1
    for other, name in (["--seed", 1], "seed"), (["--steps", 4], "steps"), (["--eta", 0], "eta"):
        said = program(*words, 7, *other, code=1)
        assert f"or one that the same command started to fill; what differs: {name}\n" in said


@posix
def test_full_disk_is_one_line(trained, tmp_path):
    words = ["--onnx", trained[0] / "model.onnx", "-n", 200, "--steps", 1]
    code = FULL_DISK.replace("100_000", "20_000")
    said = python("-c", code, HERE / "sample.py", *words, cwd=tmp_path, code=1)
    assert "samples.png can't be written: File too large\n" in said
    assert "Traceback" not in said and not list(tmp_path.iterdir())


def test_gif(program, tmp_path, monkeypatch):
    """It is saved in Jupyter, too, whose stdout has no method `reconfigure`."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    program("-n", 3, "--gif", "b/x.gif", "--steps", 15)
    with Image.open(tmp_path / "b" / "x.gif") as gif:
        assert gif.n_frames == 16 and gif.info["duration"] == 200
        gif.seek(15)
        assert gif.info["duration"] == 2000
        last = np.asarray(gif.convert("RGB")).astype(int)
    assert np.abs(last - pixels_of(tmp_path / "samples.png")).mean() < 8  # the error of a palette


def test_grid_shows_the_first_256_images(program, tmp_path):
    said = program("-n", 257, "--dir", "all", "--steps", 1, "--batch", 99)
    assert "samples.png: the first 256 of 257 images (" in said
    assert len(images_in(tmp_path / "all")) == 257


@pytest.mark.parametrize(
    "code, said, flags",
    [
        (2, "-n, --batch and --scale must be at least 1", ["-n 0", "--batch 0", "--scale 0"]),
        (2, "-n 257 needs --dir, because --out shows at most 256 images", ["-n 257"]),
        (2, "unrecognized arguments: --n 16", ["--n 16"]),
        (2, "-n: invalid int value", ["-n x"]), (2, "--seed at least 0", ["--seed -1"]),
        (1, "eta must be from 0 to 1, and is only for", ["--eta 2", "--eta nan"]),
        (1, "it is 0.0 for 'sa-solver'", ["--eta 0 --sampler sa-solver"]),
        (2, "--sampler: invalid choice: 'euler'", ["--sampler euler"]),
        (1, "guidance must be a finite number", ["--guidance nan"]),
        (2, "--t needs --interpolate", ["--t 5"]),
        (2, "takes at most one class, and exactly one with --guidance",
         ["--interpolate {two} --guidance 1"]),
        (2, "can't be combined with --inpaint, -n, --dir or --gif",
         [f"--interpolate {{two}} {flag}" for flag in
          ("--inpaint {two}", "-n 3", "--dir new", "--gif x.gif")]),
        (1, "steps must be 1..1000", ["--steps 0", "--steps 1001"]),
        (1, "this model has T = 1000: --t must be 0..999", ["--interpolate {two} --t 1000"]),
        (1, "nowhere.png can't be read", ["--interpolate {good} nowhere.png"]),
        (1, "broken.png can't be read",
         ["--interpolate {broken} {good}", "--inpaint {good} {broken}"]),
        (1, "mask.png has 4x8 pixels and ", ["--inpaint {good} mask.png"]),
        (2, "{last} must be a ",
         ["--out o.psd", "--out o.xbm", "--out o.grib", "--out nosuffix", "--out photos",
          "--gif o.jpg"]),
        (2, "must be different files", ["--out a.gif --gif ./a.gif"]),
        (1, "mine.png is not a folder", ["--out photos/mine.png/x.png", "--dir photos/mine.png"]),
        (1, "--dir photos must be a new or empty folder", ["--dir photos"]),
        (1, "{last} is also read, so it is not written; choose another name",
         ["--inpaint photos/mine.png {good} --out photos/mine.png",
          "--inpaint {good} photos/mine.png --out ./photos/mine.png",
          "--interpolate photos/mine.png photos/mine.png --out same.png"]),
    ],
)  # fmt: skip
def test_impossible_flags_are_refused_before_sampling(
    code, said, flags, image_folder, tmp_path, program, monkeypatch
):
    monkeypatch.setattr(ddpm_numpy, "sample_progressive", None)  # no step may be taken
    mine, good = tmp_path / "photos" / "mine.png", image_folder / "0.png"
    mine.parent.mkdir()
    mine.write_text("mine")
    (tmp_path / "same.png").hardlink_to(mine)
    Image.new("L", (4, 8)).save(tmp_path / "mask.png")
    for words in flags:
        words = words.format(good=good, two=f"{good} {good}", broken=image_folder / "broken.png")
        assert said.format(last=words.split()[-1]) in program(*words.split(), code=code)
    assert {path.name for path in tmp_path.rglob("*")} == {
        "photos",
        "mine.png",
        "same.png",
        "mask.png",
    }
    assert mine.read_text() == "mine"


def test_outputs_that_can_not_be_written_are_refused_before_sampling(program, monkeypatch):
    monkeypatch.setattr(ddpm_numpy, "sample_progressive", None)  # no step may be taken
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    for words in ([], ["--gif", "new/x.gif"], ["--dir", "out"]):
        assert "can't be written" in program(*words, code=1)


def test_help_has_an_example_and_the_defaults(tmp_path, run):
    defaults = "[800000]", "[128]", "[model.onnx;", "[64]"
    for program, default in zip(("train", "evaluate", "export", "sample"), defaults, strict=True):
        said = run(f"{program}.py", "--help", cwd=tmp_path).lstrip()
        assert said.startswith(f"usage: python {program}.py")
        assert f"    python {program}.py" in said and default in said


# ------------------------------------------------------------------------------------------ signals


def test_interrupted_interpolation_keeps_its_rows(program, image_folder, tmp_path, monkeypatch):
    """Before the first row, or the first image, an interrupt saves nothing."""
    good = image_folder / "0.png"
    rows = ["--interpolate", good, good, "--t", 10, 20, 30, 40]
    for words in [], rows:
        monkeypatch.setattr(ddpm_numpy, "sample_progressive", interrupted(1))
        said = program(*words, code=130)
        assert "stopped before an image was finished" in said and not list(tmp_path.iterdir())
    monkeypatch.setattr(ddpm_numpy, "sample_progressive", interrupted(3))
    assert "stopped after 2 of 4 rows" in program(*rows, code=130)
    assert Image.open(tmp_path / "samples.png").height == 2 * 60


@posix
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signal_saves_the_batches_that_are_finished(name, trained, tmp_path, start):
    """This holds where SIGINT is ignored at the start, too, as in a script's background job."""
    number = getattr(signal, name)
    if name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("nohup started the tests, so sample.py ignores SIGHUP")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    process = start("sample.py", "--onnx", trained[0] / "model.onnx", "-n", 256, "--batch", 2,
                    "--steps", 200, "--dir", "all", cwd=tmp_path)  # fmt: skip
    signal.signal(signal.SIGINT, before)
    while not (tmp_path / "all" / "000003.png").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT and "Traceback" not in said
    drawn = len(list((tmp_path / "all").glob("*.png")))
    assert f"samples.png: {drawn} images (" in said
    assert said.rstrip().endswith(f"sample.py: stopped after {drawn} of 256 images")
    with Image.open(tmp_path / "samples.png") as image:
        image.load()


@pytest.mark.slow
def test_demo_learns_to_draw_in_four_minutes(demo, tmp_path):
    """At least 90% of 64 samples are right."""
    python("sample.py", "--onnx", demo / "model.onnx", "--dir", "each", cwd=tmp_path)
    right = are_right(images_in(tmp_path / "each"))
    assert len(right) == 64 and right.mean() >= 0.9, f"{right.sum()} of 64"
