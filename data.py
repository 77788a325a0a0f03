"""The training set: a folder of images as one uint8 array (N, C, size, size), and the demo.

    images = data.read_folder("./images", 32)
    python data.py ./images real 32    # the same as PNG files in the new folder `real`, for FID

It needs no torch: torch.from_numpy(images) makes a tensor of the result.
"""

import argparse
import functools
import hashlib
import multiprocessing
import os
import signal
import sys
import tempfile
import warnings
from itertools import product
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from PIL import Image
from tqdm import tqdm

from images import is_grey, read_image, to_image

# ------------------------------------------------------------------------------ a folder of images


def image_files(folder, without=None):
    """Return (image files, other files) of a folder and its sub-folders, as lists of paths.

    An image file has a suffix that Pillow can read. Hidden files and the folder `without` are left
    out. The order is the same on each machine. Exits if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        sys.exit(f"--data {folder}: there is no such folder")
    suffixes = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if Path(root, name).resolve() != without]
        paths += [Path(root, name) for name in names]
    named = sorted((path.relative_to(folder).as_posix(), path) for path in paths)
    paths = [path for name, path in named if "/." not in f"/{name}"]
    images = [path for path in paths if path.suffix.lower() in suffixes]
    return images, [path for path in paths if path.suffix.lower() not in suffixes]


def in_processes(function, paths, start=None):
    """Yield function(path) for each path in order, computed on all cores."""
    if len(paths) < 256:  # it takes longer to start the processes
        yield from map(function, paths)
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with multiprocessing.Pool(cores, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        yield from pool.imap(function, paths, 32)


def has_colour(path):
    """Return whether an image file is in colour. It reads little more than the header."""
    try:
        with Image.open(path) as image:
            return not is_grey(image)
    except Exception:  # Pillow raises many kinds; decoding reports them
        return False


def try_to_read(path, size, channels):
    """Return (the pixels, None), or (None, the reason why the file can't be read)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return read_image(path, size, channels), None
        except Exception as error:  # Pillow raises many kinds
            return None, f"{path}: {error}"


def decode(paths, others, size, channels, file):
    """Write the images to an open binary file as a numpy array (N, channels, size, size).

    channels: 1 or 3, or None for 3 if any image is in colour. Files that can't be read, and the
    others, whose suffix is not that of an image, are counted, and the first three are named. Exits
    if no image is left.
    """
    if others:
        first = ", ".join(path.name for path in others[:3])
        print(f"ignored {len(others):,} files without the suffix of an image: {first}")
    if channels is None:
        channels = 3 if any(in_processes(has_colour, paths)) else 1

    def write_header(n):  # numpy keeps its length the same for any n
        header = {"shape": (n, channels, size, size), "fortran_order": False, "descr": "|u1"}
        npy.write_array_header_1_0(file, header)

    write_header(len(paths))
    read, broken = functools.partial(try_to_read, size=size, channels=channels), []
    decoded = in_processes(read, paths)
    bar = tqdm(decoded, "decoding", len(paths), unit=" images", mininterval=1, leave=False)
    for pixels, error in bar:
        if error:
            broken.append(error)
        else:
            file.write(pixels.tobytes())
    if broken:
        print(f"left out {len(broken):,} of {len(paths):,} files, which can't be read:")
        print("\n".join(f"  {line}" for line in broken[:3]))
    if len(broken) == len(paths):
        sys.exit("--data: there is no image that can be read")
    file.seek(0)
    write_header(len(paths) - len(broken))
    file.seek(0)


def read_folder(folder, size, channels=None, most=None):
    """Return the images in a folder, or `most` of them evenly spaced: uint8 (N, C, size, size).

    channels: C, 1 or 3, or None for 3 if any image is in colour. Exits if no image can be read.
    """
    paths, others = image_files(folder)
    if most is not None and most < len(paths):
        paths = [paths[i * len(paths) // most] for i in range(most)]
    with tempfile.TemporaryFile() as file:
        decode(paths, others, size, channels, file)
        return np.load(file)


def cached_folder(folder, size, channels, out):
    """Return read_folder(folder, size, channels), memory-mapped from a file in the folder `out`.

    The file is written once. Its name depends on the names, sizes and times of all images.
    """
    paths, others = image_files(folder, without=out.resolve())
    states = [(p.relative_to(folder).as_posix(), p.stat()) for p in paths]
    states = [(name, state.st_size, state.st_mtime_ns) for name, state in states]
    key = repr((size, channels, states)).encode(errors="surrogateescape")
    path = out / f"images-{hashlib.blake2b(key, digest_size=8).hexdigest()}.npy"
    if not path.exists():
        old = list(out.glob("images-*.npy"))
        with tempfile.NamedTemporaryFile(prefix="images-", dir=out, delete=False) as file:
            decode(paths, others, size, channels, file)
        os.replace(file.name, path)
        for file in old:
            file.unlink()
    return np.load(path, mmap_mode="c")


def fingerprint(images):
    """Return a short digest of an array of images, from its shape and about 1000 of them."""
    some = images[:: -(-len(images) // 1000)]
    return hashlib.blake2b(repr(images.shape).encode() + some.tobytes(), digest_size=8).hexdigest()


# ----------------------------------------------------------------------------------------- the demo

# Images so simple that a test can tell a right sample from a wrong one.
DEMO_GLYPHS = [
    ".#. ### .#.", "#.# .#. #.#", "### #.# ###", "### .#. .#.", "#.# #.# ###", "#.# ### #.#",
]  # fmt: skip
DEMO_COLOURS = [(230, 57, 70), (244, 162, 28), (56, 160, 75), (38, 110, 220)]


def demo_images():
    """Return each glyph in each colour at nine places, on white: uint8 (216, 3, 8, 8)."""
    images = []
    for glyph, colour, left, top in product(DEMO_GLYPHS, DEMO_COLOURS, range(3), range(3)):
        cells = np.array([[cell == "#" for cell in row] for row in glyph.split()])
        image = np.full((8, 8, 3), 255, np.uint8)
        image[top : top + 6, left : left + 6][cells.repeat(2, 0).repeat(2, 1)] = colour
        images.append(image.transpose(2, 0, 1))
    return np.stack(images)


# -------------------------------------------------------------------------------------- the program


def main():
    """Write the images of a folder as the network sees them, as PNG files in a new folder."""
    parser = argparse.ArgumentParser(usage="python data.py ./images NEW_FOLDER 32")
    parser.add_argument("folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("size", type=int)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    for k, pixels in enumerate(read_folder(args.folder, args.size)):
        to_image(pixels).save(args.out / f"{k:06d}.png")


if __name__ == "__main__":
    main()
