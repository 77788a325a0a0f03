"""Train a DDPM: a folder of images in, run/checkpoint.pt out.

    python train.py                       # the built-in demo, a few minutes on a laptop CPU
    python train.py --data ./images       # the paper's CIFAR-10 run, on your images
    python train.py --data ./images --quick    # a small network, minutes on two CPU cores
    python train.py --data ./images --init google/ddpm-cifar10-32    # fine-tune published weights
    python train.py --data ./images --eval run/checkpoint.pt    # the variational bound, in bits
    torchrun --standalone --nproc_per_node=4 train.py --data ./images   # on four GPUs

Rerunning the same command resumes training. Beside the checkpoint, the run folder holds log.csv
(one row per step), loss.png and preview-STEP.png: samples of the averaged network (EMA), always
from the same noise.
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader

import devices
import sample
from ddpm import Bound, Diffusion, UNet, cosine_betas, linear_betas
from devices import RANK, WORLD
from pretrained import from_diffusers
from sample import (
    as_value_error,
    atomic_write,
    between,
    is_out_of_memory,
    named,
    one_line,
    printable,
    progress,
)

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
CURVE = "rate-distortion.png"  # of --eval
PREVIEW, PREVIEW_STEPS = 36, 50  # images in a preview, and DDIM steps to draw them

# -------------------------------------------------------------------------------------- Algorithm 1


def learning_rate(step, lr, warmup, decay_steps=None):
    """Rises to lr over `warmup` steps; then constant (appendix B), or falls to 0 at decay_steps."""
    decay = 1 - step / decay_steps if decay_steps else 1.0
    return lr * min(1.0, (step + 1) / max(1, warmup)) * decay


def ema_decay(step, decay):
    """Rises to the paper's 0.9999, so that a short run does not average in its random start."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(averages, parameters, step, decay):
    """averages = d averages + (1 - d) parameters, in place.

    Samples come from the averages: on CIFAR-10 that is an FID of 3.2 instead of 8 to 12.
    """
    torch._foreach_lerp_(averages, parameters, 1 - ema_decay(step, decay))


def seed_of(seed, step, *part):
    """Each step is seeded from (seed, step), so resuming needs no saved generator state."""
    return int(np.random.SeedSequence((seed, step, *part)).generate_state(1)[0])


def train_step(step, network, ema, optimizer, diffusion, images, args):
    """Algorithm 1 on one batch, and the update of the EMA. Returns the loss and gradient norm.

    images: uint8 (N, C, H, W). The result is a tensor (2,) on the device. Nothing here waits for
    CUDA, so that Python can prepare the next step while the device computes.
    """
    device, parameters = next(ema.parameters()).device, list(network.parameters())
    is_cuda = device.type == "cuda"

    # Every process draws the whole batch, so that the batch does not depend on their number.
    torch.manual_seed(seed_of(args.seed, step))
    index = torch.randint(len(images), (args.batch,), device=images.device)
    flip = torch.rand(args.batch, 1, 1, 1, device=device) < (0 if args.no_flip else 0.5)
    t = torch.randint(diffusion.T, (args.batch,), device=device)
    noise = torch.randn(args.batch, *images.shape[1:], device=device)

    # Each process computes only its share of the batch, split into --accumulate parts.
    parts = range(RANK * args.accumulate, (RANK + 1) * args.accumulate)
    bounds = [k * args.batch // (WORLD * args.accumulate) for k in range(parts[-1] + 2)]
    loss = torch.zeros((), device=device)
    for k in parts:
        part = slice(bounds[k], bounds[k + 1])
        torch.manual_seed(seed_of(args.seed, step, 1 + k))  # for dropout; 0 is the seed above
        x0 = images[index[part]]
        if is_cuda and not x0.is_cuda:  # a copy from pinned memory need not be waited for
            x0 = x0.pin_memory()
        x0 = x0.to(device, non_blocking=is_cuda).float() / 127.5 - 1
        x0 = torch.where(flip[part], x0.flip(3), x0)
        with network.no_sync() if WORLD > 1 and k < parts[-1] else contextlib.nullcontext():
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                part_loss = diffusion.loss(network, x0, t[part], noise[part], args.weighting)
            part_loss = part_loss * len(x0) / args.batch
            (part_loss * WORLD).backward()  # DistributedDataParallel averages over the processes
        loss += part_loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    if WORLD > 1:
        dist.all_reduce(loss)
    lr = learning_rate(step, args.lr, args.warmup, args.steps if args.lr_decay else None)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    update_ema(list(ema.parameters()), parameters, step, args.ema)
    return torch.stack([loss, norm])


# --------------------------------------------------------------------------------- the training set


def picture_files(folder, without=None):
    """The image files under a folder, by their suffix, in an order that every machine agrees on.

    without: a folder to leave out. The folders of training runs are left out too. Raises ValueError
    if there is no such folder.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"--data {printable(folder)}: there is no such folder")
    found, seen = [], {without and os.path.realpath(without)}
    for root, folders, files in os.walk(folder, onerror=print, followlinks=True):
        is_run = "checkpoint.pt" in files and ("log.csv" in files or "loss.png" in files)
        if is_run or os.path.realpath(root) in seen:  # a link may lead back
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files = [name for name in files if not name.startswith(".") and name != CURVE]
        paths = (Path(root, name) for name in files)
        found += [path for path in paths if path.suffix.lower() in SUFFIXES and path.is_file()]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def ignore_signals(_):
    """Leave signals, which reach the whole process group, to the process that started a worker."""
    sample.on_signals(signal.SIG_IGN)


def on_all_cores(function, paths):
    """An iterable of function(128 paths), for all paths in order, computed by worker processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(cores, len(paths) // 128)  # not worth starting for few files
    return DataLoader(
        paths, 128, num_workers=workers, collate_fn=function, worker_init_fn=ignore_signals
    )


def have_colour(paths):
    """Whether any of the image files is in colour."""
    for path in paths:
        with contextlib.suppress(Exception), Image.open(path) as image:  # reads little of it
            if not sample.is_grey(image):
                return True
    return False


def read_files(paths, size, channels):
    """For each image file, (pixels, digest of the file, None), or (b"", b"", what is wrong)."""
    results = []
    for path in paths:
        try:
            content = path.read_bytes()
            pixels = sample.read_picture(io.BytesIO(content), size, channels).tobytes()
            results.append((pixels, hashlib.blake2b(content).digest(), None))
        except Exception as error:  # Pillow raises many kinds
            results.append((b"", b"", f"  {printable(path)}: {one_line(error)}"))
    return results


def decode(paths, size, channels, file):
    """Decode image files on all cores into an open file. Returns (their shape, a digest of them).

    channels: 1 or 3, or None for 3 if any image is in colour. Unreadable files are left out,
    counted, and the first ones named. Raises ValueError if none is left.
    """
    warnings.filterwarnings("ignore", module="PIL")
    if channels is None:
        channels = 3 if any(on_all_cores(have_colour, paths)) else 1
    broken, digest = [], hashlib.blake2b(digest_size=8)
    read = functools.partial(read_files, size=size, channels=channels)
    with progress(total=len(paths), desc="decoding", unit=" images", leave=False) as bar:
        for results in on_all_cores(read, paths):
            for pixels, file_digest, error in results:
                file.write(pixels)
                digest.update(file_digest)
                broken += [error] if error else []
            bar.update(len(results))
    if broken and not all(path.is_file() for path in paths):
        raise ValueError("--data: files have vanished while the folder was read")
    if broken:
        print(f"left out {len(broken)} of {len(paths)} files, which can't be read; the first ones:")
        print("\n".join(broken[:3]))
    if len(broken) == len(paths):
        raise ValueError(f"--data: no image that can be read ({' '.join(sorted(SUFFIXES))})")
    return [len(paths) - len(broken), channels, size, size], digest.hexdigest()


def read_folder(folder, size, channels=None, most=None):
    """The images under a folder, or `most` of them evenly spaced: uint8 (N, C, size, size)."""
    paths, memory = picture_files(folder), io.BytesIO()
    if most is not None and most < len(paths):
        paths = [paths[i * len(paths) // most] for i in range(most)]
    shape, _ = decode(paths, size, channels, memory)
    return torch.from_numpy(np.frombuffer(memory.getbuffer(), np.uint8).reshape(shape))


def cache_folder(folder, size, channels, out, expected=None):
    """Decode the images under a folder into out/pictures.u8, described by out/pictures.json.

    Nothing happens if they are there and no name, size or time in the folder has changed.
    expected: of the run that is resumed, a dict of "digest" and "pictures"; raises ValueError, and
    changes nothing, if the files are not those.
    """
    paths = picture_files(folder, without=out)
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    key = repr((os.path.realpath(folder), size, states))
    key = hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).hexdigest()
    data, description = out / "pictures.u8", out / "pictures.json"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        cache = json.loads(description.read_text())
        if (
            cache["key"] == key
            and cache["shape"][2:] == [size, size]
            and channels in (cache["channels"], cache["shape"][1])
            and data.stat().st_size == math.prod(cache["shape"])
            and (expected is None or cache["digest"] == expected["digest"])
        ):
            return
    with atomic_write(data) as temporary:
        with open(temporary, "wb") as file:
            shape, digest = decode(paths, size, channels, file)
        if expected and expected["digest"] != digest:
            counts = f"of {expected['pictures']} other images; now there are {shape[0]}"
            raise ValueError(f"{printable(out)} holds another run, {counts}. {WAY_OUT}")
        description.unlink(missing_ok=True)
    with atomic_write(description) as temporary:
        cache = {"key": key, "digest": digest, "shape": shape, "channels": channels}
        temporary.write_text(json.dumps(cache))


def open_cache(out):
    """The images of cache_folder, memory-mapped uint8 (N, C, size, size), and their digest."""
    cache = json.loads((out / "pictures.json").read_text())
    pixels = np.memmap(out / "pictures.u8", np.uint8, "c").reshape(cache["shape"])
    return torch.from_numpy(pixels), cache["digest"]


# What --quick stands for: small images after minutes on a CPU. docs/guide.md has measurements.
QUICK = dict(
    base_channels=16, channel_mults=[1, 2, 4, 4], num_res_blocks=1, attention_resolutions=[8],
    dropout=0.0, predicts="v", batch=64, lr=2e-3, lr_decay=True, steps=1800,
)  # fmt: skip

# The demo: images so simple that a test can tell a right sample from a wrong one, and a network and
# a schedule that learn them on two CPU cores in under four minutes.
DEMO = dict(
    image_size=8, base_channels=32, channel_mults=[1, 2], num_res_blocks=1,
    attention_resolutions=[], dropout=0.0, batch=64, lr=3e-3, lr_decay=True, steps=2400,
)  # fmt: skip
DEMO_GLYPHS = [
    ".#. ### .#.", "#.# .#. #.#", "### #.# ###", "### .#. .#.", "#.# #.# ###", "#.# ### #.#",
]  # fmt: skip
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


# ------------------------------------------------------------------------------------ checkpoints


@dataclass
class Trained:
    """A trained network in eval mode, and what is known about it."""

    model: UNet
    diffusion: Diffusion
    settings: dict  # the arguments of UNet
    step: int  # length of the training, 0 if unknown
    source: str  # where the weights come from

    @property
    def shape(self):
        """(C, H, W) of an image."""
        size = self.settings["image_size"]
        return self.settings["in_channels"], size, size


def not_a_checkpoint(path):
    """Turns any error into a ValueError that says so."""
    return as_value_error(f"{printable(path)} is not a checkpoint of train.py")


def load(path):
    """The Trained in a checkpoint, in the folder of a run, or in published weights.

    Of a checkpoint it takes the averaged weights. No code in a file is executed. Raises ValueError.
    """
    path = Path(path)
    if (path / "checkpoint.pt").is_file():
        path /= "checkpoint.pt"
    if path.suffix != ".pt" and not path.is_file():
        model, settings, diffusion = from_diffusers(path.as_posix())
        return Trained(model, diffusion, settings, 0, f"diffusers, {path.resolve().name}")
    if not path.is_file():
        raise ValueError(f"{printable(path)} does not exist; python train.py writes a checkpoint")
    with not_a_checkpoint(path):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config = checkpoint["config"]
        model = UNet(**config["model"]).eval()
        model.load_state_dict(checkpoint["ema"])
        source = f"train.py, {config['train']['data'] or 'demo'}"
        diffusion = Diffusion(**config["diffusion"])
        return Trained(model, diffusion, config["model"], int(checkpoint["step"]), source)


# --------------------------------------------------------------------------------------- evaluation


def draw_curves(axes, curves, x_label, y_label, log=""):
    """Curves, {name: (x, y)}, on axes of matplotlib. log: the logarithmic axes, such as "xy"."""
    for name, (x, y) in curves.items():
        axes.plot(x, y, label=name)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.set(xscale="log" if "x" in log else "linear", yscale="log" if "y" in log else "linear")
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend()


def save_plot(path, curves, x_label, y_label, log=""):
    """The curves of draw_curves as a PNG."""
    os.environ.pop("MPLBACKEND", None)  # of Jupyter; a Figure needs none
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    draw_curves(figure.subplots(), curves, x_label, y_label, log)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=100)


def save_loss_plot(log, path):
    """The losses of log.csv as a curve, averaged over 200 intervals."""
    rows = np.loadtxt(log, delimiter=",", skiprows=1, ndmin=2)
    if len(rows) > 1:
        parts = np.array_split(rows[:, :2], min(len(rows), 200))
        steps, losses = np.transpose([part.mean(0) for part in parts])
        save_plot(path, {"": (steps, losses)}, "step", "loss", "y")


def rate_distortion(bound):
    """The means over the images of a Bound: L_t, the rate and the RMSE of x0_hat, (T,) each.

    The rate is the number of bits per dimension that have been sent when x_t is known: L_T and the
    terms of all steps s > t. The RMSE is in values of 0..255.
    """
    L_t = bound.L_t.mean(0)
    rate = bound.L_T.mean() + L_t.flip(0).cumsum(0).flip(0) - L_t
    return L_t, rate, 127.5 * bound.mse.mean(0).sqrt()


def evaluate(args):
    """--eval: print the bound on the images, and save the rate-distortion curve (figure 5)."""
    trained, device, path = args.trained, args.device, Path(args.eval)
    if args.data is None:
        images = demo_pictures()
    else:
        images = read_folder(args.data, args.image_size, args.channels, args.eval_images)
    random = torch.Generator().manual_seed(args.seed)  # so that the first ones are like the rest
    images = images[torch.randperm(len(images), generator=random)][: args.eval_images]
    beside = path if path.is_dir() else path.parent if path.exists() else "."
    curve = Path(args.out or beside, CURVE)
    for file in (curve, curve.with_suffix(".csv")):  # now, and not after hours
        with as_value_error(f"{printable(file)} can't be written"), sample.check_writable(file):
            pass
    model = trained.model.to(device)
    diffusion = Diffusion(trained.diffusion.betas, args.variance, args.predicts)

    bounds = []
    bar = progress(total=len(images) * diffusion.T, unit=" passes", unit_scale=True)

    def network(x_t, t):
        bar.update(len(x_t))
        return model(x_t, t)

    try:
        for k, batch in enumerate(images.split(args.batch)):
            noise = torch.Generator(device).manual_seed(seed_of(args.seed, k))
            bounds.append(diffusion.vlb(network, batch.to(device).float() / 127.5 - 1, noise))
            bar.set_postfix_str(f"{bounds[-1].total.mean():.3f} bits/dim in the last batch")
    except KeyboardInterrupt:
        if not bounds:
            raise
    bar.close()
    bound = Bound(*map(torch.cat, zip(*bounds, strict=True)))
    n, (L_t, rate, rmse) = len(bound.total), rate_distortion(bound)
    error = f" +- {bound.total.std() / math.sqrt(n):.4f} (standard error)" if n > 1 else ""
    step = f" (step {trained.step:,})" if trained.step else ""
    data = printable(args.data or "the demo")
    print(f"{printable(path)}{step} on {n:,} images of {data}, bits per dimension")
    print(f"  L_T                  {bound.L_T.mean():8.6f}")
    print(f"  L_1 + .. + L_T-1     {L_t[1:].sum():8.4f}    the rate")
    print(f"  L_0                  {L_t[0]:8.4f}    the distortion")
    print(f"  total                {bound.total.mean():8.4f}{error}")
    print(f"  RMSE                 {rmse[0]:8.4f}    of x0_hat at t = 0, in values of 0..255")
    if n < len(images):
        raise ValueError(f"stopped after {n} of {len(images)} images; no curve is written")
    if not rate.isfinite().all():
        raise ValueError(f"the bound is not finite: {printable(path)} is broken")
    with atomic_write(curve.with_suffix(".csv")) as temporary:
        table = torch.stack([torch.arange(diffusion.T), L_t, rate, rmse], 1).numpy()
        np.savetxt(temporary, table, "%.9g", ",", header="t,L_t,rate,rmse", comments="")
    labels = "rate, bits per dimension", "RMSE of x0_hat, of 255"
    save_plot(curve, {"": (rate.tolist(), rmse.tolist())}, *labels)
    print(f"the curve: {printable(curve.with_suffix('.csv'))} and .png")


# ----------------------------------------------------------------------------------- the run folder

WAY_OUT = "Use another --out, or --restart, which moves that run aside."
RUN_FILES = ["log.csv", "loss.png", "preview-*.png", "rate-distortion.*"]  # and checkpoint.pt


@contextlib.contextmanager
def lock(folder):
    """Keep other trainings out of the folder. Raises ValueError if one is running there."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            what = f"a training is running in {printable(folder)}; use another --out"
            raise ValueError(what) from None
        yield
    finally:
        os.close(handle)


def move_run(source, target):
    """Move what a run writes, except for the decoded images, into another folder."""
    target.mkdir(exist_ok=True)
    for path in [path for name in [*RUN_FILES, "checkpoint.pt"] for path in source.glob(name)]:
        if path.is_symlink():  # it may be relative
            (target / path.name).symlink_to(os.path.realpath(path))
            path.unlink()
        else:
            shutil.move(path, target / path.name)  # also to another file system
    print(f"the run in {printable(source)} is now in {printable(target)}")


def refuse_foreign_files(out):
    """Raise ValueError if the folder holds files named like those of a run, but no run."""
    try:  # our cache may come before a checkpoint
        ours = {"key", "digest", "shape"} <= set(json.loads((out / "pictures.json").read_text()))
    except (OSError, ValueError, TypeError):
        ours = False
    for name in RUN_FILES if ours else [*RUN_FILES, "pictures.u8", "pictures.json"]:
        if any(out.glob(name)) and not (out / "checkpoint.pt").exists():
            what = f"{printable(out)} holds {name} but no checkpoint.pt"
            raise ValueError(f"{what}, so it is not a run; use another --out")


@contextlib.contextmanager
def run_folder(out, restart):
    """Lock the run folder; move an old run aside if asked to. Raises ValueError for other files."""
    checkpoint, aside = out / "checkpoint.pt", None
    with lock(out):
        if restart and checkpoint.exists():
            k = 1
            while os.path.lexists(aside := out.with_name(f"{out.name}-{k}")):
                k += 1
            move_run(out, aside)
        try:
            for name in ("checkpoint.pt", "pictures.u8"):  # left by a process that was killed
                for temporary in out.glob(f".{name}.tmp-????????"):
                    shutil.rmtree(temporary, ignore_errors=True)
            refuse_foreign_files(out)
            yield
        finally:
            if aside and not checkpoint.exists():  # the new run never began
                move_run(aside, out)
                aside.rmdir()


def refuse_other_run(old, new, out):
    """Raise ValueError unless two configurations are of the same run, which may train longer."""
    was, now = (config["diffusion"] | config["model"] | config["train"] for config in (old, new))
    different = [
        f"{key} was {was.get(key)}, now {now[key]}"
        for key in sorted(set(now) - {"betas", "warmup", "data"})
        if was.get(key) != now[key]
    ]
    different += ["other betas"] * (was["betas"] != now["betas"])
    different += ["other images"] * ((was["data"] is None) != (now["data"] is None))
    if different:
        held = "another run" if was["data"] else "the demo"
        more = f"; and {len(different) - 4} more" if len(different) > 4 else ""
        differences = "; ".join(different[:4]) + more
        raise ValueError(f"{printable(out)} holds {held}: {differences}. {WAY_OUT}")


def open_log(path, start):
    """log.csv with the rows up to step `start`; those after the checkpoint are dropped.

    If it has other lines, which may be somebody's, the old file is kept as log.old.csv.
    """
    header, rows, others = "step,loss,grad_norm,lr", [], []
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    for line in lines:
        try:
            step, loss, norm, lr = map(float, line.split(","))
            rows += [f"{step:.0f},{loss:.6g},{norm:.6g},{lr:.6g}"] if step <= start else []
        except ValueError:
            others += [line]
    if set(others) - {header, lines[-1] if lines else ""}:  # the last one may be cut off
        shutil.copy(path, path.with_name("log.old.csv"))
        print(f"{printable(path)} has other lines; the old file is now log.old.csv")
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join([header, *rows]) + "\n")
    return open(path, "a")


# -------------------------------------------------------------------------------------- the program


def all_flags():
    """The parser, which returns only the flags that are given, and the defaults of all flags."""
    parser = argparse.ArgumentParser(
        usage="python train.py --data ./images [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if devices.LOCAL_RANK:
        parser.error = lambda _: sys.exit(2)  # the first process of the machine prints it
    defaults = {}

    def flag(name, default, help, **kwargs):
        defaults[name[2:].replace("-", "_")] = default
        kwargs = {"type": named} | kwargs if "action" not in kwargs else kwargs
        shown = "" if default is None or default is False else f" [{default}]"
        help = (help + shown).replace("%", "%%")
        parser.add_argument(name, default=argparse.SUPPRESS, help=help, **kwargs)

    positive, switch = between(1), {"action": "store_true"}
    share = between(0, math.nextafter(1, 0), float)
    flag("--data", None, "folder of images, including its sub-folders [the built-in demo]")
    flag("--out", None, "folder of the run [run], or of the curve of --eval [the checkpoint's]")
    flag("--image-size", 32, "pixels; images are cropped to a square and resized", type=positive)
    flag("--channels", None, "1 grey, 3 colour [as found]", type=int, choices=(1, 3))
    flag("--base-channels", 128, "width of the first level of the U-Net", type=positive)
    flag("--channel-mults", [1, 2, 2, 2], "widths of the levels", type=between(1, 999), nargs="+")
    flag("--num-res-blocks", 2, "residual blocks per level", type=between(1, 99))
    flag("--attention-resolutions", [16], "in pixels", type=positive, nargs="*")
    flag("--dropout", 0.1, "probability of dropping an activation", type=share)
    flag("--quick", False, "a small network and a short run, for a CPU; see the manual", **switch)
    flag("--init", None, "start from these weights: a checkpoint, or weights for diffusers")
    flag("--schedule", "linear", "the betas, T = 1000", choices=("linear", "cosine"))
    flag("--variance", "large", "sigma_t^2: beta_t or beta-tilde_t", choices=("large", "small"))
    flag("--predicts", "eps", "the network's output", choices=("eps", "mean", "v"))
    weightings = {"choices": ("simple", "vlb", "native")}
    flag("--weighting", "simple", "of the loss: (14), (12), or that of the output", **weightings)
    flag("--batch", 128, "images per step, over all GPUs", type=between(1, 2**20))
    flag("--accumulate", 1, "parts to split a batch into, to save memory", type=positive)
    flag("--lr", 2e-4, "learning rate of Adam", type=between(1e-30, 1e30, float))
    flag("--warmup", None, "steps until --lr is reached [min(5000, steps / 20)]", type=between(0))
    flag("--lr-decay", False, "let --lr fall to 0 at --steps, for short runs", **switch)
    flag("--steps", 800_000, "length of the training", type=positive)
    flag("--ema", 0.9999, "decay of the averaged weights", type=share)
    flag("--no-flip", False, "do not mirror images at random", **switch)
    flag("--seed", 0, "seed of all random numbers", type=between(0, 2**32 - 1))
    flag("--device", "auto", "auto, cpu, cuda, cuda:1, mps or xpu")
    flag("--no-amp", False, "float32 (TF32 on CUDA) instead of bfloat16", **switch)
    flag("--no-compile", False, "do not use torch.compile on CUDA", **switch)
    flag("--preview-every", None, "steps [at most 5 % of the time]", type=positive)
    flag("--restart", False, "move the run in --out aside and start again", **switch)
    flag("--save-minutes", 5.0, "minutes between checkpoints", type=between(0, 1e9, float))
    flag("--eval", None, "do not train: compute the bound of these weights on --data")
    flag("--eval-images", None, "number of images for --eval [all]", type=positive)
    return parser, defaults


def arguments():
    """The arguments of the command line, checked against each other and against the weights."""
    parser, defaults = all_flags()
    given = vars(parser.parse_args())

    # What is not given comes from the weights, else from the demo, else from the paper.
    known = defaults | {"trained": None, "norm_groups": None}
    known |= DEMO if "data" not in given else QUICK if "quick" in given else {}
    if "quick" in given and "data" not in given:
        parser.error("--quick is for --data; the demo is short by itself")
    measuring = "eval eval_images data out batch seed device variance predicts"
    unused = set(given) - set(measuring.split())
    if "eval" in given and unused:
        parser.error(f"--{min(unused).replace('_', '-')} is for training, not for --eval")
    if "eval_images" in given and "eval" not in given:
        parser.error("--eval-images is for --eval")
    if "eval" in given and WORLD > 1:
        parser.error("--eval runs in one process, without torchrun")
    if "eval" in given or "init" in given:
        own = Path(given.get("out", "run"), "checkpoint.pt")  # a resumed run reads its own weights
        resumes = "eval" not in given and own.is_file() and "restart" not in given
        trained = load(given.get("eval") or (own if resumes else given["init"]))
        known |= trained.settings | {"dropout": known["dropout"]}  # dropout is not in the weights
        known |= {"channels": known.pop("in_channels"), "schedule": None, "trained": trained}
        known |= {"variance": trained.diffusion.variance, "predicts": trained.diffusion.predicts}
        if given.get("predicts", known["predicts"]) != known["predicts"]:
            parser.error(f"--predicts must be {known['predicts']}, as these weights do")
    args = argparse.Namespace(**(known | given))
    if args.warmup is None:
        args.warmup = min(5000, args.steps // 20)

    if args.data is None and (args.image_size, args.channels or 3) != (8, 3):
        parser.error("without --data the images are those of the demo, 8x8 in colour")
    out = Path(args.out or "run").resolve()
    if args.data and args.eval is None and Path(args.data).resolve().is_relative_to(out):
        parser.error("--out must be a folder of its own, not one that holds the images")
    try:
        with torch.device("meta"):
            UNet(**network_settings(args))
    except Exception as error:  # the U-Net knows which sizes fit together
        why = one_line(error).replace("image_size", "--image-size")
        parser.error(why.replace("base_channels", "--base-channels"))
    sizes = {args.image_size >> level for level in range(len(args.channel_mults))}
    if "attention_resolutions" in given and not set(args.attention_resolutions) <= sizes:
        parser.error(f"--attention-resolutions must be among {sorted(sizes)}")
    if args.batch < WORLD * args.accumulate:
        parser.error("--batch must have an image for each GPU and each part of --accumulate")

    args.device = devices.choose_device(args.device)
    return args


def quick_flags(args):
    """What --quick stands for, as on a command line."""
    flags = " ".join(f"--{name.replace('_', '-')} {getattr(args, name)}" for name in QUICK)
    return re.sub(r"[][,]| True", "", flags)


def network_settings(args):
    """The arguments of UNet."""
    names = "image_size base_channels channel_mults num_res_blocks attention_resolutions dropout"
    settings = {name: getattr(args, name) for name in [*names.split(), "norm_groups"]}
    return settings | {"in_channels": args.channels or 3}


def restore(state, model, ema, optimizer):
    """Load a checkpoint."""
    model.load_state_dict(state["model"])
    ema.load_state_dict(state["ema"])
    optimizer.load_state_dict(state["optimizer"])
    for parameter, moments in optimizer.state.items():  # in the memory format of this device
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = torch.empty_like(parameter).copy_(moments[name])
    if len(optimizer.state) < (state["step"] > 0) * len(list(model.parameters())):
        raise ValueError("the state of the optimizer is missing")


def read_run(args, out):
    """(The configuration, the checkpoint or None). The checkpoint is read in rank 0 alone.

    Raises ValueError if it is of another run.
    """
    schedules = {"linear": linear_betas, "cosine": cosine_betas}
    betas = schedules[args.schedule]() if args.schedule else args.trained.diffusion.betas
    names = "batch lr warmup lr_decay weighting ema no_flip seed"
    config = {  # all that another program, or a resumed run, has to know
        "model": network_settings(args),
        "diffusion": dict(betas=betas.tolist(), variance=args.variance, predicts=args.predicts),
        "train": {
            "data": args.data and printable(Path(args.data).resolve().name),
            "init": args.init and printable("/".join(Path(args.init).parts[-2:])),
            **{name: getattr(args, name) for name in names.split()},
        },
    }
    path, state = out / "checkpoint.pt", None
    if RANK == 0 and path.exists():
        with not_a_checkpoint(path):
            if not path.is_file():
                raise ValueError("it is not a file")
            state = torch.load(path, map_location="cpu", weights_only=True)
            old = state["config"]
            old["diffusion"].setdefault("predicts", "eps")  # not in the first checkpoints
            Diffusion(**old["diffusion"])
            if type(state["step"]) is not int or state["step"] < 0:
                raise ValueError(f"step {state['step']}")
            args.channels = args.channels or old["model"]["in_channels"]
        config["model"] = network_settings(args)
        refuse_other_run(old, config, out)
    return config, state


def decode_once(args, out, state):
    """Let the first process of each machine decode the images."""
    if args.data is not None and devices.LOCAL_RANK == 0:
        refuse_foreign_files(out)
        expected = state and state["config"]["train"]
        cache_folder(args.data, args.image_size, args.channels, out, expected)


def catch_signals():
    """The times of the signals from now on, in a list that grows.

    A signal more than a second after the first one raises KeyboardInterrupt.
    """
    times = []

    def catch(*_):
        if times and time.monotonic() - times[0] > 1:  # torchrun immediately sends one of its own
            raise KeyboardInterrupt
        times.append(time.monotonic())

    sample.on_signals(catch)
    return times


def check_processes_agree(config, start, model, ema, args):
    """Raise ValueError in every process unless all would train identically."""
    weights = hashlib.blake2b(digest_size=8)
    for tensor in [*model.parameters(), *ema.parameters()]:
        weights.update(tensor.detach().cpu().contiguous().numpy())
    flags = {name: getattr(args, name) for name in ("steps", "accumulate", "preview_every")}
    parts = config["model"] | config["diffusion"] | config["train"] | flags
    parts |= {"first step": start, "weights": weights.hexdigest()}
    del parts["data"]  # the name of the folder, which may differ
    devices.refuse_differences(parts)


def save_checkpoint(path, config, step, **parts):
    """Replace the checkpoint, whole or not at all. parts: model, ema and optimizer."""
    states = {name: part.state_dict() for name, part in parts.items()}
    try:
        with atomic_write(path) as temporary:
            torch.save({"config": config, "step": step, **states}, temporary)
    except (OSError, RuntimeError) as error:  # torch has a RuntimeError for a full disk
        what = f"{printable(path)} can't be written, and is as it was"
        raise OSError(f"{what}: {one_line(error)}") from None


def save_preview(path, ema, diffusion, shape, args):
    """Save a grid of images of this shape (C, H, W), drawn with DDIM by the averaged network."""
    noise = torch.Generator(args.device).manual_seed(args.seed)
    steps = min(PREVIEW_STEPS, diffusion.T)
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
        x0 = diffusion.sample(ema, (PREVIEW, *shape), steps, 0.0, noise, device=args.device)
    sample.save_image(path, sample.grid(sample.to_pixels(x0.cpu().numpy())))


def train(args, out):
    """Train in the folder `out`, from its checkpoint if there is one."""
    device, first, path = args.device, RANK == 0, out / "checkpoint.pt"
    # The output "mean" must be exact: at t = 0 its error is 100 times as large in eps.
    args.amp = devices.has_bfloat16(device) and not args.no_amp and args.predicts != "mean"
    torch.set_float32_matmul_precision("high")  # TF32 for what stays float32

    # -- the configuration, the checkpoint and the training set
    config, state = devices.in_all_processes(read_run, args, out)
    inode = out.stat().st_ino if first else None
    state, args.channels = devices.from_first_process(state, args.channels)
    devices.in_all_processes(decode_once, args, out, state)
    images, digest = (demo_pictures(), "demo") if args.data is None else open_cache(out)
    if first and len(images) < 100:
        print(f"only {len(images)} images: the network will memorise them")
    config["model"]["in_channels"] = images.shape[1]
    config["train"] |= {"pictures": len(images), "digest": digest}
    if images.nbytes < 2e9:  # larger sets are moved batch by batch
        images = images.to(device)

    # -- the network, its average and the optimizer, as they start or as they were saved
    torch.manual_seed(args.seed)
    diffusion = Diffusion(**config["diffusion"])
    model = UNet(**config["model"]).to(device)
    if args.init:
        with as_value_error(f"--init {printable(args.init)} does not match the other flags"):
            model.load_state_dict(args.trained.model.state_dict())
    resumes = state is not None
    network, start = model, state["step"] if resumes else 0
    if not args.no_compile and devices.is_worth_compiling(device, args.steps - start):
        part = -(-args.batch // (WORLD * args.accumulate))
        network = devices.try_to_compile(model, (part, *images.shape[1:]), args.amp)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    if resumes:
        with not_a_checkpoint(path):
            restore(state, model, ema, optimizer)
    del state
    if WORLD > 1:
        check_processes_agree(config, start, model, ema, args)
        network = devices.distribute(model, compiled=network is not model)

    signals = catch_signals()  # the loop saves before it stops
    # A preview costs as much as training on PREVIEW * PREVIEW_STEPS / 3 = 600 images. Draw one when
    # that is 4 % of the time or less.
    every = args.preview_every or max(25 * 600 // args.batch, args.steps // 100, 1)

    def save(step):
        if not out.is_dir() or out.stat().st_ino != inode:
            raise OSError(f"{printable(out)} was moved or replaced; step {step} is not saved")
        save_checkpoint(path, config, step, model=model, ema=ema, optimizer=optimizer)

    if first:
        if not resumes:
            save(0)  # this marks the folder as a run from the start
        size = sum(p.numel() for p in model.parameters())
        others = f" and {WORLD - 1} more" if WORLD > 1 else ""
        print(f"images   {len(images):,} of {'x'.join(map(str, images.shape[1:]))}")
        if args.quick:
            print(f"--quick  {quick_flags(args)}")
        dtype = "bfloat16" if args.amp else "float32"
        print(f"network  {size:,} parameters on {device}{others}, {dtype}")
        previews = f"with a preview every {min(every, args.steps):,}"
        print(f"steps    {start:,} to {args.steps:,}, {previews}")

    unread, done = [], start  # unread: the steps whose loss has not been read
    saved, mean_loss, must_stop = time.monotonic(), None, False

    def record(step, lr, read):
        """Wait for a step, and log it."""
        nonlocal mean_loss, must_stop
        loss, norm, must_stop = read()
        if not math.isfinite(loss + norm):
            raise RuntimeError(
                f"the loss of step {step + 1} is not finite; the checkpoint is as it was. Try a "
                "lower --lr, a longer --warmup, or --no-amp."
            )
        if first:
            log.write(f"{step + 1},{loss:.6g},{norm:.6g},{lr:.6g}\n")
            mean_loss = loss if mean_loss is None else 0.98 * mean_loss + 0.02 * loss
            bar.set_postfix_str(f"loss {mean_loss:.4f}", refresh=False)
            bar.update()

    log = open_log(out / "log.csv", start) if first else contextlib.nullcontext()
    bar = progress(total=args.steps, initial=start, unit="step", smoothing=0.05, disable=not first)
    with log, bar:
        for step in range(start, args.steps):
            status = train_step(step, network, ema, optimizer, diffusion, images, args)
            caught = torch.full((1,), float(len(signals)), device=device)
            if WORLD > 1:  # so that all stop after the same step
                dist.all_reduce(caught)
            read = devices.read_later(torch.cat([status, caught]))
            unread.append((step, optimizer.param_groups[0]["lr"], read))
            while len(unread) > devices.AHEAD.get(device.type, 0):
                record(*unread.pop(0))
            done, stops_here = step + 1, must_stop  # before rank 0 may read more than the others
            show = done % every == 0 or done == args.steps
            if stops_here or show or (first and time.monotonic() - saved > 60 * args.save_minutes):
                while unread:
                    record(*unread.pop(0))
                if first:  # before the preview, which may fail
                    log.flush()
                    save(done)
                    saved = time.monotonic()
            if first and show:
                preview = out / f"preview-{done:07d}.png"
                save_preview(preview, ema, diffusion, images.shape[1:], args)
                save_loss_plot(log.name, out / "loss.png")
            if stops_here:
                break

    sample.on_signals(signal.SIG_IGN)  # all is saved, and there is little left to do
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()
    if first and done < args.steps:
        command = shlex.join(word for word in sys.argv if word != "--restart")
        program = "torchrun ..." if WORLD > 1 else "python"
        print(f"stopped at step {done:,}; to resume:\n  {program} {printable(command)}")
    elif first:
        shown = os.path.relpath(path)
        print(f"done, {printable(shown)} of step {done:,}; next:")
        print(f"  python export.py --checkpoint {printable(shlex.quote(shown))}")


def main():
    args = arguments()
    try:
        if args.eval is not None:
            return evaluate(args)
        out = Path(args.out or "run").resolve()
        restart = args.restart and not devices.RESTARTED
        if WORLD > 1:
            devices.start_processes(args.device)
        with run_folder(out, restart) if RANK == 0 else contextlib.nullcontext():
            train(args, out)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        hint = "try --accumulate 2 (half the memory), a smaller --batch or a smaller network"
        raise MemoryError(f"out of memory; {hint}") from error


if __name__ == "__main__":
    sample.run_program(main, "train.py" if WORLD == 1 else f"train.py, rank {RANK}")
