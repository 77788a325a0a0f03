"""A run of train.py: its settings, the files that it writes, and the trained network.

run/checkpoint.pt holds

    {"config": {"model": the arguments of UNet, "diffusion": those of Diffusion, "train": the rest},
     "step": the number of training steps,
     "model": ..., "ema": ..., "optimizer": ...}

Samples use "ema", the averaged weights. torch.load(path, weights_only=True) opens the file.
"""

import argparse
import contextlib
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data import digest
from ddpm import Diffusion, UNet, cosine_betas, linear_betas
from device import RANK
from images import grid, save_image, save_plot, to_pixels

DEMO = "train.py, the demo"  # the source of its weights
HEADER = "step,loss,grad_norm,lr\n"
SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas}
SHAPE = (  # the flags of the network's shape
    "image_size", "base_channels", "channel_mults", "num_res_blocks", "attention_resolutions",
    "norm_groups",
)  # fmt: skip
TRAINING = "optimizer", "batch", "lr", "warmup", "lr_decay", "weighting", "ema", "flip", "seed"

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
    path = Path(os.path.abspath(path))
    return path.parent.name if path.name == "checkpoint.pt" else path.name


def settings(args, weights, images=None):
    """Return the "config" of a checkpoint from the arguments of train.py.

    weights: the Trained of --init, or None. images: a fingerprint of the training set.
    """
    betas = weights.diffusion.betas if weights else SCHEDULES[args.schedule]()
    model = {name: getattr(args, name) for name in (*SHAPE, "dropout")}
    diffusion = {"variance": args.variance, "predicts": args.predicts, "betas": betas.tolist()}
    training = {name: getattr(args, name) for name in TRAINING}
    training |= {
        "steps": args.steps if args.lr_decay else None,  # else the run can be made longer
        "init": args.init,
        "data": args.data and Path(args.data).resolve().name,
        "folder": args.data and digest(os.fsencode(Path(args.data).resolve())),
        "images": images,
        "code": digest(Path(sys.modules["ddpm"].__file__).read_bytes()),
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
            f"{out} holds a run with other settings: {lines}. Use another --out{hint}, or rename "
            "the folder"
        )
    if step > steps:
        sys.exit(f"{out} is at step {step:,} already, so --steps must be larger")
    if new["images"] is None or step == steps or RANK > 0:
        return
    for name, what in (("images", "the images have"), ("code", "ddpm.py has")):
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
    """

    def __init__(self, out, step, lr_at):
        self.out, self.lr_at, self.rows = out, lr_at, ""
        self.saved = self.previewed = time.monotonic()
        self.preview_seconds = 0  # how long the last one took
        self.recent = deque(maxlen=100)  # losses
        if (out / "log.csv").exists():  # its rows may be newer than the checkpoint
            lines = (out / "log.csv").read_text().splitlines(keepends=True)[1:]
            lines = [
                line for line in lines if line.endswith("\n") and int(line.split(",")[0]) <= step
            ]
            (out / ".log.csv.tmp").write_text(HEADER + "".join(lines))
            os.replace(out / ".log.csv.tmp", out / "log.csv")
            self.recent.extend(float(line.split(",")[1]) for line in lines[-100:])

    def log(self, step, losses):
        """Append the steps up to `step` to log.csv, and return the mean of the last 100 losses.

        losses: [(loss, norm of the gradient)].
        """
        self.out.mkdir(parents=True, exist_ok=True)
        for k, (loss, norm) in enumerate(losses, step - len(losses)):
            self.rows += f"{k + 1},{loss:.6g},{norm:.6g},{self.lr_at(k):.6g}\n"
            self.recent.append(loss)
        # On Windows, a spreadsheet that shows the file locks it; the rows are then written later.
        with contextlib.suppress(PermissionError), open(self.out / "log.csv", "a") as file:
            file.write(self.rows if file.tell() else HEADER + self.rows)
            self.rows = ""
        return np.mean(self.recent)

    def save(self, config, step, model, ema, optimizer):
        """Write a checkpoint to a temporary file, then put it in place."""
        self.out.mkdir(parents=True, exist_ok=True)
        path, temporary = self.out / "checkpoint.pt", self.out / ".checkpoint.pt.tmp"
        parts = {"model": model, "ema": ema, "optimizer": optimizer}
        states = {name: part.state_dict() for name, part in parts.items()}
        try:
            torch.save({"config": config, "step": step, **states}, temporary)
        except RuntimeError as error:  # torch's message is a line of C++ if the disk is full
            temporary.unlink(missing_ok=True)
            sys.exit(f"{path} can't be written and stays as it was; is the disk full? ({error})")
        os.replace(temporary, path)
        self.saved = time.monotonic()

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
            x0 = diffusion.sample(
                partial(ema, y=y), (36, *shape), min(20, diffusion.T), "dpm",
                generator=noise, device=args.device,
            )  # fmt: skip
        image = grid(to_pixels(x0.cpu().numpy()), rows=rows, names=args.classes)
        save_image(self.out / f"preview-{step:07d}.png", image)
        table = np.loadtxt(self.out / "log.csv", delimiter=",", skiprows=1, ndmin=2)[:, :2]
        length = -(-len(table) // 200)
        parts = [table[k : k + length].mean(0) for k in range(0, len(table) - length + 1, length)]
        save_plot(self.out / "loss.png", *np.transpose(parts), "step", "loss", log=True)
        self.previewed = time.monotonic()
        self.preview_seconds = self.previewed - began


def open_checkpoint(path):
    """Return the dict of a checkpoint. Exits if the file is not one. No code in it is executed."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises many kinds
        state = None
    if not isinstance(state, dict) or not {"config", "step", "ema"} <= state.keys():
        sys.exit(f"{path.as_posix()} is damaged, or not a checkpoint of train.py")
    return state


def find_run(out):
    """Return the checkpoint in the folder of a run, or None if there is none yet.

    Exits if the folder holds files of other programs instead.
    """
    if (out / "checkpoint.pt").is_file():
        return open_checkpoint(out / "checkpoint.pt")
    if any(path.is_file() for path in (out, *out.parents)):
        sys.exit(f"--out {out} must be a folder")
    for path in out.glob("*"):  # of a run that ended before its first checkpoint
        ours = re.fullmatch(r"\..*|images-[0-9a-f]{16}\..*", path.name)
        if path.name == "log.csv":
            ours = HEADER.startswith(path.read_text(errors="replace")[: len(HEADER)])
        if not ours:
            sys.exit(f"--out {out} is not the folder of a run; use a new or empty folder")
    return None


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

    @property
    def shape(self):
        """(C, H, W) of an image."""
        size = self.settings["image_size"]
        return self.settings["in_channels"], size, size


def load(path):
    """Return the Trained of a checkpoint, of the folder of a run, or of published weights.

    The weights of a checkpoint are the averaged ones. Exits if `path` is none of these.
    """
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
        diffusion, classes = Diffusion(**config["diffusion"]), config["train"].get("classes", [])
        return Trained(model, diffusion, config["model"], state["step"], source, classes)
    if path.is_dir() and not [*path.glob("*config.json"), *path.glob("*/*config.json")]:
        sys.exit(f"{path} has neither a checkpoint.pt nor weights in diffusers' format")
    if path.is_dir() or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(?<!\.pt)", path.as_posix()):
        from pretrained import from_diffusers

        model, settings, diffusion = from_diffusers(path.as_posix())
        return Trained(model, diffusion, settings, 0, f"diffusers, {path.name}")
    sys.exit(f"{path.as_posix()} does not exist; python train.py writes a checkpoint")
