"""One image: read a file, convert its pixels, arrange images in a grid, save them.

The rest is what sample.py needs without support/: check_output checks beforehand whether a file
can be written, and `replacing` writes it, so that an old file is replaced as a whole or kept.

Pixels are uint8, (C, H, W) for one image and (B, C, H, W) for several; C is 1 for greyscale
images and 3 for colour. The networks work on float32 in [-1, 1].
"""

import contextlib
import io
import math
import os
import re
import secrets
import signal
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

with contextlib.suppress(ImportError):  # HEIC, the format of iPhone photos
    from pillow_heif import register_heif_opener

    register_heif_opener()

Image.init()
FORMATS = [kind for kind in Image.OPEN if kind != "EPS"]  # EPS would start Ghostscript
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")  # the names of what `replacing` writes

# ------------------------------------------------------------------------------------------- images


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


def to_pixels(x):
    """Return an array with values in [-1, 1] as uint8 pixels, rounded."""
    return ((x.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)


def to_image(pixels):
    """Return uint8 pixels (C, H, W) as a Pillow image."""
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def grid(pixels, columns=None, rows=None, names=()):
    """Return uint8 pixels (B, C, H, W) as one Pillow image with rows of `columns` images.

    If `rows` is given, and there are at least that many images, image k is in row k % rows.
    Without either, the grid is about square. Small images are enlarged. names: the names of the
    rows, written to their left.
    """
    if rows and 1 < rows <= len(pixels):
        columns = math.ceil(len(pixels) / rows)
        blank = np.full((rows * columns - len(pixels), *pixels.shape[1:]), 255, np.uint8)
        order = np.arange(rows * columns).reshape(columns, rows).T.ravel()
        pixels = np.concatenate([pixels, blank])[order]
    columns = columns or math.ceil(math.sqrt(len(pixels)))
    padding = (0, -len(pixels) % columns), (0, 0), (1, 1), (1, 1)
    pixels = np.pad(pixels, padding, constant_values=255)
    _, c, h, w = pixels.shape
    pixels = pixels.reshape(-1, columns, c, h, w).transpose(2, 0, 3, 1, 4)
    image = to_image(pixels.reshape(c, -1, columns * w))
    scale = max(1, round(512 / max(image.size)), round(64 / h))
    image = ImageOps.scale(image, scale, Image.Resampling.NEAREST)
    has_all_rows = len(names) * h * scale == image.height  # not with fewer images than names
    return label_rows(image, names) if has_all_rows else image


def label_rows(image, names):
    """Return a Pillow image whose rows of equal height have their names to the left."""
    font = ImageFont.load_default(16)
    margin = 16 + math.ceil(max(font.getlength(name) for name in names))
    canvas = ImageOps.expand(image, (margin, 0, 0, 0), fill="white")
    for row, name in enumerate(names):
        middle = (row + 0.5) * image.height / len(names)
        ImageDraw.Draw(canvas).text((8, middle), name, "black", font, anchor="lm")
    return canvas


# -------------------------------------------------------------------------------------------- files


def check_output(path, *inputs):
    """Exit if no file can be made at `path`, or if the file there is one of the inputs."""
    folder = next(p for p in Path(os.path.abspath(path)).parents if os.path.lexists(p))
    if not folder.is_dir():
        sys.exit(f"{path} can't be written: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        sys.exit(f"{path} can't be written: no permission to write to {folder}")
    if os.path.isdir(path):
        sys.exit(f"{path} can't be written: it is a folder")
    for name in inputs:
        if os.path.exists(name) and os.path.exists(path) and os.path.samefile(name, path):
            sys.exit(f"{path} is also read, so it is not written; choose another name")


def check_new_folder(path):
    """Exit unless `path` is a new or empty folder that can be written."""
    check_output(Path(path) / "x")
    if os.path.exists(path) and (not os.path.isdir(path) or os.listdir(path)):
        sys.exit(f"{path} must be a new or empty folder")


def is_folder_name(name):
    """Return whether a folder can have this name, and a terminal can show it."""
    return name == Path(name).name and name not in ("", "..") and name.isprintable()


@contextlib.contextmanager
def replacing(path):
    """Yield a new binary file, which becomes the file `path` at the end of the block.

    If the block fails, `path` stays as it was. Exits if the disk is full or can't be written to.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "x+b") as file:  # x: no file or link of this name may be there
            yield file
            file.flush()
            os.fsync(file.fileno())  # else, after a power cut, the new name may have no content
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # An error of another file is a bug, and one of Pillow has no errno: neither exits here.
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
            stays = " and stays as it was" * path.exists()
            sys.exit(f"{path} can't be written{stays}: {error.strerror}")
        raise


def save_image(path, image, **options):
    """Save a Pillow image in the format of the suffix, in a folder that is made if needed."""
    kind = Image.registered_extensions()[Path(path).suffix.lower()]
    with replacing(path) as file:
        image.save(file, kind, **options)


def save_animation(path, images, each=60, last=2000):
    """Save Pillow images as an animation. each, last: milliseconds per image, and of the last."""
    duration = [each] * (len(images) - 1) + [last]
    save_image(path, images[0], save_all=True, append_images=images[1:], duration=duration, loop=0)


# ------------------------------------------------------------------------------------- the terminal


class Output(io.FileIO):
    """Standard output or error that stays writable after its reader has ended.

    If the reader of a pipe (tee, head, less) ends, the output goes to the terminal instead, and the
    program is told to stop, unless nohup started it. If the terminal is closed, the output is lost,
    and SIGHUP tells the program to stop.
    """

    def write(self, data):
        """Write bytes."""
        try:
            return super().write(data)
        except OSError as error:
            try:
                place = os.open("/dev/tty", os.O_WRONLY)
            except OSError:
                place = os.open(os.devnull, os.O_WRONLY)
            os.dup2(place, self.fileno())
            os.close(place)
            if isinstance(error, BrokenPipeError) and not ignores_hangup():
                super().write(b"\nthe reader of the pipe has ended\n")
                signal.raise_signal(signal.SIGTERM)
            return super().write(data)


def guard_output():
    """Let print survive a pipe whose reader has ended, and characters the encoding lacks."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        buffer = getattr(stream, "buffer", None)
        raw = getattr(buffer, "raw", buffer)  # python -u has no buffer
        if type(raw) is io.FileIO:  # neither Jupyter's nor a Windows console
            file = io.BufferedWriter(Output(raw.fileno(), "w", closefd=False))
            guarded = io.TextIOWrapper(file, stream.encoding, "backslashreplace", None, True)
            setattr(sys, name, guarded)


def ignores_hangup():
    """Return whether nohup started the program, so that a closed terminal does not end it."""
    return hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def interrupt(*_):
    """Handle a signal: raise KeyboardInterrupt, and ignore the signals that follow.

    Nothing then interrupts the saving of finished work.
    """
    catch_signals(signal.SIG_IGN)
    raise KeyboardInterrupt


def catch_signals(handler=interrupt):
    """Install a handler for Ctrl-C, SIGTERM and SIGHUP (a closed terminal, unless under nohup).

    The default raises KeyboardInterrupt once.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name) and not (name == "SIGHUP" and ignores_hangup()):
            signal.signal(getattr(signal, name), handler)
