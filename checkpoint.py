"""A checkpoint of train.py: save it, read it, compare it, and load the trained network.

run/checkpoint.pt holds

    {"config": {"model": the arguments of UNet, "diffusion": those of Diffusion, "train": the rest},
     "step": the number of training steps,
     "model": ..., "ema": ..., "optimizer": ...}

Samples use "ema", the averaged weights. torch.load(path, weights_only=True) opens the file.
"""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from ddpm import Diffusion, UNet


@dataclass
class Trained:
    """A trained network in eval mode, and what is known about it."""

    model: UNet
    diffusion: Diffusion
    settings: dict  # the arguments of UNet
    step: int  # the length of the training, 0 if unknown
    source: str  # where the weights come from
    classes: list | tuple = ()  # the names of the classes, if the network has some

    @property
    def shape(self):
        """(C, H, W) of an image."""
        size = self.settings["image_size"]
        return self.settings["in_channels"], size, size


def save(path, config, step, model, ema, optimizer):
    """Write a checkpoint to a temporary file beside `path`, then put it in place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    states = {name: part.state_dict() for name, part in parts.items()}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        torch.save({"config": config, "step": step, **states}, temporary)
    except RuntimeError as error:  # torch names a line of C++ if the disk is full
        temporary.unlink(missing_ok=True)
        sys.exit(f"{path} can't be written and stays as it was; is the disk full? ({error})")
    os.replace(temporary, path)


def read(path):
    """Return the dict of a checkpoint. Exits if the file is not one. No code in it is executed."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises many kinds
        state = None
    if not isinstance(state, dict) or not {"config", "step", "ema"} <= state.keys():
        sys.exit(f"{path} is damaged, or not a checkpoint of train.py")
    return state


def restore(state, model, ema, optimizer):
    """Load the three parts of a checkpoint."""
    model.load_state_dict(state["model"])
    ema.load_state_dict(state["ema"])
    optimizer.load_state_dict(state["optimizer"])


def read_run(out):
    """Return the checkpoint in the folder of a run, or None if the folder is new or empty.

    Exits if it holds anything but decoded images.
    """
    if (out / "checkpoint.pt").is_file():
        return read(out / "checkpoint.pt")
    if out.is_dir() and any(not path.name.startswith((".", "images-")) for path in out.iterdir()):
        sys.exit(f"--out {out} holds files but no checkpoint.pt; use a new or empty folder")
    return None


def differences(old, new, besides):
    """Return [(name, old value, new value)] of the settings in which two configs differ.

    besides: names of settings that may differ.
    """
    was, now = (config["model"] | config["diffusion"] | config["train"] for config in (old, new))
    names = (was | now).keys() - {"num_classes", *besides}  # "classes", their names, say more
    different = [(name, was.get(name), now.get(name)) for name in sorted(names)]
    return [
        (name, "one schedule", "another") if name == "betas" else (name, before, after)
        for name, before, after in different
        if before != after
    ]


def load(path):
    """Return the Trained of a checkpoint, of the folder of a run, or of published weights.

    A checkpoint gives its averaged weights. Exits if there is nothing of the kind at `path`.
    """
    path = Path(path)
    if (path / "checkpoint.pt").is_file():
        path /= "checkpoint.pt"
    if path.is_file():
        state = read(path)
        config = state["config"]
        model = UNet(**config["model"]).eval()
        model.load_state_dict(state["ema"])
        source = f"train.py, {config['train']['data'] or 'the demo'}"
        diffusion, classes = Diffusion(**config["diffusion"]), config["train"].get("classes", [])
        return Trained(model, diffusion, config["model"], state["step"], source, classes)
    if path.is_dir() or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(?<!\.pt)", str(path)):
        from pretrained import from_diffusers

        model, settings, diffusion = from_diffusers(path.as_posix())
        return Trained(model, diffusion, settings, 0, f"diffusers, {path.name}")
    sys.exit(f"{path} does not exist; python train.py writes a checkpoint")
