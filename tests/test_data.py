"""The promises of data.py: which files of a folder are read, in which order, and how often."""

import os
import zlib
from pathlib import Path
from threading import get_ident

import numpy as np
import pytest
from conftest import HERE, posix, python
from PIL import EpsImagePlugin, Image

import images
from images import from_pixels, to_pixels
from support import data, demo
from support.demo import are_right, demo_images


def save(path, colour=0, mode="L", size=(4, 4)):
    """Save an image of one colour, in a folder that is made if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def read_folder(*args, **kwargs):
    """Return the images of data.read_folder, without the labels."""
    images, labels = data.read_folder(*args, **kwargs)
    assert labels is None
    return images


def cached(folder, channels=None):
    """Return the images of a folder, decoded into its sub-folder `out`."""
    return read_folder(folder, 4, channels, cache=folder / "out")


def first_pixels(images):
    return images[:, 0, 0, 0].tolist()


# ----------------------------------------------------------------------------- which files are read


def test_folder_is_read_with_its_sub_folders(image_folder, capsys):
    """Hidden files do not count; other files that are left out are counted and named."""
    images = read_folder(image_folder, 8)
    assert images.shape == (12, 3, 8, 8) and images.dtype == np.uint8
    said = capsys.readouterr().out
    assert "ignored 1 file with a suffix that Pillow does not read: note.txt" in said
    assert "left out 1 of 13 files" in said and f"{image_folder / 'broken.png'}: " in said
    np.testing.assert_array_equal(images, read_folder(image_folder, 8))
    assert read_folder(image_folder, 8, channels=1).shape == (12, 1, 8, 8)
    assert len(read_folder(image_folder, 8, most=5)) == 5


def test_the_first_three_that_are_left_out_are_named(tmp_path, capsys):
    """This happens each time, also if the cache is read. For HEIC, the package is named, too."""
    save(tmp_path / "in" / "good.png", 5)
    for k in range(5):
        (tmp_path / "in" / f"bad-{k}.png").write_text("not an image")
        (tmp_path / "in" / f"table-{k}.csv").write_text("not an image")
    (tmp_path / "in" / "z.HEIC").touch()
    for _ in range(2):  # decodes, then reads the cache
        assert first_pixels(read_folder(tmp_path / "in", 4, cache=tmp_path / "out")) == [5]
        said = capsys.readouterr().out
        assert "ignored 6 files" in said and "pip install pillow-heif" in said
        assert "left out 5 of 6 files" in said
        for k in range(5):
            assert (f"bad-{k}.png: " in said) == (f"table-{k}.csv" in said) == (k < 3)


def test_folder_is_grey_only_if_every_image_is(tmp_path):
    save(tmp_path / "a.png", 9, size=(28, 28))
    save(tmp_path / "b.png", 1, mode="1", size=(28, 28))
    save(tmp_path / "c.tif", mode="F", size=(28, 28))  # left out, but grey
    assert read_folder(tmp_path, 4)[:, :, 0, 0].tolist() == [[9], [255]]
    save(tmp_path / "d.png", (0, 255, 0), mode="RGB")
    images = read_folder(tmp_path, 4)
    assert images[:, :, 0, 0].tolist() == [[9, 9, 9], [255, 255, 255], [0, 255, 0]]
    assert read_folder(tmp_path, 4, channels=1)[:, :, 0, 0].tolist() == [[9], [255], [150]]


def test_awkward_files_are_read_or_left_out(tmp_path, capsys, monkeypatch):
    """An EPS file is left out, whatever its name, because reading it would start Ghostscript."""
    grey = Image.new("L", (5, 9), 100)
    grey.save(tmp_path / "SMALLER.PNG")
    grey.save(tmp_path / "really-a.png", "JPEG")  # a suffix that lies
    Image.fromarray(np.full((4, 4), 25700, np.uint16)).save(tmp_path / "i.tiff")
    first, second = Image.new("L", (8, 8), 100), Image.new("L", (8, 8), 200)
    first.save(tmp_path / "animated.gif", save_all=True, append_images=[second])
    first.save(tmp_path / "small.avif", quality=100)
    save(tmp_path / "z-one-bit.bmp", 1, mode="1")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    bomb = bytearray((tmp_path / "SMALLER.PNG").read_bytes())
    bomb[16:24] = (60000).to_bytes(4, "big") * 2  # width and height, in the header
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(bomb)
    save(tmp_path / "f.tif", mode="F")
    save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.png")
    opened = []
    monkeypatch.setattr(EpsImagePlugin.EpsImageFile, "_open", lambda self: opened.append(self))
    for channels in (None, 1):
        images = read_folder(tmp_path, 8, channels)
        assert images.mean((1, 2, 3)).tolist() == [100, 100, 100, 100, 100, 255]
        said = capsys.readouterr().out
        assert "left out 4 of 10" in said and "exceeds limit" in said
    assert not opened


def test_decompression_bomb_is_one_line(tmp_path, monkeypatch):
    save(tmp_path / "bomb.png", size=(60, 60))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(SystemExit, match="there is no image that can be read"):
        read_folder(tmp_path, 4)


def test_folder_without_images_is_one_line(tmp_path, capsys):
    """A folder with nothing but the output of train.py and sample.py is one, too."""
    with pytest.raises(SystemExit, match="nowhere: no such folder"):
        read_folder(tmp_path / "nowhere", 4)
    with pytest.raises(SystemExit, match="not a folder"):
        read_folder(__file__, 4)
    save(tmp_path / "old" / "preview.png")
    save(tmp_path / "old" / "deep" / "1.png")
    save(tmp_path / "drawn" / "000000.png")
    for name in ("old/checkpoint.pt", "drawn/.sample.json"):
        (tmp_path / name).touch()
    for name in ("note.txt", "broken.png"):
        (tmp_path / name).write_text("not an image")
        with pytest.raises(SystemExit, match="there is no image that can be read"):
            read_folder(tmp_path, 4)
    said = capsys.readouterr().out
    assert "left out 1 of 1 files as unreadable:\n" in said
    for name in "old", "drawn":
        assert f"{tmp_path / name} (it holds the output of train.py or sample.py)" in said


@pytest.mark.parametrize("is_large", [False, True])
def test_order_is_that_of_the_names_with_and_without_threads(is_large, tmp_path, monkeypatch):
    names = ["b/1.png", "a.png", "B.png", "a/z.png", "a/10.png", "a/9.png", "a-.png"]
    names += [f"many/{k:03d}.png" for k in range(50)]
    for k, name in enumerate(sorted(names)):
        save(tmp_path / name, k)
    threads, read = set(), data.read_image
    monkeypatch.setattr(data, "read_image", lambda *args: threads.add(get_ident()) or read(*args))
    monkeypatch.setattr(data, "LARGE", 0 if is_large else 10**6)
    assert first_pixels(read_folder(tmp_path, 4)) == list(range(len(names)))
    assert (threads == {get_ident()}) is not is_large


def test_bug_in_read_image_is_not_taken_for_broken_images(tmp_path, monkeypatch):
    """A reader may edit images.py: read_image then has another shape, or always raises."""
    for k in range(3):
        save(tmp_path / f"{k}.png")
    monkeypatch.setattr(data, "read_image", lambda *_: np.zeros((1, 8, 4), np.uint8))
    with pytest.raises(ValueError, match=r"the shape \(1, 8, 4\), not \(1, 4, 4\)"):
        read_folder(tmp_path, 4)
    monkeypatch.setattr(data, "read_image", lambda *_: misspelt)  # noqa: F821
    with pytest.raises(NameError, match="misspelt"):
        read_folder(tmp_path, 4)


@posix
def test_links_and_folders_that_can_not_be_read_are_said(tmp_path, monkeypatch, capsys):
    for name in ("in/0.png", "in/closed/1.png", "elsewhere/2.png"):
        save(tmp_path / name)
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "gone.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "in" / "\x1b[31mred.png").write_text("no image")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read every folder
    assert len(read_folder(tmp_path / "in", 4)) == 1
    said = capsys.readouterr().out
    assert "left out 2 sub-folders" in said
    assert "linked (a link)" in said and "closed (Permission denied)" in said
    assert "left out 2 of 3 files as unreadable" in said and "gone.png: " in said
    assert "\x1b" not in said and "\\x1b[31mred.png: " in said


# --------------------------------------------------------------------------------------- the cache


def test_images_are_decoded_once(tmp_path, monkeypatch, capsys):
    """The memory-mapped file is used until an image is added, renamed, changed or removed.

    Files of the user that have similar names stay.
    """
    folder, out, users = tmp_path / "data", tmp_path / "run", {"images-train.npy", "images-b.json"}
    out.mkdir()
    for name in users:
        (out / name).touch()
    for k in range(3):
        save(folder / f"{k}.png", k)
    decoded, decode = [], data.decode
    monkeypatch.setattr(data, "decode", lambda *args: decoded.append(1) or decode(*args))

    def cached(channels=None, folder=folder):
        """Return the first pixel of each image, and how often the folder has been decoded."""
        array = read_folder(folder, 4, channels, cache=out)
        data.forget_others(array, out)
        assert isinstance(array, np.memmap)
        path = Path(array.filename)
        assert path.stat().st_size == 128 + array.size  # uint8, and numpy's header
        assert {p.name for p in out.iterdir()} == users | {path.name, f"{path.stem}.json"}
        return first_pixels(array), len(decoded)

    monkeypatch.chdir(tmp_path)  # on Windows, it may be on another drive
    assert cached() == cached() == ([0, 1, 2], 1)
    for other_words in (f"{folder}/", os.path.relpath(folder)):
        assert cached(folder=other_words) == ([0, 1, 2], 1)
    assert cached(channels=1) == ([0, 1, 2], 1)
    assert cached(channels=3) == cached(channels=3) == ([0, 1, 2], 2)
    assert cached() == ([0, 1, 2], 3)  # what was forced is not what is found
    save(folder / "3.png", 7)
    assert cached() == ([0, 1, 2, 7], 4)
    (folder / "3.png").rename(folder / "-.png")
    assert cached() == ([7, 0, 1, 2], 5)
    save(folder / "1.png", 8)
    assert cached() == ([7, 0, 8, 2], 6)
    (folder / "2.png").unlink()
    assert cached() == ([7, 0, 8], 7)
    os.utime(folder / "0.png", ns=(1, 1))
    assert cached() == ([7, 0, 8], 8)
    monkeypatch.setattr(data, "read_image", lambda *args: 255 - images.read_image(*args))
    assert cached() == ([248, 255, 247], 9)  # as when a reader edits read_image
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "kind, content",
    [
        ("npy", None), ("npy", lambda _: b""), ("npy", lambda whole: whole[:-1]),
        ("npy", lambda whole: bytes(len(whole))),
        ("json", None), ("json", lambda _: b""), ("json", lambda _: b"[null, 3, []]"),  # an old one
    ],
)  # fmt: skip
def test_damaged_cache_is_decoded_again(kind, content, tmp_path, monkeypatch):
    """So is the fingerprint, which each process reads at each start instead of computing it."""
    save(tmp_path / "0.png", (9, 9, 0), mode="RGB")
    whole = cached(tmp_path).copy()
    (file,) = (tmp_path / "out").glob(f"*.{kind}")
    before = file.read_bytes()
    file.unlink()
    if content:
        file.write_bytes(content(before))
    assert np.array_equal(cached(tmp_path), whole)
    expected = data.digest_of(whole)
    monkeypatch.setattr(data, "digest_of", None)
    assert data.fingerprint(cached(tmp_path)) == expected


def test_note_never_describes_another_array(tmp_path, monkeypatch):
    """After kill -9 between the two writes, greyscale images are not taken for colour images."""
    save(tmp_path / "0.png", 9)
    assert cached(tmp_path).shape[1] == 1
    replace = os.replace
    for kind in (".npy", ".json"):

        def interrupted(temporary, path, kind=kind):
            if path.suffix == kind:
                raise KeyboardInterrupt
            replace(temporary, path)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", interrupted)
            cached(tmp_path, 3)
        assert cached(tmp_path, 1).shape[1] == 1
    assert not list((tmp_path / "out").glob(".*"))


def test_fingerprint_changes_with_the_images():
    images = np.random.default_rng(0).integers(0, 256, (50, 3, 8, 8), np.uint8)
    changed = images.copy()
    changed[17, 1, 4, 4] ^= 1
    others = images.copy(), changed, images[::-1], images[:-1], images.reshape(50, 3, 4, 16)
    first, same, *different = (data.fingerprint(other) for other in (images, *others))
    assert first == same and len({first, *different}) == 5


# ---------------------------------------------------------------------------------------- the rest


def test_demo_has_each_glyph_in_each_colour_at_nine_places():
    """No other image counts as right, and no faint one."""
    images = demo_images()
    assert images.shape == (216, 3, 8, 8) and images.dtype == np.uint8
    assert len(np.unique(images, axis=0)) == 216
    drawn = (images != 255).any(1)
    assert (drawn.sum((1, 2)) % 4 == 0).all() and drawn.any(0).all()  # of cells of 2 x 2
    colours = {tuple(image[:, mask][:, 0]) for image, mask in zip(images, drawn, strict=True)}
    assert colours == set(demo.COLOURS)
    moved = np.roll(images[0], 3, axis=1)
    noise = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    assert are_right(np.stack([*images[[0, 215]], moved, noise, 0 * noise + 255])).sum() == 2
    faint, fainter = (to_pixels(from_pixels(images) * factor) for factor in (0.7, 0.5))
    assert are_right(faint).all() and not are_right(fainter).any()


def test_program_writes_the_images_as_the_network_sees_them(image_folder, tmp_path):
    """The folder may exist if it is empty. Nothing is made before the input has been read."""
    (tmp_path / "real").mkdir()
    words = ["-m", "support.data", image_folder, tmp_path / "real", 8]
    said = python("-m", "support.data", "nowhere", tmp_path / "new", 8, cwd=HERE, code=1)
    assert "no such folder" in said and not (tmp_path / "new").exists()
    assert "real: 12 images" in python(*words, cwd=HERE)
    paths = sorted((tmp_path / "real").iterdir())
    written = [np.asarray(Image.open(path)).transpose(2, 0, 1) for path in paths]
    assert np.array_equal(written, read_folder(image_folder, 8))
    assert "a new or empty" in python(*words, cwd=HERE, code=1)
