"""A trained network and what is known about it: from a checkpoint, a run, or published weights."""

import os
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

import ddpm_numpy
from beyond import as_eps
from ddpm import Diffusion
from ddpm import UNet as Network  # the network of the programs; replace it here

DEMO = "train.py, the demo"  # the source of its weights
HUB = "hf:"  # before the name of published weights on the Hugging Face Hub


@dataclass
class Trained:
    """A trained network in eval mode, and what is known about it."""

    model: torch.nn.Module
    diffusion: Diffusion
    settings: dict  # the arguments of the network
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


def name_of(path):
    """Return the name of a run, of its checkpoint, or of published weights."""
    path = Path(os.path.abspath(str(path).removeprefix(HUB)))
    return path.parent.name if path.name == "checkpoint.pt" else path.name


def open_checkpoint(path):
    """Return the dict of a checkpoint. Exits if the file is not one. No code in it is executed."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises many kinds
        state = None
    if not isinstance(state, dict) or not {"config", "step", "ema"} <= state.keys():
        sys.exit(f"{path.as_posix()} is damaged, or not a checkpoint of train.py")
    return state


def from_checkpoint(state):
    """Return the Trained of the averaged weights in the dict of a checkpoint."""
    config, training = state["config"], state["config"]["train"]
    model, data = Network(**config["model"]).eval(), training["data"]
    model.load_state_dict(state["ema"])
    source = DEMO if data is None else f"train.py, {data}"
    return Trained(
        model, Diffusion(**config["diffusion"]), config["model"], state["step"], source,
        training.get("classes", []), training["predicts"],
    )  # fmt: skip


def load(path):
    """Return the Trained of a checkpoint, of a run folder, or of published weights.

    Published weights are a folder or, as in "hf:google/ddpm-cifar10-32", a name on the hub. The
    weights of a checkpoint are the averaged ones. Exits if `path` is none of these.
    """
    source, path = str(path), Path(path)
    if not source.startswith(HUB):
        if (path / "checkpoint.pt").is_file():
            path /= "checkpoint.pt"
        if path.suffix == ".onnx":
            sys.exit(f"{path.as_posix()} is not a checkpoint; sample.py draws from it with --onnx")
        if path.is_file():
            return from_checkpoint(open_checkpoint(path))
        if not path.is_dir():
            is_name = len(path.parts) == 2 and path.suffix != ".pt"
            hub = f" ({HUB}{path.as_posix()} is a name on the hub)" * is_name
            sys.exit(f"{path.as_posix()} does not exist; python train.py writes checkpoint.pt into "
                     f"the folder of its --out{hub}")  # fmt: skip
        if (path / "log.csv").is_file():
            sys.exit(f"{path} has no checkpoint yet; train.py saves one before its first preview")
        if not [*path.glob("*config.json"), *path.glob("*/*config.json")]:
            sys.exit(f"{path} has neither a checkpoint.pt nor weights in diffusers' format")
        source = path.as_posix()
    from support.pretrained import from_diffusers

    return from_diffusers(source.removeprefix(HUB))


def start_from(weights, model, classes):
    """Load the weights of --init. If the class names differ, the classes start without effect."""
    state = weights.model.state_dict()
    if weights.classes and weights.classes != classes:  # the bias takes over "no class"
        no_class = state.pop("class_embedding.weight")[-1]
        state["time_mlp.2.bias"] = state["time_mlp.2.bias"] + no_class
    own = model.state_dict().items()
    new = {name: w for name, w in own if name.startswith("class_embedding.")}
    model.load_state_dict(new | state)


# ------------------------------------------------------------- the same network in another format


def example_labels(trained, batch):
    """Return (y,), the classes in turn with "no class" among them, or () without classes."""
    return (torch.arange(batch) % (len(trained.classes) + 1),) if trained.classes else ()


@torch.no_grad()
def largest_difference(model, eps, shape, T, num_classes=0):
    """Return max |model(x_t, t) - eps(x_t, t)| over batches of 1, 2 and 3, scales of x_t, and t.

    shape: (C, H, W) of an image. num_classes: with classes, both functions take (x_t, t, y). The
    result is NaN if any eps is.
    """
    random, differences = torch.Generator().manual_seed(0), []
    for batch, scale in ((1, 1.0), (2, 0.01), (3, 2.0)):
        x_t = scale * torch.randn(batch, *shape, generator=random)
        for times in ((0, 1, 2), (T - 1, T // 2, T // 4)):
            t = torch.tensor(times[:batch]).clamp(0, T - 1)
            inputs = (x_t, t, num_classes - torch.arange(batch))[: 3 if num_classes else 2]
            differences.append((model(*inputs) - eps(*inputs)).abs().max())
    return torch.stack(differences).max().item()


def eps_of(path):
    """Return eps(x_t, t) or eps(x_t, t, y), on torch tensors, of an ONNX file on the CPU."""
    network = ddpm_numpy.Network(path, "cpu")
    return lambda *inputs: torch.from_numpy(network(*(tensor.numpy() for tensor in inputs)))
