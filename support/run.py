"""The run folder of train.py: its checkpoint, lock, log and previews.

run/checkpoint.pt holds

    {"config": {"model": the network's arguments, "diffusion": those of Diffusion, "train": the
                rest},
     "step": the number of training steps,
     "model": ..., "ema": ..., "optimizer": ...}

Samples use "ema", the averaged weights. torch.load(path, weights_only=True) opens the file.
"""

import contextlib
import re
import sys
from collections import deque
from functools import partial

import filelock
import numpy as np
import torch

from beyond import as_eps, sample
from images import TEMPORARY, check_output, grid, replacing, save_image, to_pixels
from support.plot import save_plot
from support.trained import open_checkpoint

HEADER = "step,loss,grad_norm,lr\n"
ROW = re.compile(r"\d{1,15}(,-?\d+(\.\d+)?([eE][-+]\d+)?){3}\n")  # in log.csv


def find_checkpoint(out):
    """Return the checkpoint in a run folder, or None. Exits if it is not a run folder."""
    path = out / "checkpoint.pt"
    if path.is_file():
        return open_checkpoint(path)
    log = out / "log.csv"  # may be from a run that ended before its first checkpoint
    begun = log.is_file() and HEADER.startswith(log.read_text(errors="replace")[: len(HEADER)])
    for path in out.glob("*"):
        ours = re.fullmatch(r"\..*|images-[0-9a-f]{16}\..*", path.name)
        if not ours and not (begun and (path == log or path.is_dir())):
            sys.exit(f"--out {out} holds {path.name}, but no checkpoint.pt, so it is not a "
                     "run folder; use a new or empty folder")  # fmt: skip
    return None


@contextlib.contextmanager
def opened(out):
    """Yield the checkpoint in a run folder, or None, and hold the folder's lock during the block.

    A killed process loses its lock. The files that it left half written are removed, and so is a
    new folder that stays empty. Exits if another process holds the lock, if the folder holds files
    of other programs, or if it can't be written to.
    """
    check_output(out / "checkpoint.pt")
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
        yield find_checkpoint(out)
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
        eps = partial(as_eps(ema, diffusion, args.predicts, args.device), y=y)
        x0 = sample(diffusion, eps, (36, *shape), min(20, diffusion.T), "sa-solver",
                    generator=noise, device=args.device)  # fmt: skip
    save_image(path, grid(to_pixels(x0.cpu().numpy()), rows=rows, names=args.classes))


class Log:
    """log.csv, a row per step, and the curve of its losses.

    path: the path of log.csv, which is cut back to the first `step` steps. lr_at(k): the learning
    rate of step k, counted from 0.
    """

    def __init__(self, path, step, lr_at):
        self.path, self.lr_at, self.rows = path, lr_at, ""
        rows = self.read(step) if path.exists() else []
        with replacing(path) as file:
            file.write((HEADER + "".join(rows)).encode())
        self.recent = deque((float(row.split(",")[1]) for row in rows), maxlen=100)  # losses

    def read(self, last):
        """Return the rows up to the step `last`, as text.

        It leaves out foreign lines, such as a spreadsheet's, and the unfinished line of a killed
        run. If a step was logged twice, the second row counts.
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
                file.write(self.rows)
            self.rows = ""
        except (PermissionError, FileNotFoundError):
            pass  # a spreadsheet on Windows locks it, or the folder was moved: it is written later
        except OSError as error:
            sys.exit(f"{self.path} can't be written, so training ends: {error.strerror}")
        return np.mean(self.recent)

    def plot(self, path, step):
        """Save the losses up to a step as an image, averaged over up to 200 equal intervals."""
        table = np.loadtxt(self.read(step), delimiter=",", ndmin=2)[:, :2]
        length = -(-len(table) // 200)
        parts = [table[k : k + length].mean(0) for k in range(0, len(table) - length + 1, length)]
        save_plot(path, *np.transpose(parts), "step", "loss", log=True)
