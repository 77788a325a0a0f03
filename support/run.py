"""The run folder of train.py: its settings, checkpoint, log and previews.

run/checkpoint.pt holds

    {"config": {"model": the arguments of UNet, "diffusion": those of Diffusion, "train": the rest},
     "step": the number of training steps,
     "model": ..., "ema": ..., "optimizer": ...}

Samples use "ema", the averaged weights. torch.load(path, weights_only=True) opens the file.
"""

import os
import re
import sys
import time
from collections import deque
from functools import partial
from pathlib import Path

import numpy as np
import torch

from beyond import as_eps, cosine_betas, sample
from ddpm import linear_betas
from images import TEMPORARY, check_output, grid, replacing, save_image, to_pixels
from support.data import digest
from support.plot import save_plot
from support.ranks import RANK
from support.trained import open_checkpoint

HEADER = "step,loss,grad_norm,lr\n"
ROW = re.compile(r"\d{1,15}(,-?\d+(\.\d+)?(e[-+]\d+)?){3}\n")  # of log.csv
LONG = 3 * 3600  # runs longer than this many seconds are announced
WAIT = 2  # seconds within which an active writer changes its file
SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas}
SHAPE = (  # the settings of the network's shape
    "image_size", "base_channels", "channel_mults", "num_res_blocks", "attention_resolutions",
    "norm_groups",
)  # fmt: skip
TRAINING = (
    "predicts", "optimizer", "batch", "lr", "lr_decay", "weighting", "ema", "flip", "seed",
)  # fmt: skip

# ------------------------------------------------------------------------------------ the settings


def make_config(args, channels, state=None):
    """Return the "config" of a checkpoint from the Settings of train.py.

    channels: of the images, None if not yet known. The fingerprint of the images is None until they
    are decoded. state: the run's own checkpoint, whose warm-up and --init are kept.
    """
    betas = SCHEDULES[args.schedule]().tolist() if args.betas is None else [*args.betas]
    old = state["config"]["train"] if state else {}
    warmup = old.get("warmup", min(5000, args.steps // 20)) if args.warmup is None else args.warmup
    model = {name: getattr(args, name) for name in (*SHAPE, "dropout")} | {"in_channels": channels}
    model = {name: [*v] if isinstance(v, tuple) else v for name, v in model.items()}
    training = {name: getattr(args, name) for name in TRAINING} | {
        "steps": args.steps if args.lr_decay else None,  # else the run can be made longer
        "warmup": warmup,
        "init": args.init or old.get("init"),
        "data": args.data and Path(args.data).resolve().name,
        "folder": args.data and digest(os.fsencode(Path(args.data).resolve())),
        "images": None,
        "code": digest(*(Path(sys.modules[m].__file__).read_bytes() for m in ("ddpm", "beyond"))),
    }
    if args.classes:
        model["num_classes"], training["classes"] = len(args.classes), args.classes
    return {"model": model, "diffusion": {"variance": args.variance, "betas": betas},
            "train": training}  # fmt: skip


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
    if what:
        fixed = {*SHAPE, "in_channels", "predicts", "betas"} & changed.keys()
        hint = "" if fixed else f" (--init {out} starts from its weights)"
        sys.exit(f"{out} holds a run with other settings. Use another --out{hint}, or rename the "
                 f"folder. What differs: {'; '.join(what)}")  # fmt: skip
    if step > steps:
        sys.exit(f"{out} is at step {step:,} already, so --steps must be larger")
    if config["train"]["images"] and step < steps and RANK == 0:
        for name, new in (("the images have", images[1]), ("ddpm.py or beyond.py has", code)):
            if new:
                print(f"{name} changed since step {step:,}; training continues with the change")


def refuse_other_ranks(configs):
    """Exit unless all processes have the same settings and images. configs: one per process."""
    for rank, config in enumerate(configs):
        if names := differences(configs[0], config).keys() - {"data", "folder", "init"}:
            sys.exit(f"rank {rank} differs from rank 0 in {' and '.join(sorted(names))}")


# --------------------------------------------------------------------------------------- the folder


def duration(seconds):
    """Return a time in words, such as "about 5 months"."""
    for unit, length in (("years", 365 * 86400), ("months", 30 * 86400), ("days", 86400)):
        if seconds >= 2 * length:
            return f"about {seconds / length:.0f} {unit}"
    return f"about {seconds / 3600:.0f} hours"


class RunFolder:
    """The run folder: it writes the checkpoint, the log, previews and the loss curve.

    args: the Settings. config: of the checkpoint. step: the number of steps taken so far.
    lr_at(k): the learning rate of step k, counted from 0. version: what version_of said of the
    checkpoint when it was read; another one is never replaced.
    """

    def __init__(self, args, config, step, lr_at, version=None):
        self.args, self.config, self.lr_at, self.version = args, config, lr_at, version
        self.out, self.rows = args.out, ""
        self.recent = deque(maxlen=100)  # losses
        self.saved = self.previewed = time.monotonic()
        self.preview_seconds = 0  # how long the last one took
        # On an accelerator, the first one can be slow, because kernels are chosen by timing them.
        self.count_preview = args.device.type == "cpu"
        # The (step, time) from which steps are timed; steps that may compile do not count.
        self.timed_from = None if args.compile or args.device.type != "cpu" else (step, self.saved)
        self.said_how_long = False
        if (self.out / "log.csv").exists():
            self.continue_log(self.out / "log.csv", step)

    def continue_log(self, path, step):
        """Cut the log back to the step of the checkpoint; keep a foreign one as log-edited.csv."""
        rows, is_foreign = read_log(path, step)
        if is_foreign:
            with replacing(self.out / "log-edited.csv") as file:
                file.write(path.read_bytes())
            print(f"{path} has lines from another program; a copy is kept as log-edited.csv, "
                  "and the log is continued")  # fmt: skip
        with replacing(path) as file:
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

    def time_left(self, step):
        """Return a line that says how long the rest of the run will take, once, if that is long."""
        now = time.monotonic()
        start, began = self.timed_from = self.timed_from or (step, now)
        if self.said_how_long or now - began < 10 or step == start:
            return None
        self.said_how_long, each = True, (now - began) / (step - start)
        left = each * (self.args.steps - step)
        if left < LONG:
            return None
        line = f"at {each:.2g} s per step, the run will take {duration(left)}"
        if self.args.device.type == "cpu":
            quick = "--quick --out quick, a smaller network"
            line += f"; {quick}, takes 8 minutes on two cores at 32x32"
        return line

    def save(self, step, model, ema, optimizer):
        """Replace the checkpoint. Exits if another process has written it in the meantime."""
        path = self.out / "checkpoint.pt"
        parts = {"model": model, "ema": ema, "optimizer": optimizer}
        states = {name: part.state_dict() for name, part in parts.items()}
        with replacing(path) as file:
            try:
                torch.save({"config": self.config, "step": step, **states}, file)
            except RuntimeError as error:  # torch's own error hides that of a full disk
                raise error.__context__ or error from None
            if version_of(path) not in (None, self.version):
                sys.exit(f"{path} was written by another process, which trains in the same folder. "
                         "It is not replaced; use another --out")  # fmt: skip
        self.version, self.saved = version_of(path), time.monotonic()

    def save_is_due(self, before_preview):
        """Return whether the last checkpoint is too old, or there is none before a preview.

        support/data.py leaves out the previews, because a checkpoint.pt is in their folder.
        """
        first = before_preview and not (self.out / "checkpoint.pt").exists()
        return first or time.monotonic() - self.saved > 60 * self.args.save_minutes

    def preview_is_due(self):
        """Return whether the time since the last preview is long, compared with its duration."""
        gap = self.args.preview_gap * self.preview_seconds
        return time.monotonic() - self.previewed >= gap

    def preview(self, step, ema, diffusion):
        """Save 36 images that the averaged network draws, in a row for each class, and loss.png."""
        began, args = time.monotonic(), self.args
        noise, rows = torch.Generator(args.device).manual_seed(args.seed), len(args.classes)
        y = torch.arange(36, device=args.device) % rows if rows else None
        shape = 36, self.config["model"]["in_channels"], args.image_size, args.image_size
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
            eps = partial(as_eps(ema, diffusion, args.predicts), y=y)
            x0 = sample(diffusion, eps, shape, min(20, diffusion.T), "sa-solver",
                        generator=noise, device=args.device)  # fmt: skip
        image = grid(to_pixels(x0.cpu().numpy()), rows=rows, names=args.classes)
        save_image(self.out / f"preview-{step:07d}.png", image)
        self.plot_loss(step)
        self.previewed = time.monotonic()
        if self.count_preview:
            self.preview_seconds = self.previewed - began
        self.count_preview = True

    def plot_loss(self, step):
        """Save loss.png, averaged over up to 200 intervals of equal length."""
        table = np.loadtxt(read_log(self.out / "log.csv", step)[0], delimiter=",", ndmin=2)[:, :2]
        length = -(-len(table) // 200)
        parts = [table[k : k + length].mean(0) for k in range(0, len(table) - length + 1, length)]
        save_plot(self.out / "loss.png", *np.transpose(parts), "step", "loss", log=True)


def read_log(path, last):
    """Return the rows of a log.csv, as text, up to the step `last`, and whether it has others.

    It leaves out lines from a spreadsheet, say, and one that a killed run did not finish. If a
    step was logged twice, the second row counts.
    """
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    rows = {int(line.split(",")[0]): line for line in lines if ROW.fullmatch(line)}
    others = {line for line in lines[:-1] if line.strip() and not ROW.fullmatch(line)} - {HEADER}
    return [rows[step] for step in sorted(rows) if step <= last], bool(others)


def version_of(path):
    """Return what tells a file from one that replaces it, or None if there is none."""
    return (path.stat().st_mtime_ns, path.stat().st_size) if path.exists() else None


def find_run(out):
    """Return the checkpoint in a run folder and its version_of, or (None, None).

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


def remove_remains(out):
    """Remove the temporary files of processes that were killed while writing into a run folder.

    Exits if one of these files is still being written.
    """
    for path in out.glob(".*.tmp"):
        if not TEMPORARY.fullmatch(path.name):
            continue
        before = version_of(path)
        time.sleep(WAIT)
        if version_of(path) != before:
            sys.exit(f"another process is writing into {out}; wait for it, or use another --out")
        path.unlink(missing_ok=True)
