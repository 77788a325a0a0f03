"""What a run is: its settings, network, checkpoint and device, in this order.

    settings = Settings(base_channels=64)         # the other fields have the paper's values
    network, diffusion = build(settings, (3, 32, 32))
    network, diffusion, state = load("run")       # a run folder, or its checkpoint.pt

train.py trains a run; export.py and extras/ open one with `load`.
"""

import argparse
import math
import os
import sys
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import torch

from ddpm import Diffusion, UNet, linear_betas
from program import replacing
from sample import grid, last_x0, reverse, to_pixels

# ---------------------------------------------------------------------------------------- settings


def in_range(kind, low, high=math.inf):
    """Return an argparse type for an int or a float that is at least `low` and below `high`."""

    def number(text):
        value = kind(text)
        if not low <= value < high:
            raise argparse.ArgumentTypeError(f"{text} is out of range")
        return value

    return number


positive, whole = in_range(int, 1), in_range(int, 0, 2**63)
amount, share = in_range(float, 0), in_range(float, 0, 1)
switch = argparse.BooleanOptionalAction
PARTS = "v", "weights", "muon"  # what quick.py can put in place of the paper's


def flag(default, meaning, **options):
    """Return a field of Settings that has a flag. options: passed to argparse's add_argument."""
    if "[" not in meaning and not isinstance(default, bool):
        values = default if isinstance(default, tuple) else (default,)
        meaning += f" [{' '.join(map(str, values))}]"
    return field(default=default, metadata={"help": meaning, **options})


@dataclass
class Settings:
    """The settings of a run, as in its checkpoint. The defaults are the paper's CIFAR-10 run."""

    # The network. Only published weights set norm_groups
    image_size: int = flag(32, "pixels; images are cropped to a square", type=positive)
    in_channels: int = flag(None, "1 is grey, 3 is colour [detected]", type=int, choices=(1, 3))
    base_channels: int = flag(128, "width of the first level", type=positive)
    channel_mults: tuple = flag((1, 2, 2, 2), "relative widths of levels", type=positive, nargs="+")
    num_res_blocks: int = flag(2, "residual blocks per level", type=positive)
    attention_resolutions: tuple = flag((16,), "level sizes with attention", type=int, nargs="*")
    patch_size: int = flag(1, "width of a patch that the network sees as one pixel", type=positive)
    norm_groups: int = None
    # The method. Only published weights set betas
    data: str = flag(None, "folder of images [the built-in demo]")
    classes: bool = flag(False, "the sub-folders of --data are classes", action=switch)
    betas: tuple = tuple(linear_betas().tolist())
    variance: str = flag("large", "sigma_t^2 of the reverse process", choices=("large", "small"))
    parts: tuple = flag((), "parts of quick.py to use [none]", choices=PARTS, nargs="*")
    batch: int = flag(128, "images per step, over all GPUs", type=positive)
    lr: float = flag(2e-4, "learning rate", type=amount)
    warmup: int = flag(None, "steps to reach the learning rate [min(5000, steps / 20)]", type=whole)
    cooldown: float = flag(0.0, "final share of steps, in which --lr falls to 0", type=share)
    ema: float = flag(0.9999, "decay of the averaged weights", type=share)
    flip: bool = flag(True, "flip images left to right at random", action=switch)
    seed: int = flag(0, "seed of all random numbers", type=whole)
    # What may change when a run is resumed
    steps: int = flag(800_000, "number of training steps", type=positive)
    dropout: float = flag(0.1, "share of the activations to drop", type=share)
    accumulate: int = flag(1, "parts to split each batch into, to save memory", type=positive)
    amp: bool = flag(None, "bfloat16 [where it is fast]", action=switch)
    preview_every: int = flag(None, "steps between previews [they take at most 4%% of the time]",
                              type=positive)  # fmt: skip
    save_minutes: float = flag(5.0, "minutes between saves", type=amount)

    def __post_init__(self):
        self.data = self.data and os.path.abspath(self.data)


NAMES = [entry.name for entry in fields(Settings)]
NETWORK = (  # these stay for good
    "image_size", "in_channels", "base_channels", "channel_mults", "num_res_blocks",
    "attention_resolutions", "patch_size", "norm_groups",
)  # fmt: skip
FREE = "steps", "dropout", "accumulate", "amp", "preview_every", "save_minutes"  # these may change

# --quick: a run of minutes on a CPU, for small images. benchmarks/ladder.md has measurements.
QUICK = dict(
    base_channels=48, channel_mults=(1, 1, 1), num_res_blocks=1, attention_resolutions=(),
    patch_size=2, dropout=0.0, parts=PARTS, batch=64, lr=6e-3, cooldown=0.25, steps=2570,
)  # fmt: skip

# The demo: a small network that learns the 216 images on two CPU cores in under four minutes.
DEMO = dict(
    image_size=8, base_channels=32, channel_mults=(1, 2), num_res_blocks=1,
    attention_resolutions=(), dropout=0.0, batch=64, lr=3e-3, steps=2400,
)  # fmt: skip


# -------------------------------------------------------------------------------------- the network


def build(settings, shape, names=()):
    """Return (network, diffusion): eps_theta(x_t, t, y=None), with new weights, and its Diffusion.

    shape: (C, H, W) of an image. names: the class names. To train another network, return it here.
    Raises ValueError for settings that do not fit.
    """
    options = {name: getattr(settings, name) for name in (*NETWORK, "dropout")}
    options |= {"in_channels": shape[0], "image_size": shape[-1], "num_classes": len(names)}
    diffusion = Diffusion(settings.betas, settings.variance)
    if not settings.parts and settings.patch_size == 1:  # the paper's
        del options["patch_size"]
        return UNet(**options), diffusion
    from quick import PatchUNet, VUNet, WeightedDiffusion

    if "weights" in settings.parts:
        diffusion = WeightedDiffusion(settings.betas, settings.variance)
    network = VUNet(diffusion, **options) if "v" in settings.parts else PatchUNet(**options)
    return network, diffusion


def make_optimizer(network, settings):
    """Return Adam, or what --parts puts in its place."""
    if "muon" in settings.parts:
        from quick import Muon

        return Muon(network, settings.lr)
    return torch.optim.Adam(network.parameters(), settings.lr, fused=True)


def preview(network, shape, names, settings):
    """Return a grid of 36 images of this shape (C, H, W), always from the same noise.

    With up to 32 classes, each row shows one of them. The sampler is Algorithm 2 in 20 steps with
    the small variance, which is better than DPM-Solver++ after a short run of the paper's recipe
    (benchmarks/ladder.md).
    """
    device = next(network.parameters()).device
    random = torch.Generator(device).manual_seed(settings.seed)
    y = torch.arange(36, device=device) % len(names) if names else None

    def eps(x_t, t):
        return network(x_t, torch.full((36,), t, device=device), y)

    draw_noise = partial(torch.randn, 36, *shape, generator=random, device=device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=settings.amp):
        how = {"variance": "small", "steps": min(20, len(settings.betas)), "sampler": "ddpm"}
        x0 = last_x0(reverse(eps, draw_noise, settings.betas, **how))
    return grid(to_pixels(x0.cpu().numpy()), len(names))


# ---------------------------------------------------------------------------------- the checkpoint


def default_run():
    """Return the folder that a program opens without a path: run if it is there, or demo."""
    return "run" if os.path.exists("run/checkpoint.pt") else "demo"


def read_checkpoint(path):
    """Return the checkpoint of a run folder, or the file checkpoint.pt, as a dict.

    It has "settings", a dict for Settings, "shape", (C, H, W), "names" of the classes, "images", a
    digest, "step", "model", "ema" and "optimizer"; and "source", the given path, for messages. No
    code in the file is executed. Exits with one line if it can't be read.
    """
    source, path = path, Path(path, "checkpoint.pt") if os.path.isdir(path) else Path(path)
    if not path.exists():
        sys.exit(f"{path} is not there; run train.py first")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if {entry.name for entry in fields(Run)} <= {*state} and {*state["settings"]} == {*NAMES}:
            return state | {"source": source}
    except OSError as error:
        sys.exit(f"{path} can't be read: {error.strerror}")
    except Exception:  # torch raises many kinds of errors
        pass
    sys.exit(f"{path} is damaged, or is not a checkpoint of this version of train.py")


def write_checkpoint(state, path):
    """Replace the file `path` with a checkpoint. Exits if the disk is full."""
    with replacing(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch raises it after the OSError of a full disk
            raise error.__context__ or error from None


def load(path, build=build):
    """Return (network, diffusion, state) of a run folder, or of its checkpoint.pt.

    The network has the averaged weights, is in eval mode, and returns eps. state: as from
    read_checkpoint. build: what made the network. Exits with one line if it can't be read.
    """
    state = read_checkpoint(path)
    network, diffusion = build(Settings(**state["settings"]), state["shape"], state["names"])
    network.load_state_dict(state["ema"])
    return network.eval(), diffusion, state


def begin_anew(state):
    """Return a checkpoint at step 0 with the averaged weights of the checkpoint `state`.

    Its settings are the defaults of the new run. All but the network's, classes and parts may
    change.
    """
    settings = state["settings"] | dict.fromkeys(["data", "warmup", "amp", "preview_every"])
    new = {"settings": settings, "images": None, "step": 0, "model": state["ema"]}
    return state | new | {"optimizer": None}


@dataclass
class Run:
    """A run in training. The fields have the names, and the meaning, that a checkpoint has."""

    settings: Settings
    shape: tuple
    names: tuple
    images: str
    step: int
    model: torch.nn.Module
    ema: torch.nn.Module
    optimizer: torch.optim.Optimizer

    def load(self, state):
        """Restore the states of a checkpoint, and free each of them in `state`."""
        self.step = state["step"]
        for name in "model", "ema", "optimizer":
            if saved := state.pop(name):  # a run that begins anew has no optimizer state
                getattr(self, name).load_state_dict(saved)

    def state(self):
        """Return the checkpoint of this step."""
        state = vars(self) | {"settings": vars(self.settings)}
        return state | {n: state[n].state_dict() for n in ("model", "ema", "optimizer")}


# --------------------------------------------------------------------------------------- the device


def choose_device(name="auto", index=None):
    """Return the torch.device that --device names; "auto" is the accelerator, if there is one.

    index: the accelerator of this process, if there are several processes. Exits with what torch
    says if the device is not there.
    """
    auto = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        device = torch.device(auto if name == "auto" else name)
        if device.type != "cpu":
            device = torch.device(device.type, (device.index or 0) if index is None else index)
            torch.accelerator.set_device_index(device.index)
        torch.ones(1, device=device)  # runs a kernel, which the build may lack for an old card
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"--device {name}: {str(error).splitlines()[0]}")
    return device


def has_bfloat16(device):
    """Return whether the device computes in bfloat16; emulating it would only cost time."""
    if device.type == "cpu":
        return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
    if device.type == "mps":  # nobody has measured it
        return False
    return torch.get_device_module(device).is_bf16_supported(including_emulation=False)


def compiled(network):
    """Return the network, compiled for batches of one size."""
    options = {"force_layout_optimization": True}  # channels_last, which suits tensor cores
    return torch.compile(network, dynamic=False, options=options)


def to_device(x, device):
    """Return a tensor on the device. From pinned memory, the copy to CUDA is asynchronous."""
    x = x.pin_memory() if device.type == "cuda" and not x.is_cuda else x
    return x.to(device, non_blocking=device.type == "cuda")
