"""The training set: a folder of images as one array, and the built-in demo.

    images, labels, names = read_folder("./images", 32)     # uint8 (N, C, 32, 32)
    x0 = from_pixels(images)                                # float32 in [-1, 1]

It needs numpy, Pillow, tqdm and, to write the decoded images, program.py.
"""

import contextlib
import hashlib
import inspect
import os
import sys
import tempfile
import warnings
from itertools import compress, product
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from program import replacing

with contextlib.suppress(ImportError):  # HEIC, the format of iPhone photos
    from pillow_heif import register_heif_opener

    register_heif_opener()

Image.init()
FORMATS = [kind for kind in Image.OPEN if kind != "EPS"]  # EPS would start Ghostscript
DECODED = f".images-{16 * '[0-9a-f]'}"  # the files that keep decoded images, in a run's folder


def read_image(path, size, channels, background=255):
    """Return the centre square of an image file: upright, resized, and composited onto white.

    channels: 1 for greyscale, 3 for colour. background: another grey in place of white. The result
    is uint8 (channels, size, size). Raises what Pillow raises if the file is not an image or is
    damaged, and ValueError if the file does not give the range of its pixels.
    """
    with Image.open(path, formats=FORMATS) as image:
        deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
        transparent = image.info.get("transparency")
        image = ImageOps.exif_transpose(image)
        if deep:  # Pillow would clip 16-bit values to 255 instead of scaling them
            values = np.asarray(image)
            pixels = (values / 257).round().astype(np.uint8)
            image = Image.fromarray(np.where(values == transparent, np.uint8(background), pixels))
        elif image.mode in ("I", "F"):
            raise ValueError("the file does not say the range of its 32-bit pixels")
        if image.has_transparency_data:  # transparent pixels have arbitrary colours
            image = image.convert("RGBA")
            below = Image.new("L", image.size, background).convert("RGBA")
            image = Image.alpha_composite(below, image)
        image = image.convert("L" if channels == 1 else "RGB")
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def from_pixels(pixels):
    """Return uint8 pixels as float32 in [-1, 1]. An array gives an array, a tensor a tensor."""
    return pixels / np.float32(127.5) - 1


# ------------------------------------------------------------------------------ a folder of images


def image_files(folder):
    """Return the paths of the image files in a folder and its sub-folders, sorted.

    An image file has a suffix that Pillow can read. Links are followed. Hidden files are left out;
    other files, folders that can't be listed or hold a run of train.py, and further links to the
    same folder are reported. Exits if there is no image file.
    """
    if not os.path.isdir(folder):
        sys.exit(f"{folder} is not a folder")
    suffixes = {s for s, kind in Image.registered_extensions().items() if kind in FORMATS}
    images, others, skipped, closed, seen = [], [], [], [], set()
    walk = os.walk(folder, onerror=lambda e: closed.append(e.filename), followlinks=True)
    for root, folders, names in walk:
        real = os.path.realpath(root)
        if real in seen or "checkpoint.pt" in names or {"log.csv", ".lock"} <= {*names}:
            skipped.append(root)
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in (name for name in names if not name.startswith(".")):
            is_image = os.path.splitext(name)[1].lower() in suffixes
            (images if is_image else others).append(os.path.join(root, name))
    report("left out", "folder", closed, "that can't be listed")
    report("ignored", "file", others, "without a suffix that Pillow reads")
    report("ignored", "folder", skipped, "with a run of train.py, or linked a second time")
    if not images:
        sys.exit(f"{folder}: there is no image that can be read")
    return sorted(images)


def report(verb, noun, paths, why):
    """Print how many files or folders are left out and why, and the first three of them."""
    if paths:
        names = ", ".join(map(ascii, sorted(paths)[:3]))
        print(f"{verb} {len(paths):,} {noun}{'s' * (len(paths) > 1)} {why}: {names}")


def find_classes(class_of, folder):
    """Return the sorted names in class_of, where "" is no class. Exits if they can't be used."""
    names = sorted({*class_of})
    if "" in names:
        sys.exit(f"{folder} has images outside of its sub-folders, which are the classes")
    if len(names) < 2:
        sys.exit(f"{folder} needs images in two sub-folders or more, the classes; found: {names}")
    return names


def has_colour(path):
    """Return whether an image file is in colour. It reads little more than the header."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode not in ("P", "PA"):
                return Image.getmodebase(image.mode) != "L"
            palette = np.reshape(image.getpalette("RGB"), (-1, 3))
            return bool((palette != palette[:, :1]).any())
    except Exception:  # Pillow raises many kinds of errors; `decode` leaves the file out
        return False


def stamp(path):
    """Return (size, modified, changed) of a file, or () for a broken link."""
    state = os.stat(path) if os.path.exists(path) else None
    return (state.st_size, state.st_mtime_ns, state.st_ctime_ns) if state else ()


def decode(paths, size, channels, file):
    """Write which of the paths can be read (N bytes), and then the pixels of these, to a file."""
    errors = {}

    def read(path):
        try:
            return read_image(path, size, channels)
        except Exception as error:  # Pillow raises many kinds of errors
            errors[path] = repr(error)  # without its traceback, which would keep the image

    is_read = np.zeros(len(paths), bool)
    with replacing(file) as out, ThreadPool(min(8, os.cpu_count() or 1)) as pool:
        out.write(is_read.tobytes())
        bar = tqdm(pool.imap(read, paths), "decoding", len(paths), unit=" images", leave=False)
        for index, pixels in enumerate(bar):
            if pixels is not None:
                is_read[index] = True
                out.write(pixels.tobytes())
        out.seek(0)
        out.write(is_read.tobytes())
    for path in sorted(errors)[:1]:
        print(f"{path!a} can't be read: {errors[path]}")


def decode_once(paths, size, channels, folder, cache):
    """Return the images that can be read, (N, C, size, size), and whether each path is, bool.

    cache: the folder of the file that `decode` writes, which is memory-mapped; None to keep none.
    """
    found = [(os.path.relpath(path, folder), *stamp(path)) for path in paths]
    source = inspect.getsource(read_image)  # users edit it
    key = hashlib.sha256(ascii((size, channels, found, source)).encode()).hexdigest()[:16]
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(cache or temporary) / f".images-{key}"
        if not file.exists():
            decode(paths, size, channels, file)
        data = np.memmap(file, np.uint8, "c") if cache else np.fromfile(file, np.uint8)
    is_read, pixels = np.split(data, [len(paths)])
    return pixels.reshape(-1, channels, size, size), is_read.astype(bool)


def read_folder(folder, size, channels=None, classes=False, cache=None, names=None):
    """Return the images in a folder and its sub-folders, their labels and the names of the classes.

    The images are uint8 (N, C, size, size). The labels, int64 (N,), are indices into the tuple of
    names; without classes, the labels are None and the tuple is empty.

    channels: C, 1 or 3, or None for 3 if any image is in colour.
    classes: whether each sub-folder with an image that can be read is a class, in the order of
        their names.
    cache: a folder for a file of decoded images, memory-mapped, and valid until an image changes.
    names: the names of the classes, if they are known; images may then lack some of them.

    Counts and names what is left out. Exits if no image is left, if an image is in none of the
    classes, or if there are fewer than two classes.
    """
    warnings.filterwarnings("ignore", module="PIL")  # what can't be read is reported
    paths = image_files(folder)
    class_of = [os.path.dirname(os.path.relpath(path, folder)).split(os.sep)[0] for path in paths]
    if classes:
        find_classes(class_of, folder)  # a first look, because decoding takes longer
    channels = channels or (3 if any(map(has_colour, paths)) else 1)
    images, is_read = decode_once(paths, size, channels, folder, cache)
    report("left out", "file", [*compress(paths, ~is_read)], "that can't be read")
    if not is_read.any():
        sys.exit(f"{folder}: there is no image that can be read")
    if not classes and not names:
        return images, None, ()
    class_of = [*compress(class_of, is_read)]
    names = tuple(names or find_classes(class_of, folder))
    if unknown := {*class_of} - {*names}:
        sys.exit(f"{folder} has images in {min(unknown)!r}, but the classes are {names}")
    return images, np.array([names.index(name) for name in class_of]), names


# ---------------------------------------------------------------------------------------- the demo


GLYPHS = [
    ".#. ### .#.", "#.# .#. #.#", "### #.# ###", "### .#. .#.", "#.# #.# ###", "#.# ### #.#",
]  # fmt: skip
COLOURS = [(230, 57, 70), (244, 162, 28), (56, 160, 75), (38, 110, 220)]


def demo_images():
    """Return each glyph in each colour at nine places, on white: uint8 (216, 3, 8, 8)."""
    images = []
    for glyph, colour, left, top in product(GLYPHS, COLOURS, range(3), range(3)):
        cells = np.array([[cell == "#" for cell in row] for row in glyph.split()])
        image = np.full((8, 8, 3), 255, np.uint8)
        image[top : top + 6, left : left + 6][cells.repeat(2, 0).repeat(2, 1)] = colour
        images.append(image.transpose(2, 0, 1))
    return np.stack(images)
