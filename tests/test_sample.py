"""The promises of sample.py: single images, the network file, the samples, the outputs."""

import contextlib
import os
import shutil
import struct
import sys

import numpy as np
import onnx
import pytest
import torch
from conftest import FULL_DISK, HERE, checkpoint, python
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import sample
import train
from benchmarks.table2 import count_right
from ddpm import Diffusion, UNet, linear_betas
from test_ddpm import PAPER

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX limits")

# ------------------------------------------------------------------------------------------- images


def read_saved(tmp_path, image, name="x.png", size=4, channels=None, **kwargs):
    image.save(tmp_path / name, **kwargs)
    return sample.read_picture(tmp_path / name, size, channels)


def test_transparency_is_white(tmp_path):
    clear_red = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (read_saved(tmp_path, clear_red) == 255).all()
    assert (read_saved(tmp_path, Image.new("LA", (4, 4), (0, 0))) == 255).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0])
    assert (read_saved(tmp_path, palette, transparency=0) == 255).all()
    deep = Image.fromarray(np.full((4, 4), 300, np.uint16))
    assert (read_saved(tmp_path, deep, transparency=300) == 255).all()


@pytest.mark.parametrize("name", ["x.png", "x.tiff", "x.pgm"])
def test_16_bits_are_scaled_and_not_clipped(name, tmp_path):
    ramp = np.linspace(0, 65535, 16).reshape(4, 4).astype(np.uint16)
    ours = read_saved(tmp_path, Image.fromarray(ramp), name)
    assert ours.shape == (1, 4, 4)
    np.testing.assert_array_equal(ours[0], (ramp / 257).round().astype(np.uint8))


def test_palettes_are_grey_or_colour_as_their_colours(tmp_path):
    grey = Image.new("L", (4, 4), 100)
    assert read_saved(tmp_path, grey, "x.gif").shape == (1, 4, 4)
    palette = grey.convert("P")
    assert (read_saved(tmp_path, palette) == 100).all()
    palette.putpalette([k % 256 for k in range(1, 769)])
    assert read_saved(tmp_path, palette).shape == (3, 4, 4)
    with pytest.raises(ValueError, match="channels must be 1 or 3"):
        read_saved(tmp_path, grey, channels=2)


@pytest.mark.parametrize("bits, white_is_zero", [(12, 0), (16, 0), (16, 1)])
def test_tiff_says_its_number_of_bits_and_what_is_white(bits, white_is_zero, tmp_path):
    data = bytes(bits) if white_is_zero else b"\xff" * bits  # eight pixels
    tags = [(256, 8), (257, 1), (258, bits), (259, 1), (262, 1 - white_is_zero), (273, 8),
            (277, 1), (278, 1), (279, len(data))]  # fmt: skip
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    offset = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    (tmp_path / "x.tif").write_bytes(offset + data + struct.pack("<H", 9) + entries + bytes(4))
    assert (sample.read_picture(tmp_path / "x.tif", 4) == 255).all()


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_32_bit_pixels_are_refused(dtype, tmp_path, trained, run):
    """Their range is unknown: 0..1, 0..255 and 0..65535 all occur."""
    image = Image.fromarray(np.full((4, 4), 100, dtype))
    with pytest.raises(ValueError, match="does not say the range"):
        read_saved(tmp_path, image, "x.tiff")
    said = run("sample.py", "--onnx", trained[0] / "model.onnx", "--interpolate", "x.tiff",
               "x.tiff", cwd=tmp_path, code=1)  # fmt: skip
    assert "x.tiff can't be read: the file does not say the range" in said


def test_images_are_turned_upright_and_cropped_to_the_centre(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    half = Image.new("L", (4, 4), 0)
    half.paste(255, (0, 0, 4, 2))
    ours = read_saved(tmp_path, half, exif=exif)[0]
    assert (ours[:2] == 0).all() and (ours[2:] == 255).all()
    wide = Image.new("L", (12, 4), 0)
    wide.paste(255, (4, 0, 8, 4))
    assert (read_saved(tmp_path, wide) == 255).all()


def test_channels_are_those_of_the_file_unless_given(tmp_path):
    grey, green = Image.new("L", (4, 4), 9), Image.new("RGB", (4, 4), (0, 255, 0))
    assert read_saved(tmp_path, grey)[:, 0, 0].tolist() == [9]
    assert read_saved(tmp_path, grey, channels=3)[:, 0, 0].tolist() == [9, 9, 9]
    assert read_saved(tmp_path, green)[:, 0, 0].tolist() == [0, 255, 0]
    assert read_saved(tmp_path, green, channels=1)[:, 0, 0].tolist() == [150]


def test_grid_shows_every_image():
    x = np.linspace(-1, 1, 5, dtype=np.float32)[:, None, None, None] * np.ones((1, 1, 4, 4))
    image = np.asarray(sample.grid(sample.to_pixels(x)))
    scale = image.shape[1] // 18
    tiles = image[3 * scale :: 6 * scale, 3 * scale :: 6 * scale]
    assert tiles.tolist() == [[0, 64, 128], [191, 255, 255]]  # the sixth is left white


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_atomic_write_leaves_the_old_file_and_nothing_else(error, tmp_path):
    (tmp_path / "file").write_text("of before")
    with pytest.raises(type(error)), sample.atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise error
    assert [p.read_text() for p in tmp_path.iterdir()] == ["of before"]
    with sample.atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("new")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["new"]


# ------------------------------------------------------------------------------ the reverse process


@posix
def test_permissions_of_an_old_file_stay(tmp_path, monkeypatch):
    path, image = tmp_path / "x.png", Image.new("L", (2, 2))
    sample.save_image(path, image)
    path.chmod(0o600)
    sample.save_image(path, image)
    assert path.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests may run as root, who may write all
    for write in (sample.save_image, sample.check_output):
        with pytest.raises(PermissionError, match="is write-protected"):
            write(path, image)


def test_link_is_written_through(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link.png").symlink_to("elsewhere/real.png")  # which does not exist yet
    for colour in ("red", "blue"):
        sample.save_image(tmp_path / "link.png", Image.new("RGB", (2, 2), colour))
    assert (tmp_path / "link.png").is_symlink()
    assert os.listdir(tmp_path / "elsewhere") == ["real.png"]
    assert Image.open(tmp_path / "elsewhere" / "real.png").getpixel((0, 0)) == (0, 0, 255)


def test_noise_is_standard_normal_and_the_same_when_drawn_ahead():
    draw_noise = sample.noise_of(0, 0, (100, 1, 10, 10))
    first, second = draw_noise(), draw_noise()
    assert first.dtype == np.float32 and not np.array_equal(first, second)
    assert abs(first.mean()) < 0.05 and abs(first.std() - 1) < 0.05
    assert np.abs(np.corrcoef(first.reshape(100, -1)) - np.eye(100)).max() < 0.6
    one, other = sample.noise_of(3, 5, (2, 1, 4, 4)), sample.noise_of(3, 5, (2, 1, 4, 4))
    other = sample.ahead(other)
    for _ in range(5):
        assert np.array_equal(one(), other())


@pytest.fixture
def draw(trained, tmp_path, run):
    def call(folder, *flags):
        run("sample.py", "--onnx", trained[0] / "model.onnx", "--steps", 5, "--dir", folder, *flags,
            cwd=tmp_path)  # fmt: skip
        paths = sorted((tmp_path / folder).iterdir())
        return [np.asarray(Image.open(path)).astype(int) for path in paths]

    return call


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


def test_images_that_are_not_saved_are_counted(trained, tmp_path, run):
    for flags, said in (
        ("-n 256", "256 images"),
        ("-n 257", "the first 256 of 257 images"),
        ("-n 257 --dir all", "the first 256 of 257 images"),
    ):
        flags = ["--onnx", trained[0] / "model.onnx", "--steps", 1, "--batch", 99, *flags.split()]
        out = run("sample.py", *flags, cwd=tmp_path)
        assert f": {said}, " in out
        assert ("the other 1 are not saved" in out) == (flags[-1] == "257")


def test_network_file_with_any_name_is_opened(trained, tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b"m\xf6.onnx")  # not UTF-8
    with contextlib.suppress(OSError):  # some file systems refuse such names
        shutil.copy(trained[0] / "model.onnx", name)
        assert sample.Network(os.fsdecode(name), 1).shape == (1, 3, 8, 8)


def test_wrong_arguments_of_functions_are_refused(trained):
    betas, model = np.array([0.1, 0.2]), network_of(trained)
    for kwargs in ({"variance": "Large"}, {"steps": 3}, {"steps": 0}, {"eta": 3.0}):
        with pytest.raises(ValueError, match="must be"):
            next(sample.sample_progressive(model, lambda: np.zeros(1), betas, **kwargs))
    with pytest.raises(ValueError, match="eta must be"):
        PAPER.sample(None, (1, 1, 1, 1), eta=3.0)
    with pytest.raises(ValueError, match="device must be"):
        sample.Network(trained[0] / "model.onnx", 1, "gpu")


def network_of(trained):
    state = checkpoint(trained[0] / "run")
    network = UNet(**state["config"]["model"]).eval()
    network.load_state_dict(state["ema"])
    return network


def test_program_equals_the_torch_sampler(trained, draw):
    """From the seed to the pixels: sample.py against ddpm.py with the EMA weights."""
    pixels, draw_noise = draw("a", "-n", 2), sample.noise_of(0, 0, (2, 3, 8, 8))
    x0 = PAPER.sample(network_of(trained), (2, 3, 8, 8), 5,
                      draw_noise=lambda: torch.from_numpy(draw_noise()))  # fmt: skip
    expected = ((x0 + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    assert max(np.abs(p - e).max() for p, e in zip(pixels, expected, strict=True)) <= 1


def test_interpolation_between_two_images(trained, pictures, tmp_path, run):
    """The grid of the program: the images at its ends, and between them what ddpm.py makes."""
    files = [pictures / "0.png", pictures / "deep" / "LOUD.JPG"]
    run("sample.py", "--onnx", trained[0] / "model.onnx", "--interpolate", *files,
        "--t", 30, 600, "--steps", 40, "--out", "i.png", cwd=tmp_path)  # fmt: skip
    image = np.asarray(Image.open(tmp_path / "i.png")).astype(int)
    scale = image.shape[1] // (13 * 10)
    assert image.shape == (2 * 10 * scale, 13 * 10 * scale, 3)
    tiles = image[::scale, ::scale].reshape(2, 10, 13, 10, 3).swapaxes(1, 2)[:, :, 1:-1, 1:-1]
    ends = [sample.read_picture(file, 8).transpose(1, 2, 0) for file in files]
    assert all(
        np.array_equal(row[k], end) for row in tiles for k, end in ((0, ends[0]), (12, ends[1]))
    )
    x0 = [torch.from_numpy(end.transpose(2, 0, 1)[None] / 127.5 - 1).float() for end in ends]
    for row, t in zip(tiles, (30, 600), strict=True):
        z = sample.noise_of(0, 0, (1, 3, 8, 8))
        x_t = [PAPER.q_sample(x, torch.tensor([t]), torch.from_numpy(z())) for x in x0]
        x_t = torch.cat([torch.lerp(x_t[0], x_t[1], k / 10) for k in range(11)])
        chain = Diffusion(linear_betas()[: t + 1])
        out = chain.sample(network_of(trained), x_t.shape, min(40, t + 1), x_T=x_t,
                           draw_noise=lambda z=z: torch.from_numpy(z()))  # fmt: skip
        expected = ((out + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
        assert np.abs(row[1:-1] - expected).max() <= 1


# -------------------------------------------------------------------------------------- the outputs


def test_gif_and_strip(draw, tmp_path):
    draw("a", "-n", 3, "--gif", "b/x.gif", "--strip", "b/x.png", "--steps", 30)
    with Image.open(tmp_path / "b" / "x.gif") as gif:
        assert gif.n_frames == 31
    strip = np.asarray(Image.open(tmp_path / "b" / "x.png"))
    assert strip.shape[0] / strip.shape[1] == pytest.approx(6 / sample.STRIP)  # 3 images, 2 rows


def test_what_cannot_be_written_is_said_before_sampling(trained, tmp_path, run, monkeypatch):
    monkeypatch.setattr(sample, "sample_progressive", None)  # no step may be taken
    (tmp_path / "folder.png").mkdir()
    getattr(os, "mkfifo", os.mkdir)(tmp_path / "pipe.png")  # Windows has none
    (tmp_path / "file").write_text("mine")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "000000.png").write_text("mine")
    for flags, said in (
        ("--out o.psd", "o.psd must be an image file such as x.png"),
        ("--out o.ico", "o.ico must be an image file"),
        ("--out nosuffix", "nosuffix must be an image file"),
        ("--out o.xbm", "cannot write mode"),
        ("--out folder.png", "folder.png is a folder"),
        ("--out pipe.png", "pipe.png is a"),
        ("--interpolate pipe.png pipe.png", "pipe.png can't be read: it is not a file"),
        ("--interpolate a.png b.png --out o.webp --t " + "5 " * 2000, "exceeds WebP limit"),
        ("--out file/o.png", "file"),
        ("--gif o.jpg", "o.jpg must be an animation such as x.gif"),
        ("--strip s", "s must be an image file"),
        ("--dir file", "file"),
        ("--dir new.png/sub --out new.png", "--out must be a file"),
        ("--dir photos", "photos holds images; choose another --dir"),
    ):
        flags = ["--onnx", trained[0] / "model.onnx", "-n", 1, *flags.split()]
        code = 2 if said.startswith("--") else 1
        assert said in run("sample.py", *flags, cwd=tmp_path, code=code)
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "photos" / "000000.png").read_text() == "mine"


def test_images_of_another_process_are_not_overwritten(trained, tmp_path, run, monkeypatch):
    """Another sample.py with the same --dir began after this one had checked the folder."""
    draw = sample.draw_samples

    def late(network, args):
        (tmp_path / "each" / "000001.png").write_text("of the other")
        draw(network, args)

    monkeypatch.setattr(sample, "draw_samples", late)
    flags = ["--onnx", trained[0] / "model.onnx", "-n", 2, "--steps", 2, "--dir", "each"]
    assert "000001.png" in run("sample.py", *flags, cwd=tmp_path, code=1)
    assert (tmp_path / "each" / "000001.png").read_text() == "of the other"


def test_network_converts_dtypes_and_refuses_other_shapes(trained):
    network, random = sample.Network(trained[0] / "model.onnx", 2, "cpu"), np.random.default_rng(0)
    x, t = random.standard_normal((2, 3, 8, 8), np.float32), np.array([3, 900])
    eps = network(x, t).copy()
    np.testing.assert_array_equal(network(x.astype(np.float64), t.astype(np.int32)), eps)
    for wrong in (x[:1], x.transpose(0, 2, 3, 1)):
        with pytest.raises(ValueError, match="x_t must be"):
            network(wrong, t)


@posix
def test_full_disk_leaves_the_old_image_whole(trained, tmp_path):
    (tmp_path / "samples.png").write_text("of before")
    flags = ["--onnx", trained[0] / "model.onnx", "--steps", 2]
    said = python("-c", FULL_DISK, 1000, HERE / "sample.py", *flags, cwd=tmp_path, code=1)
    assert "sample.py: " in said and "too large" in said
    assert [p.read_text() for p in tmp_path.iterdir()] == ["of before"]


@pytest.mark.parametrize(
    "flags, code, said",
    [
        ("-n 0", 2, "-n: must be a whole number from 1"),
        ("-n x", 2, "-n: must be a whole number from 1"),
        ("--batch 1000000000000", 2, "--batch: must be a whole number from 1 to 1048576"),
        ("--eta 2", 2, "--eta: must be a number from 0 to 1"),
        ("--eta nan", 2, "--eta: must be a number from 0 to 1"),
        ("--steps 0", 2, "--steps: must be a whole number"),
        ("--steps 1001", 1, "--steps must be 1..1000"),
        ("--seed -1", 2, "--seed: must be a whole number"),
        ("--t 5", 2, "--t must be given with --interpolate"),
        ("--out model.onnx", 2, "must differ from each other and from the inputs"),
        ("--out a.png --dir a.png", 2, "must differ from each other and from the inputs"),
        ("--out a/000000.png --dir a", 2, "--dir must not hold the other outputs"),
        ("--dir=", 2, "--dir: must not be empty"),
        ("--out=", 2, "--out: must not be empty"),
        ("--out a.gif --gif ./a.gif", 2, "must differ from each other and from the inputs"),
        ("--interpolate {0} {0} --t 1000", 1, "--t 0..999"),
        ("--interpolate {0} {0} --gif x.gif", 2, "--interpolate writes --out only"),
        ("--interpolate {0} {0} --out {0}", 2, "must differ from each other and from the inputs"),
        ("--interpolate {1} {1}", 1, "broken.png can't be read"),
    ],
)
def test_impossible_flags_are_refused(flags, code, said, trained, pictures, run):
    flags = flags.format(pictures / "0.png", pictures / "broken.png").split()
    assert said in run("sample.py", *flags, cwd=trained[0], code=code)
    assert not (trained[0] / "x.gif").exists()


# --------------------------------------------------------------------------------- the network file

NO_TORCH = """
import importlib.abc, runpy, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "onnxscript", "ddpm", "train", "export"):
            raise ImportError(f"{name} must not be imported here")
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_sampling_needs_no_torch_and_importing_it_no_onnxruntime(trained, tmp_path):
    args = ["--onnx", trained[0] / "model.onnx", "-n", 2, "--steps", 3, "--out", "apart/s.png"]
    python("-c", NO_TORCH, HERE / "sample.py", *args, cwd=tmp_path)
    assert (tmp_path / "apart" / "s.png").is_file()
    code = "import sys, sample; print({'onnxruntime', 'torch'} & set(sys.modules))"
    assert python("-c", code, cwd=HERE).strip() == "set()"


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_requiring_cuda_without_a_gpu_names_the_command_that_helps(trained, run):
    said = run("sample.py", "--device", "cuda", "--onnx", "model.onnx", cwd=trained[0], code=1)
    assert 'pip install "onnxruntime-gpu[cuda,cudnn]"' in said
    with pytest.raises(RuntimeError, match="CUDA"):
        sample.Network(trained[0] / "model.onnx", 1, "cuda")
    network = sample.Network(trained[0] / "model.onnx", 1)
    assert network.device == "cpu" and network.no_cuda


def save_model(path, eps, shape=(3, 8, 8), batch="batch", **changes):
    """A model.onnx with valid metadata around the nodes `eps`, which compute eps of x_t and t."""
    graph = helper.make_graph(
        eps,
        "network",
        [
            helper.make_tensor_value_info("x_t", TensorProto.FLOAT, [batch, *shape]),
            helper.make_tensor_value_info("t", TensorProto.INT64, [batch]),
        ],
        [helper.make_tensor_value_info("eps", TensorProto.FLOAT, [batch, *shape])],
        [
            numpy_helper.from_array(np.array(value), name)
            for name, value in (
                ("half", 500),
                ("nan", np.float32("nan")),
                ("one", np.int64(1)),
                ("shape", [-1, 1, 1, 1]),
                ("table", np.ones(900, np.float32)),
            )
        ],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    metadata = {
        "ddpm.betas": str(linear_betas().tolist()),
        "ddpm.variance": "large",
        "ddpm.image_shape": str(list(shape)),
    }
    helper.set_model_props(proto, metadata | changes)
    onnx.save(proto, path)
    return path


NODE = helper.make_node
COPY = [NODE("Identity", ["x_t"], ["eps"])]
NAN_AT = {
    500: [NODE("Equal", ["t", "half"], ["is_half"])],
    0: [NODE("Less", ["t", "one"], ["is_half"])],
}
for nodes in NAN_AT.values():
    nodes += [
        NODE("Reshape", ["is_half", "shape"], ["is_half_4d"]),
        NODE("Where", ["is_half_4d", "nan", "x_t"], ["eps"]),
    ]
SHORT_TABLE = [
    NODE("Gather", ["table", "t"], ["value"]),
    NODE("Reshape", ["value", "shape"], ["value_4d"]),
    NODE("Mul", ["x_t", "value_4d"], ["eps"]),
]


@pytest.mark.parametrize(
    "eps, changes, said",
    [
        (NAN_AT[0], {}, "eps is not finite"),
        (SHORT_TABLE, {}, ""),  # an index out of range at large t
        (COPY, {"batch": 1}, ""),
        (COPY, {"ddpm.betas": "[]"}, "its betas are not a noise schedule"),
        (COPY, {"ddpm.betas": "[2]"}, "its betas are not a noise schedule"),
        (COPY, {"ddpm.betas": "[1e-300]"}, "its betas are not a noise schedule"),
        (COPY, {"ddpm.betas": "[[0.1, 0.2], [0.1, 0.2]]"}, "its betas are not a noise schedule"),
        (COPY, {"ddpm.betas": "[NaN]"}, "its betas are not a noise schedule"),
        (COPY, {"ddpm.betas": "{"}, ""),
        (COPY, {"ddpm.variance": "none"}, "its variance or"),
        (COPY, {"ddpm.image_shape": "[3]"}, ""),
        (COPY, {"ddpm.image_shape": "[3, 16, 8]"}, ""),
        (COPY, {"ddpm.image_shape": "[3, 0, 0]"}, ""),
        (COPY, {"ddpm.image_shape": "[3, 8.0, 8]"}, ""),
        (COPY, {"ddpm.image_shape": "[4, 8, 8]"}, "its variance or"),
    ],
)
def test_wrong_networks_in_valid_files_are_one_line(eps, changes, said, tmp_path, run):
    save_model(tmp_path / "model.onnx", eps, **changes)
    line = run("sample.py", "-n", 2, "--steps", 2, cwd=tmp_path, code=1)
    assert "model.onnx is not a model of export.py: " + said in line
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_model_that_is_right_is_accepted(tmp_path, run):
    save_model(tmp_path / "model.onnx", COPY)
    run("sample.py", "-n", 2, "--steps", 2, cwd=tmp_path)


def test_eps_that_is_not_finite_in_the_middle_saves_nothing(tmp_path, run):
    save_model(tmp_path / "model.onnx", NAN_AT[500])
    said = run("sample.py", "-n", 2, cwd=tmp_path, code=1)
    assert "eps is not finite at t = 500" in said
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_foreign_and_missing_models_are_one_line(trained, tmp_path, run):
    assert "does not exist; python export.py" in run("sample.py", cwd=tmp_path, code=1)
    whole = (trained[0] / "model.onnx").read_bytes()
    for content in (whole[: len(whole) // 2], b""):
        (tmp_path / "model.onnx").write_bytes(content)
        assert "is not a model of export.py" in run("sample.py", cwd=tmp_path, code=1)
    proto = onnx.load_from_string(whole)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "model.onnx")
    assert "its metadata lacks ddpm.betas" in run("sample.py", cwd=tmp_path, code=1)
    (tmp_path / "model.onnx").unlink()
    (tmp_path / "model.onnx").mkdir()
    assert "model.onnx is a folder" in run("sample.py", cwd=tmp_path, code=1)


def test_batch_that_does_not_fit_into_memory_is_one_line(tmp_path, run):
    path = save_model(tmp_path / "model.onnx", COPY, shape=(3, 4096, 4096))
    with pytest.raises(MemoryError, match="do not fit into memory, see --batch"):
        sample.Network(path, 2**20, "cpu")  # 211 TB


@pytest.mark.parametrize(
    "program, default", [("train", "[800000]"), ("export", "[model.onnx]"), ("sample", "[64]")]
)
def test_help_has_an_example_and_the_defaults(program, default, tmp_path, run):
    said = run(f"{program}.py", "--help", cwd=tmp_path).lstrip()
    assert f"    python {program}.py" in said and default in said
    assert said.splitlines()[0].startswith(f"usage: python {program}.py")


# ----------------------------------------------------------------------------------------- the demo


def right_demo_pictures(folder):
    """How many of the PNGs in a folder are demo images, to within 48 of 255 in each pixel."""
    images = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])
    return count_right(images), len(images)


def test_demo_images_are_told_from_others(tmp_path):
    images = train.demo_pictures().permute(0, 2, 3, 1).numpy()
    assert len(images) == len(np.unique(images, axis=0)) == 216
    moved = np.roll(images[0], 3, axis=0)
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for k, image in enumerate([images[0], images[215], moved, noise, 0 * noise + 255]):
        Image.fromarray(image).save(tmp_path / f"{k}.png")
    assert right_demo_pictures(tmp_path) == (2, 5)


@pytest.mark.slow
def test_demo_learns_to_draw_in_four_minutes(demo, tmp_path):
    """90 % of 64 samples are right."""
    python("sample.py", "--onnx", demo / "model.onnx", "--dir", "each", cwd=tmp_path)
    right, n = right_demo_pictures(tmp_path / "each")
    assert n == 64 and right >= 0.9 * n, f"{right} of {n}"
