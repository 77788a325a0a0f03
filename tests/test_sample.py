"""The promises of sample.py: the network file, the samples, the outputs, signals; and the demo."""

import io
import json
import os
import re
import signal
import sys
import time

import numpy as np
import onnx
import pytest
import torch
from conftest import FULL_DISK, HERE, PAPER, posix, python, read
from PIL import Image

import beyond
import ddpm_numpy
import sample
from ddpm import Diffusion, UNet, linear_betas
from images import from_pixels, read_image, to_pixels
from support.data import count_right, demo_images


@pytest.fixture
def draw(trained, tmp_path, run):
    """Run sample.py with --dir; returns the images in the folder."""

    def call(folder, *flags):
        run("sample.py", "--onnx", trained[0] / "model.onnx", "--steps", 5, "--dir", folder, *flags,
            cwd=tmp_path)  # fmt: skip
        paths = sorted((tmp_path / folder).glob("[!.]*"))
        assert [path.name for path in paths] == [f"{k:06d}.png" for k in range(len(paths))]
        return [np.asarray(Image.open(path)).astype(int).transpose(2, 0, 1) for path in paths]

    return call


@pytest.fixture
def network(trained):
    """The network of model.onnx in torch, with the averaged weights."""
    state = read(trained[0] / "run")
    model = UNet(**state["config"]["model"]).eval()
    model.load_state_dict(state["ema"])
    return model


# --------------------------------------------------------------------------------- the network file


def test_foreign_and_missing_models_are_one_line(trained, tmp_path, run):
    said = run("sample.py", cwd=tmp_path, code=1)
    assert "sample.py: model.onnx does not exist; python export.py writes it" in said
    whole = (trained[0] / "model.onnx").read_bytes()
    for content in (whole[: len(whole) // 2], b"garbage", b""):
        (tmp_path / "model.onnx").write_bytes(content)
        with pytest.raises(ValueError, match="can't be opened by ONNX Runtime"):
            ddpm_numpy.Network(tmp_path / "model.onnx")
        assert "can't be opened" in run("sample.py", cwd=tmp_path, code=1)
    proto = onnx.load_from_string(whole)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="was not written by export"):
        ddpm_numpy.Network(tmp_path / "model.onnx")
    assert "it lacks ddpm.betas" in run("sample.py", cwd=tmp_path, code=1)


def test_folder_in_place_of_a_model_says_what_to_do(trained, run):
    said = run("sample.py", "--onnx", "run", cwd=trained[0], code=1)
    assert "first: python export.py --checkpoint run" in said


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("betas", [0.1, 2.0], "no schedule"),
        ("betas", [], "no schedule"),
        ("betas", {"a": 1}, "do not fit"),
        ("variance", "x", "no schedule"),
        ("image_shape", [3, 8], "do not fit"),
        ("image_shape", [3, 8, "x"], "do not fit"),
        ("image_shape", [1, 8, 8], "do not fit"),
        ("classes", ["a", "a", "b"], "classes are ['a', 'a', 'b']"),
        ("classes", ["a", "b", "c", "d"], "do not fit"),
        ("classes", [], "do not fit"),
        ("classes", ["a", "\x1b[31m", "b"], "a class must not be named '\\x1b[31m'"),
    ],
)
def test_metadata_that_do_not_fit_the_network_are_refused(name, value, said, coloured, tmp_path):
    proto = onnx.load(coloured / "model.onnx")
    entry = next(p for p in proto.metadata_props if p.key == f"ddpm.{name}")
    entry.value = json.dumps(value)
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=re.escape(said)):
        ddpm_numpy.Network(tmp_path / "model.onnx")


def test_missing_packages_are_one_line():
    for package in ("numpy", "PIL", "tqdm"):
        code = f"import sys; sys.modules[{package!r}] = None; import sample"
        said = python("-c", code, cwd=HERE, code=1)
        assert said.startswith(f"sample.py needs {package}: pip install") and "Trace" not in said


def test_missing_onnxruntime_is_one_line(trained, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install onnxruntime" in run("sample.py", cwd=trained[0], code=1)


def test_cuda_that_is_not_there_is_said(trained, run):
    said = run("sample.py", "--device", "cuda", cwd=trained[0], code=1)
    assert "ONNX Runtime can't use CUDA; see Accelerators" in said
    said = run("sample.py", "-n", 1, "--steps", 1, cwd=trained[0])
    assert "model.onnx on CPU; to use a GPU, see Accelerators" in said


NO_TORCH = """
import importlib.abc, runpy, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "onnx", "onnxscript", "ddpm", "data", "checkpoint", "train", "export"):
            raise ImportError(f"{name} must not be imported here")
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_sampling_needs_no_torch_and_importing_it_no_onnxruntime(trained, tmp_path):
    args = ["--onnx", trained[0] / "model.onnx", "-n", 2, "--steps", 3, "--out", "apart/s.png"]
    env = os.environ | {"PYTHONPATH": str(HERE)}
    python("-c", NO_TORCH, HERE / "sample.py", *args, cwd=tmp_path, env=env)
    assert (tmp_path / "apart" / "s.png").is_file()
    code = "import sys, sample; print({'onnxruntime', 'torch'} & set(sys.modules))"
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
    assert max(np.abs(x - y).max() for x, y in zip(a, b, strict=True)) <= 1  # rounding at most
    assert all(np.abs(x - y).max() <= 1 for x, y in zip(a, c, strict=False))
    assert all(np.abs(x - y).max() > 30 for x, y in zip(c, d, strict=True))
    assert np.abs(a[0] - a[1]).max() > 30
    again = draw("again", "-n", 7, "--batch", 7)
    assert all(np.array_equal(x, y) for x, y in zip(a, again, strict=True))


@pytest.mark.parametrize(
    "flags, sampler, eta",
    [("", "dpm", None), ("--sampler ddpm", "ddpm", None), ("--sampler ddim", "ddim", 0.0),
     ("--eta 0.5", "ddim", 0.5)],
)  # fmt: skip
def test_program_equals_the_torch_sampler(flags, sampler, eta, network, draw):
    """From the seed to the pixels: sample.py against ddpm.py with the EMA weights."""
    pixels = draw("a", "-n", 2, *flags.split())
    draw_noise = ddpm_numpy.noise_of(0, 0, (2, 3, 8, 8))
    x0 = beyond.sample(PAPER, network, (2, 3, 8, 8), 5, sampler, eta,
                      draw_noise=lambda: torch.from_numpy(draw_noise()))  # fmt: skip
    expected = ((x0 + 1) * 127.5).round().numpy()
    assert max(np.abs(p - e).max() for p, e in zip(pixels, expected, strict=True)) <= 1


def test_interpolation_between_two_images(trained, network, image_folder, tmp_path, run):
    """The grid of the program: the images at its ends, and between them what ddpm.py makes."""
    files = [image_folder / "0.png", image_folder / "deep" / "LOUD.JPG"]
    run("sample.py", "--onnx", trained[0] / "model.onnx", "--interpolate", *files,
        "--t", 30, 600, "--steps", 40, "--out", "i.png", cwd=tmp_path)  # fmt: skip
    image = np.asarray(Image.open(tmp_path / "i.png")).astype(int)
    scale = image.shape[0] // (2 * 10)
    assert scale == 6  # as in every other grid
    assert image.shape[0] == 2 * 10 * scale and image.shape[2] == 3
    image = image[:, image.shape[1] - 13 * 10 * scale :]  # without "t = 30" and "t = 600"
    tiles = image[::scale, ::scale].reshape(2, 10, 13, 10, 3).transpose(0, 2, 4, 1, 3)
    tiles = tiles[..., 1:-1, 1:-1]  # (2, 13, C, H, W)
    ends = [read_image(file, 8, 3) for file in files]
    x0 = [torch.from_numpy(from_pixels(end))[None] for end in ends]
    for row, t in zip(tiles, (30, 600), strict=True):
        assert np.array_equal(row[0], ends[0]) and np.array_equal(row[12], ends[1])
        z = ddpm_numpy.noise_of(0, 0, (1, 3, 8, 8))
        x_t = [PAPER.q_sample(x, torch.tensor([t]), torch.from_numpy(z())) for x in x0]
        x_t = torch.cat([torch.lerp(x_t[0], x_t[1], k / 10) for k in range(11)])
        chain = Diffusion(linear_betas()[: t + 1])
        out = beyond.sample(chain, network, x_t.shape, min(40, t + 1), x_T=x_t,
                            draw_noise=lambda z=z: torch.from_numpy(z()))  # fmt: skip
        assert np.abs(row[1:-1] - ((out + 1) * 127.5).round().numpy()).max() <= 1


def test_inpainting_keeps_the_image_outside_the_mask(trained, network, image_folder, tmp_path, run):
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 3:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    file = image_folder / "0.png"
    run("sample.py", "--onnx", trained[0] / "model.onnx", "--inpaint", file, "mask.png", "-n", 2,
        "--steps", 20, "--dir", "out", cwd=tmp_path)  # fmt: skip
    drawn = np.stack([read_image(path, 8, 3) for path in sorted((tmp_path / "out").glob("*.png"))])
    known = torch.from_numpy(from_pixels(read_image(file, 8, 3))), torch.from_numpy(mask > 0)
    z = ddpm_numpy.noise_of(0, 0, (2, 3, 8, 8))
    x0 = beyond.sample(
        PAPER, network, (2, 3, 8, 8), 20, draw_noise=lambda: torch.from_numpy(z()), known=known
    )
    assert np.abs(drawn - to_pixels(x0.numpy())).max() <= 1
    kept = np.broadcast_to(mask == 0, drawn.shape)
    change = np.abs(drawn.astype(int) - read_image(file, 8, 3))
    assert not change[kept].any() and change[~kept].max() > 9


@pytest.mark.parametrize(
    "mode, black, white, share",
    [
        ("L", 0, 255, "50%"),
        ("L", 0, 1, "50%"),
        ("1", 0, 1, "50%"),
        ("RGBA", (0, 0, 0, 0), (255, 255, 255, 255), "50%"),
        ("RGBA", (0, 0, 0, 255), (255, 255, 255, 255), "50%"),
        ("RGBA", (0, 0, 0, 255), (255, 255, 255, 254), "50%"),
        ("L", 0, 0, "0%"),
        ("L", 255, 255, "100%"),
    ],
)
def test_masks_as_people_draw_them(mode, black, white, share, trained, image_folder, tmp_path, run):
    mask = Image.new(mode, (8, 8), black)
    mask.paste(white, (0, 0, 8, 4))
    mask.save(tmp_path / "mask.png")
    words = ["--inpaint", image_folder / "0.png", "mask.png", "-n", 1, "--steps", 2, "--dir", "out"]
    said = run("sample.py", "--onnx", trained[0] / "model.onnx", *words, cwd=tmp_path)
    assert f"the mask selects {share} of the image" in said
    if share == "50%":
        drawn = read_image(tmp_path / "out" / "000000.png", 8, 3)
        same = (drawn == read_image(image_folder / "0.png", 8, 3)).all((0, 2))
        assert same[4:].all() and not same[:4].all()


def test_mask_is_turned_as_its_exif_says(trained, image_folder, tmp_path, run):
    """A mask on a transparent layer: its left half is opaque, and on the screen its upper half."""
    mask, exif = Image.new("RGBA", (8, 8), (0, 0, 0, 0)), Image.Exif()
    mask.paste((255, 255, 255, 255), (0, 0, 4, 8))
    exif[0x112] = 6  # rotated by 90 degrees
    mask.save(tmp_path / "mask.png", exif=exif)
    words = ["--inpaint", image_folder / "0.png", "mask.png", "-n", 1, "--steps", 2, "--dir", "out"]
    run("sample.py", "--onnx", trained[0] / "model.onnx", *words, cwd=tmp_path)
    drawn = read_image(tmp_path / "out" / "000000.png", 8, 3)
    same = (drawn == read_image(image_folder / "0.png", 8, 3)).all((0, 2))
    assert same[4:].all() and not same[:4].all()


def test_samples_that_are_not_finite_are_not_saved(trained, image_folder, tmp_path, run):
    proto = onnx.load(trained[0] / "model.onnx")
    weight = next(w for w in proto.graph.initializer if w.name.endswith("conv_out.bias"))
    weight.CopyFrom(onnx.numpy_helper.from_array(np.full(3, np.nan, np.float32), weight.name))
    onnx.save(proto, tmp_path / "nan.onnx")
    good = image_folder / "0.png"
    for flags in (["--dir", "out"], ["--interpolate", good, good]):
        words = ["--onnx", "nan.onnx", "--steps", 2, *flags]
        assert "not finite, so no image is saved" in run("sample.py", *words, cwd=tmp_path, code=1)
    assert not list(tmp_path.rglob("*.png"))


def test_long_sampling_says_what_fewer_steps_would_take(trained, tmp_path, run, monkeypatch):
    clock = iter(range(0, 10**6, 5))
    monkeypatch.setattr(sample.time, "monotonic", lambda: next(clock))
    words = ["--onnx", trained[0] / "model.onnx", "-n", 2, "--steps"]
    said = run("sample.py", *words, 100, cwd=tmp_path)
    assert len(re.findall(r"about 2 min; --steps 20: about \d\d s", said)) == 1
    assert "--steps 20" not in run("sample.py", *words, 20, cwd=tmp_path)


def test_interrupted_interpolation_keeps_its_rows(
    trained, image_folder, tmp_path, run, monkeypatch
):
    chain, calls = sample.sample_progressive, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        yield from chain(*args)

    monkeypatch.setattr(sample, "sample_progressive", interrupted)
    good = image_folder / "0.png"
    words = ["--interpolate", good, good, "--t", 10, 20, 30, 40, "--steps", 2]
    said = run("sample.py", "--onnx", trained[0] / "model.onnx", *words, cwd=tmp_path, code=1)
    assert "stopped after 2 of 4 rows" in said
    assert Image.open(tmp_path / "samples.png").height == 2 * 60


@pytest.mark.parametrize("name", ["../../x", "/x", "..", "", "a/b", "..\\x", "C:\\x", "C:x"])
def test_class_of_a_stranger_never_leaves_the_folder(name, coloured, tmp_path, run):
    proto = onnx.load(coloured / "model.onnx")
    classes = next(p for p in proto.metadata_props if p.key == "ddpm.classes")
    classes.value = json.dumps(["blue", name, "red"])
    onnx.save(proto, tmp_path / "model.onnx")
    said = run("sample.py", "--dir", "out", "--steps", 1, cwd=tmp_path, code=1)
    assert "a class must not be named" in said
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_weights_outside_of_the_file_are_not_read(trained, tmp_path):
    """ONNX files may name other files for their weights; a path out of the folder is refused."""
    proto = onnx.load(trained[0] / "model.onnx")
    (tmp_path / "secret").write_bytes(bytes(4 * 3))
    weight = next(w for w in proto.graph.initializer if w.name.endswith("conv_out.bias"))
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    for path in ("../secret", str(tmp_path / "secret")):
        del weight.external_data[:]
        weight.external_data.add(key="location", value=path)
        (tmp_path / "inside").mkdir(exist_ok=True)
        (tmp_path / "inside" / "model.onnx").write_bytes(proto.SerializeToString())
        with pytest.raises(ValueError, match="can't be opened"):
            ddpm_numpy.Network(tmp_path / "inside" / "model.onnx", "cpu")


def test_bug_keeps_its_traceback(trained, run, monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(sample, "sample_progressive", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run("sample.py", "--onnx", trained[0] / "model.onnx", cwd=tmp_path)
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------- the outputs


def test_outputs_that_are_inputs_or_can_not_be_written_are_refused(
    trained, image_folder, tmp_path, run, monkeypatch
):
    monkeypatch.setattr(sample, "sample_progressive", None)  # no step may be taken
    photo = (image_folder / "0.png").read_bytes()
    (tmp_path / "photo.png").write_bytes(photo)
    (tmp_path / "same.png").hardlink_to(tmp_path / "photo.png")
    onnx = ["--onnx", trained[0] / "model.onnx"]
    for words in (
        ["--inpaint", "photo.png", image_folder / "0.png", "--out", "photo.png"],
        ["--inpaint", image_folder / "0.png", "photo.png", "--strip", "./photo.png"],
        ["--interpolate", "photo.png", "photo.png", "--out", "same.png"],
    ):
        said = run("sample.py", *onnx, *words, cwd=tmp_path, code=1)
        assert "is also read, so it is not written; choose another name" in said
    assert (tmp_path / "photo.png").read_bytes() == photo
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    for words in ([], ["--gif", "new/x.gif"], ["--dir", "out"]):
        assert "can't be written" in run("sample.py", *onnx, *words, cwd=tmp_path, code=1)


def test_interrupted_folder_is_continued(trained, tmp_path, run, monkeypatch):
    """By the same command, also with a larger -n: the images are those of one command."""
    words = ["--onnx", trained[0] / "model.onnx", "--steps", 3, "--batch", 2]
    run("sample.py", *words, "-n", 7, "--dir", "whole", "--out", "whole.png", cwd=tmp_path)
    chain, drawn = sample.sample_progressive, []

    def interrupted(*args, **kwargs):
        drawn.append(1)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        yield from chain(*args, **kwargs)

    monkeypatch.setattr(sample, "sample_progressive", interrupted)
    words += ["--dir", "parts", "--out", "parts.png"]
    assert "stopped after 4 of 6" in run("sample.py", *words, "-n", 6, cwd=tmp_path, code=1)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("*.png")}
    said = run("sample.py", *words, "-n", 6, cwd=tmp_path)
    assert "parts has the first 4 images already" in said and "parts.png: 6 images, " in said
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    said = run("sample.py", *words, "-n", 7, "--gif", "x.gif", cwd=tmp_path)
    assert "so --gif and --strip have nothing to show" in said
    said = run("sample.py", *words, "-n", 7, cwd=tmp_path)
    assert "has the first 7 images already\n" in said and said.rstrip().endswith("7 images")
    a, b = (sorted((tmp_path / name).glob("*.png")) for name in ("whole", "parts"))
    for one, other in zip([*a, tmp_path / "whole.png"], [*b, tmp_path / "parts.png"], strict=True):
        np.testing.assert_allclose(*(np.asarray(Image.open(p)).astype(int) for p in (one, other)),
                                   atol=1)  # fmt: skip
    for other in (["--seed", 1], ["--steps", 4], ["--eta", 0]):
        said = run("sample.py", *words, *other, "-n", 7, cwd=tmp_path, code=1)
        assert "or one that the same command has begun" in said


@posix
def test_full_disk_is_one_line(trained, tmp_path):
    words = ["--onnx", trained[0] / "model.onnx", "-n", 200, "--steps", 1]
    code = FULL_DISK.replace("100_000", "20_000")
    said = python("-c", code, HERE / "sample.py", *words, cwd=tmp_path, code=1)
    assert "samples.png can't be written and stays as it was: File too large\n" in said
    assert "Traceback" not in said and not list(tmp_path.iterdir())


def test_jupyters_stdout_is_enough(trained, tmp_path, run, monkeypatch):
    """It has no method `reconfigure`."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    run("sample.py", "--onnx", trained[0] / "model.onnx", "--steps", 1, "-n", 1, cwd=tmp_path)
    assert (tmp_path / "samples.png").is_file()


def test_gif_and_strip(draw, tmp_path):
    draw("a", "-n", 3, "--gif", "b/x.gif", "--strip", "b/x.png", "--steps", 30)
    with Image.open(tmp_path / "b" / "x.gif") as gif:
        assert gif.n_frames == 31
    draw("c", "-n", 3, "--strip", "b/short.png")  # 5 steps
    for name, columns in (("x", sample.STRIP), ("short", 5)):
        width, height = Image.open(tmp_path / "b" / f"{name}.png").size
        assert height / width == pytest.approx(6 / columns)  # 3 images, 2 rows


def test_grid_shows_the_first_256_images(trained, tmp_path, run):
    for flags, said in (
        ("-n 5", "samples.png: 5 images, "),
        ("-n 257 --dir all", "samples.png: the first 256 of 257 images, "),
    ):
        flags = ["--onnx", trained[0] / "model.onnx", "--steps", 1, "--batch", 99, *flags.split()]
        assert said in run("sample.py", *flags, cwd=tmp_path)
    assert len(list((tmp_path / "all").glob("*.png"))) == 257


@pytest.mark.parametrize(
    "flags, code, said",
    [
        ("-n 0", 2, "-n and --batch must be at least 1"),
        ("-n x", 2, "-n: invalid int value"),
        ("--batch 0", 2, "-n and --batch must be at least 1"),
        ("--seed -1", 2, "--seed at least 0"),
        ("-n 257", 2, "-n 257 needs --dir, because --out shows at most 256 images"),
        ("--eta 2", 2, "--eta must be from 0 to 1"),
        ("--eta nan", 2, "--eta must be from 0 to 1"),
        ("--eta 0 --sampler dpm", 2, "is only for --sampler ddim"),
        ("--sampler euler", 2, "--sampler: invalid choice: 'euler'"),
        ("--steps 0", 1, "--steps must be 1..1000"),
        ("--steps 1001", 1, "--steps must be 1..1000"),
        ("--interpolate {good} {good} --t 1000", 1, "--t 0..999"),
        ("--interpolate {broken} {good}", 1, "broken.png can't be read"),
        ("--interpolate {good} nowhere.png", 1, "nowhere.png can't be read"),
        ("--inpaint {good} {broken}", 1, "broken.png can't be read"),
        (
            "--interpolate {good} {good} --inpaint {good} {good}",
            2,
            "can't be combined with --inpaint",
        ),
        ("--interpolate {good} {good} --dir new", 2, "can't be combined with --inpaint, -n, --dir"),
        ("--interpolate {good} {good} -n 3", 2, "can't be combined with"),
        ("--interpolate {good} {good} --gif x.gif", 2, "can't be combined with"),
        ("--out o.psd", 2, "o.psd must be a file such as x.png or x.gif"),
        ("--out o.xbm", 2, "o.xbm must be a file such as"),
        ("--out o.grib", 2, "o.grib must be a file such as"),
        ("--out photos", 2, "photos must be a file such as"),
        ("--out photos/mine.png/x.png", 1, "mine.png is not a folder"),
        ("--t 5", 2, "--t needs --interpolate"),
        ("--guidance nan", 2, "--guidance must be a finite number"),
        (
            "--interpolate {good} {good} --guidance 1",
            2,
            "takes at most one class, and exactly one with --guidance",
        ),
        ("--out nosuffix", 2, "nosuffix must be a file such as"),
        ("--strip s", 2, "s must be a file such as"),
        ("--gif o.jpg", 2, "o.jpg must be a file such as x.png or x.gif"),
        ("--dir photos", 1, "--dir photos must be a new or empty folder"),
        ("--dir photos/mine.png", 1, "mine.png is not a folder"),
    ],
)
def test_impossible_flags_are_refused_before_sampling(
    flags, code, said, trained, image_folder, tmp_path, run, monkeypatch
):
    monkeypatch.setattr(sample, "sample_progressive", None)  # no step may be taken
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.png").write_text("mine")
    flags = flags.format(good=image_folder / "0.png", broken=image_folder / "broken.png").split()
    assert said in run("sample.py", "--onnx", trained[0] / "model.onnx", *flags, cwd=tmp_path,
                       code=code)  # fmt: skip
    assert [path.name for path in tmp_path.rglob("*")] == ["photos", "mine.png"]


@pytest.mark.parametrize(
    "program, default",
    [("train", "[800000]"), ("evaluate", "[128]"), ("export", "[model.onnx;"), ("sample", "[64]")],
)
def test_help_has_an_example_and_the_defaults(program, default, tmp_path, run):
    said = run(f"{program}.py", "--help", cwd=tmp_path).lstrip()
    assert f"    python {program}.py" in said and default in said
    assert said.splitlines()[0].startswith(f"usage: python {program}.py")


# ------------------------------------------------------------------------------------------ signals


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_the_batches_that_are_finished(number, trained, tmp_path, start):
    """Also where SIGINT is ignored at the start, as in a script's background job."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    process = start("sample.py", "--onnx", trained[0] / "model.onnx", "-n", 256, "--batch", 2,
                    "--dir", "all", cwd=tmp_path)  # fmt: skip
    signal.signal(signal.SIGINT, before)
    while not (tmp_path / "all" / "000003.png").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 1 and "Traceback" not in said
    drawn = len(list((tmp_path / "all").glob("*.png")))
    assert f"samples.png: {drawn} images, " in said
    assert said.rstrip().endswith(f"sample.py: stopped after {drawn} of 256 images")
    with Image.open(tmp_path / "samples.png") as image:
        image.load()


def test_interrupt_before_the_first_image_saves_nothing(trained, tmp_path, run, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "sample_progressive", interrupt)
    said = run("sample.py", "--onnx", trained[0] / "model.onnx", cwd=tmp_path, code=1)
    assert "stopped before an image was finished" in said and not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------- the demo


def test_demo_images_are_told_from_others():
    images = demo_images()
    moved = np.roll(images[0], 3, axis=1)
    noise = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    assert count_right(np.stack([images[0], images[215], moved, noise, 0 * noise + 255])) == 2
    faint, fainter = (to_pixels(from_pixels(images) * factor) for factor in (0.7, 0.5))
    assert count_right(faint) == 216 and count_right(fainter) == 0


@pytest.mark.slow
def test_demo_learns_to_draw_in_four_minutes(demo, tmp_path):
    """90 % of 64 samples are right."""
    python("sample.py", "--onnx", demo / "model.onnx", "--dir", "each", cwd=tmp_path)
    paths = sorted((tmp_path / "each").glob("*.png"))
    images = np.stack([np.asarray(Image.open(path)).transpose(2, 0, 1) for path in paths])
    right = count_right(images)
    assert len(images) == 64 and right >= 0.9 * 64, f"{right} of 64"
