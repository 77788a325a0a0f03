"""A run of train.py: its settings, the files that it writes, and the trained network.

run/checkpoint.pt holds

    {"config": {"model": the arguments of UNet, "diffusion": those of Diffusion, "train": the rest},
     "step": the number of training steps,
     "model": ..., "ema": ..., "optimizer": ...}

Samples use "ema", the averaged weights. torch.load(path, weights_only=True) opens the file.
"""

import argparse
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from beyond import as_eps, cosine_betas, sample
from data import digest
from ddpm import Diffusion, UNet, linear_betas
from device import RANK
from images import check_output, grid, replacing, save_image, save_plot, to_pixels

DEMO = "train.py, the demo"  # the source of its weights
HEADER = "step,loss,grad_norm,lr\n"
ROW = re.compile(r"\d{1,15}(,-?\d+(\.\d+)?(e[-+]\d+)?){3}\n")  # of log.csv
HUB = "hf:"  # before the name of published weights on the Hugging Face Hub
SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas}
SHAPE = (  # the flags of the network's shape
    "image_size", "base_channels", "channel_mults", "num_res_blocks", "attention_resolutions",
    "norm_groups",
)  # fmt: skip
WAIT = 2  # seconds after which a file that is being written has changed
TRAINING = (
    "predicts", "optimizer", "batch", "lr", "warmup", "lr_decay", "weighting", "ema", "flip",
    "seed",
)  # fmt: skip

# ------------------------------------------------------------------------------------ the settings


def number(kind, low, high=math.inf):
    """Return an argparse type for an int or a float that is at least `low` and below `high`."""

    def parse(text):
        value = kind(text)
        if not low <= value < high:
            limit = f" and below {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} must be at least {low}{limit}")
        return value

    parse.__name__ = kind.__name__  # for argparse's messages
    return parse


def command(*words):
    """Return the words as a command line that the user's shell understands."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def name_of(path):
    """Return the name of a run, of its checkpoint, or of published weights."""
    path = Path(os.path.abspath(str(path).removeprefix(HUB)))
    return path.parent.name if path.name == "checkpoint.pt" else path.name


def duration(seconds):
    """Return a time in words, such as "about 5 months"."""
    for unit, length in (("years", 365 * 86400), ("months", 30 * 86400), ("days", 86400)):
        if seconds >= 2 * length:
            return f"about {seconds / length:.0f} {unit}"
    return f"about {seconds / 3600:.0f} hours"


def make_config(args, weights, images=None):
    """Return the "config" of a checkpoint from the arguments of train.py.

    weights: the Trained of --init, or None. images: a fingerprint of the training set.
    """
    betas = weights.diffusion.betas if weights else SCHEDULES[args.schedule]()
    model = {name: getattr(args, name) for name in (*SHAPE, "dropout")}
    diffusion = {"variance": args.variance, "betas": betas.tolist()}
    training = {name: getattr(args, name) for name in TRAINING}
    training |= {
        "steps": args.steps if args.lr_decay else None,  # else the run can be made longer
        "init": args.init,
        "data": args.data and Path(args.data).resolve().name,
        "folder": args.data and digest(os.fsencode(Path(args.data).resolve())),
        "images": images,
        "code": digest(*(Path(sys.modules[m].__file__).read_bytes() for m in ("ddpm", "beyond"))),
    }
    if args.classes:
        model["num_classes"], training["classes"] = len(args.classes), args.classes
    model["in_channels"] = args.channels
    return {"model": model, "diffusion": diffusion, "train": training}


def complete(args, state):
    """Take settings that the command does not give from the run's checkpoint, if there is one."""
    if args.warmup is None:  # a run that is extended keeps its warm-up
        args.warmup = state["config"]["train"]["warmup"] if state else min(5000, args.steps // 20)
    if state:
        args.channels = args.channels or state["config"]["model"]["in_channels"]
        args.init = args.init or state["config"]["train"]["init"]


def differences(old, new, besides):
    """Return [(name, old value, new value)] of the settings in which two configs differ.

    besides: names of settings that may differ.
    """
    was, now = (config["model"] | config["diffusion"] | config["train"] for config in (old, new))
    names = (was | now).keys() - {"num_classes", *besides}  # "classes" lists their names
    different = [(name, was.get(name), now.get(name)) for name in sorted(names)]
    shown = {"betas": ("one schedule", "another"), "images": ("one set", "another")}
    shown["folder"] = was["data"], f"a different folder, {now['data']}"
    return [
        (name, *shown.get(name, (before, after)))
        for name, before, after in different
        if before != after
    ]


def refuse_other_run(out, state, config, steps):
    """Exit unless the checkpoint in the folder `out` belongs to a run with these settings.

    Changed images in the same folder are accepted, and so are the same images in another folder.
    """
    if state is None:
        return
    old, new, step = state["config"]["train"], config["train"], state["step"]
    besides = ["data", "code"]
    if new["images"] in (None, old["images"]) or new["folder"] == old["folder"]:
        besides += ["images", "folder"]
    if different := differences(state["config"], config, besides):
        fixed = {*SHAPE, "in_channels", "predicts", "betas"} & {name for name, *_ in different}
        hint = "" if fixed else f" (--init {out} starts from its weights)"
        lines = "; ".join(f"{name} was {before}, now {now}" for name, before, now in different)
        sys.exit(
            f"{out} holds a run with other settings. Use another --out{hint}, or rename the "
            f"folder. What differs: {lines}"
        )
    if step > steps:
        sys.exit(f"{out} is at step {step:,} already, so --steps must be larger")
    if new["images"] is None or step == steps or RANK > 0:
        return
    for name, what in (("images", "the images have"), ("code", "ddpm.py or beyond.py has")):
        if new[name] != old[name]:
            print(f"{what} changed since step {step:,}; training continues with the change")


def refuse_other_ranks(configs):
    """Exit unless all processes have the same settings and images. configs: one per process."""
    for rank, config in enumerate(configs):
        besides = "data", "folder", "init"
        for name, first, other in differences(configs[0], config, besides):
            sys.exit(f"{name} is {first} in rank 0, but {other} in rank {rank}")


# --------------------------------------------------------------------------------------- the folder


class Run:
    """The folder of a run: it writes the checkpoint, the log, previews and the curve of the loss.

    step: the number of steps taken so far. lr_at(k): the learning rate of step k, counted from 0.
    found: what version_of said of the checkpoint when it was read. Another one is never replaced.
    """

    def __init__(self, out, step, lr_at, found=None):
        self.out, self.lr_at, self.rows, self.version = out, lr_at, "", found
        self.saved = self.previewed = time.monotonic()
        self.preview_seconds = 0  # how long the last one took
        self.recent = deque(maxlen=100)  # losses
        if (out / "log.csv").exists():  # its rows may be newer than the checkpoint
            rows = read_log(out / "log.csv", step)
            keep_foreign_log(out / "log.csv")
            with replacing(out / "log.csv") as file:
                file.write((HEADER + "".join(rows)).encode())
            self.recent.extend(float(row.split(",")[1]) for row in rows[-100:])

    def log(self, step, losses):
        """Append the steps up to `step` to log.csv, and return the mean of the last 100 losses.

        losses: [(loss, norm of the gradient)].
        """
        self.out.mkdir(parents=True, exist_ok=True)
        for k, (loss, norm) in enumerate(losses, step - len(losses)):
            self.rows += f"{k + 1},{loss:.6g},{norm:.6g},{self.lr_at(k):.6g}\n"
            self.recent.append(loss)
        path = self.out / "log.csv"
        try:
            with open(path, "a") as file:
                file.write(self.rows if file.tell() else HEADER + self.rows)
            self.rows = ""
        except PermissionError:  # on Windows, a spreadsheet that shows the file locks it
            pass  # the rows are written later
        except OSError as error:
            sys.exit(f"{path} can't be written, so training ends: {error.strerror}")
        return np.mean(self.recent)

    def save(self, config, step, model, ema, optimizer):
        """Replace the checkpoint. Exits if another process has written it in the meantime."""
        path = self.out / "checkpoint.pt"
        parts = {"model": model, "ema": ema, "optimizer": optimizer}
        states = {name: part.state_dict() for name, part in parts.items()}
        with replacing(path) as file:
            try:
                torch.save({"config": config, "step": step, **states}, file)
            except RuntimeError as error:  # torch's own hides the one of a full disk
                raise error.__context__ or error from None
            if version_of(path) not in (None, self.version):
                sys.exit(f"{path} was written by another process, which trains in the same folder. "
                         "It is not replaced; use another --out")  # fmt: skip
        self.version, self.saved = version_of(path), time.monotonic()

    def save_is_due(self, minutes, before_preview):
        """Return whether the last checkpoint is too old, or there is none before a preview.

        data.py recognises the folder of a run by its checkpoint, and leaves out its previews.
        """
        first = before_preview and not (self.out / "checkpoint.pt").exists()
        return first or time.monotonic() - self.saved > 60 * minutes

    def preview_is_due(self, gap):
        """Return whether the time since the last preview is at least `gap` times what it took."""
        return time.monotonic() - self.previewed >= gap * self.preview_seconds

    def preview(self, step, ema, diffusion, shape, args):
        """Save 36 images of this shape (C, H, W) that the averaged network draws, and loss.png.

        Each class has a row. The curve is averaged over up to 200 intervals of equal length.
        """
        began = time.monotonic()
        noise, rows = torch.Generator(args.device).manual_seed(args.seed), len(args.classes)
        y = torch.arange(36, device=args.device) % rows if rows else None
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
            eps = partial(as_eps(ema, diffusion, args.predicts), y=y)
            x0 = sample(diffusion, eps, (36, *shape), min(20, diffusion.T), "dpm",
                        generator=noise, device=args.device)  # fmt: skip
        image = grid(to_pixels(x0.cpu().numpy()), rows=rows, names=args.classes)
        save_image(self.out / f"preview-{step:07d}.png", image)
        table = np.loadtxt(read_log(self.out / "log.csv", step), delimiter=",", ndmin=2)[:, :2]
        length = -(-len(table) // 200)
        parts = [table[k : k + length].mean(0) for k in range(0, len(table) - length + 1, length)]
        save_plot(self.out / "loss.png", *np.transpose(parts), "step", "loss", log=True)
        self.previewed = time.monotonic()
        self.preview_seconds = self.previewed - began


def read_log(path, last):
    """Return the rows of a log.csv, as text, up to the step `last`.

    Other lines are left out, such as empty ones, those of a spreadsheet, and one that a killed run
    did not finish. Of a step that was logged twice, the second row counts.
    """
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    rows = {int(line.split(",")[0]): line for line in lines if ROW.fullmatch(line)}
    return [rows[step] for step in sorted(rows) if step <= last]


def keep_foreign_log(path):
    """Copy a log.csv that a spreadsheet has saved to log-edited.csv, because it is rewritten."""
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    if any(line.strip() and line != HEADER and not ROW.fullmatch(line) for line in lines[:-1]):
        copy = path.with_name("log-edited.csv")
        with replacing(copy) as file:
            file.write(path.read_bytes())
        print(f"{path} has lines of another program; it is kept as {copy.name}, and continued")


def version_of(path):
    """Return what tells a file from one that replaces it, or None if there is none."""
    return (path.stat().st_mtime_ns, path.stat().st_size) if path.exists() else None


def remove_remains(out):
    """Remove what processes have left that were killed while they wrote into the folder of a run.

    Exits if one of them still writes.
    """
    for path in out.glob(".*.tmp"):
        if not re.fullmatch(r"\..+\.[0-9a-f]{16}\.tmp", path.name):  # of images.replacing
            continue
        before = version_of(path)
        time.sleep(WAIT)
        if version_of(path) != before:
            sys.exit(f"another process is writing into {out}; wait for it, or use another --out")
        path.unlink(missing_ok=True)


def open_checkpoint(path):
    """Return the dict of a checkpoint. Exits if the file is not one. No code in it is executed."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises many kinds
        state = None
    if not isinstance(state, dict) or not {"config", "step", "ema"} <= state.keys():
        sys.exit(f"{path.as_posix()} is damaged, or not a checkpoint of train.py")
    config = state["config"]
    if "predicts" in config["diffusion"]:  # of an earlier version
        config["train"]["predicts"] = config["diffusion"].pop("predicts")
    return state


def find_run(out):
    """Return the checkpoint in the folder of a run and its version_of, or (None, None).

    Exits if the folder holds files of other programs instead, or can't be written.
    """
    path = out / "checkpoint.pt"
    check_output(path)
    remove_remains(out)
    if path.is_file():
        version = version_of(path)
        return open_checkpoint(path), version
    for path in out.glob("*"):  # of a run that ended before its first checkpoint
        ours = re.fullmatch(r"\..*|images-[0-9a-f]{16}\..*", path.name)
        if path.name == "log.csv":
            ours = HEADER.startswith(path.read_text(errors="replace")[: len(HEADER)])
        if not ours:
            sys.exit(f"--out {out} holds {path.name}, but no checkpoint.pt, so it is not the "
                     "folder of a run; use a new or empty folder")  # fmt: skip
    return None, None


def start_from(weights, model, classes):
    """Load the weights of --init. If the class names differ, the new ones start without effect."""
    state = weights.model.state_dict()
    if weights.classes and weights.classes != classes:  # the bias takes over "no class"
        no_class = state.pop("class_embedding.weight")[-1]
        state["time_mlp.2.bias"] = state["time_mlp.2.bias"] + no_class
    model.load_state_dict(model.state_dict() | state)


# ------------------------------------------------------------------------------ the trained network


@dataclass
class Trained:
    """A trained network in eval mode, and what is known about it."""

    model: UNet
    diffusion: Diffusion
    settings: dict  # the arguments of UNet
    step: int  # the number of training steps, 0 if unknown
    source: str  # where the weights come from
    classes: list | tuple = ()  # the names of the classes, if the network has any
    predicts: str = "eps"  # what the network returns, see beyond.py

    @cached_property
    def eps(self):
        """eps_theta(x_t, t, y=None), whatever the network returns."""
        return as_eps(self.model, self.diffusion, self.predicts)

    @property
    def shape(self):
        """(C, H, W) of an image."""
        size = self.settings["image_size"]
        return self.settings["in_channels"], size, size


def load(path):
    """Return the Trained of a checkpoint, of the folder of a run, or of published weights.

    Published weights are a folder or, as in "hf:google/ddpm-cifar10-32", a name on the hub. The
    weights of a checkpoint are the averaged ones. Exits if `path` is none of these.
    """
    if str(path).startswith(HUB):
        return published(str(path).removeprefix(HUB))
    path = Path(path)
    if (path / "checkpoint.pt").is_file():
        path /= "checkpoint.pt"
    if path.is_file():
        state = open_checkpoint(path)
        config = state["config"]
        model = UNet(**config["model"]).eval()
        model.load_state_dict(state["ema"])
        data = config["train"]["data"]
        source = DEMO if data is None else f"train.py, {ascii(data)[1:-1]}"  # for ONNX
        diffusion, training = Diffusion(**config["diffusion"]), config["train"]
        classes, predicts = training.get("classes", []), training["predicts"]
        return Trained(model, diffusion, config["model"], state["step"], source, classes, predicts)
    if not path.is_dir():
        is_name = len(path.parts) == 2 and path.suffix != ".pt"
        hub = f" ({HUB}{path.as_posix()} is a name on the hub)" * is_name
        sys.exit(f"{path.as_posix()} does not exist; python train.py writes checkpoint.pt into the "
                 f"folder of its --out{hub}")  # fmt: skip
    if not [*path.glob("*config.json"), *path.glob("*/*config.json")]:
        sys.exit(f"{path} has neither a checkpoint.pt nor weights in diffusers' format")
    return published(path.as_posix())


def published(source):
    """Return the Trained of weights in diffusers' format, a folder or a name on the hub."""
    from pretrained import from_diffusers

    model, settings, diffusion, predicts = from_diffusers(source)
    name = f"diffusers, {Path(source).name}"
    return Trained(model, diffusion, settings, 0, name, predicts=predicts)
