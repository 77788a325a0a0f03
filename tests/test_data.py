"""The promises of data.py: which files of a folder are read, in which order, and how often."""

import os
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import HERE, posix, python
from PIL import EpsImagePlugin, Image

import images
from support import data


def first_pixels(images):
    return images[:, 0, 0, 0].tolist()


def read(*args, **kwargs):
    """The images of data.read_folder, without labels."""
    images, labels = data.read_folder(*args, **kwargs)
    assert labels is None
    return images


# ----------------------------------------------------------------------------- which files are read


def test_folder_is_read_with_its_sub_folders(image_folder, capsys):
    """Hidden files do not count; what is left out is counted and named."""
    images = read(image_folder, 8)
    assert images.shape == (12, 3, 8, 8) and images.dtype == np.uint8
    said = capsys.readouterr().out
    assert "ignored 1 file with a suffix that Pillow does not read: note.txt" in said
    assert "left out 1 of 13 files" in said and f"{image_folder / 'broken.png'}: " in said
    np.testing.assert_array_equal(images, read(image_folder, 8))
    assert read(image_folder, 8, channels=1).shape == (12, 1, 8, 8)
    assert len(read(image_folder, 8, most=5)) == 5


def test_heic_names_the_package_that_reads_it(tmp_path, capsys):
    Image.new("L", (4, 4)).save(tmp_path / "good.png")
    (tmp_path / "IMG_1.HEIC").touch()
    read(tmp_path, 4)
    assert "pip install pillow-heif" in capsys.readouterr().out


def test_the_first_three_that_are_left_out_are_named(tmp_path, capsys):
    Image.new("L", (4, 4)).save(tmp_path / "good.png")
    for k in range(5):
        (tmp_path / f"bad-{k}.png").write_text("not an image")
        (tmp_path / f"table-{k}.csv").write_text("not an image")
    assert len(read(tmp_path, 4)) == 1
    said = capsys.readouterr().out
    assert "ignored 5 files" in said and "left out 5 of 6 files" in said
    for k in range(5):
        assert (f"bad-{k}.png: " in said) == (f"table-{k}.csv" in said) == (k < 3)


def test_folder_is_grey_only_if_every_image_is(tmp_path):
    Image.new("L", (28, 28), 9).save(tmp_path / "a.png")
    Image.new("1", (28, 28), 1).save(tmp_path / "b.png")
    Image.new("F", (28, 28)).save(tmp_path / "c.tif")  # left out, but grey
    assert read(tmp_path, 4)[:, :, 0, 0].tolist() == [[9], [255]]
    Image.new("RGB", (4, 4), (0, 255, 0)).save(tmp_path / "d.png")
    images = read(tmp_path, 4)
    assert images[:, :, 0, 0].tolist() == [[9, 9, 9], [255, 255, 255], [0, 255, 0]]
    images = read(tmp_path, 4, channels=1)
    assert images[:, :, 0, 0].tolist() == [[9], [255], [150]]


def test_awkward_files_are_read_or_left_out(tmp_path, capsys):
    grey = Image.new("L", (5, 9), 100)
    grey.save(tmp_path / "SMALLER.PNG")
    grey.save(tmp_path / "really-a.png", "JPEG")  # a suffix that lies
    Image.fromarray(np.full((4, 4), 25700, np.uint16)).save(tmp_path / "i.tiff")
    first, second = Image.new("L", (8, 8), 100), Image.new("L", (8, 8), 200)
    first.save(tmp_path / "animated.gif", save_all=True, append_images=[second])
    first.save(tmp_path / "small.avif", quality=100)
    Image.new("1", (8, 8), 1).save(tmp_path / "z-one-bit.bmp")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    bomb = bytearray((tmp_path / "SMALLER.PNG").read_bytes())
    bomb[16:24] = (60000).to_bytes(4, "big") * 2  # width and height, in the header
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(bomb)
    Image.new("F", (4, 4)).save(tmp_path / "f.tif")
    images = read(tmp_path, 8, channels=1)
    assert images.mean((1, 2, 3)).tolist() == [100, 100, 100, 100, 100, 255]
    said = capsys.readouterr().out
    assert "left out 3 of 9" in said and "exceeds limit" in said


def test_folder_without_images_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="nowhere: no such folder"):
        read(tmp_path / "nowhere", 4)
    with pytest.raises(SystemExit, match="not a folder"):
        read(__file__, 4)
    for name in ("note.txt", "broken.png"):
        (tmp_path / name).write_text("not an image")
        with pytest.raises(SystemExit, match="there is no image that can be read"):
            read(tmp_path, 4)
    assert "left out 1 of 1 files as unreadable:\n" in capsys.readouterr().out


@pytest.mark.parametrize("is_large", [False, True])
def test_order_is_that_of_the_names_with_and_without_threads(is_large, tmp_path, monkeypatch):
    names = ["b/1.png", "a.png", "B.png", "a/z.png", "a/10.png", "a/9.png", "a-.png"]
    names += [f"many/{k:03d}.png" for k in range(50)]
    for k, name in enumerate(sorted(names)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4), k).save(tmp_path / name)
    found = [Path(path).relative_to(tmp_path).as_posix() for path in data.image_files(tmp_path)[0]]
    assert found == sorted(names)
    threads, read_image = set(), data.read_image

    def watched(*args):
        threads.add(threading.get_ident())
        return read_image(*args)

    monkeypatch.setattr(data, "read_image", watched)
    monkeypatch.setattr(data, "LARGE", 0 if is_large else 10**6)
    assert first_pixels(read(tmp_path, 4)) == list(range(len(names)))
    assert (threads == {threading.get_ident()}) is not is_large


def test_bug_in_read_image_is_not_taken_for_broken_images(tmp_path, monkeypatch):
    """As when a reader edits images.py: another shape, or an exception for every file."""
    for k in range(3):
        Image.new("L", (4, 4)).save(tmp_path / f"{k}.png")
    monkeypatch.setattr(data, "read_image", lambda *_: np.zeros((1, 8, 4), np.uint8))
    with pytest.raises(ValueError, match=r"the shape \(1, 8, 4\), not \(1, 4, 4\)"):
        read(tmp_path, 4)
    monkeypatch.setattr(data, "read_image", lambda *_: misspelt)  # noqa: F821
    with pytest.raises(NameError, match="misspelt"):
        read(tmp_path, 4)


def test_runs_are_no_training_images(tmp_path, capsys):
    """A folder that holds a checkpoint.pt is left out, with what is in it, and a line says so."""
    for name in ("images/0.png", "old-run/preview.png", "old-run/deep/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / name)
    (tmp_path / "old-run" / "checkpoint.pt").touch()
    assert len(read(tmp_path, 4)) == 1
    said = capsys.readouterr().out
    assert f"left out 1 sub-folder: {tmp_path / 'old-run'} (it holds a checkpoint.pt)" in said


@posix
def test_links_and_folders_that_can_not_be_read_are_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "in" / "closed").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("in/0.png", "in/closed/1.png", "elsewhere/2.png"):
        Image.new("L", (4, 4)).save(tmp_path / name)
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "gone.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "in" / "\x1b[31mred.png").write_text("no image")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read every folder
    assert len(read(tmp_path / "in", 4)) == 1
    said = capsys.readouterr().out
    assert "left out 2 sub-folders" in said
    assert "linked (a link)" in said and "closed (Permission denied)" in said
    assert "left out 2 of 3 files as unreadable" in said and "gone.png: " in said
    assert "\x1b" not in said and "\\x1b[31mred.png: " in said


def test_eps_is_not_read(tmp_path, monkeypatch):
    """Reading it would start Ghostscript, whatever the name of the file."""
    Image.new("L", (4, 4)).save(tmp_path / "good.png")
    Image.new("L", (4, 4)).save(tmp_path / "cat.eps")
    (tmp_path / "cat.eps").rename(tmp_path / "cat.png")
    opened = []
    monkeypatch.setattr(EpsImagePlugin.EpsImageFile, "_open", lambda self: opened.append(self))
    for channels in (None, 3):
        assert len(read(tmp_path, 4, channels)) == 1
    assert not opened


# --------------------------------------------------------------------------------------- the cache


def test_images_are_decoded_once(tmp_path, monkeypatch, capsys):
    """One memory-mapped file, used again until an image is added, renamed, changed or removed."""
    folder, out = tmp_path / "data", tmp_path / "run"
    folder.mkdir()
    out.mkdir()
    for k in range(3):
        Image.new("L", (4, 4), k).save(folder / f"{k}.png")
    decoded, decode = [], data.decode
    monkeypatch.setattr(data, "decode", lambda *args: decoded.append(1) or decode(*args))

    def cached(channels=None, folder=folder):
        """The first pixel of each image, and how often the folder has been decoded."""
        array = read(folder, 4, channels, cache=out)
        data.forget_others(array, out)
        assert isinstance(array, np.memmap)
        (path,) = out.glob("images-*.npy")
        assert path.stat().st_size == 128 + array.size  # uint8, and numpy's header
        return first_pixels(array), len(decoded)

    monkeypatch.chdir(tmp_path)  # on Windows, it may be on another drive
    other_words = f"{folder}/", os.path.relpath(folder)
    assert cached() == cached() == ([0, 1, 2], 1)
    assert all(cached(folder=words) == ([0, 1, 2], 1) for words in other_words)
    assert cached(channels=1) == ([0, 1, 2], 1)
    assert cached(channels=3) == cached(channels=3) == ([0, 1, 2], 2)
    assert cached() == ([0, 1, 2], 3)  # what was forced is not what is found
    Image.new("L", (4, 4), 7).save(folder / "3.png")
    assert cached() == ([0, 1, 2, 7], 4)
    (folder / "3.png").rename(folder / "-.png")
    assert cached() == ([7, 0, 1, 2], 5)
    Image.new("L", (4, 4), 8).save(folder / "1.png")
    assert cached() == ([7, 0, 8, 2], 6)
    (folder / "2.png").unlink()
    assert cached() == ([7, 0, 8], 7)
    os.utime(folder / "0.png", ns=(1, 1))
    assert cached() == ([7, 0, 8], 8)
    monkeypatch.setattr(data, "read_image", lambda *args: 255 - images.read_image(*args))
    assert cached() == ([248, 255, 247], 9)  # as when a reader edits read_image
    assert not capsys.readouterr().out


def test_files_of_the_user_are_not_forgotten(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "0.png")
    (tmp_path / "out").mkdir()
    for name in ("images-train.npy", "images-best.json", "images-0123456789abcdef.npy"):
        (tmp_path / "out" / name).touch()
    data.forget_others(read(tmp_path, 4, cache=tmp_path / "out"), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"images-train.npy", "images-best.json"} < names and len(names) == 4


def test_what_can_not_be_read_is_said_each_time(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    Image.new("L", (4, 4), 5).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_text("not an image")
    for _ in range(2):  # decodes, then reads the cache
        assert first_pixels(read(tmp_path, 4, cache=tmp_path / "out")) == [5]
        assert "left out 1 of 2 files" in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage", ["cut array", "no array", "no note", "empty note", "old note", "zeros"]
)
def test_damaged_cache_is_decoded_again(damage, tmp_path):
    (tmp_path / "out").mkdir()
    Image.new("RGB", (4, 4), (9, 9, 0)).save(tmp_path / "0.png")
    whole = read(tmp_path, 4, cache=tmp_path / "out").copy()
    (array,), (note,) = (list((tmp_path / "out").glob(f"*.{kind}")) for kind in ("npy", "json"))
    if damage == "cut array":
        array.write_bytes(array.read_bytes()[:-1])
    elif damage == "zeros":
        array.write_bytes(bytes(array.stat().st_size))
    elif damage.startswith("no"):
        (array if damage == "no array" else note).unlink()
    else:
        note.write_text("" if damage == "empty note" else "[null, 3, []]")
    images = read(tmp_path, 4, cache=tmp_path / "out")
    assert np.array_equal(images, whole)
    assert data.fingerprint(images) == data.digest_of(whole)  # which the new note has


def test_note_never_describes_another_array(tmp_path, monkeypatch):
    """As after kill -9 between the two: grey images are not taken for those in colour."""
    (tmp_path / "out").mkdir()
    Image.new("L", (4, 4), 9).save(tmp_path / "0.png")
    assert read(tmp_path, 4, cache=tmp_path / "out").shape[1] == 1
    replace = os.replace
    for kind in (".npy", ".json"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", lambda a, b, kind=kind: (
                (_ for _ in ()).throw(KeyboardInterrupt()) if b.suffix == kind else replace(a, b)
            ))  # fmt: skip
            read(tmp_path, 4, 3, cache=tmp_path / "out")
        assert read(tmp_path, 4, 1, cache=tmp_path / "out").shape[1] == 1
    assert not list((tmp_path / "out").glob(".*"))


def test_fingerprint_is_computed_once(tmp_path, monkeypatch):
    """Not by each process at each start, which takes long for many images."""
    (tmp_path / "out").mkdir()
    Image.new("L", (4, 4), 9).save(tmp_path / "0.png")
    images = read(tmp_path, 4, cache=tmp_path / "out")
    expected = data.digest_of(images)
    monkeypatch.setattr(data, "digest_of", None)
    assert data.fingerprint(read(tmp_path, 4, cache=tmp_path / "out")) == expected


def test_fingerprint_changes_with_the_images(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (50, 3, 8, 8), np.uint8)
    same, changed = images.copy(), images.copy()
    changed[17, 1, 4, 4] ^= 1
    assert data.fingerprint(images) == data.fingerprint(same)
    others = [changed, images[::-1], images[:-1], images.reshape(50, 3, 4, 16)]
    assert len({data.fingerprint(other) for other in [images, *others]}) == 5
    many = np.zeros((3500, 1, 2, 2), np.uint8)
    assert data.fingerprint(many) != data.fingerprint(many[:-1]) != data.fingerprint(many + 1)


# ---------------------------------------------------------------------------------------- the rest


def test_demo_has_each_glyph_in_each_colour_at_nine_places():
    images = data.demo_images()
    assert images.shape == (216, 3, 8, 8) and images.dtype == np.uint8
    assert len(np.unique(images, axis=0)) == 216
    drawn = (images != 255).any(1)
    assert (drawn.sum((1, 2)) % 4 == 0).all() and drawn.any(0).all()  # of cells of 2 x 2
    colours = {tuple(image[:, mask][:, 0]) for image, mask in zip(images, drawn, strict=True)}
    assert colours == set(data.DEMO_COLOURS)


def test_decoding_needs_no_torch():
    code = "import sys, support.data; print({'torch', 'matplotlib'} & set(sys.modules))"
    assert python("-c", code, cwd=HERE).strip() == "set()"


def test_program_writes_the_images_as_the_network_sees_them(image_folder, tmp_path):
    """The folder may exist if it is empty. Nothing is made before the input has been read."""
    (tmp_path / "real").mkdir()
    words = ["-m", "support.data", image_folder, tmp_path / "real", 8]
    said = python("-m", "support.data", "nowhere", tmp_path / "new", 8, cwd=HERE, code=1)
    assert "no such folder" in said and not (tmp_path / "new").exists()
    assert "real: 12 images" in python(*words, cwd=HERE)
    paths = sorted((tmp_path / "real").iterdir())
    written = [np.asarray(Image.open(path)).transpose(2, 0, 1) for path in paths]
    assert np.array_equal(written, read(image_folder, 8))
    assert "a new or empty" in python(*words, cwd=HERE, code=2)
