"""Sample images from model.onnx with ONNX Runtime, on CUDA or a CPU, without torch.

    python sample.py --onnx model.onnx                     # 64 images in samples.png
    python sample.py --onnx model.onnx --steps 50 --eta 0  # DDIM, 20 times as fast
    python sample.py --onnx model.onnx -n 10000 --dir out  # one PNG per image
    python sample.py --onnx model.onnx --interpolate a.png b.png  # between two images

A machine that serves images needs this file, a model.onnx, numpy, Pillow, tqdm and onnxruntime (or
onnxruntime-gpu[cuda,cudnn]). The reverse process repeats that of ddpm.py in numpy.
"""

import argparse
import contextlib
import copy
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

INSTALL = 'pip uninstall -y onnxruntime onnxruntime-gpu; pip install "onnxruntime-gpu[cuda,cudnn]"'
GRID = 256  # the largest number of images in one grid
FRAMES, STRIP = 50, 10  # how many of the steps the GIF and the strip show
LANES = {"cuda": 2}  # batches drawn at a time: numpy works on one while CUDA works on another
LAMBDAS = np.linspace(0, 1, 11, dtype=np.float32)  # the mixtures of an interpolation

# ------------------------------------------------------------------------------ the reverse process


def respaced(betas, steps):
    """A shorter chain through the same noise levels: its betas (steps,) and its t (steps,)."""
    T = len(betas)
    if not 1 <= steps <= T:
        raise ValueError(f"steps must be 1..{T}, not {steps}")
    tau = (T - 1 - np.arange(steps) * (T - 1) // max(1, steps - 1))[::-1]
    alphas_bar = (1 - betas).cumprod()[tau]
    return 1 - alphas_bar / np.append(1.0, alphas_bar[:-1]), tau


def sample_progressive(
    eps_model, draw_noise, betas, variance="large", steps=None, eta=None, x_T=None
):
    """Algorithm 2 of the paper as a generator: yields (t, x_t, x0_hat) from t = T-1 down to t = 0.

    x_t is the input of the network and x0_hat, in [-1, 1], the current estimate of the clean image;
    the last x0_hat is the sample. All are float32 (B, C, H, W).

    eps_model(x_t, t) returns eps; t is int64 (B,). draw_noise() returns the next z.
    betas: float64 (T,). variance: sigma_t^2 is beta_t if "large", beta-tilde_t if "small".
    steps: how many of the T steps to take; all if None. eta: None is the paper's step, a number is
        DDIM's eta.
    x_T: the start, if it is not pure noise. To continue from an x_t, pass betas[: t + 1] with it.

    Raises ValueError for an unknown variance, and for steps or eta out of range.
    """
    if variance not in ("large", "small") or not 0 <= (eta or 0) <= 1:
        raise ValueError('variance must be "large" or "small", and eta from 0 to 1')
    betas, tau = respaced(betas, len(betas) if steps is None else steps)
    alphas = 1 - betas
    alphas_bar = alphas.cumprod()
    alphas_bar_prev = np.append(1.0, alphas_bar[:-1])
    posterior_variance = (1 - alphas_bar_prev) / (1 - alphas_bar) * betas  # (7)
    sigma2 = betas if variance == "large" else posterior_variance
    x = draw_noise() if x_T is None else x_T
    tables = np.stack([betas, alphas, alphas_bar, alphas_bar_prev], 1).tolist()
    for i in reversed(range(len(betas))):
        beta, alpha, abar, abar_prev = tables[i]  # Python floats, which keep float32 arrays float32
        eps = eps_model(x, np.full(len(x), tau[i]))
        x0 = ((x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)).clip(-1, 1)  # (15)
        yield int(tau[i]), x, x0
        if i == 0:  # the last step adds no noise, and its mean is x0_hat itself
            return
        if eta is None:
            mean = (
                math.sqrt(abar_prev) * beta / (1 - abar) * x0
                + math.sqrt(alpha) * (1 - abar_prev) / (1 - abar) * x
            )  # (7)
            sigma = math.sqrt(sigma2[i])
        else:
            sigma = eta * math.sqrt(posterior_variance[i])
            eps = (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)  # recomputed from the clipped x0
            mean = math.sqrt(abar_prev) * x0 + math.sqrt(1 - abar_prev - sigma**2) * eps
        x = mean if sigma == 0 else mean + sigma * draw_noise()


def interpolate(eps_model, draw_noise, x0, x0_b, t, betas, variance="large", steps=None, eta=None):
    """Figure 8: two images diffused to x_t, mixed by each of LAMBDAS, and denoised.

    Yields what sample_progressive does, with a row for each lambda. All rows share the same noise,
    so that only lambda differs.

    draw_noise() returns the next z, (1, C, H, W). x0, x0_b: images in [-1, 1], (C, H, W).
    t: 0..T-1; the larger it is, the more the network has to invent.
    """
    abar = float((1 - betas).cumprod()[t])
    x_t, x_t_b = (math.sqrt(abar) * x + math.sqrt(1 - abar) * draw_noise() for x in (x0, x0_b))
    lam = LAMBDAS[:, None, None, None]
    mixed = (1 - lam) * x_t + lam * x_t_b
    steps = None if steps is None else min(steps, t + 1)
    return sample_progressive(eps_model, draw_noise, betas[: t + 1], variance, steps, eta, mixed)


def noise_of(seed, first, shape):
    """A draw_noise() for images first, first + 1, ...: standard normal, of shape (B, C, H, W).

    The noise of image k depends on (seed, k) alone, so neither -n nor --batch changes an image.
    """
    streams = [np.random.default_rng((seed, first + k)) for k in range(shape[0])]
    return lambda: np.stack([s.standard_normal(shape[1:], dtype=np.float32) for s in streams])


def ahead(draw_noise):
    """The same draw_noise(), with each z drawn in a thread while the network runs."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(draw_noise)

    def next_noise():
        nonlocal future
        z, future = future.result(), pool.submit(draw_noise)
        return z

    return next_noise


# -------------------------------------------------------------------------------------- the network


class Network:
    """eps_theta(x_t, t) from a model.onnx, for batches of one size.

    network(x_t, t) takes float32 (batch, C, H, W) and int64 (batch,) and returns eps, float32
    (batch, C, H, W). The next call may overwrite the returned array.

    device: "auto" prefers CUDA, "cuda" requires it, "cpu" avoids it.

    Attributes: betas, float64 (T,), and variance are the file's; shape is (batch, C, H, W); device
    is "cuda" or "cpu", whichever it runs on; no_cuda says why CUDA could not be used, or is None.

    Raises ValueError if the file was not written by export.py, MemoryError if the batch does not
    fit, and RuntimeError if CUDA is required and does not work or, in a call, if eps is not finite.
    For another thread, twin() is the same network with arrays of its own.
    """

    def __init__(self, path, batch, device="auto"):
        if device not in ("auto", "cuda", "cpu"):
            raise ValueError(f'device must be "auto", "cuda" or "cpu", not {device!r}')
        self.batch, self.no_cuda = batch, None
        if device != "cpu":
            try:
                return self._open(path, "cuda")
            except RuntimeError as error:
                self.no_cuda = one_line(error)
        self._open(path, "cpu", only_read=device == "cuda")  # the fault may be that of the file
        if device == "cuda":
            raise RuntimeError(f"if CUDA is missing, run:  {INSTALL}  ({self.no_cuda})")

    def _open(self, path, device, only_read=False):
        """Open the file on "cuda" or "cpu", and, unless only_read, try it at both ends of t.

        Raises MemoryError, or else RuntimeError on CUDA and ValueError on a CPU.
        """
        try:
            self.device = device
            self._start(path)
            if only_read:
                return
            self._allocate()
            T = len(self.betas)
            for first in (T - 1, 0) if self.batch == 1 else (T - 1,):  # one image needs two calls
                self(np.zeros(self.shape, np.float32), np.resize([first, 0], self.batch))
        except Exception as error:  # ONNX Runtime raises many kinds
            if device == "cuda" or is_out_of_memory(error):
                raise self._explain(error) from None
            what = f"{printable(path)} is not a model of export.py"
            raise ValueError(f"{what}: {one_line(error)}") from None

    def _start(self, path):
        """Start the session of ONNX Runtime.

        It silently falls back to the CPU when CUDA does not load; without cuDNN it opens the file
        but cannot run a convolution.
        """
        import onnxruntime as ort

        ort.set_default_logger_severity(4)  # the exceptions report the errors
        providers = ["CPUExecutionProvider"]
        with contextlib.redirect_stdout(None):  # it prints what is missing, and where it fails
            if self.device == "cuda":
                if "CUDAExecutionProvider" not in ort.get_available_providers():
                    raise RuntimeError("this ONNX Runtime was built without CUDA")
                ort.preload_dlls()  # the CUDA libraries that pip installed
                providers = [("CUDAExecutionProvider", {"cudnn_conv_algo_search": "HEURISTIC"})]
            content = Path(path).read_bytes()  # it can't open every name that Python can
            self.session = ort.InferenceSession(content, providers=providers)
        if self.device == "cuda" and self.session.get_providers()[0] != "CUDAExecutionProvider":
            raise RuntimeError("the CUDA provider of ONNX Runtime does not load")
        self._read_metadata()

    def _allocate(self):
        """Allocate the arrays of all calls, on the device."""
        import onnxruntime as ort

        allocate = ort.OrtValue.ortvalue_from_shape_and_type
        self._x = allocate(self.shape, np.float32, self.device, 0)
        self._t = allocate((self.batch,), np.int64, self.device, 0)
        self._eps = allocate(self.shape, np.float32, self.device, 0)
        self._binding = self.session.io_binding()
        self._binding.bind_ortvalue_input("x_t", self._x)
        self._binding.bind_ortvalue_input("t", self._t)
        self._binding.bind_ortvalue_output("eps", self._eps)

    def _explain(self, error):
        """The exception that says what an exception of ONNX Runtime means."""
        if is_out_of_memory(error):
            where = "the memory of the card" if self.device == "cuda" else "memory"
            what = f"{self.batch} images at once do not fit into {where}, see --batch"
            return MemoryError(f"{what}: {one_line(error)}")
        return RuntimeError(f"ONNX Runtime fails on {self.device}: {one_line(error)}")

    def twin(self):
        twin = copy.copy(self)
        twin._allocate()
        return twin

    def _read_metadata(self):
        """Set betas, variance and shape. Raises an Exception if they make no sense."""
        metadata = self.session.get_modelmeta().custom_metadata_map
        missing = {"ddpm.betas", "ddpm.variance", "ddpm.image_shape"} - set(metadata)
        if missing:
            raise ValueError(f"its metadata lacks {', '.join(sorted(missing))}")
        self.betas = np.array(json.loads(metadata["ddpm.betas"]), np.float64)
        abar = (1 - self.betas).cumprod()
        if self.betas.ndim != 1 or not len(abar) or not ((abar > 0) & (abar < 1)).all():
            raise ValueError("its betas are not a noise schedule")
        self.variance = metadata["ddpm.variance"]
        channels, height, width = json.loads(metadata["ddpm.image_shape"])
        if self.variance not in ("large", "small") or channels not in (1, 3):
            raise ValueError("its variance or its number of channels is unknown")
        self.shape = (self.batch, channels, height, width)

    def __call__(self, x, t):
        if x.shape != self.shape or t.shape != (self.batch,):
            raise ValueError(f"x_t must be {self.shape} and t ({self.batch},)")
        self._x.update_inplace(np.ascontiguousarray(x, np.float32))
        self._t.update_inplace(np.ascontiguousarray(t, np.int64))
        try:
            self.session.run_with_iobinding(self._binding)
        except Exception as error:  # of ONNX Runtime's own kinds
            raise self._explain(error) from None
        eps = self._eps.numpy()
        if not np.isfinite(eps).all():
            raise RuntimeError(f"eps is not finite at t = {t.max()} (float16 may overflow)")
        return eps


def is_out_of_memory(error):
    words = "out of memory|bad_alloc|bad allocation|allocate memory|alloc_failed|requested bytes"
    return isinstance(error, MemoryError) or bool(re.search(words, str(error), re.IGNORECASE))


# ------------------------------------------------------------------------------------------- images


def is_grey(image):
    """Whether a Pillow image has no colour, by its mode or its palette."""
    if image.mode in ("P", "PA"):
        red, green, blue = np.reshape(image.getpalette("RGB"), (-1, 3)).T
        return (red == green).all() and (green == blue).all()
    return image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I")


def read_picture(file, size, channels=None):
    """An image file as uint8 (C, size, size): its centre square, upright, transparency on white.

    file: a path or a binary stream. channels: C, 1 for grey and 3 for colour; as in the file if
    None. Raises ValueError if the range of the pixels is unknown, and what Pillow raises.
    """
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 or 3, not {channels}")
    try:
        image = Image.open(file)
    except UnidentifiedImageError:  # its message names the stream
        raise ValueError("it is not an image") from None
    with image:
        mode = "L" if (channels or (1 if is_grey(image) else 3)) == 1 else "RGB"
        deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
        tags, transparent = getattr(image, "tag_v2", {}), image.info.get("transparency")
        image = ImageOps.exif_transpose(image)
        if deep:  # up to 16 bits, which Pillow would clip to 255 instead of scaling
            values = np.asarray(image) / (2 ** tags.get(258, (16,))[0] - 1)  # TIFF: BitsPerSample
            if tags.get(262) == 0:  # TIFF: PhotometricInterpretation is WhiteIsZero
                values = 1 - values
            if transparent is not None:
                values[np.asarray(image) == transparent] = 1
            image = Image.fromarray((255 * values).round().astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ValueError("the file does not say the range of its 32-bit pixels")
        if image.has_transparency_data:  # transparent pixels have arbitrary colours
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = ImageOps.fit(image.convert(mode), (size, size), Image.Resampling.LANCZOS)
        return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def to_pixels(x):
    """Images in [-1, 1], (B, C, H, W), as uint8 (B, H, W, C), rounded."""
    return ((x.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1)


def to_image(pixels):
    """uint8 (H, W, C) as a Pillow image, grey or colour."""
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)


def grid(pixels, columns=None):
    """uint8 (B, H, W, C) as one image with rows of `columns` images; small ones are enlarged."""
    columns = columns or math.ceil(math.sqrt(len(pixels)))
    pixels = np.pad(
        pixels, ((0, -len(pixels) % columns), (1, 1), (1, 1), (0, 0)), constant_values=255
    )
    _, h, w, c = pixels.shape
    pixels = pixels.reshape(-1, columns, h, w, c).transpose(0, 2, 1, 3, 4)
    image = to_image(pixels.reshape(-1, columns * w, c))
    return ImageOps.scale(image, max(1, round(512 / image.width)), Image.Resampling.NEAREST)


def temporary_folder(path):
    """A folder beside `path` that no other process uses, and that is gone after a `with` block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=f".{path.name}.tmp-", dir=path.parent)


def target_of(path):
    """`path`, or the target of the link there. Raises PermissionError if it is write-protected."""
    target = Path(os.path.realpath(path))
    if target.is_file() and not os.access(target, os.W_OK):
        raise PermissionError(f"{printable(path)} is write-protected")
    return target


def check_writable(path):
    """Raise ValueError or OSError now if no file can be put at `path` later.

    Returns the temporary_folder beside it.
    """
    if path.exists() and not path.is_file():
        kind = "folder" if path.is_dir() else "device or pipe"
        raise ValueError(f"{printable(path)} is a {kind}")
    return temporary_folder(target_of(path))


@contextlib.contextmanager
def atomic_write(path):
    """Yields a temporary path beside `path`, then moves what was written there into place.

    The file appears whole or not at all, also on a full disk, and no other process writes to the
    same temporary path. A link at `path` stays, and its target is written; so do the permissions
    of an old file. Raises OSError.
    """
    path = target_of(path)
    with temporary_folder(path) as folder:
        temporary = Path(folder, path.name)
        yield temporary
        if temporary.is_file():
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            if path.is_file():
                with contextlib.suppress(OSError):  # some file systems have no permissions
                    shutil.copymode(path, temporary)
        os.replace(temporary, path)


def save_image(path, image, **kwargs):
    """Save a Pillow image in the format of the suffix, whole or not at all."""
    with atomic_write(path) as temporary:
        image.save(temporary, **kwargs)


def save_animation(path, images, each=60, last=2000):
    """Save Pillow images as an animation. each, last: how long to show one, in milliseconds."""
    duration = [each] * (len(images) - 1) + [last]
    save_image(path, images[0], save_all=True, append_images=images[1:], duration=duration, loop=0)


def strip(frames):
    """[(x_t, x0_hat)], each uint8 (B, H, W, C), as one image.

    For each of the first four samples, it has a row of x_t above a row of x0_hat.
    """
    chosen = [frames[i] for i in np.linspace(0, len(frames) - 1, STRIP).round().astype(int)]
    rows = np.stack([np.stack(pair) for pair in chosen], 2)  # (2, B, STRIP, H, W, C)
    rows = rows[:, :4].swapaxes(0, 1)
    return grid(rows.reshape(-1, *rows.shape[3:]), STRIP)


def check_output(path, image, animated=False):
    """Raise ValueError or OSError now if an image of this size can't be saved at `path` later."""
    path, suffix = Path(path), Path(path).suffix.lower()
    kind = Image.registered_extensions().get(suffix)  # registers all formats
    if kind not in (Image.SAVE_ALL if animated else Image.SAVE) or kind in ("ICO", "ICNS"):
        what = "an animation such as x.gif" if animated else "an image file such as x.png"
        raise ValueError(f"{printable(path)} must be {what}")
    with check_writable(path) as folder, as_value_error(printable(path)):
        image.save(Path(folder, path.name))


# ----------------------------------------------------------------- what the three programs share


def printable(text):
    """A path or a message with control characters and undecodable bytes escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def one_line(error):
    """An exception as one line of at most 300 characters."""
    return printable(" ".join(str(error).split()))[:300] or type(error).__name__


@contextlib.contextmanager
def as_value_error(what):
    """Turns any error into a ValueError whose one line says what is wrong, and why."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{what}: {kind}{one_line(error)}") from None


def between(least, most=2**31 - 1, kind=int):
    """An argparse type: an int or a float from `least` to `most`."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if least <= kind(text) <= most:
                return kind(text)
        what = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"must be a {what} from {least} to {most}")

    return parse


def named(text):
    """An argparse type: a path that is not the empty string of an unset shell variable."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def progress(*args, **kwargs):
    """A tqdm bar; where stderr is not a terminal, a line every ten seconds."""
    if sys.stderr.isatty():
        return tqdm(*args, **kwargs)

    class Lines(io.TextIOBase):
        def write(self, text):
            if text.strip():
                with contextlib.suppress(OSError):  # whoever reads it may be gone
                    print(text.strip(), file=sys.stderr, flush=True)

    return tqdm(*args, **(kwargs | {"mininterval": 10, "file": Lines()}))


def on_signals(handler):
    """Handle Ctrl-C, SIGTERM and SIGHUP, except those that are ignored, as under nohup."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            with contextlib.suppress(ValueError):  # not in the main thread of a notebook's server
                signal.signal(number, handler)


def run_program(main, name):
    """Run main(); an error becomes one line and exit status 1 (a traceback under python -X dev)."""
    on_signals(signal.default_int_handler)  # KeyboardInterrupt, which cleans up
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed, as by 2>&-
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115
        getattr(sys, stream).reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
        return
    except KeyboardInterrupt:
        message = "stopped"
    except (ValueError, RuntimeError, OSError, MemoryError, ImportError) as error:
        if sys.flags.dev_mode:
            raise
        message = one_line(error)
        if isinstance(error, ModuleNotFoundError):
            message += f"; pip install {error.name}"
    try:
        sys.stdout.flush()
    except OSError:  # Python would report it again
        sys.stdout = None
    sys.exit(f"{name}: {message}")


# -------------------------------------------------------------------------------------- the program


def arguments():
    parser = argparse.ArgumentParser(
        usage="python sample.py --onnx model.onnx [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    flag = parser.add_argument
    flag("--onnx", default="model.onnx", type=named, help="from export.py [model.onnx]")
    flag("-n", default=64, type=between(1), help="number of images [64]")
    grid_help = f"a grid of the first {GRID} images [samples.png]"
    flag("--out", default="samples.png", type=named, help=grid_help)
    flag("--dir", type=named, help="a new folder for all images, one PNG each")
    flag("--gif", type=named, help="an animation of the reverse process, first batch only")
    flag("--strip", type=named, help="x_t and x0_hat along the chain, first four images only")
    flag("--interpolate", nargs=2, metavar="FILE", help="two images, to draw 11 mixtures between")
    flag("--t", type=between(0), nargs="+", help="t at which to mix, one row each, 0..T-1 [T / 2]")
    flag("--steps", type=between(1), help="steps of the reverse process, 1..T [T, as in the paper]")
    flag("--eta", type=between(0, 1, float), help="DDIM's eta, 0 to 1 [the paper's step instead]")
    flag("--batch", default=64, type=between(1, 2**20), help="images drawn together [64]")
    flag("--seed", default=0, type=between(0, 2**32 - 1), help="the same seed, the same images [0]")
    flag("--device", default="auto", choices=("auto", "cuda", "cpu"), help="[auto]")
    args = parser.parse_args()
    if args.interpolate and (args.dir or args.gif or args.strip):
        parser.error("--interpolate writes --out only, without --dir, --gif and --strip")
    outputs = [name for name in (args.out, args.gif, args.strip, args.dir) if name is not None]
    inputs = {Path(name).resolve() for name in (args.onnx, *(args.interpolate or []))}
    if len({Path(name).resolve() for name in outputs} | inputs) < len(outputs) + len(inputs):
        parser.error("the outputs must differ from each other and from the inputs")
    if args.dir and Path(args.dir).resolve() in {Path(name).resolve().parent for name in outputs}:
        parser.error("--dir must not hold the other outputs")
    if args.dir and Path(args.dir).resolve().is_relative_to(Path(args.out).resolve()):
        parser.error("--out must be a file")
    if args.t and not args.interpolate:
        parser.error("--t must be given with --interpolate")
    return args


def main():
    args = arguments()
    if not Path(args.onnx).is_file():
        kind = "is a folder" if Path(args.onnx).is_dir() else "does not exist"
        raise ValueError(f"{printable(args.onnx)} {kind}; python export.py writes a model.onnx")
    batch = len(LAMBDAS) if args.interpolate else min(args.batch, args.n)
    network = Network(args.onnx, batch, args.device)
    if network.no_cuda and shutil.which("nvidia-smi"):
        print(
            f"sample.py: {network.no_cuda}. If CUDA is missing, run:\n  {INSTALL}", file=sys.stderr
        )

    T, (_, channels, height, width) = len(network.betas), network.shape
    args.steps = T if args.steps is None else args.steps
    args.t = args.t or [T // 2]
    if args.steps > T or max(args.t) >= T:
        raise ValueError(f"this model has T = {T}: --steps must be 1..{T}, --t 0..{T - 1}")

    def blank(n, columns=None):
        return grid(np.zeros((n, height, width, channels), np.uint8), columns)

    if args.interpolate:
        columns = len(LAMBDAS) + 2
        check_output(args.out, blank(columns * len(args.t), columns))
    else:
        check_output(args.out, blank(min(args.n, GRID)))
    if args.gif:
        check_output(args.gif, blank(min(batch, GRID)), animated=True)
    if args.strip:
        check_output(args.strip, blank(2 * STRIP * min(batch, 4), STRIP))
    if args.dir:
        suffixes = {path.suffix.lower() for path in Path(args.dir).glob("*")}
        if suffixes & set(Image.registered_extensions()):
            raise ValueError(f"{printable(args.dir)} holds images; choose another --dir")
        check_output(Path(args.dir, "x.png"), blank(1))

    print(f"{printable(args.onnx)} on {'CUDA' if network.device == 'cuda' else 'the CPU'}", end="")
    print("" if args.interpolate else f", {args.steps} steps")
    (draw_interpolation if args.interpolate else draw_samples)(network, args)


def draw_interpolation(network, args):
    """--interpolate: a grid with a row for each --t."""
    ends = []
    for path in args.interpolate:
        with as_value_error(f"{printable(path)} can't be read"):  # Pillow raises many kinds
            if Path(path).exists() and not Path(path).is_file():
                raise ValueError("it is not a file")
            pixels = read_picture(path, network.shape[-1], network.shape[1])
        ends.append(pixels.astype(np.float32) / 127.5 - 1)
    rows = []
    for t in args.t:
        chain = interpolate(
            network, noise_of(args.seed, 0, (1, *network.shape[1:])), *ends, t, network.betas,
            network.variance, args.steps, args.eta,
        )  # fmt: skip
        for _, _, x0 in progress(chain, f"t = {t}", min(args.steps, t + 1), unit="step"):
            mixtures = x0
        rows += [ends[0], *mixtures, ends[1]]
    save_image(args.out, grid(to_pixels(np.stack(rows)), len(LAMBDAS) + 2))
    print(f"{printable(args.out)}: one image, mixtures for lambda = 0, 0.1, ... 1, the other image")


def draw_samples(network, args):
    """-n samples in batches: the grid, and the folder, the GIF and the strip if asked for."""
    started, stop = time.monotonic(), threading.Event()
    starts = range(0, args.n, network.batch)
    _, channels, height, width = network.shape
    shown = np.zeros((min(args.n, GRID), height, width, channels), np.uint8)
    frames = []  # of the first batch: (x_t, x0_hat) at some of the steps, including the last
    kept = {-(-k * args.steps // FRAMES) for k in range(FRAMES)} | {args.steps - 1}
    bar = progress(total=len(starts) * args.steps, unit="step")

    def draw_batch(network, first):
        draw_noise = ahead(noise_of(args.seed, first, network.shape))
        chain = sample_progressive(
            network, draw_noise, network.betas, network.variance, args.steps, args.eta
        )
        for i, (_, x, x0) in enumerate(chain):
            if first == 0 and i in kept and (args.gif or args.strip):
                frames.append((to_pixels(x[:GRID]), to_pixels(x0[:GRID])))
            bar.update()
            if stop.is_set():
                return
        pixels = to_pixels(x0[: args.n - first])  # the last batch may draw more
        shown[first : first + len(pixels)] = pixels[: max(0, GRID - first)]
        if args.dir:
            for k, image in enumerate(pixels, first):
                with open(Path(args.dir, f"{k:06d}.png"), "xb") as file:  # never an existing one
                    to_image(image).save(file, "PNG")

    def draw(network, starts):
        try:
            for first in starts:
                if stop.is_set():
                    return
                draw_batch(network, first)
        except BaseException:  # also Ctrl-C
            stop.set()
            raise

    lanes = min(LANES.get(network.device, 1), len(starts))
    with bar, ThreadPoolExecutor(lanes) as pool:
        twins = [network.twin() for _ in range(lanes - 1)]
        try:
            others = [pool.submit(draw, twin, starts[k::lanes]) for k, twin in enumerate(twins, 1)]
            draw(network, starts[::lanes])
            for lane in others:
                lane.result()
        finally:
            stop.set()

    save_image(args.out, grid(shown))
    if args.gif:
        save_animation(args.gif, [grid(x) for x, _ in frames] + [grid(frames[-1][1])])
    if args.strip:
        save_image(args.strip, strip(frames))
    seconds = time.monotonic() - started
    what = f"{args.n} images" if args.n <= GRID else f"the first {GRID} of {args.n} images"
    print(f"{printable(args.out)}: {what}, {seconds:.1f} s, {seconds / args.n:.2f} s each")
    if args.n > GRID and not args.dir:
        print(f"the other {args.n - GRID} are not saved, because there is no --dir")


if __name__ == "__main__":
    run_program(main, "sample.py")
