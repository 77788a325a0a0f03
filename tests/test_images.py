"""images.py: how a file is read, which files of a folder are read, classes, the cache, the demo."""

import os
import shutil
from types import FunctionType

import numpy as np
import pytest
import torch
from conftest import COLOURS, posix
from PIL import EpsImagePlugin, Image

import images
from images import demo_images, from_pixels, has_colour, read_folder, read_image
from sample import to_pixels


def save(path, colour=0, mode="L", size=(4, 4)):
    """Save an image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def values(folder, channels=None, **options):
    """Return the first pixel of each image in a folder: a list of lists of C values."""
    return read_folder(folder, 4, channels, **options)[0][:, :, 0, 0].tolist()


def read_saved(path, image, **options):
    """Save a Pillow image, and read it again, in colour if the file is."""
    image.save(path, **options)
    return read_image(path, 4, 3 if has_colour(path) else 1)


def test_transparency_is_white_or_another_grey(tmp_path):
    grey, deep = Image.new("L", (4, 4), 9), Image.fromarray(np.full((4, 4), 300, np.uint16))
    for image, transparent in (
        (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), None), (Image.new("LA", (4, 4), (0, 0)), None),
        (Image.new("RGB", (4, 4), "red"), (255, 0, 0)), (grey.convert("P"), 9), (grey, 9),
        (deep, 300),
    ):  # fmt: skip
        assert (read_saved(tmp_path / "x.png", image, transparency=transparent) == 255).all()
        assert (read_image(tmp_path / "x.png", 4, 1, background=7) == 7).all()
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 51))
    assert read_saved(tmp_path / "x.png", half)[:, 0, 0].tolist() == [255, 204, 204]


def test_16_bits_are_scaled_and_32_bits_refused(tmp_path):
    """The range of the latter is unknown: 0..1, 0..255 and 0..65535 all occur."""
    ramp = np.linspace(0, 65400, 16).reshape(4, 4).astype(np.uint16)
    for name in "x.png", "x.tiff", "x.pgm":
        ours = read_saved(tmp_path / name, Image.fromarray(ramp))
        np.testing.assert_array_equal(ours, (ramp / 257).round().astype(np.uint8)[None])
    for dtype in np.float32, np.int32:
        with pytest.raises(ValueError, match="does not say the range"):
            read_saved(tmp_path / "x.tiff", Image.fromarray(np.full((4, 4), 100, dtype)))


def test_images_are_turned_upright_and_cropped_to_the_centre(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    half, wide = Image.new("L", (4, 4), 0), Image.new("L", (12, 4), 0)
    half.paste(255, (0, 0, 4, 2))
    wide.paste(255, (4, 0, 8, 4))
    assert read_saved(tmp_path / "x.png", half, exif=exif)[0, :, 0].tolist() == [0, 0, 255, 255]
    assert (read_saved(tmp_path / "x.png", wide) == 255).all()
    deep = Image.fromarray(np.asarray(half).astype(np.uint16) * 257)
    assert read_saved(tmp_path / "x.png", deep, exif=exif)[0, :, 0].tolist() == [0, 0, 255, 255]
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8))
    noise.save(tmp_path / "x.png")
    small = noise.convert("L").resize((4, 4), Image.Resampling.LANCZOS)
    assert (read_image(tmp_path / "x.png", 4, 1)[0] == np.asarray(small)).all()


def test_pixels_survive_the_round_trip():
    pixels = np.arange(256, dtype=np.uint8)
    x, tensor = from_pixels(pixels), from_pixels(torch.from_numpy(pixels))
    assert x.dtype == np.float32 and x[[0, 255]].tolist() == [-1, 1]
    assert tensor.dtype == torch.float32 and np.array_equal(tensor.numpy(), x)
    assert np.array_equal(to_pixels(x), pixels)


def test_folder_is_read_with_its_sub_folders(image_folder, tmp_path, capsys):
    """Files that are left out are counted, and the first three named, also if the cache is read."""
    for is_cached in False, True:
        array, labels, names = read_folder(image_folder, 8, cache=tmp_path)
        assert array.shape == (12, 3, 8, 8) and array.dtype == np.uint8
        assert labels is None and names == ()
        said = capsys.readouterr().out
        assert f"ignored 1 file without a suffix that Pillow reads: '{image_folder}" in said
        assert "left out 1 file that can't be read" in said and "broken.png" in said
        assert ("broken.png' can't be read: OSError" in said) != is_cached
    save(tmp_path / "0.png", 9)
    for name in *(f"bad-{k}.png" for k in range(5)), "\x1b[31m.txt":
        (tmp_path / name).write_text("not an image")
    assert values(tmp_path) == [[9]]
    said = capsys.readouterr().out
    assert "left out 5 files" in said and "bad-2.png" in said and "bad-3.png" not in said
    assert "\\x1b[31m.txt" in said and "\x1b" not in said


def test_every_format_is_read(tmp_path, monkeypatch, capsys, recwarn):
    """EPS is left out, whatever its suffix, because reading it would start Ghostscript."""
    grey = Image.new("L", (8, 8), 100)
    for suffix in "avif bmp gif JPG jp2 pcx pgm png sgi tga tif webp".split():
        grey.save(tmp_path / f"a.{suffix}", quality=100)
    grey.save(tmp_path / "really-a.png", "JPEG")  # a suffix that lies
    grey.save(tmp_path / "animated.gif", save_all=True, append_images=[Image.new("L", (8, 8), 9)])
    save(tmp_path / "float.tif", mode="F")
    grey.save(tmp_path / "0.png", "EPS")
    opened = []
    monkeypatch.setattr(EpsImagePlugin.EpsImageFile, "_open", lambda self: opened.append(self))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)  # Pillow warns of large images
    array = read_folder(tmp_path, 4)[0]
    assert array.shape[:2] == (14, 3) and np.abs(array.astype(int) - 100).max() <= 1  # AVIF is RGB
    assert "left out 2 files that can't be read" in capsys.readouterr().out
    assert not opened and not recwarn.list


def test_folder_is_grey_only_if_every_image_is(tmp_path):
    save(tmp_path / "a.png", 9)
    save(tmp_path / "b.png", 1, mode="1")
    save(tmp_path / "c.tif", mode="F")  # left out, but grey
    palette = Image.new("L", (4, 4), 100).convert("P")  # grey, because its colours are
    palette.save(tmp_path / "d.png")
    assert values(tmp_path) == [[9], [255], [100]]
    palette.putpalette([0, 255, 0] * 256)
    palette.save(tmp_path / "d.png")
    assert values(tmp_path) == [[9] * 3, [255] * 3, [0, 255, 0]]
    assert values(tmp_path, channels=1) == [[9], [255], [150]]


def test_order_is_that_of_the_names_and_runs_are_left_out(tmp_path, capsys):
    """What is left out is named: a folder of a run, and a second link to a folder."""
    names = "B.png a-.png a.png a/10.png a/9.png a/z.png b/1.png".split()
    for k, name in reversed([*enumerate(names)]):
        save(tmp_path / name, k)
    for name in ".hidden/0.png", "new/deep/0.png", "run/deep/0.png":
        save(tmp_path / name)
    for name in "b/log.csv", "new/log.csv", "new/.lock", "run/checkpoint.pt":
        (tmp_path / name).touch()
    (tmp_path / "z").symlink_to(tmp_path / "a")
    assert values(tmp_path) == [[k] for k in range(len(names))]
    said = capsys.readouterr().out
    assert "ignored 3 folders with a run of train.py, or linked a second time: " in said
    assert f"'{tmp_path}/new', '{tmp_path}/run', '{tmp_path}/z'" in said


def test_mistakes_are_one_line(tmp_path):
    for folder in tmp_path / "nowhere", __file__:
        with pytest.raises(SystemExit, match=r"^[^\n]* is not a folder$"):
            read_folder(folder, 4)
    for name in "note.txt", "broken.png":
        (tmp_path / name).write_text("not an image")
        with pytest.raises(SystemExit, match=r"^[^\n]*: there is no image that can be read$"):
            read_folder(tmp_path, 4, cache=tmp_path)


@posix
def test_classes_are_the_sub_folders_with_an_image(class_folder, tmp_path, monkeypatch):
    """Sub-folders whose files are broken, or that can't be listed, are none, read or listed."""
    folder, listed = tmp_path / "classes", [*COLOURS]
    shutil.copytree(class_folder, folder)
    for name in "black", "lost+found":
        (folder / name).mkdir()
    (folder / "black" / "0.png").write_text("broken")
    scandir, closed = os.scandir, str(folder / "lost+found")  # root may list every folder
    monkeypatch.setattr(os, "scandir", lambda path: scandir("/no" if path == closed else path))
    for cache, given in (None, []), (tmp_path, []), (tmp_path, listed):  # then cached
        array, labels, names = read_folder(str(folder), 8, None, not given, cache, given)
        assert names == (*COLOURS,) and labels.tolist() == [0] * 20 + [1] * 20 + [2] * 20
        expected = np.array([COLOURS[names[label]] for label in labels])
        assert np.abs(array.mean((2, 3)) - expected).max() < 20
    with pytest.raises(SystemExit, match="images in 'blue', but the classes are"):
        read_folder(str(folder), 8, names=listed[1:])


@posix
def test_folder_without_classes_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    save(tmp_path / "two" / "red" / "0.png")
    (tmp_path / "two" / "blue").mkdir()
    (tmp_path / "two" / "blue" / "0.png").write_text("broken")
    with pytest.raises(SystemExit, match=r"^[^\n]*two sub-folders or more, [^\n]*: \['red'\]$"):
        read_folder(tmp_path / "two", 4, classes=True)
    monkeypatch.setattr(images, "decode", None)
    for name, said in (
        ("red", r"two sub-folders or more, the classes; found: \['red'\]"),
        (".", "images outside of its sub-folders"),
    ):  # fmt: skip
        save(tmp_path / "classes" / name / "0.png")
        with pytest.raises(SystemExit, match=rf"^[^\n]*{said}[^\n]*$"):
            read_folder(tmp_path / "classes", 4, classes=True)


def test_images_are_decoded_once(tmp_path, monkeypatch):
    """The memory-mapped file is used until a file or the source of read_image changes."""
    folder, decoded, decode = tmp_path / "data", [], images.decode
    for k in range(3):
        save(folder / f"{k}.png", k)
    monkeypatch.setattr(images, "decode", lambda *args: decoded.append(1) or decode(*args))

    def cached(channels=None, folder=folder):
        """Return the first value of each image, and how often the folder has been decoded."""
        array = read_folder(folder, 4, channels, cache=tmp_path)[0]
        assert isinstance(array, np.memmap) and len([*tmp_path.iterdir()]) == 1 + len(decoded)
        found = array[:, 0, 0, 0].tolist()
        array[:] = 9  # the file stays as it is
        return found, len(decoded)

    for path in folder, f"{folder}/", os.path.relpath(folder):
        assert cached(folder=path) == ([0, 1, 2], 1)
    monkeypatch.chdir(folder)
    assert cached() == ([0, 1, 2], 1)
    assert cached(channels=3) == cached(channels=3) == ([0, 1, 2], 2)
    (folder / "2.png").rename(folder / "-.png")
    assert cached() == ([2, 0, 1], 3)
    save(folder / "1.png", 8)
    assert cached() == ([2, 0, 8], 4)
    os.utime(folder / "0.png", ns=(1, 1))
    assert cached() == ([2, 0, 8], 5)
    again = FunctionType(read_image.__code__, vars(images))  # as in another process
    monkeypatch.setattr(images, "read_image", again)
    assert cached() == ([2, 0, 8], 5)
    monkeypatch.setattr(images, "read_image", lambda *args: 255 - read_image(*args))
    assert cached() == ([253, 255, 247], 6)
    monkeypatch.setattr(images, "stamp", lambda path: ())  # then only the names are known
    assert cached() == ([253, 255, 247], 7)
    (folder / "-.png").rename(folder / "3.png")
    assert cached() == ([255, 247, 253], 8)


def test_demo_has_each_glyph_in_each_colour_at_nine_places():
    assert len(np.unique(demo_images(), axis=0)) == 216
    drawn = (demo_images() != 255).any(1)
    assert (drawn.sum((1, 2)) % 4 == 0).all() and drawn.any(0).all()  # of cells of 2 x 2
