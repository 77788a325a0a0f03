"""The promises of data.py: which files of a folder are read, in which order, and how often."""

import os
import signal
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import HERE, python
from PIL import Image

import data


def first_pixels(images):
    return images[:, 0, 0, 0].tolist()


# ----------------------------------------------------------------------------- which files are read


def test_folder_is_read_with_its_sub_folders(image_folder, capsys):
    """Hidden files do not count; what is left out is counted and named."""
    images = data.read_folder(image_folder, 8)
    assert images.shape == (12, 3, 8, 8) and images.dtype == np.uint8
    said = capsys.readouterr().out
    assert "ignored 1 files without the suffix of an image: note.txt" in said
    assert "left out 1 of 13 files" in said and f"{image_folder / 'broken.png'}: " in said
    np.testing.assert_array_equal(images, data.read_folder(image_folder, 8))
    assert data.read_folder(image_folder, 8, channels=1).shape == (12, 1, 8, 8)
    assert len(data.read_folder(image_folder, 8, most=5)) == 5


def test_the_first_three_that_are_left_out_are_named(tmp_path, capsys):
    Image.new("L", (4, 4)).save(tmp_path / "good.png")
    for k in range(5):
        (tmp_path / f"bad-{k}.png").write_text("not an image")
        (tmp_path / f"table-{k}.csv").write_text("not an image")
    assert len(data.read_folder(tmp_path, 4)) == 1
    said = capsys.readouterr().out
    assert "ignored 5 files" in said and "left out 5 of 6 files" in said
    for k in range(5):
        assert (f"bad-{k}.png: " in said) == (f"table-{k}.csv" in said) == (k < 3)


def test_folder_is_grey_only_if_every_image_is(tmp_path):
    Image.new("L", (28, 28), 9).save(tmp_path / "a.png")
    Image.new("1", (28, 28), 1).save(tmp_path / "b.png")
    Image.new("F", (28, 28)).save(tmp_path / "c.tif")  # left out, but grey
    assert data.read_folder(tmp_path, 4)[:, :, 0, 0].tolist() == [[9], [255]]
    Image.new("RGB", (4, 4), (0, 255, 0)).save(tmp_path / "d.png")
    images = data.read_folder(tmp_path, 4)
    assert images[:, :, 0, 0].tolist() == [[9, 9, 9], [255, 255, 255], [0, 255, 0]]
    images = data.read_folder(tmp_path, 4, channels=1)
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
    images = data.read_folder(tmp_path, 8, channels=1)
    assert images.mean((1, 2, 3)).tolist() == [100, 100, 100, 100, 100, 255]
    said = capsys.readouterr().out
    assert "left out 3 of 9" in said and "exceeds limit" in said


def test_folder_without_images_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="nowhere: there is no such folder"):
        data.read_folder(tmp_path / "nowhere", 4)
    for name in ("note.txt", "broken.png"):
        (tmp_path / name).write_text("not an image")
        with pytest.raises(SystemExit, match="there is no image that can be read"):
            data.read_folder(tmp_path, 4)


def test_order_is_that_of_the_names_with_and_without_processes(tmp_path, monkeypatch):
    names = ["b/1.png", "a.png", "B.png", "a/z.png", "a/10.png", "a/9.png", "a-.png"]
    names += [f"many/{k:03d}.png" for k in range(270)]  # enough for the pool
    for k, name in enumerate(sorted(names)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4), k % 256).save(tmp_path / name)
    found = [Path(path).relative_to(tmp_path).as_posix() for path in data.image_files(tmp_path)[0]]
    assert found == sorted(names)
    expected = [k % 256 for k in range(len(names))]
    assert first_pixels(data.read_folder(tmp_path, 4)) == expected
    monkeypatch.setattr(data, "in_processes", map)
    assert first_pixels(data.read_folder(tmp_path, 4)) == expected


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no process groups")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_decoding(number, start):
    """A worker holds the pipe of the output, which therefore ends with the last of them."""
    code = "import signal, time, data; signal.signal(2, signal.default_int_handler)\n"
    code += "for _ in data.in_processes(time.sleep, [0.01] * 10**5): print('decoding', flush=True)"
    process = start("-c", code, cwd=HERE)
    assert process.stdout.readline() == "decoding\n"
    if number == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, number)  # the terminal sends Ctrl-C to all
    said, _ = process.communicate(timeout=30)
    assert number == signal.SIGKILL or "PoolWorker" not in said  # a traceback of each


# --------------------------------------------------------------------------------------- the cache


def test_images_are_decoded_once(tmp_path, monkeypatch, capsys):
    """One memory-mapped file, used again until an image is added, renamed, changed or removed."""
    folder, out = tmp_path / "data", tmp_path / "data" / "run"
    out.mkdir(parents=True)
    for k in range(3):
        Image.new("L", (4, 4), k).save(folder / f"{k}.png")
    Image.new("L", (4, 4), 99).save(out / "preview.png")  # no part of the training set
    decoded, decode = [], data.decode
    monkeypatch.setattr(data, "decode", lambda *args: decoded.append(1) or decode(*args))

    def read(channels=None):
        """The first pixel of each image, and how often the folder has been decoded."""
        images, _ = data.cached_folder(folder, 4, channels, out)
        assert isinstance(images, np.memmap)
        (array,) = out.glob("images-*")  # the old one is removed
        assert array.stat().st_size == 128 + images.size  # uint8, and numpy's header
        return first_pixels(images), len(decoded)

    assert read() == read() == ([0, 1, 2], 1)
    assert read(channels=3) == ([0, 1, 2], 2)
    Image.new("L", (4, 4), 7).save(folder / "3.png")
    assert read() == ([0, 1, 2, 7], 3)
    (folder / "3.png").rename(folder / "-.png")
    assert read() == ([7, 0, 1, 2], 4)
    Image.new("L", (4, 4), 8).save(folder / "1.png")
    assert read() == ([7, 0, 8, 2], 5)
    (folder / "2.png").unlink()
    assert read() == ([7, 0, 8], 6)
    os.utime(folder / "0.png", ns=(1, 1))
    assert read() == ([7, 0, 8], 7)
    assert not capsys.readouterr().out


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
    code = "import sys, data; print({'torch', 'matplotlib'} & set(sys.modules))"
    assert python("-c", code, cwd=HERE).strip() == "set()"


SPAWN = """
import multiprocessing, sys, torch
import data, probe
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    print(set(data.in_processes(probe.modules, range(256))))
"""


def test_processes_that_decode_do_not_import_torch(tmp_path):
    """Also where they are spawned, as on Windows, by a program that imports torch."""
    (tmp_path / "main.py").write_text(SPAWN)
    (tmp_path / "probe.py").write_text(
        "import sys\ndef modules(_): return 'torch' in sys.modules, 'numpy' in sys.modules"
    )
    env = os.environ | {"PYTHONPATH": str(HERE)}
    assert python(tmp_path / "main.py", cwd=tmp_path, env=env).strip() == "{(False, True)}"
