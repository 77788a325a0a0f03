"""The training set: a folder of images as one uint8 array (N, C, size, size).

    images, labels = read_folder("./images", 32)
    python -m support.data ./images real 32    # the same as PNG files in the new folder `real`

It needs no torch: torch.from_numpy(images) makes a tensor of the result.
"""

import argparse
import hashlib
import inspect
import json
import os
import re
import sys
import tempfile
import warnings
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from PIL import Image
from tqdm import tqdm

from images import (
    FORMATS,
    check_new_folder,
    guard_output,
    is_folder_name,
    read_image,
    replacing,
    to_image,
)
from support import cli

LARGE = 16_384  # bytes; from this file size on, threads are faster
PILLOW = OSError, ValueError, SyntaxError, Image.DecompressionBombError  # what it raises

# ------------------------------------------------------------------------------ a folder of images


def image_files(folder):
    """Return (image files, other files, left out) of a folder and its sub-folders.

    The first two are lists of paths, in the same order on each machine. An image file has a suffix
    that Pillow can read. Hidden files are ignored. Sub-folders are left out, with a reason, if they
    are links, cannot be read, or hold the output of train.py or sample.py. Exits if there is no
    such folder.
    """
    if not os.path.isdir(folder):
        sys.exit(f"{folder}: {'not a folder' if os.path.exists(folder) else 'no such folder'}")
    suffixes = {s for s, kind in Image.registered_extensions().items() if kind in FORMATS}
    paths, left_out = [], []

    def can_not_read(error):
        left_out.append(f"{error.filename} ({error.strerror})")

    for root, folders, names in os.walk(folder, onerror=can_not_read):
        is_below = root != os.fspath(folder)
        if "checkpoint.pt" in names or (is_below and ".sample.json" in names):
            left_out.append(f"{root} (it holds the output of train.py or sample.py)")
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [path for name in folders if os.path.islink(path := os.path.join(root, name))]
        left_out += [f"{path} (a link)" for path in links]
        paths += [os.path.join(root, name) for name in names if not name.startswith(".")]
    paths.sort(key=lambda path: path.replace(os.sep, "/"))
    images = [path for path in paths if os.path.splitext(path)[1].lower() in suffixes]
    return images, sorted(set(paths) - set(images)), left_out


def class_of(path, folder):
    """Return the name of the sub-folder of `folder` that the file is in, "" if it is in none."""
    parts = Path(path).relative_to(folder).parts
    return parts[0] if len(parts) > 1 else ""


def class_names(folder):
    """Return the names of the classes, sorted: the sub-folders that have images in them.

    Exits if there are images outside the sub-folders, or fewer than two classes.
    """
    paths, _, left_out = image_files(folder)
    names = sorted({class_of(path, folder) for path in paths})
    if "" in names:
        first = next(os.path.basename(path) for path in paths if not class_of(path, folder))
        sys.exit(f"--classes: {folder} has images outside of its sub-folders, which are the "
                 f"classes: move or remove {printable(first)}")  # fmt: skip
    if bad := [name for name in names if not is_folder_name(name)]:
        sys.exit(f"--classes: a class must not be named {bad[0]!r}")
    if len(names) < 2:
        found = ", ".join([*names, *left_out[:3]]) or "none"
        sys.exit(f"--classes: {folder} needs images in two sub-folders or more, one for each "
                 f"class; found: {printable(found)}")  # fmt: skip
    return names


def labels_of(paths, folder, classes):
    """Return the index of each file's class in a list of names, int64 (N,).

    Exits if a file is in none of them.
    """
    index = {name: k for k, name in enumerate(classes)}
    names = [class_of(path, folder) for path in paths]
    if unknown := sorted(set(names) - index.keys()):
        what = f"the sub-folder {unknown[0]}" if unknown[0] else "images outside of the sub-folders"
        sys.exit(f"{folder} has {what}, but the classes are {', '.join(classes)}")
    return np.array([index[name] for name in names])


def is_grey(image):
    """Return whether a Pillow image has no colour, by its mode or its palette."""
    if image.mode in ("P", "PA"):
        red, green, blue = np.reshape(image.getpalette("RGB"), (-1, 3)).T
        return bool((red == green).all() and (green == blue).all())
    return image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I")


def has_colour(path):
    """Return whether an image file is in colour. It reads little more than the header."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return not is_grey(image)
    except Exception:  # Pillow raises many kinds; decoding reports them
        return False


def try_to_read(path, size, channels):
    """Return (the pixels, None), or (None, the exception that reading the file raises)."""
    try:
        return read_image(path, size, channels), None
    except Exception as error:  # Pillow raises many kinds
        return None, error


def size_and_time(path):
    """Return the size of a file and when it was changed, or (0, 0) for a broken link."""
    state = os.stat(path) if os.path.exists(path) else None
    return (state.st_size, state.st_mtime_ns) if state else (0, 0)


def map_files(function, paths):
    """Yield function(path) for each path in order, computed in threads if the files are large.

    Pillow decodes without Python's lock. With small files, threads mostly wait for that lock.
    """
    size = np.mean([size_and_time(path)[0] for path in paths[:64]])
    if size < LARGE:
        yield from map(function, paths)
        return
    most = 16 if size < 2**20 else 4  # an image takes 12 bytes per pixel while it is decoded
    with ThreadPool(min(most, os.cpu_count() or 1)) as pool:
        yield from pool.imap(function, paths)


def decode(paths, size, channels, file):
    """Write images to an open .npy file, uint8 (N, C, size, size).

    channels: C, 1 or 3, or None for 3 if any image is in colour. Returns C, and [(index, why)] of
    the paths that can't be read. Exits if none can.
    """
    warnings.filterwarnings("ignore", module="PIL")  # what can't be read is reported
    if channels is None:
        channels = 3 if any(map(has_colour, paths)) else 1
    shape, broken = (channels, size, size), []
    header = {"shape": (len(paths), *shape), "fortran_order": False, "descr": "|u1"}
    npy.write_array_header_1_0(file, header)
    results = map_files(partial(try_to_read, size=size, channels=channels), paths)
    bar = tqdm(results, "decoding", len(paths), unit=" images", mininterval=1, leave=False)
    for index, (pixels, error) in enumerate(bar):
        if error:
            broken.append((index, error))
            continue
        if pixels.shape != shape:
            raise ValueError(f"read_image returned the shape {pixels.shape}, not {shape}")
        file.write(pixels.tobytes())
    file.seek(0)
    header["shape"] = len(paths) - len(broken), *shape
    npy.write_array_header_1_0(file, header)  # numpy keeps its length the same for any N
    if len(broken) == len(paths):
        if not isinstance(broken[0][1], PILLOW):
            raise broken[0][1]  # a bug in read_image
        report_unreadable(paths, broken)
        sys.exit("there is no image that can be read")
    return channels, [(index, str(error)) for index, error in broken]


def printable(text):
    """Return untrusted text, such as a file name, without control characters."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def report_unreadable(paths, broken):
    """Print how many of the paths can't be read, and the first three: broken is [(index, why)]."""
    print(f"left out {len(broken):,} of {len(paths):,} files as unreadable:")
    print("\n".join(f"  {printable(f'{paths[index]}: {why}')}" for index, why in broken[:3]))


def read_folder(folder, size, channels=None, most=None, classes=None, cache=None):
    """Return the images in a folder, uint8 (N, C, size, size), and their labels, int64 (N,).

    channels: C, 1 or 3, or None for 3 if any image is in colour.
    most: take this many images, evenly spaced; all if None.
    classes: names of sub-folders. The label of an image is the index of its sub-folder in this
        list. Without such a list, the labels are None.
    cache: a folder in which the decoded images stay until a file changes; they are memory-mapped.

    Counts and names the files that are left out. Exits if no image is left, or if one is in none of
    the classes.
    """
    paths, others, left_out = image_files(folder)
    if left_out:
        first = printable(", ".join(left_out[:3]))
        print(f"left out {len(left_out):,} sub-folder{'s' * (len(left_out) > 1)}: {first}")
    if others:
        first = printable(", ".join(os.path.basename(path) for path in others[:3]))
        files = "1 file" if len(others) == 1 else f"{len(others):,} files"
        print(f"ignored {files} with a suffix that Pillow does not read: {first}")
        if any(path.lower().endswith((".heic", ".heif")) for path in others):
            print("to read HEIC files: pip install pillow-heif")
    if not paths:
        sys.exit(f"{folder}: there is no image that can be read")
    if most is not None and most < len(paths):
        paths = [paths[i * len(paths) // most] for i in range(most)]
    with tempfile.TemporaryDirectory() as temporary:
        file, broken = decoded(paths, folder, size, channels, cache or Path(temporary))
        images = np.load(file, mmap_mode="c" if cache else None)
    if broken:
        report_unreadable(paths, broken)
        unreadable = {index for index, _ in broken}
        paths = [path for index, path in enumerate(paths) if index not in unreadable]
    return images, labels_of(paths, folder, classes) if classes else None


def decoded(paths, folder, size, channels, cache):
    """Return the .npy file of these images in the folder `cache`, and what `decode` returns.

    They are decoded again if a file, or the code of read_image, has changed, or if what was
    decoded is damaged.
    """
    states = [(os.path.relpath(path, folder), *size_and_time(path)) for path in paths]
    key = repr((size, states, inspect.getsource(read_image)))
    file = cache / f"images-{digest(key.encode(errors='surrogateescape'))}.npy"
    note = read_note(file)
    if note is None or channels not in (note["asked"], note["found"]):
        with replacing(file) as new:
            found, broken = decode(paths, size, channels, new)
        note = {"asked": channels, "found": found, "broken": broken}
        note["digest"] = digest_of(np.load(file, mmap_mode="r"))
        with replacing(file.with_suffix(".json")) as new:
            new.write(json.dumps(note).encode())
    return file, note["broken"]


def read_note(file):
    """Return the note on a decoded .npy file, or None if either is missing or damaged.

    It is {"asked": the channels as requested, "found": the channels of the file, "broken": what
    `decode` returns, "digest": the digest of the images}.
    """
    try:
        note = json.loads(file.with_suffix(".json").read_bytes())
        images = np.load(file, mmap_mode="r")  # raises if the array is truncated
        is_whole = images.shape[1] == note["found"] and {"asked", "broken", "digest"} <= note.keys()
        return note if is_whole else None
    except (OSError, EOFError, ValueError, TypeError, KeyError):
        return None


def forget_others(images, cache):
    """Remove everything decoded into the folder `cache` except these images of read_folder."""
    for file in cache.iterdir():
        ours = re.fullmatch(r"images-[0-9a-f]{16}\.(npy|json)", file.name)
        if ours and file.stem != Path(images.filename).stem:
            file.unlink(missing_ok=True)  # another machine may do the same


def digest(*parts):
    """Return a short digest of bytes or arrays."""
    hasher = hashlib.blake2b(digest_size=8)
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest()


def digest_of(images):
    """Return a short digest of an array of images."""
    return digest(repr(images.shape).encode(), np.ascontiguousarray(images))


def fingerprint(images):
    """Return digest_of the images of read_folder, which is known if they come from its cache."""
    note = read_note(Path(images.filename)) if isinstance(images, np.memmap) else None
    return note["digest"] if note else digest_of(images)


# -------------------------------------------------------------------------------------- the program


def main():
    """Write the images of a folder as the network sees them, as PNG files in a new folder."""
    parser = argparse.ArgumentParser(usage="python -m support.data ./images NEW_FOLDER 32")
    parser.add_argument("folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("size", type=cli.number(int, 1))
    args = parser.parse_args()
    guard_output()
    check_new_folder(args.out)
    images, _ = read_folder(args.folder, args.size)
    args.out.mkdir(parents=True, exist_ok=True)
    for k, pixels in enumerate(images):
        to_image(pixels).save(args.out / f"{k:06d}.png")
    print(f"{args.out}: {len(images):,} images")


if __name__ == "__main__":
    main()
