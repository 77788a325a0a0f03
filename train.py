"""Train a DDPM: pictures in, run/checkpoint.pt out.

    python train.py                       # a built-in demo, a few minutes on a laptop's CPU
    python train.py --data ./images       # the paper's CIFAR-10 run, on your pictures
    python train.py --data ./images --base-channels 64 --steps 50000    # a smaller one
    python train.py --data ./images --init ddpm-cifar10-32  # from published weights, see export.py
    python train.py --data ./images --eval run/checkpoint.pt    # the bound on them, in bits
    torchrun --standalone --nproc_per_node=4 train.py --data ./images   # on four GPUs

The same command run again goes on where it stopped. Beside the checkpoint it leaves log.csv (a row
a step), loss.png and preview-STEP.png: samples of the averaged (EMA) network, always from the same
noise.
"""

import argparse
import contextlib
import copy
import csv
import hashlib
import io
import math
import multiprocessing
import os
import shlex
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ddpm import Bound, Diffusion, UNet, cosine_betas, linear_betas

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

RANK, WORLD = 0, 1  # which of how many processes this is
if "TORCHELASTIC_RUN_ID" in os.environ:  # of torchrun
    RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
PREVIEW, PREVIEW_STEPS = 36, 50  # pictures in a preview, and of the T steps how many it takes


def fail(message):
    """Ends the program with one line; of several processes, the first one says it."""
    sys.exit(1 if RANK else f"train.py: {message}")


# ----------------------------------------------------------------------------------------- pictures


def is_grey(image):
    return image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I")


def read_picture(file, size):
    """One picture file as uint8 (C, size, size), its centre square. C: 1 grey, 3 colour."""
    with Image.open(file) as image:
        image = ImageOps.exif_transpose(image)
        grey = is_grey(image)
        if image.mode.startswith("I"):  # 16 bits: Pillow would cut, not scale
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).round().astype(np.uint8))
        if image.mode == "F":
            raise ValueError("floating-point pixels, whose range is not known")
        if image.has_transparency_data:  # on white: under alpha lie colours that nobody has seen
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if grey else "RGB")
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def picture_files(folder, without=None):
    """The picture files under a folder, by their suffix, in the same order on every machine.

    without: a folder to leave out, that of this run; folders of other runs are left out, too.
    """
    found, seen = [], {without and os.path.realpath(without)}
    for root, folders, files in os.walk(folder, onerror=print, followlinks=True):
        of_a_run = {"checkpoint.pt", "log.csv"} <= set(files)
        if of_a_run or os.path.realpath(root) in seen:  # or a link that leads back
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(root, name) for name in files if not name.startswith("."))
        found += [path for path in paths if path.suffix.lower() in SUFFIXES and path.is_file()]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def on_all_cores(function, items):
    """Yields function(item) for each, in their order.

    Threads would wait for each other, since reading a small picture is mostly Python. Processes
    hand on their results through pipes, so none runs far ahead, or on when this one is gone.
    """
    if sys.platform != "linux":  # where forking is not safe, or not possible
        with ThreadPoolExecutor() as pool:
            yield from pool.map(function, items)
        return

    def work(into, share):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is this process that is to be stopped
        for out in pipes:  # so that a pipe breaks when this process is gone
            out.close()
        with contextlib.suppress(BrokenPipeError):
            for part in share:
                into.send([function(item) for item in part])

    parts = [items[k : k + 16] for k in range(0, len(items), 16)]
    cores = min(len(os.sched_getaffinity(0)), len(parts))
    fork, pipes = multiprocessing.get_context("fork"), []
    for k in range(cores):
        out, into = fork.Pipe(duplex=False)
        pipes.append(out)
        fork.Process(target=work, args=(into, parts[k::cores]), daemon=True).start()
        into.close()
    for k in range(len(parts)):
        try:
            yield from pipes[k % cores].recv()
        except EOFError:
            fail("a process that reads pictures was killed; is there enough memory?")


def decode(paths, size, channels, write):
    """Calls write(bytes) for each picture, of channels x size x size, on all cores and in order.

    channels: None for 3 if any picture is in colour, else 1. Returns (channels, a digest of the
    files). Files that can't be read are left out, counted, and some of them named.
    """

    def colour(path):
        try:
            with Image.open(path) as image:  # reads no more than the header
                return not is_grey(image)
        except Exception:
            return False

    def read(path):
        try:
            content = path.read_bytes()
            picture = to_channels(read_picture(io.BytesIO(content), size), channels)
            return picture.tobytes(), hashlib.blake2b(content).digest(), None
        except Exception as error:  # whatever is wrong with one file, the others are trained on
            return b"", b"", f"  {path}: {error}"

    warnings.filterwarnings("ignore", module="PIL")
    if channels is None:
        channels = 3 if any(on_all_cores(colour, paths)) else 1
    broken, digest = [], hashlib.blake2b(digest_size=8)
    results = on_all_cores(read, paths)
    for pixels, its_digest, error in tqdm(
        results, "reading", len(paths), unit=" pictures", leave=False
    ):
        write(pixels)
        digest.update(its_digest)
        if error:
            broken.append(error)
    if broken:
        print(f"left out {len(broken)} of {len(paths)} files that can't be read, the first ones:")
        print("\n".join(broken[:3]).encode(errors="replace").decode())
    if len(broken) == len(paths):
        fail(f"--data: no picture that can be read ({' '.join(sorted(SUFFIXES))})")
    return channels, digest.hexdigest()


def read_folder(folder, size, channels=None, most=None):
    """The pictures under a folder, or `most` at even distances in it: uint8 (N, C, size, size)."""
    paths = picture_files(folder)
    if most is not None and most < len(paths):
        paths = [paths[i * len(paths) // most] for i in range(most)]
    memory = io.BytesIO()
    channels, _ = decode(paths, size, channels, memory.write)
    pixels = np.frombuffer(memory.getbuffer(), np.uint8)
    return torch.from_numpy(pixels.reshape(-1, channels, size, size))


CACHE = f"pictures-{'[0-9a-f]' * 16}-{'[0-9a-f]' * 16}-[13].u8"  # state of the folder, digest, C


def cache_folder(folder, size, channels, out):
    """Decodes all pictures under a folder into one file in out, and returns its path.

    If it is there already it is used again, until a name, a size or a time in the folder changes.
    """
    paths = picture_files(folder, without=out)
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    key = repr((os.path.realpath(folder), size, channels, states)).encode()
    key = hashlib.blake2b(key, digest_size=8).hexdigest()
    for path in out.glob(CACHE):
        length = path.stat().st_size
        if path.name.split("-")[1] == key and length and length % size**2 == 0:
            return path
    temporary = out / "pictures.tmp"
    try:
        with open(temporary, "wb") as file:
            channels, digest = decode(paths, size, channels, file.write)
            file.flush()
            os.fsync(file.fileno())
        return temporary.replace(out / f"pictures-{key}-{digest}-{channels}.u8")
    except OSError as error:
        fail(f"{temporary} can't be written, to decode the pictures into: {error}")
    finally:
        temporary.unlink(missing_ok=True)


def open_cache(path, size):
    """The pictures of cache_folder, mapped into memory: uint8 (N, C, size, size), and a digest."""
    _, _, digest, channels = path.stem.split("-")
    pixels = np.memmap(path, np.uint8, "c").reshape(-1, int(channels), size, size)
    return torch.from_numpy(pixels), digest


def to_channels(picture, channels):
    """uint8 (C, H, W), grey or colour, as (channels, H, W)."""
    if len(picture) == channels:
        return picture
    if channels == 3:
        return picture.repeat(3, 0)
    return np.asarray(Image.fromarray(picture.transpose(1, 2, 0)).convert("L"))[None]


# The demo: pictures so simple that a test can tell a right sample from a wrong one, with a network
# and a length that learn them on two CPU cores in under four minutes.
DEMO = {
    "image_size": 8,
    "base_channels": 32,
    "channel_mults": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [],
    "dropout": 0.0,
    "batch": 64,
    "lr": 3e-3,
    "lr_decay": True,
    "steps": 2400,
}
DEMO_GLYPHS = [
    ".#. ### .#.",
    "#.# .#. #.#",
    "### #.# ###",
    "### .#. .#.",
    "#.# #.# ###",
    "#.# ### #.#",
]
DEMO_COLOURS = [(230, 57, 70), (244, 162, 28), (56, 160, 75), (38, 110, 220)]


def demo_pictures():
    """Each glyph in each colour at nine places, on white: uint8 (216, 3, 8, 8)."""
    pictures = []
    for glyph, colour, left, top in product(DEMO_GLYPHS, DEMO_COLOURS, range(3), range(3)):
        cells = np.array([[cell == "#" for cell in row] for row in glyph.split()])
        picture = np.full((8, 8, 3), 255, np.uint8)
        picture[top : top + 6, left : left + 6][cells.repeat(2, 0).repeat(2, 1)] = colour
        pictures.append(picture.transpose(2, 0, 1))
    return torch.from_numpy(np.stack(pictures))


# ----------------------------------------------------------------------------------------- training


def learning_rate(step, lr, warmup, decay_steps=None):
    """Up to lr over `warmup` steps, then constant (appendix B), or down to 0 at decay_steps."""
    decay = 1 - step / decay_steps if decay_steps else 1.0
    return lr * min(1.0, (step + 1) / max(1, warmup)) * decay


def ema_decay(step, decay):
    """A short run must not average in its random start: the decay grows to the paper's 0.9999."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(averages, parameters, step, decay):
    """averages = d averages + (1 - d) parameters, in place; the U-Net has no buffers.

    Pictures are drawn with the averages: for CIFAR-10 that is FID 3.2 where others measured 8 to 12
    with the parameters themselves.
    """
    torch._foreach_lerp_(averages, parameters, 1 - ema_decay(step, decay))


def seed_of(seed, step, *part):
    """Randomness is counted, not carried: all that step draws comes from (seed, step) alone."""
    return int(np.random.SeedSequence((seed, step, *part)).generate_state(1)[0])


def has_bfloat16(device):
    """Whether the device computes in bfloat16 itself; where it is emulated, it only costs time."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def is_worth_compiling(device, steps):
    """On CUDA, where it takes Triton and a minute or more, which a short run would not win back."""
    return device.type == "cuda" and steps >= 5000 and find_spec("triton") is not None


def save_grid(x, path):
    """Pictures (B, C, H, W) in [-1, 1] as one PNG, in rows as long as there are rows, enlarged."""
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()
    columns = math.ceil(math.sqrt(len(x)))
    x = np.pad(x, ((0, -len(x) % columns), (0, 0), (1, 1), (1, 1)), constant_values=255)
    x = x.reshape(-1, columns, *x.shape[1:]).transpose(0, 3, 1, 4, 2)
    x = x.reshape(x.shape[0] * x.shape[1], x.shape[2] * x.shape[3], -1)
    image = Image.fromarray(x.squeeze(-1) if x.shape[-1] == 1 else x)
    image = ImageOps.scale(image, max(1, round(512 / image.width)), Image.Resampling.NEAREST)
    image.save(path, "PNG")


def ticks(low, high, logarithmic):
    """Some round numbers from low to high."""
    if logarithmic:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1, 2, 5) if len(powers) < 5 else (1,)
        return [k * 10.0**p for p in powers for k in steps if low <= k * 10.0**p <= high]
    step = 10 ** math.floor(math.log10((high - low) / 5))
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (k * step) <= 6)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def save_plot(path, curves, x_label, y_label, log=""):
    """Curves, {name: (x, y)}, as a PNG of 640 x 440 pixels.

    log: the axes that are logarithmic, "", "x", "y" or "xy"; the others begin at 0.
    """
    width, height, font = 1280, 880, ImageFont.load_default(32)  # drawn at twice the size
    left, top, right, bottom = 200, 40, width - 60, height - 130
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    ranges = {}
    for i, axis in enumerate("xy"):
        values = [float(v) for curve in curves.values() for v in curve[i]]
        ranges[axis] = (min(values) if axis in log else 0.0, max(values))

    def share(axis, value):  # of the length of the axis
        low, high = ranges[axis]
        if axis in log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / ((high - low) or 1)

    def place(x, y):
        return left + share("x", x) * (right - left), bottom - share("y", y) * (bottom - top)

    (x_low, x_high), (y_low, y_high) = ranges.values()
    for x in ticks(x_low, x_high, "x" in log):
        draw.line([place(x, y_low), place(x, y_high)], "#dddddd", 2)
        draw.text((place(x, y_low)[0], bottom + 14), f"{x:g}", "black", font, "ma")
    for y in ticks(y_low, y_high, "y" in log):
        draw.line([place(x_low, y), place(x_high, y)], "#dddddd", 2)
        draw.text((left - 14, place(x_low, y)[1]), f"{y:g}", "black", font, "rm")
    colours = "#265fdc", "#d1495b", "#2a8a4a", "#8a5a00"
    for k, ((name, (xs, ys)), colour) in enumerate(zip(curves.items(), colours, strict=False)):
        draw.line([place(x, y) for x, y in zip(xs, ys, strict=True)], colour, 5, "curve")
        draw.text((right - 20, top + 12 + 44 * k), name, colour, font, "ra")
    draw.text(((left + right) / 2, height - 20), x_label, "black", font, "md")
    upright = Image.new("L", (bottom - top, 50))
    ImageDraw.Draw(upright).text((upright.width / 2, 4), y_label, 255, font, "ma")
    image.paste("black", (10, top), upright.rotate(90, expand=True))
    image.reduce(2).save(path, "PNG")


def save_loss_plot(log, path):
    """The loss of each step in log.csv, averaged in 200 stretches, as a curve."""
    with open(log) as file:
        rows = [row.split(",") for row in file.readlines()[1:]]
    length = math.ceil(len(rows) / 200)
    parts = [rows[k : k + length] for k in range(0, len(rows), length)]
    steps = [int(part[-1][0]) for part in parts]
    means = [sum(float(row[1]) for row in part) / len(part) for part in parts]
    if len(parts) > 1 and min(means) > 0:
        save_whole(path, lambda path: save_plot(path, {"": (steps, means)}, "step", "loss", "y"))


def save_whole(path, write):
    """Let write(temporary path) make a file, then put it at path in one step or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save on a full disk
        temporary.unlink(missing_ok=True)
        fail(f"{path} can't be written, and is as it was: {str(error).splitlines()[0]}")


def arguments():
    parser = argparse.ArgumentParser(
        usage="python train.py --data ./images [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if RANK:
        parser.error = lambda _: sys.exit(2)  # the first process says it

    def flag(name, default, help, **kwargs):
        text = "" if default is None or default is False else f" [{default}]"
        parser.add_argument(name, default=default, help=help + text.replace("%", "%%"), **kwargs)

    flag("--data", None, "folder of pictures, read with its sub-folders [the built-in demo]")
    flag("--out", None, "folder for checkpoint.pt, log.csv, previews [run; of --eval, beside it]")
    flag("--image-size", 32, "pixels; pictures are cropped to a square and resized", type=int)
    flag("--channels", None, "1 grey, 3 colour [as found]", type=int, choices=(1, 3))
    flag("--base-channels", 128, "width of the U-Net's first level", type=int)
    flag("--channel-mults", [1, 2, 2, 2], "width of each level over the first", type=int, nargs="+")
    flag("--num-res-blocks", 2, "residual blocks per level", type=int)
    flag("--attention-resolutions", [16], "sizes in pixels with attention", type=int, nargs="*")
    flag("--dropout", 0.1, "share of activations dropped", type=float)
    flag("--init", None, "start from these weights: a checkpoint, or a folder of diffusers")
    flag("--schedule", "linear", "the betas, T = 1000", choices=("linear", "cosine"))
    flag("--variance", "large", "sigma_t^2: beta_t or beta-tilde_t", choices=("large", "small"))
    flag(
        "--weighting",
        "simple",
        "of the loss: simple (14), or vlb for the bound (12)",
        choices=("simple", "vlb"),
    )
    flag("--batch", 128, "pictures per step, on all GPUs together", type=int)
    flag("--accumulate", 1, "parts of a batch, one after the other, if it is too large", type=int)
    flag("--lr", 2e-4, "learning rate of Adam", type=float)
    flag("--warmup", None, "steps until lr is reached [min(5000, steps / 20)]", type=int)
    flag("--lr-decay", False, "to 0 at the end: better for short runs", action="store_true")
    flag("--steps", 800_000, "length of the training", type=int)
    flag("--ema", 0.9999, "decay of the averaged weights", type=float)
    flag("--no-flip", False, "don't mirror pictures at random", action="store_true")
    flag("--seed", 0, "of all that is random", type=int)
    flag("--device", "auto", "auto, cpu, cuda or cuda:1")
    flag(
        "--no-amp",
        False,
        "float32 (TF32 on CUDA) where bfloat16 would be used",
        action="store_true",
    )
    flag("--no-compile", False, "torch's kernels as they are, on CUDA too", action="store_true")
    flag("--preview-every", None, "steps [so that it takes under 5 %% of the time]", type=int)
    flag("--restart", False, "move the run in --out aside, and begin anew", action="store_true")
    flag("--save-minutes", 5.0, "minutes between checkpoints", type=float)
    flag(
        "--eval",
        None,
        "don't train: the bound of a checkpoint (or a folder of diffusers) on --data",
    )
    flag("--eval-images", None, "of how many of the pictures [all]", type=int)
    parser.set_defaults(trained=None, norm_groups=None)
    args = parser.parse_args()
    # What the command line doesn't say, the demo does, or the weights to start from do.
    if args.data is None:
        parser.set_defaults(**DEMO)
    if args.init is not None or args.eval is not None:
        own = Path(args.out or "run") / "checkpoint.pt"  # a run that goes on needs --init no more
        goes_on = own.is_file() and not args.restart
        trained = load(args.eval or (own if goes_on else args.init))
        shape = {key: value for key, value in trained.settings.items() if key != "dropout"}
        shape["channels"] = shape.pop("in_channels")
        variance = trained.diffusion.variance
        parser.set_defaults(trained=trained, schedule=None, variance=variance, **shape)
    args = parser.parse_args()
    if args.eval is not None and (args.init is not None or args.schedule):
        parser.error("--eval must be without --init and --schedule")
    if args.data is None and (args.image_size, args.channels or 3) != (8, 3):
        parser.error("without --data there is only the demo, of 8x8 pixels in colour")

    factor = 2 ** (len(args.channel_mults) - 1)
    if args.image_size % factor or args.image_size < factor:
        below = args.image_size // factor * factor
        parser.error(
            f"--image-size must be a multiple of {factor}, since the U-Net halves it "
            f"{len(args.channel_mults) - 1} times: {below or factor} or {below + factor}"
        )
    if args.base_channels < 4 or args.base_channels % 4:
        parser.error("--base-channels must be a multiple of 4")
    counts = [args.batch, args.accumulate, args.steps, args.num_res_blocks, *args.channel_mults]
    if min(counts) < 1 or (args.preview_every is not None and args.preview_every < 1):
        parser.error("--batch, --accumulate, --steps, blocks, mults and previews start at 1")
    if not 0 <= args.seed < 2**63 or (args.warmup or 0) < 0:
        parser.error("--seed must be from 0 to 2^63 - 1, --warmup at least 0")
    sizes = {args.image_size >> level for level in range(len(args.channel_mults))}
    if args.attention_resolutions != [16] and not set(args.attention_resolutions) <= sizes:
        parser.error(f"--attention-resolutions must be among {sorted(sizes)}")
    if args.batch < WORLD * args.accumulate:
        parser.error("--batch must have a picture for each GPU and each part of --accumulate")
    if args.eval_images is not None and args.eval_images < 1:
        parser.error("--eval-images must be at least 1")
    if not (0 <= args.dropout < 1 and 0 <= args.ema < 1 and 0 < args.lr < math.inf):
        parser.error("--dropout and --ema must be in [0, 1), --lr above 0")
    if not 0 <= args.save_minutes < math.inf:
        parser.error("--save-minutes must be at least 0")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and WORLD > 1:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    name, _, number = args.device.partition(":")
    if name not in ("cpu", "cuda") or not (number or "0").isdecimal():
        parser.error("--device is auto, cpu, cuda or cuda:1")
    if name == "cuda" and int(number or 0) >= torch.cuda.device_count():
        parser.error(f"--device {args.device}: torch sees {torch.cuda.device_count()} GPUs here")
    if args.data is not None and not os.path.isdir(args.data):
        fail(f"--data {args.data}: there is no such folder")
    out = Path(args.out or "run").resolve()
    if args.data and args.eval is None and Path(args.data).resolve().is_relative_to(out):
        parser.error("--out must be a folder of its own, not one that holds the pictures")
    return args


def load(path):
    """A checkpoint or a folder of diffusers: what export.load returns, or the end."""
    from export import load  # needs onnx, which training does not

    try:
        return load(path)
    except ValueError as error:
        fail(error)


def evaluate(args):
    """The bound on the pictures, printed, and the rate-distortion curve (Figure 5) as two files."""
    model, diffusion, _, step, *_ = args.trained
    shape = args.trained.shape
    if (args.channels, args.image_size) != shape[:2]:
        fail(f"{args.eval} is for pictures of {'x'.join(map(str, shape))}")
    device = torch.device(args.device)
    if args.data is None:
        images = demo_pictures()
    else:
        images = read_folder(args.data, args.image_size, args.channels, args.eval_images)
    random = torch.Generator().manual_seed(args.seed)  # so that the first are like the rest
    images = images[torch.randperm(len(images), generator=random)][: args.eval_images]
    model.to(device)
    diffusion = Diffusion(diffusion.betas.to(device), args.variance)

    bounds = []
    bar = tqdm(total=len(images) * diffusion.T, unit=" passes", unit_scale=True)

    def network(x_t, t):
        bar.update(len(x_t))
        return model(x_t, t)

    try:
        for k, batch in enumerate(images.split(args.batch)):
            noise = torch.Generator(device).manual_seed(seed_of(args.seed, k))
            bound = diffusion.vlb(network, batch.to(device).float() / 127.5 - 1, noise)
            bounds.append(Bound(*(part.cpu() for part in bound)))
            bar.set_postfix_str(f"{bounds[-1].total.mean():.3f} bits/dim in the last batch")
    except KeyboardInterrupt:
        if not bounds:
            raise
    bar.close()
    bound = Bound(*map(torch.cat, zip(*bounds, strict=True)))
    n, L_t = len(bound.total), bound.L_t.mean(0)
    rmse = 127.5 * bound.mse.mean(0).sqrt()  # in values of 0..255
    # When x_t is known, these bits have been sent: L_T, and the terms of the steps before t.
    rate = bound.L_T.mean() + L_t.flip(0).cumsum(0).flip(0) - L_t
    error = f" +- {bound.total.std() / math.sqrt(n):.4f} (standard error)" if n > 1 else ""
    step = f" (step {step:,})" if step else ""
    print(f"{args.eval}{step} on {n:,} pictures of {args.data or 'the demo'}, bits per dimension")
    print(f"  L_T                  {bound.L_T.mean():8.6f}")
    print(f"  L_1 + .. + L_T-1     {L_t[1:].sum():8.4f}    the rate")
    print(f"  L_0                  {L_t[0]:8.4f}    the distortion")
    print(f"  total                {bound.total.mean():8.4f}{error}")
    print(f"  RMSE                 {rmse[0]:8.4f}    of x0_hat at t = 0, in values of 0..255")
    if n < len(images):
        fail(f"stopped after {n} of {len(images)} pictures; no curve is written")
    if not rate.isfinite().all():
        fail(f"the bound is not finite: {args.eval} is broken")
    rows = zip(range(diffusion.T), L_t.tolist(), rate.tolist(), rmse.tolist(), strict=True)
    folder = Path(args.eval) if Path(args.eval).is_dir() else Path(args.eval).parent
    folder = Path(args.out or folder)
    folder.mkdir(parents=True, exist_ok=True)

    def write(path):
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([("t", "L_t", "rate", "rmse"), *rows])

    save_whole(folder / "rate-distortion.csv", write)
    curve = {"": (rate.tolist(), rmse.tolist())}
    labels = "rate, bits per dimension", "RMSE of x0_hat, of 255"
    save_whole(folder / "rate-distortion.png", lambda path: save_plot(path, curve, *labels))
    print(f"the curve: {folder / 'rate-distortion.csv'} and .png")


def main():
    args = arguments()
    if args.eval is not None:
        return evaluate(args)
    out, device, first = Path(args.out or "run"), torch.device(args.device), RANK == 0
    amp = has_bfloat16(device) and not args.no_amp
    torch.set_float32_matmul_precision("high")  # TF32 for what stays float32
    if first:
        lock(out)
        if args.restart and (out / "log.csv").exists():
            move_aside(out)
            lock(out)
    if WORLD > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))

    path = [None]
    if first and args.data is not None:
        path = [cache_folder(args.data, args.image_size, args.channels, out)]
    if WORLD > 1:
        dist.broadcast_object_list(path)
    images, digest = open_cache(path[0], args.image_size) if path[0] else (demo_pictures(), None)
    if first and len(images) < 100:
        print(f"only {len(images)} pictures: the network will learn them by heart")

    # -- the configuration: all that another program, or this one when it resumes, must know
    if args.schedule is None:
        betas = args.trained.diffusion.betas
    else:
        betas = linear_betas() if args.schedule == "linear" else cosine_betas()
    warmup = min(5000, args.steps // 20) if args.warmup is None else args.warmup
    config = {
        "model": {
            "image_size": args.image_size,
            "in_channels": images.shape[1],
            "base_channels": args.base_channels,
            "channel_mults": args.channel_mults,
            "num_res_blocks": args.num_res_blocks,
            "attention_resolutions": args.attention_resolutions,
            "dropout": args.dropout,
            "norm_groups": args.norm_groups,
        },
        "diffusion": {"betas": betas.tolist(), "variance": args.variance},
        "train": {
            "data": args.data and str(Path(args.data).resolve().name),
            "init": args.init and "/".join(Path(args.init).resolve().parts[-2:]),
            "pictures": len(images),
            "digest": digest,
            "batch": args.batch,
            "lr": args.lr,
            "warmup": warmup,
            "lr_decay": args.lr_decay,
            "weighting": args.weighting,
            "ema": args.ema,
            "flip": not args.no_flip,
            "seed": args.seed,
        },
    }

    torch.manual_seed(args.seed)
    diffusion = Diffusion(betas.to(device), args.variance)
    model = UNet(**config["model"]).to(device)
    if args.init:
        try:
            model.load_state_dict(args.trained.model.state_dict())
        except RuntimeError as error:
            why = " ".join(str(error).split())[:200]
            fail(f"--init {args.init} is of another shape than the flags ask: {why}")
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)  # on a CPU it is slower
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)

    # -- resume
    checkpoint_path, start = out / "checkpoint.pt", 0
    if checkpoint_path.exists():
        try:
            checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
            refuse_other_run(checkpoint["config"], config, out)
            start = checkpoint["step"]
            if not isinstance(start, int) or start < 0:
                raise ValueError(f"step {start}")
            model.load_state_dict(checkpoint["model"])
            ema.load_state_dict(checkpoint["ema"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            for parameter, state in optimizer.state.items():  # from CUDA they are channels_last
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.empty_like(parameter).copy_(state[name])
            if len(optimizer.state) < (start > 0) * len(list(model.parameters())):
                raise ValueError("the state of the optimizer is missing")
        except Exception as error:
            why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            fail(f"{checkpoint_path} is no checkpoint of train.py ({why})")
        del checkpoint
    if first:
        log = open_log(out / "log.csv", start)
        for old in out.glob(CACHE):
            if str(digest) not in old.name:
                old.unlink()
    network = model
    if WORLD > 1:
        network = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if not args.no_compile and is_worth_compiling(device, args.steps - start):
        network = torch.compile(network)

    def save(step):
        state = {
            "config": config,
            "step": step,
            "model": model.state_dict(),
            "ema": ema.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        log.flush()
        save_whole(checkpoint_path, lambda path: torch.save(state, path))

    def preview(step):
        shape, steps = (PREVIEW, *images.shape[1:]), min(PREVIEW_STEPS, diffusion.T)
        noise = torch.Generator(device).manual_seed(args.seed)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            x0 = diffusion.sample(ema, shape, steps, 0.0, noise, device=device)
        save_whole(out / f"preview-{step:07d}.png", lambda path: save_grid(x0, path))
        log.flush()
        save_loss_plot(log.name, out / "loss.png")

    # A forward pass is a third of a training step, so a preview is as long as this many steps:
    preview_cost = PREVIEW * PREVIEW_STEPS / (3 * args.batch)
    preview_every = args.preview_every or max(math.ceil(25 * preview_cost), args.steps // 100)
    preview_every = min(preview_every, args.steps)  # the last step has one

    # -- Ctrl-C and SIGTERM finish the step, save and leave
    stop = []
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, _: stop.append(number))

    size = sum(p.numel() for p in model.parameters())
    if first:
        gpus = f" and {WORLD - 1} more" if WORLD > 1 else ""
        print(f"pictures {len(images):,} of {images.shape[1]}x{args.image_size}x{args.image_size}")
        print(f"network  {size:,} parameters on {device}{gpus}, {'bfloat16' if amp else 'float32'}")
        print(f"steps    {start:,} to {args.steps:,}, a preview each {preview_every:,}")
    if images.nbytes < 2e9:  # few are moved once, many batch by batch
        images = images.to(device)
    bounds = [
        k * args.batch // (WORLD * args.accumulate) for k in range(WORLD * args.accumulate + 1)
    ]
    parts = range(RANK * args.accumulate, (RANK + 1) * args.accumulate)  # of the batch, done here

    # -- Algorithm 1
    model.train()
    parameters, averages = list(model.parameters()), list(ema.parameters())
    saved, mean_loss = time.monotonic(), None
    bar = tqdm(
        total=args.steps, initial=start, unit="step", smoothing=0.05, mininterval=0.5,
        disable=not first,
    )  # fmt: skip
    for step in range(start, args.steps):
        done = step + 1
        # the whole batch is drawn in every process, so that it doesn't depend on their number
        torch.manual_seed(seed_of(args.seed, step))
        index = torch.randint(len(images), (args.batch,), device=images.device)
        flip = torch.rand(args.batch, 1, 1, 1, device=device) < (0 if args.no_flip else 0.5)
        t = torch.randint(diffusion.T, (args.batch,), device=device)
        noise = torch.randn(args.batch, *images.shape[1:], device=device)

        loss = torch.zeros((), device=device)
        for k in parts:
            torch.manual_seed(seed_of(args.seed, step, 1 + k))  # for dropout
            part = slice(bounds[k], bounds[k + 1])
            x0 = images[index[part]].to(device).float() / 127.5 - 1
            x0 = torch.where(flip[part], x0.flip(3), x0)
            alone = WORLD > 1 and k != parts[-1]  # gradients meet after the last part
            with network.no_sync() if alone else contextlib.nullcontext():
                with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                    mean = diffusion.loss(network, x0, t[part], noise[part], args.weighting)
                share = mean * len(x0) / args.batch
                (share * WORLD).backward()  # DistributedDataParallel takes the mean over processes
            loss += share.detach()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        status = torch.stack([loss, norm / WORLD, torch.tensor(float(len(stop)), device=device)])
        if WORLD > 1:
            dist.all_reduce(status)  # so that all stop together
        loss, norm, stopping = status.tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            bar.close()
            fail(
                f"the loss of step {done} is not finite, {checkpoint_path} is as it was. "
                "Try a lower --lr or a longer --warmup, or --no-amp."
            )
        lr = learning_rate(step, args.lr, warmup, args.steps if args.lr_decay else None)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        update_ema(averages, parameters, step, args.ema)

        if first:
            log.write(f"{done},{loss:.6g},{norm:.6g},{lr:.6g}\n")
            mean_loss = loss if mean_loss is None else 0.98 * mean_loss + 0.02 * loss
            rate = bar.format_dict["rate"] or 0
            bar.set_postfix_str(f"loss {mean_loss:.4f}, {rate * args.batch:.0f} pictures/s", False)
            bar.update()
            late = time.monotonic() - saved > 60 * args.save_minutes
            if stopping or done == args.steps or late:
                save(done)
                saved = time.monotonic()
            if done % preview_every == 0 or done == args.steps:
                preview(done)
        if stopping:
            break
    bar.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()
    if first and start < args.steps and stopping and done < args.steps:
        command = shlex.join(word for word in sys.argv if word != "--restart")
        program = "torchrun ..." if WORLD > 1 else "python"
        print(f"stopped at step {done:,}; to go on:\n  {program} {command}")
    elif first:
        print(
            f"done, {checkpoint_path}; next:\n"
            f"  python export.py --checkpoint {checkpoint_path.as_posix()}"
        )


def lock(folder):
    """Keeps other trainings out of the folder until this process ends, or closes the handle."""
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"a training is running in {folder}; use another --out")
    return handle


def move_aside(folder):
    """Renames the folder of a run to the first free one of run-1, run-2, ..."""
    folder, k = folder.resolve(), 1
    while folder.with_name(f"{folder.name}-{k}").exists():
        k += 1
    folder.rename(folder.with_name(f"{folder.name}-{k}"))
    print(f"the run in {folder} is now in {folder.name}-{k}")


def refuse_other_run(old, new, out):
    """A folder holds one run. What differs is named; a longer training is the same run."""
    for key, value in (("weighting", "simple"), ("digest", new["train"]["digest"])):
        old["train"].setdefault(key, value)  # in a checkpoint from before there was this key
    different = [
        "other pictures" if key == "digest" else f"{key} was {old[part].get(key)}, now {value}"
        for part in new
        for key, value in new[part].items()
        if old[part].get(key) != value and key not in ("warmup", "betas", "data")
    ]
    if old["diffusion"]["betas"] != new["diffusion"]["betas"]:
        different.append("schedule")
    if different:
        held = "another run" if old["train"]["data"] else "the demo"
        more = f"; and {len(different) - 4} more" if len(different) > 4 else ""
        fail(
            f"{out} holds {held}: {'; '.join(different[:4])}{more}. Use another --out, or "
            "--restart, which moves that run aside."
        )


def open_log(path, start):
    """log.csv, with the rows of the steps done; what a killed run wrote after them is dropped."""
    rows, last = ["step,loss,grad_norm,lr"], 0
    if start and path.exists():
        for row in path.read_text(errors="replace").splitlines()[1:]:
            step, *rest = row.split(",")
            if len(rest) == 3 and step.isdecimal() and last < int(step) <= start:
                rows.append(row)
                last = int(step)
    save_whole(path, lambda path: path.write_text("\n".join(rows) + "\n"))
    return open(path, "a")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("train.py: stopped")
    except OSError as error:  # a disk that is full, a folder that can't be written to
        fail(error)
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        fail("out of memory; --accumulate 2 needs about half of it, a smaller network less")
