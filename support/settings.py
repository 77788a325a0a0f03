"""The settings of train.py: flags that say where they are kept, and comparisons of two runs.

A dataclass declares them with `flag`. The "config" of a checkpoint has three parts: "model" has the
arguments of the network, "diffusion" those of Diffusion, and "train" the rest.
"""

import inspect
import os
import sys
from dataclasses import field, fields
from pathlib import Path

from beyond import as_eps
from ddpm import Diffusion
from support.data import digest
from support.trained import Network


def flag(default, kept, meaning=None, **options):
    """Declare a setting, which is a flag if it has a meaning.

    kept: the part of the checkpoint's config that has it, so that another value is refused:
    "model" for an argument of the network, "diffusion" for one of Diffusion, "train", or None.
    options: those of argparse.
    """
    options |= {"help": meaning} if meaning else {}
    return field(default=default, metadata={"kept": kept, "options": options})


def given_flags(parser, settings):
    """Return the flags that the command line has, {name: value}, from the fields of a dataclass.

    parser: an argparse.ArgumentParser, which may have other flags. settings: the dataclass.
    """
    for f in (f for f in fields(settings) if "help" in f.metadata["options"]):
        options = dict(f.metadata["options"])
        shown = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        if "[" not in options["help"] and shown not in ("", None) and "action" not in options:
            options["help"] += f" [{shown}]"
        parser.add_argument(f"--{f.name.replace('_', '-')}", **options)
    given = vars(parser.parse_args()).items()
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given}


def as_flag(name, value):
    """Return a setting as the flag of the command line that gives it."""
    values = value if isinstance(value, tuple) else () if isinstance(value, bool) else (value,)
    return " ".join([f"--{'no-' * (value is False)}{name.replace('_', '-')}", *map(str, values)])


def config_of(args):
    """Return the "config" of a checkpoint: each of the Settings in the part that keeps it.

    Until the images are decoded, their fingerprint is None, and their number of channels may be.
    """
    config = {"model": {}, "diffusion": {}, "train": {}}
    for f in (f for f in fields(args) if f.metadata["kept"]):
        value = getattr(args, f.name)
        config[f.metadata["kept"]][f.name] = [*value] if isinstance(value, tuple) else value
    del config["diffusion"]["schedule"]  # which is kept as its betas
    if args.classes:
        config["model"]["num_classes"] = len(args.classes)
    folder = None if args.data is None else Path(args.data).resolve()
    method = type(args), Network, Diffusion, as_eps  # train.py, the network's file, ...
    config["train"] |= {
        "steps": args.steps if args.lr_decay else None,  # else the run can be made longer
        "data": folder and folder.name,
        "folder": folder and digest(os.fsencode(folder)),
        "images": None,
        "code": digest(*(Path(inspect.getfile(part)).read_bytes() for part in method)),
    }
    return config


def differences(old, new):
    """Return {name: (old value, new value)} of the settings in which two configs differ."""
    was, now = (config["model"] | config["diffusion"] | config["train"] for config in (old, new))
    names = sorted((was | now).keys() - {"num_classes"})  # "classes" lists their names
    return {n: (was.get(n), now.get(n)) for n in names if was.get(n) != now.get(n)}


def refuse_other_run(out, state, config, steps):
    """Exit unless the checkpoint in the folder `out` belongs to a run with this config.

    It is called before the images are decoded, when the config has no fingerprint, and again after.
    Changed images in the same folder are accepted, and so are the same images in another folder.
    """
    if state is None:
        return
    step, changed = state["step"], differences(state["config"], config)
    code, images = changed.pop("code", None), changed.pop("images", (None, None))
    changed.pop("data", None)
    folders = changed.pop("folder", ())
    old, new = (c["train"]["data"] for c in (state["config"], config))
    if None in folders:  # the demo has other settings, too
        changed = {"data": (old or "the built-in demo", new or "the built-in demo")}
    elif folders and images[1]:
        changed["data"] = old, f"another folder, {new}, with other images"
    if "betas" in changed:
        changed["betas"] = "one schedule", "another"
    if "lr_decay" in changed:
        changed.pop("steps", None)
    elif "steps" in changed:
        why = "the learning rate falls to 0 at the last step"
        changed["steps"] = changed["steps"][0], f"{steps}; {why}"
    what = [f"{name} was {before}, now {now}" for name, (before, now) in changed.items()]
    if what:  # --init decides the network and what it predicts
        fixed = ({*config["model"], "predicts", "betas"} - {"dropout"}) & changed.keys()
        hint = "" if fixed else f" (--init {out} starts from its weights)"
        sys.exit(f"{out} holds a run with other settings. Use another --out{hint}, or rename "
                 f"{out}. What differs: {'; '.join(what)}")  # fmt: skip
    if step > steps:
        sys.exit(f"{out} is at step {step:,} already, so --steps must be larger")
    if config["train"]["images"] and step < steps:
        for name, new in (("the images have", images[1]), ("the code of the method has", code)):
            if new:
                print(f"{name} changed since step {step:,}; training continues with the change")


def refuse_other_ranks(configs):
    """Exit unless all processes have the same settings and images. configs: one per process."""
    for rank, config in enumerate(configs):
        if names := differences(configs[0], config).keys() - {"data", "folder", "init"}:
            sys.exit(f"rank {rank} differs from rank 0 in {' and '.join(sorted(names))}")
