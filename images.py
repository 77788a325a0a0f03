"""The training set: a folder of images as one array, and the built-in demo.

    images, labels = read_folder("./images", 32)     # uint8 (N, C, 32, 32)
    x0 = from_pixels(images)                         # float32 in [-1, 1]

It needs numpy, Pillow and tqdm, and no other file of the project.
"""

import contextlib
import hashlib
import inspect
import os
import secrets
import sys
import tempfile
import warnings
from itertools import product
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

with contextlib.suppress(ImportError):  # HEIC, the format of iPhone photos
    from pillow_heif import register_heif_opener

    register_heif_opener()

Image.init()
FORMATS = [kind for kind in Image.OPEN if kind != "EPS"]  # EPS would start Ghostscript


def read_image(path, size, channels):
    """Return the centre square of an image file: upright, resized, and composited onto white.

    channels: 1 for greyscale, 3 for colour. The result is uint8 (channels, size, size). Raises what
    Pillow raises if the file is not an image or is damaged, and ValueError if the file does not
    give the range of its pixels.
    """
    with Image.open(path, formats=FORMATS) as image:
        deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
        transparent = image.info.get("transparency")
        image = ImageOps.exif_transpose(image)
        if deep:  # Pillow would clip 16-bit values to 255 instead of scaling them
            values = np.asarray(image)
            pixels = (values / 257).round().astype(np.uint8)
            image = Image.fromarray(np.where(values == transparent, np.uint8(255), pixels))
        elif image.mode in ("I", "F"):
            raise ValueError("the file does not say the range of its 32-bit pixels")
        if image.has_transparency_data:  # transparent pixels have arbitrary colours
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if channels == 1 else "RGB")
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def from_pixels(pixels):
    """Return uint8 pixels as float32 in [-1, 1]. An array gives an array, a tensor a tensor."""
    return pixels / np.float32(127.5) - 1


# ------------------------------------------------------------------------------ a folder of images


def image_files(folder):
    """Return the paths of the image files in a folder and its sub-folders, sorted, and the others.

    An image file has a suffix that Pillow can read; a folder that can't be listed counts as one.
    Hidden files, and folders that hold a run of train.py, are left out. Links are followed. Exits
    if there is no image file.
    """
    if not os.path.isdir(folder):
        sys.exit(f"{folder} is not a folder")
    suffixes = {s for s, kind in Image.registered_extensions().items() if kind in FORMATS}
    images, others, seen = [], [], set()

    def closed(error):
        images.append(os.path.join(error.filename, "*"))

    for root, folders, names in os.walk(folder, onerror=closed, followlinks=True):
        real = os.path.realpath(root)
        if real in seen or "checkpoint.pt" in names or {"log.csv", ".lock"} <= {*names}:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in (name for name in names if not name.startswith(".")):
            is_image = os.path.splitext(name)[1].lower() in suffixes
            (images if is_image else others).append(os.path.join(root, name))
    if not images:
        sys.exit(f"{folder}: there is no image that can be read")
    return sorted(images), others


def report(verb, paths, why):
    """Print how many files are left out and why, and the names of the first three."""
    if paths:
        names = ", ".join(map(ascii, sorted(paths)[:3]))
        print(f"{verb} {len(paths):,} file{'s' * (len(paths) > 1)} {why}: {names}")


def class_of(path, folder):
    """Return the name of the sub-folder of `folder` that the file is in, "" if it is in none."""
    parts = Path(path).relative_to(folder).parts
    return parts[0] if len(parts) > 1 else ""


def class_names(folder):
    """Return the names of the classes, sorted: the sub-folders that have images in them.

    Exits if there are images outside the sub-folders, if there are fewer than two classes, or if
    a name can't be shown or can't be the name of a folder everywhere.
    """
    names = sorted({class_of(path, folder) for path in image_files(folder)[0]})
    if "" in names:
        sys.exit(
            f"--classes: {folder} has images outside of its sub-folders, which are the classes"
        )
    if len(names) < 2:
        sys.exit(f"--classes: {folder} needs images in two sub-folders or more; found: {names}")
    if bad := [name for name in names if not name.isprintable() or set(name) & set('\\:*?"<>|')]:
        sys.exit(f"--classes: {bad[0]!r} can't be the name of a class; rename the sub-folder")
    return names


def has_colour(path):
    """Return whether an image file is in colour. It reads little more than the header."""
    with contextlib.suppress(Exception), Image.open(path, formats=FORMATS) as image:
        if image.mode in ("P", "PA"):
            palette = np.reshape(image.getpalette("RGB"), (-1, 3))
            return bool((palette != palette[:, :1]).any())
        return Image.getmodebase(image.mode) != "L"
    return False  # Pillow raises many kinds; `decode` leaves the file out


def state_of(path):
    """Return what changes with a file: its size and two times; nothing for a broken link."""
    state = os.stat(path) if os.path.exists(path) else None
    return (state.st_size, state.st_mtime_ns, state.st_ctime_ns) if state else ()


@contextlib.contextmanager
def replacing(path):
    """Yield a new binary file, which takes the place of the file `path` at the end of the block.

    If the block fails, `path` stays as it was. Exits with one line if the disk is full.
    """
    name = Path(path).name.lstrip(".")
    temporary = Path(path).with_name(f".{name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # otherwise, a power cut may leave an empty file
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter
        sys.exit(f"{path} can't be written: {error.__context__ or error}")
    finally:
        temporary.unlink(missing_ok=True)


def decode(paths, size, channels, file):
    """Write which of the paths can be read (N bytes), and then the pixels of these, to a file."""

    def read(path):
        with contextlib.suppress(Exception):  # Pillow raises many kinds; None stands for them
            return read_image(path, size, channels)

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


def read_folder(folder, size, channels=None, classes=None, cache=None):
    """Return the images in a folder, uint8 (N, C, size, size), and their labels, int64 (N,).

    channels: C, 1 or 3, or None for 3 if any image is in colour.
    classes: names of sub-folders. The label of an image is the index of its sub-folder in this
        list. Without such a list, the labels are None.
    cache: a folder for the decoded images, memory-mapped, and valid until a file changes.

    Counts and names the files that are left out. Exits if no image is left, or if one is in none of
    the classes.
    """
    warnings.filterwarnings("ignore", module="PIL")  # what can't be read is reported
    paths, others = image_files(folder)
    report("ignored", others, "without a suffix that Pillow reads")
    channels = channels or (3 if any(map(has_colour, paths)) else 1)
    found = [(os.path.relpath(path, folder), *state_of(path)) for path in paths]
    key = ascii((size, channels, found, inspect.getsource(read_image)))
    name = f".images-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(cache or temporary) / name
        if not file.exists():
            decode(paths, size, channels, file)
        data = np.memmap(file, np.uint8, "c") if cache else np.fromfile(file, np.uint8)
    is_read = data[: len(paths)].astype(bool)
    broken = [path for path, read in zip(paths, is_read, strict=True) if not read]
    report("left out", broken, "that can't be read")
    if len(broken) == len(paths):
        sys.exit(f"{folder}: there is no image that can be read")
    images = data[len(paths) :].reshape(-1, channels, size, size)
    if not classes:
        return images, None
    names = [class_of(path, folder) for path, read in zip(paths, is_read, strict=True) if read]
    if unknown := {*names} - {*classes}:
        sys.exit(f"{folder} has images in {min(unknown)!r}, but the classes are {classes}")
    return images, np.array([classes.index(name) for name in names])


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
