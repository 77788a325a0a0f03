"""The promises of images.py: how a file is read, pixels, the grid, the plot."""

import os
import signal

import numpy as np
import pytest
import torch
from conftest import posix, restoring_signals
from PIL import Image

from images import Output, catch_signals, from_pixels, grid, read_image, replacing, to_pixels
from support.data import is_grey
from support.plot import save_plot


@pytest.fixture
def read_saved(tmp_path):
    """Save a Pillow image, and read it again."""

    def call(image, name="x.png", **options):
        image.save(tmp_path / name, **options)
        with Image.open(tmp_path / name) as saved:
            channels = 1 if is_grey(saved) else 3
        return read_image(tmp_path / name, 4, channels)

    return call


def test_transparency_is_white(read_saved):
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0])
    for image, options in (
        (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), {}),
        (Image.new("LA", (4, 4), (0, 0)), {}),
        (palette, {"transparency": 0}),
        (Image.new("RGB", (4, 4), "red"), {"transparency": (255, 0, 0)}),
        (Image.new("L", (4, 4), 9), {"transparency": 9}),
        (Image.fromarray(np.full((4, 4), 300, np.uint16)), {"transparency": 300}),
    ):
        assert (read_saved(image, **options) == 255).all()
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 51))
    assert read_saved(half)[:, 0, 0].tolist() == [255, 204, 204]


@pytest.mark.parametrize("name", ["x.png", "x.tiff", "x.pgm"])
def test_16_bits_are_scaled_and_not_clipped(name, read_saved):
    ramp = np.linspace(0, 65535, 16).reshape(4, 4).astype(np.uint16)
    ours = read_saved(Image.fromarray(ramp), name)
    assert ours.shape == (1, 4, 4)
    np.testing.assert_array_equal(ours[0], (ramp / 257).round().astype(np.uint8))


def test_palettes_are_grey_or_colour_as_their_colours(read_saved):
    grey = Image.new("L", (4, 4), 100)
    assert read_saved(grey, "x.gif").shape == (1, 4, 4)
    palette = grey.convert("P")
    assert (read_saved(palette) == 100).all()
    palette.putpalette([k % 256 for k in range(1, 769)])
    assert read_saved(palette).shape == (3, 4, 4)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_32_bit_pixels_are_refused(dtype, read_saved):
    """Their range is unknown: 0..1, 0..255 and 0..65535 all occur."""
    with pytest.raises(ValueError, match="does not say the range"):
        read_saved(Image.fromarray(np.full((4, 4), 100, dtype)), "x.tiff")


def test_images_are_turned_upright_and_cropped_to_the_centre(read_saved):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    half = Image.new("L", (4, 4), 0)
    half.paste(255, (0, 0, 4, 2))
    ours = read_saved(half, exif=exif)[0]
    assert (ours[:2] == 0).all() and (ours[2:] == 255).all()
    wide = Image.new("L", (12, 4), 0)
    wide.paste(255, (4, 0, 8, 4))
    assert (read_saved(wide) == 255).all()


def test_pixels_survive_the_round_trip_and_are_rounded():
    pixels = np.arange(256, dtype=np.uint8)
    x = from_pixels(pixels)
    assert x.dtype == np.float32 and x[[0, 255]].tolist() == [-1, 1]
    np.testing.assert_array_equal(to_pixels(x), pixels)
    tensor = from_pixels(torch.from_numpy(pixels))
    assert tensor.dtype == torch.float32 and np.array_equal(tensor.numpy(), x)
    near = [-2, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 1 - 0.4 / 127.5, 2]
    assert to_pixels(np.float32(near)).tolist() == [0, 0, 1, 255, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_shows_every_image(channels):
    shape = (5, channels, 4, 4)
    x = np.linspace(-1, 1, 5, dtype=np.float32)[:, None, None, None] * np.ones(shape)
    image = np.asarray(grid(to_pixels(x)))
    assert image.ndim == (2 if channels == 1 else 3)
    middle = slice(image.shape[1] // 6, None, image.shape[1] // 3)  # middles of tiles, 2 rows of 3
    tiles = image.reshape(*image.shape[:2], channels)[middle, middle]
    assert tiles[..., 0].tolist() == [[0, 64, 128], [191, 255, 255]]  # the sixth is left white
    assert (tiles == tiles[..., :1]).all()


def test_error_of_another_file_keeps_its_traceback(tmp_path):
    (tmp_path / "x.png").write_text("whole")
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "x.png"):
        (tmp_path / "missing").read_bytes()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]


@pytest.mark.parametrize("log", [False, True])
def test_plot_shows_the_curve(log, tmp_path):
    save_plot(tmp_path / "x.png", range(300), [100] * 100 + [10] * 100 + [1] * 100, "x", "y", log)
    pixels = np.asarray(Image.open(tmp_path / "x.png").convert("RGB")).astype(int)
    rows, columns = np.nonzero(pixels[..., 2] - pixels[..., 0] > 100)  # the blue curve
    thirds = (columns - columns.min()) * 3 // (np.ptp(columns) + 1)
    left, middle, right = (np.median(rows[thirds == k]) for k in range(3))
    share = (right - middle) / (right - left)
    assert left < middle < right and share == pytest.approx(1 / 2 if log else 1 / 11, abs=0.02)


@posix
@pytest.mark.parametrize("nohup", [False, True])
def test_lost_reader_stops_the_program_once_unless_it_runs_under_nohup(nohup, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    with restoring_signals(), Output(writer, "w") as output:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
        catch_signals()
        if not nohup:
            with pytest.raises(KeyboardInterrupt):
                output.write(b"lost\n")
        assert output.write(b"next\n") == 5
