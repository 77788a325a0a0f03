"""The command line of train.py: from flags, and what is saved, to the Settings of a run."""

import argparse
import math
import sys
from dataclasses import fields
from itertools import chain
from pathlib import Path

import torch

from run import DEMO, FREE, NAMES, NETWORK, QUICK, Settings, build, has_bfloat16, switch


def as_flag(name, value=True):
    """Return the words of the command line that give a setting this value."""
    values = () if isinstance(value, bool) else value
    values = values if isinstance(values, tuple | list) else [values]
    return [f"--{'no-' if value is False else ''}{name.replace('_', '-')}", *map(str, values)]


def command_line(doc, given=None):
    """Return the flags of train.py that are given, {name: value}. doc: its documentation.

    given: flags from Python, to check like typed ones; None reads the command line.
    """
    parser = argparse.ArgumentParser(
        prog="train.py", usage="python train.py --data ./images [options]", description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    add = parser.add_argument
    add("--out", type=Path, help="folder of the run [run, or demo without --data]")
    add("--init", help="a run whose averaged weights a new run begins with")
    add("--device", help="auto, cpu, cuda, cuda:1, mps or xpu [auto]")
    add("--compile", action=switch, help="torch.compile, for long runs on a GPU [no]")
    add("--quick", action=switch, help="a small network and a short run; see the manual [no]")
    for setting in fields(Settings):
        if setting.metadata:
            add(*as_flag(setting.name), **setting.metadata)
    words = None
    if given is not None:
        words = [*chain(*(as_flag(*item) for item in given.items() if item[1] is not None))]
    flags = vars(parser.parse_args(words))
    return {name: tuple(v) if isinstance(v, list) else v for name, v in flags.items()}


def check_data(given, state):
    """Exit if --data is missing. state: as for choose_settings."""
    if given.get("data", state and state["settings"]["data"]):
        return
    for name in "init", "quick", "classes", "image_size", "in_channels":
        if given.get(name):
            sys.exit(f"train.py: {as_flag(name)[0]} needs --data")
    if state and state["images"] is None:  # published weights
        sys.exit(f"train.py: {state['source']} has been trained on no images yet; give --data")
    if state is None and "out" in given:
        sys.exit(f"train.py: {given['out']} has no checkpoint; give --data, or for the demo "
                 "no --out")  # fmt: skip


def check_saved(given, state):
    """Exit if the given flags contradict the checkpoint."""
    saved, source, has_begun = state["settings"], state["source"], state["images"] is not None
    fixed = {*NAMES} - {*FREE, "data"} if has_begun else {*NETWORK, "classes", "parts"}
    if given.get("quick"):
        given = {"parts": QUICK["parts"]} | given
    for name in given.keys() & fixed:
        if given[name] != saved[name]:
            sys.exit(f"train.py: {source} has {name} = {saved[name]}, not {given[name]}; "
                     "omit the flag that sets it, or begin another run")  # fmt: skip
    if given.get("steps", math.inf) < state["step"]:
        sys.exit(f"train.py: {source} is at step {state['step']:,}; --steps can't be smaller")


def choose_settings(given, state, device, world=1, build=build):
    """Return the Settings of a run: the defaults, then what is saved, then the given flags.

    given: {name: value} of the flags. state: the checkpoint that the run begins with, or None.
    world: the number of processes. build: makes the network. Exits if the flags do not fit
    together, or contradict what is saved.
    """
    check_data(given, state)
    if state:
        check_saved(given, state)
        defaults = state["settings"]
    elif given.get("quick"):
        defaults = QUICK
    else:
        defaults = {} if "data" in given else DEMO
    s = Settings(**defaults | {name: given[name] for name in NAMES if name in given})
    if s.batch % (world * s.accumulate):
        sys.exit("train.py: --batch must be a multiple of the number of GPUs times --accumulate")
    try:
        with torch.device("meta"):  # before the images are decoded
            build(s, (s.in_channels or 3, s.image_size, s.image_size))
    except ValueError as error:
        sys.exit(f"train.py: {error}")
    if s.warmup is None:
        s.warmup = min(5000, s.steps // 20)
    if s.amp is None:
        s.amp = has_bfloat16(device)
    if s.preview_every is None:  # one takes as long as training on 240 images, so at most 4%
        s.preview_every = max(25 * 240 // s.batch, s.steps // 100, 1)
    return s
