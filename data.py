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
    if not os.path.isdir(folder):
        sys.exit(f"{folder}: there is no such folder")
    suffixes = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths = []
    for root, folders, names in os.walk(folder):
        shown = [name for name in folders if not name.startswith(".")]
        folders[:] = [name for name in shown if Path(root, name).resolve() != without]
        paths += [os.path.join(root, name) for name in names if not name.startswith(".")]
    paths.sort(key=lambda path: path.replace(os.sep, "/"))
    images = [path for path in paths if os.path.splitext(path)[1].lower() in suffixes]
    return images, sorted(set(paths) - set(images))


def class_of(path, folder):
    """Return the name of the sub-folder of `folder` that the file is in, "" if it is in none."""
    parts = Path(path).relative_to(folder).parts
    return parts[0] if len(parts) > 1 else ""


def class_names(folder, without=None):
    """Return the names of the classes, sorted: the sub-folders that have images in them.

    Exits if there are images outside of the sub-folders, or fewer than two classes.
    """
    paths, _ = image_files(folder, without)
    names = sorted({class_of(path, folder) for path in paths})
    if "" in names:
        sys.exit(
            f"--classes: {folder} has images outside of its sub-folders; each must be in a class"
        )
    if len(names) < 2:
        sys.exit(
            f"--classes: {folder} needs two sub-folders with images or more, one for each class"
        )
    return names


def in_processes(function, paths):
    """Yield function(path) for each path in order, computed on all cores."""
    if len(paths) < 256:  # it takes longer to start the processes
        yield from map(function, paths)
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # A spawned process imports the main module. This module takes its place meanwhile, because
    # train.py would load torch, with all of CUDA's libraries, in each process.
    main, sys.modules["__main__"] = sys.modules["__main__"], sys.modules[__name__]
    pool = multiprocessing.Pool(cores, signal.signal, (signal.SIGINT, signal.SIG_IGN))
    sys.modules["__main__"] = main
    with pool:
        yield from pool.imap(function, paths, 128)


def has_colour(path):
    """Return whether an image file is in colour. It reads little more than the header."""
    try:
        with Image.open(path) as image:
            return not is_grey(image)
    except Exception:  # Pillow raises many kinds; decoding reports them
        return False


def try_to_read(path, size, channels):
    """Return (the bytes of the pixels, None), or (None, the reason why they can't be read)."""
    try:
        return read_image(path, size, channels).tobytes(), None
    except Exception as error:  # Pillow raises many kinds
        return None, f"{path}: {error}"


def decode(paths, others, size, channels, file):
    """Write images to an .npy file, uint8 (N, channels, size, size), and return their paths.

    channels: 1 or 3, or None for 3 if any image is in colour. Unreadable files, and the `others`
    without the suffix of an image, are counted, and the first three of each are named. Exits if no
    image is left.
    """
    if others:
        first = ", ".join(os.path.basename(path) for path in others[:3])
        print(f"ignored {len(others):,} files without the suffix of an image: {first}")
    warnings.filterwarnings("ignore", module="PIL")  # what can't be read is said below
    if channels is None:
        channels = 3 if any(in_processes(has_colour, paths)) else 1
    read, good, broken = functools.partial(try_to_read, size=size, channels=channels), [], []
    header = {"shape": (len(paths), channels, size, size), "fortran_order": False, "descr": "|u1"}
    with open(file, "wb") as out:
        npy.write_array_header_1_0(out, header)
        decoded = in_processes(read, paths)
        bar = tqdm(decoded, "decoding", len(paths), unit=" images", mininterval=1, leave=False)
        for path, (pixels, error) in zip(paths, bar, strict=True):
            if error:
                broken.append(error)
            else:
                good.append(path)
                out.write(pixels)
        out.seek(0)
        header["shape"] = len(good), channels, size, size
        npy.write_array_header_1_0(out, header)  # numpy keeps its length the same for any N
    if broken:
        print(f"left out {len(broken):,} of {len(paths):,} files, which can't be read:")
        print("\n".join(f"  {line}" for line in broken[:3]))
    if not good:
        sys.exit("there is no image that can be read")
    return good


def labels_of(paths, folder, classes):
    """Return the index of each file's class in a list of names, int64 (N,).

    Exits if a file is in none of them.
    """
    index = {name: k for k, name in enumerate(classes)}
    names = [class_of(path, folder) for path in paths]
    if unknown := sorted(set(names) - index.keys()):
        sys.exit(f"{Path(folder, unknown[0])} is not a class of the network")
    return np.array([index[name] for name in names])


def read_folder(folder, size, channels=None, most=None):
    """Return the images in a folder, or `most` of them evenly spaced: uint8 (N, C, size, size).

    channels: C, 1 or 3, or None for 3 if any image is in colour. Exits if no image can be read.
    """
    return read_labelled(folder, size, channels, most, None)[0]


def read_labelled(folder, size, channels, most, classes):
    """Return the same as read_folder and, for a list of class names, the labels, int64 (N,).

    A label is the index of the sub-folder in the list. Exits if an image is in none of them.
    """
    paths, others = image_files(folder)
    if most is not None and most < len(paths):
        paths = [paths[i * len(paths) // most] for i in range(most)]
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary, "images.npy")
        good = decode(paths, others, size, channels, file)
        return np.load(file), labels_of(good, folder, classes) if classes else None


def cached_folder(folder, size, channels, out, classes=None):
    """Return the same as read_labelled, with the images memory-mapped from a file in `out`.

    The images are decoded once. The name of the file depends on the size, and on the names, sizes
    and times of the image files.
    """
    paths, others = image_files(folder, without=out.resolve())
    states = [(path.removeprefix(str(folder)), os.stat(path)) for path in paths]
    states = [(name, state.st_size, state.st_mtime_ns) for name, state in states]
    key = repr((size, states)).encode(errors="surrogateescape")
    file = out / f"images-{hashlib.blake2b(key, digest_size=8).hexdigest()}.npy"
    of_run = (channels,) if channels else (1, 3)
    labels = file.with_suffix(".labels.npy")
    files = [labels, file] if classes else [file]
    exist = all(map(Path.exists, files))
    if not exist or np.load(file, mmap_mode="r").shape[1] not in of_run:
        old = set(out.glob("images-*.npy"))
        with tempfile.TemporaryDirectory(prefix="images-", dir=out) as temporary:
            good = decode(paths, others, size, channels, Path(temporary, file.name))
            if classes:
                np.save(Path(temporary, labels.name), labels_of(good, folder, classes))
            for new in files:
                os.replace(Path(temporary, new.name), new)
        for other in old - set(files):
            other.unlink(missing_ok=True)  # another machine may do the same
    return np.load(file, mmap_mode="c"), np.load(labels) if classes else None


def fingerprint(images):
    """Return a short digest of an array of images."""
    digest = hashlib.blake2b(repr(images.shape).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(images))
    return digest.hexdigest()


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
    if args.out.exists():
        parser.error(f"{args.out} exists; choose a new folder")
    args.out.mkdir(parents=True)
    for k, pixels in enumerate(read_folder(args.folder, args.size)):
        to_image(pixels).save(args.out / f"{k:06d}.png")


if __name__ == "__main__":
    main()
