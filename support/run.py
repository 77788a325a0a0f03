"""The run folder of train.py: its settings, checkpoint, log and previews.

run/checkpoint.pt holds

    {"config": {"model": the network's arguments, "diffusion": those of Diffusion, "train": the
                rest},
     "step": the number of training steps,
     "model": ..., "ema": ..., "optimizer": ...}

Samples use "ema", the averaged weights. torch.load(path, weights_only=True) opens the file.
"""

import contextlib
import inspect
import os
import re
import sys
from collections import deque
from dataclasses import fields
from functools import partial
from pathlib import Path

import filelock
import numpy as np
import torch

from beyond import as_eps, sample
from ddpm import Diffusion
from images import TEMPORARY, check_output, grid, replacing, save_image, to_pixels
from support.data import digest
from support.plot import save_plot
from support.ranks import RANK
from support.trained import Network, open_checkpoint

HEADER = "step,loss,grad_norm,lr\n"
ROW = re.compile(r"\d{1,15}(,-?\d+(\.\d+)?(e[-+]\d+)?){3}\n")  # of log.csv

# ------------------------------------------------------------------------------------ the settings


def config_of(args):
    """Return the "config" of a checkpoint: each of the Settings in the part that keeps it.

    The number of channels may be None until the images are decoded, and their fingerprint is.
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
    if changed.pop("folder", None) and images[1]:
        old, new = (c["train"]["data"] for c in (state["config"], config))
        changed["data"] = old, f"another folder, {new}, with other images"
    if "betas" in changed:
        changed["betas"] = "one schedule", "another"
    what = [f"{name} was {before}, now {now}" for name, (before, now) in changed.items()]
    if what:  # --init decides the network and what it predicts
        fixed = ({*config["model"], "predicts", "betas"} - {"dropout"}) & changed.keys()
        hint = "" if fixed else f" (--init {out} starts from its weights)"
        sys.exit(f"{out} holds a run with other settings. Use another --out{hint}, or rename the "
                 f"folder. What differs: {'; '.join(what)}")  # fmt: skip
    if step > steps:
        sys.exit(f"{out} is at step {step:,} already, so --steps must be larger")
    if config["train"]["images"] and step < steps and RANK == 0:
        for name, new in (("the images have", images[1]), ("the code of the method has", code)):
            if new:
                print(f"{name} changed since step {step:,}; training continues with the change")


def refuse_other_ranks(configs):
    """Exit unless all processes have the same settings and images. configs: one per process."""
    for rank, config in enumerate(configs):
        if names := differences(configs[0], config).keys() - {"data", "folder", "init"}:
            sys.exit(f"rank {rank} differs from rank 0 in {' and '.join(sorted(names))}")


# --------------------------------------------------------------------------------------- the folder


def find_run(out):
    """Return the checkpoint in a run folder, or None.

    Exits if the folder holds files of other programs instead, or can't be written.
    """
    path = out / "checkpoint.pt"
    check_output(path)
    if path.is_file():
        return open_checkpoint(path)
    log = out / "log.csv"  # of a run that ended before its first checkpoint
    begun = log.is_file() and HEADER.startswith(log.read_text(errors="replace")[: len(HEADER)])
    for path in out.glob("*"):
        ours = re.fullmatch(r"\..*|images-[0-9a-f]{16}\..*", path.name)
        if not ours and not (begun and (path == log or path.is_dir())):
            sys.exit(f"--out {out} holds {path.name}, but no checkpoint.pt, so it is not the "
                     "folder of a run; use a new or empty folder")  # fmt: skip
    return None


@contextlib.contextmanager
def locked(out):
    """Hold the lock of a run folder during the block. Exits if another process holds it.

    The lock of a process that is killed is gone with it. What it left half written is removed, and
    so is a new folder that stays empty.
    """
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        sys.exit(f"another process trains in {out}; wait for it, or use another --out")
    for path in out.glob(".*.tmp"):
        if TEMPORARY.fullmatch(path.name):
            path.unlink()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows keeps a file that is open
            (out / ".lock").unlink()
        lock.release()
        with contextlib.suppress(OSError):
            if is_new:
                out.rmdir()


def save(path, config, step, model, ema, optimizer):
    """Replace a checkpoint."""
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    states = {name: part.state_dict() for name, part in parts.items()}
    with replacing(path) as file:
        try:
            torch.save({"config": config, "step": step, **states}, file)
        except RuntimeError as error:  # torch's own error hides that of a full disk
            raise error.__context__ or error from None


def preview(path, shape, ema, diffusion, args):
    """Save 36 images of this shape (C, H, W) that the averaged network draws, classes in rows.

    args: the Settings of train.py. The noise is the same for each preview.
    """
    noise, rows = torch.Generator(args.device).manual_seed(args.seed), len(args.classes)
    y = torch.arange(36, device=args.device) % rows if rows else None
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
        eps = partial(as_eps(ema, diffusion, args.predicts), y=y)
        x0 = sample(diffusion, eps, (36, *shape), min(20, diffusion.T), "sa-solver",
                    generator=noise, device=args.device)  # fmt: skip
    save_image(path, grid(to_pixels(x0.cpu().numpy()), rows=rows, names=args.classes))


class Log:
    """log.csv, a row per step, and the curve of its losses.

    path: of log.csv, which is cut back to the first `step` steps. lr_at(k): the learning rate of
    step k, counted from 0.
    """

    def __init__(self, path, step, lr_at):
        self.path, self.lr_at, self.rows = path, lr_at, ""
        self.recent = deque(maxlen=100)  # losses
        if path.exists():
            rows = self.read(step)
            with replacing(path) as file:
                file.write((HEADER + "".join(rows)).encode())
            self.recent.extend(float(row.split(",")[1]) for row in rows[-100:])

    def read(self, last):
        """Return the rows up to the step `last`, as text.

        It leaves out lines from a spreadsheet, say, and one that a killed run did not finish. If a
        step was logged twice, the second row counts.
        """
        lines = self.path.read_text(errors="replace").splitlines(keepends=True)
        rows = {int(line.split(",")[0]): line for line in lines if ROW.fullmatch(line)}
        return [rows[step] for step in sorted(rows) if step <= last]

    def add(self, step, losses):
        """Append the steps up to `step`, and return the mean of the last 100 losses.

        losses: [(loss, norm of the gradient)].
        """
        for k, (loss, norm) in enumerate(losses, step - len(losses)):
            self.rows += f"{k + 1},{loss:.6g},{norm:.6g},{self.lr_at(k):.6g}\n"
            self.recent.append(loss)
        try:
            with open(self.path, "a") as file:
                file.write(self.rows if file.tell() else HEADER + self.rows)
            self.rows = ""
        except PermissionError:  # on Windows, a spreadsheet that shows the file locks it
            pass  # the rows are written later
        except OSError as error:
            sys.exit(f"{self.path} can't be written, so training ends: {error.strerror}")
        return np.mean(self.recent)

    def plot(self, path, step):
        """Save the losses up to a step as an image, averaged over up to 200 equal intervals."""
        table = np.loadtxt(self.read(step), delimiter=",", ndmin=2)[:, :2]
        length = -(-len(table) // 200)
        parts = [table[k : k + length].mean(0) for k in range(0, len(table) - length + 1, length)]
        save_plot(path, *np.transpose(parts), "step", "loss", log=True)
