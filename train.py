"""Train a DDPM: a folder of images in, run/checkpoint.pt out.

    python train.py                            # the built-in demo, minutes on a CPU, into demo/
    python train.py --data ./images            # the paper's CIFAR-10 run on your images, into run/
    python train.py --data ./images --quick    # a small network, minutes on two CPU cores
    python train.py --data ./images --classes  # the sub-folders are classes, to sample by name
    python train.py --out run                  # resumes a run; so does its first command
    torchrun --standalone --nproc_per_node=4 train.py --data ./images    # on four GPUs

Besides the checkpoint, the run folder holds the decoded images, log.csv (one row per step) and
preview-STEP.png: samples of the averaged network (EMA), always from the same noise.
"""

import argparse
import contextlib
import copy
import hashlib
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections import deque
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the first step, Ctrl-C ends the program

import filelock
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from ddpm import Diffusion, UNet, linear_betas
from images import demo_images, from_pixels, read_folder, replacing
from sample import StopRequest, check_output, grid, guard_output, reverse, to_pixels

# torchrun sets these: the rank of this process, the number of processes, the rank on its machine.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))

# -------------------------------------------------------------------------------------- Algorithm 1


def algorithm_1(network, ema, optimizer, diffusion, images, labels, s):
    """Return step(k), which takes gradient step k on a batch that (seed, k) alone determines.

    Its result is a tensor (2,), whose sum over the processes is the loss and the norm of the
    gradient. Nothing in a step waits for CUDA, so that Python can prepare the next one.

    network, ema: what is trained, and its average. images: uint8 (N, C, H, W). labels: int64 (N,)
    on the same device, or None. s: a namespace with a value for each of SETTINGS.
    """
    device, parts = next(network.parameters()).device, WORLD * s.accumulate
    diffusion = copy.copy(diffusion)
    for name, table in vars(diffusion).items():
        if isinstance(table, torch.Tensor):  # then a look-up copies nothing to the device
            setattr(diffusion, name, table.to(device, torch.float32))

    def step(k):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(k, s)
        set_seed(device, s.seed, k, 0)
        index = torch.randint(len(images), (s.batch,), device=images.device)
        flip = torch.rand(s.batch, 1, 1, 1, device=device) < (0.5 if s.flip else 0)
        t = torch.randint(diffusion.T, (s.batch,), device=device)
        noise = torch.randn(s.batch, *images.shape[1:], device=device)
        batch = [index, flip, t, noise]
        if labels is not None:  # drop a tenth: guidance needs eps without a class, too
            drop = torch.rand(s.batch, device=images.device) < 0.1
            batch.append(labels[index].masked_fill(drop, ema.num_classes))

        total = torch.zeros((), device=device)
        for part in range(RANK * s.accumulate, (RANK + 1) * s.accumulate):  # its own parts
            index, flip, t, noise, *y = (drawn.tensor_split(parts)[part] for drawn in batch)
            x0 = from_pixels(to_device(images[index], device))
            x0 = torch.where(flip, x0.flip(3), x0)
            model = partial(network, y=to_device(*y, device)) if y else network
            set_seed(device, s.seed, k, 1 + part)  # for the dropout
            is_last = WORLD == 1 or (part + 1) % s.accumulate == 0  # it exchanges the gradients
            with contextlib.nullcontext() if is_last else network.no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=s.amp):
                    loss = diffusion.loss(model, x0, t, noise) * len(x0) / s.batch
                (loss * WORLD).backward()  # DistributedDataParallel averages over the processes
            total += loss.detach()

        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, network, k, s.ema)
        return torch.stack([total, norm / WORLD])  # the norm is the same in every process

    return step


def update_ema(ema, model, step, decay):
    """Update the averaged weights, which draw the samples, in place; copy the buffers.

    Unlike in the authors' code, the decay grows with the step, so that the initial weights soon
    lose their influence.
    """
    decay = min(decay, (1 + step) / (10 + step))
    get_ema_multi_avg_fn(decay)([*ema.parameters()], [*model.parameters()], None)
    for average, buffer in zip(ema.buffers(), model.buffers(), strict=True):
        average.copy_(buffer)


def learning_rate(step, settings):
    """Return --lr, or less during the linear rise over the first --warmup steps."""
    return settings.lr * min(1.0, (step + 1) / max(1, settings.warmup))


def set_seed(device, *numbers):
    """Seed the generators of the CPU and the device from (seed, step, part): no state is saved."""
    # The seed has 64 bits, of which torch's generator for the CPU uses 32.
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":  # torch.manual_seed would visit every device
        torch.get_device_module(device).manual_seed(seed)


# ---------------------------------------------------------------------------------------- settings


def in_range(kind, low, high=math.inf):
    """Return an argparse type for an int or a float that is at least `low` and below `high`."""

    def number(text):
        if not low <= kind(text) < high:
            raise argparse.ArgumentTypeError(f"{text} is out of range")
        return kind(text)

    return number


count, whole = in_range(int, 1), in_range(int, 0, 2**63)
amount, share = in_range(float, 0), in_range(float, 0, 1)
# {name: (type or choices, default, meaning)}; [...] stands for several values. The defaults are the
# paper's CIFAR-10 run. A setting without a meaning has no flag: published weights bring it along.
NETWORK = {
    "image_size": (count, 32, "pixels; images are cropped to a square"),
    "in_channels": ((1, 3), None, "1 for greyscale, 3 for colour [detected]"),
    "base_channels": (count, 128, "width of the first level"),
    "channel_mults": ([count], (1, 2, 2, 2), "relative widths of the levels"),
    "num_res_blocks": (count, 2, "residual blocks per level"),
    "attention_resolutions": ([int], (16,), "sizes with attention"),
    "norm_groups": (None, None, None),
}
METHOD = {
    "data": (os.path.abspath, None, "folder of images [the built-in demo]"),
    "classes": (bool, False, "the sub-folders of --data are classes"),
    "betas": (None, tuple(linear_betas().tolist()), None),
    "variance": (("large", "small"), "large", "sigma_t^2"),
    "parts": ([("v", "muon")], (), "parts of quick.py to use [none]"),
    "batch": (count, 128, "images per step, over all GPUs"),
    "lr": (amount, 2e-4, "learning rate"),
    "warmup": (whole, None, "steps until --lr [min(5000, steps / 20)]"),
    "ema": (share, 0.9999, "decay of the averaged weights"),
    "flip": (bool, True, "flip images left to right at random"),
    "seed": (whole, 0, "seed of all random numbers"),
}
FREE = {  # what may change when a run is resumed
    "steps": (count, 800_000, "number of training steps"),
    "dropout": (share, 0.1, "share of the activations to drop"),
    "accumulate": (count, 1, "parts to split each batch into, to save memory"),
    "amp": (bool, None, "bfloat16 [where it is fast]"),
    "preview_every": (count, None, "steps between previews [which take at most 4%% of the time]"),
    "save_minutes": (amount, 5.0, "minutes between saves"),
}
SETTINGS = NETWORK | METHOD | FREE

# --quick: a run of minutes on a CPU, for small images. benchmarks/ladder.md has measurements.
QUICK = dict(
    base_channels=16, channel_mults=(1, 2, 4, 4), num_res_blocks=1, attention_resolutions=(),
    dropout=0.0, parts=("v", "muon"), batch=64, lr=6e-3, steps=1500,
)  # fmt: skip

# The demo: a small network that learns the 216 images on two CPU cores in under four minutes.
DEMO = dict(
    image_size=8, base_channels=32, channel_mults=(1, 2), num_res_blocks=1,
    attention_resolutions=(), dropout=0.0, batch=64, lr=3e-3, steps=2400,
)  # fmt: skip


def command_line():
    """Return the flags that are given, {name: value}."""
    parser = argparse.ArgumentParser(
        usage="python train.py --data ./images [options]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--out", type=Path, help="folder of the run [run, or demo without --data]")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps or xpu [auto]")
    add("--compile", action=switch, help="torch.compile [on CUDA, if 5,000 steps remain]")
    add("--quick", action="store_true", help="a small network and a short run; see the manual")
    for name, (kind, default, meaning) in SETTINGS.items():
        if meaning and kind is bool:
            add(as_flag(name), action=switch, help=meaning)
        elif meaning:
            nargs, kind = ("*", kind[0]) if isinstance(kind, list) else (None, kind)
            choices, kind = (kind, type(kind[0])) if isinstance(kind, tuple) else (None, kind)
            shown = "" if "[" in meaning else f" [{as_flag('', default)[3:]}]"
            add(as_flag(name), type=kind, nargs=nargs, choices=choices, help=meaning + shown)
    given = vars(parser.parse_args())
    return {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}


def as_flag(name, value=True):
    """Return the flag that gives a setting."""
    values = value if isinstance(value, tuple) else () if isinstance(value, bool) else (value,)
    return " ".join([f"--{'no-' * (value is False)}{name.replace('_', '-')}", *map(str, values)])


def decide(given, state, out, device):
    """Return the settings as a namespace: the defaults, then what is saved, then the given flags.

    Exits if the flags do not fit together, or contradict what is saved.
    """
    saved = state["settings"] if state else {}
    data, quick = given.get("data", saved.get("data")), given.get("quick")
    if data is None and given.keys() & {"quick", "classes", "image_size", "in_channels"}:
        sys.exit("train.py: --quick, --classes, --image-size and --in-channels need --data")
    if state and quick:
        given = {"parts": QUICK["parts"]} | given
    s = {name: default for name, (_, default, _) in SETTINGS.items()}
    s |= saved or (QUICK if quick else DEMO if data is None else {})
    s |= {name: value for name, value in given.items() if name in SETTINGS}
    fixed = {*NETWORK, "parts"}  # with new weights and with published ones
    if state and state["images"]:
        fixed |= {*METHOD} - {"data"}
    for name, value in given.items():
        if state and name in fixed and value != saved[name]:
            sys.exit(f"train.py: {out} was begun without {as_flag(name, value)}; omit this flag, "
                     "or use another --out")  # fmt: skip
    s = argparse.Namespace(**s)
    if state and s.steps < state["step"]:
        sys.exit(f"train.py: {out} is at step {state['step']:,} already; --steps can't be smaller")
    if s.batch < WORLD * s.accumulate:
        sys.exit("train.py: --batch must be at least the number of GPUs times --accumulate")
    if s.warmup is None:
        s.warmup = min(5000, s.steps // 20)
    if s.amp is None:
        s.amp = has_bfloat16(device)
    if s.preview_every is None:  # 36 images x 20 passes take as long as training on 240 images
        s.preview_every = max(25 * 240 // s.batch, s.steps // 100, 1)
    return s


# ---------------------------------------------------------------------------------- the run folder


def build(settings, shape, names):
    """Return (network, diffusion): eps_theta(x_t, t, y=None), with new weights, and its Diffusion.

    settings: as in a checkpoint. shape: (C, H, W) of an image. names: the class names.
    To train another network, return it here. Raises ValueError for settings that do not fit.
    """
    diffusion, make_network = Diffusion(settings["betas"], settings["variance"]), UNet
    if "v" in settings["parts"]:
        from quick import VUNet

        make_network = partial(VUNet, diffusion)
    options = {name: settings[name] for name in (*NETWORK, "dropout")}
    options |= {"in_channels": shape[0], "image_size": shape[-1], "num_classes": len(names)}
    return make_network(**options), diffusion


def load(path):
    """Return (network, diffusion, state) of a run folder, or of its checkpoint.pt.

    The network has the averaged weights, is in eval mode, and returns eps. state: {"settings",
    "shape": (C, H, W), "names": the class names, "images": a digest, "step", "model", "ema",
    "optimizer"}. No code in the file is executed. Exits with one line if it can't be read.
    """
    path = Path(path, "checkpoint.pt") if os.path.isdir(path) else Path(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        sys.exit(f"{path} can't be read: {(str(error) or repr(error)).splitlines()[0]}")
    if not isinstance(state, dict) or state.get("settings", {}).keys() != SETTINGS.keys():
        sys.exit(f"{path} is not a checkpoint of this version of train.py")
    network, diffusion = build(state["settings"], state["shape"], state["names"])
    network.load_state_dict(state["ema"])
    return network.eval(), diffusion, state


def open_run(out, data, lock):
    """Return the checkpoint of a run folder, or None. Exits if another process holds the lock."""
    if data and Path(data).resolve().is_relative_to(out.resolve()):
        sys.exit(f"train.py: --out {out} must not be the folder of the images, or above it")
    check_output(out / "checkpoint.pt")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        sys.exit(f"train.py: another process is training in {out}; wait, or use another --out")
    for path in out.glob(".*.tmp"):  # left by a killed process
        path.unlink()
    return load(out)[2] if (out / "checkpoint.pt").exists() else None


def open_log(path, step):
    """Begin log.csv, or cut it back to its first `step` steps."""
    lines = path.read_text().splitlines(keepends=True)[1:] if path.exists() else []
    # A killed process leaves rows of steps after its checkpoint, and half a row.
    rows = [row for row in lines if row[-1] == "\n" and int(row.split(",")[0]) <= step]
    with replacing(path) as file:
        file.write(("step,loss,grad_norm,lr\n" + "".join(rows)).encode())


def preview(path, network, shape, names, s):
    """Save 36 images of this shape (C, H, W), classes in rows, always from the same noise."""
    device = next(network.parameters()).device
    random = torch.Generator(device).manual_seed(s.seed)
    y = torch.arange(36, device=device) % len(names) if names else None

    def eps(x_t, t):
        return network(x_t, torch.full((36,), t, device=device), y)

    draw_noise = partial(torch.randn, 36, *shape, generator=random, device=device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=s.amp):
        *_, (_, _, x0) = reverse(eps, draw_noise, s.betas, steps=min(20, len(s.betas)))
    with contextlib.suppress(OSError):  # a full disk does not end the run
        grid(to_pixels(x0.cpu().numpy()), len(names)).save(path)


# -------------------------------------------------------------------------- devices and processes


def choose_device(name):
    """Return the torch.device that --device names; "auto" is the accelerator, if there is one.

    Under torchrun, each process of a machine has an accelerator of its own. Exits with what torch
    says if the device is not there.
    """
    auto = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        device = torch.device(auto if name == "auto" else name)
        if device.type != "cpu":
            index = LOCAL_RANK if WORLD > 1 else device.index or 0
            device = torch.device(device.type, index)
            torch.accelerator.set_device_index(index)
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


def to_device(x, device):
    """Return a tensor on the device. From pinned memory, the copy to CUDA is asynchronous."""
    x = x.pin_memory() if device.type == "cuda" and not x.is_cuda else x
    return x.to(device, non_blocking=device.type == "cuda")


def join(device):
    """Connect the processes through gloo and, for gradients on a GPU, the vendor's library."""
    if RANK > 0:  # only the first process prints
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    gpu = {"cuda": ",cuda:nccl", "xpu": ",xpu:xccl"}.get(device.type, "")
    dist.init_process_group(f"cpu:gloo{gpu}", timeout=timedelta(hours=4))  # one of them decodes


def from_first(function, *args):
    """Return the first process's function(*args) in every process. If it exits, all of them do."""
    values = [None, None]
    if RANK == 0:
        try:
            values[0] = function(*args)
        except SystemExit as error:
            values[1] = error.code
    if WORLD > 1:
        dist.broadcast_object_list(values)
    if values[1]:
        sys.exit(values[1] if RANK == 0 else 1)
    return values[0]


def from_all(value):
    """Return a list of the values of all processes, when all have called this."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


# -------------------------------------------------------------------------------------- the program


def load_images(s, channels, out):
    """Return (images, labels or None, names of the classes, a digest of all three).

    The first process of each machine decodes them into the folder `out`, for all of its processes.
    """
    if s.data is None:
        images, labels, names = demo_images(), None, ()
    else:
        if LOCAL_RANK > 0:
            from_all(None)  # wait for the first process of each machine
        out.mkdir(parents=True, exist_ok=True)
        size, classes = s.image_size, s.classes
        images, labels, names = read_folder(s.data, size, channels, classes, cache=out)
        if LOCAL_RANK == 0:
            from_all(None)
    digest = hashlib.blake2b(np.ascontiguousarray(images), digest_size=8)
    digest.update(repr((images.shape, names, labels is not None and labels.tolist())).encode())
    return images, labels, names, digest.hexdigest()


def say_days(network, diffusion, shape, s, start):
    """Print how long the run will take, if it is over a day, estimated from two images."""
    network = copy.deepcopy(network)  # whose gradients and buffers may change
    x0, t = torch.zeros(2, *shape), torch.zeros(2, dtype=torch.int64)
    for _ in range(2):  # the first pass takes longer
        began = time.monotonic()
        with torch.autocast("cpu", torch.bfloat16, enabled=s.amp):
            diffusion.loss(network, x0, t, x0).backward()
        days = (time.monotonic() - began) / 2 * s.batch * (s.steps - start) / 24 / 3600
    if days > 1:
        print(f"this will take about {days:,.0f} days on this CPU; --quick takes minutes")


def train(s, out, start, step, save, draw):
    """Take the steps from `start` on, until asked to stop; return the step and the StopRequest.

    step: from algorithm_1. save(k) and draw(k) write the checkpoint and a preview after step k.
    """
    if RANK == 0:
        open_log(out / "log.csv", start)
    bar = tqdm(total=s.steps, initial=start, unit="step", mininterval=1, disable=RANK > 0)
    stop, saved, recent = StopRequest(), time.monotonic(), deque(maxlen=100)
    done, pending, rows = start, [], b""
    for k in range(start + 1, s.steps + 1):
        pending.append(step(k - 1))
        show = k % s.preview_every == 0 or k == s.steps
        # Reading the losses waits for a GPU, so it is done every ten steps. A single process stops
        # at once when it is asked to; several stop together, when they read their losses.
        must_read = show or k % 10 == 0 or pending[0].device.type == "cpu"
        if not must_read and not (WORLD == 1 and stop.number):
            continue

        # The losses, the norms, and whether a process was told to stop, in one reduction:
        values = torch.stack([*pending, pending[0].new_tensor([stop.number, 0])])
        if WORLD > 1:
            dist.all_reduce(values)
        *losses, (stops, _) = values.tolist()
        if not np.isfinite(losses).all():
            bar.close()
            sys.exit(f"the loss or its gradient is infinite or NaN by step {k:,}, which is not "
                     "saved; try a lower --lr or --no-amp, and a new --out")  # fmt: skip
        for i, (loss, norm) in enumerate(losses if RANK == 0 else (), done + 1):
            rows += f"{i},{loss:.6g},{norm:.6g},{learning_rate(i - 1, s):.6g}\n".encode()
            recent.append(loss)
        done, pending = k, []
        if RANK == 0:
            # A full disk may accept only some of the rows; the others are kept for the next time.
            with contextlib.suppress(OSError), open(out / "log.csv", "ab", 0) as file:
                rows = rows[file.write(rows) :]
            late = time.monotonic() - saved > 60 * s.save_minutes
            if k == s.steps or stops or late:
                save(k)
                saved = time.monotonic()
            bar.set_postfix_str(f"loss {np.mean(recent):.4f}", refresh=False)
            bar.update(len(losses))
            if show:
                draw(k)
        if stops:
            break
    bar.close()
    return done, stop


def main():
    guard_output()
    given = command_line()
    torch.set_float32_matmul_precision("high")  # TF32 for products that stay float32
    torch.backends.cudnn.benchmark = True  # all batches are of one size
    device = choose_device(given["device"])
    if WORLD > 1:
        join(device)
    out = given.get("out") or Path("run" if "data" in given else "demo")
    lock = filelock.FileLock(out / ".lock")  # a killed process loses it
    old = from_first(open_run, out, given.get("data"), lock)
    s = decide(given, old, out, device)
    channels = old["shape"][0] if old else s.in_channels
    images, labels, names, digest = load_images(s, channels, out)
    mine = vars(s) | {"data": None, "images": digest}
    if others := [other for other in from_all(mine) if other != mine]:
        wrong = [name for name in mine if others[0][name] != mine[name]]
        sys.exit(f"the processes have different {' and '.join(wrong)}")
    shape, start = images.shape[1:], old["step"] if old else 0
    if old and (shape, names) != (old["shape"], old["names"]):
        sys.exit(f"train.py: {out} is for images of {old['shape']} and the classes {old['names']}")
    if old and old["images"] not in (None, digest):
        if s.data != old["settings"]["data"]:
            sys.exit(f"train.py: {out} was trained on other images; use another --out")
        print(f"the images have changed since step {old['step']:,}; training continues with them")
    if LOCAL_RANK == 0 and s.data is not None:
        for path in {*out.glob(".images-*")} - {out / Path(images.filename).name}:
            path.unlink(missing_ok=True)  # another machine may do the same

    torch.manual_seed(s.seed)
    try:
        network, diffusion = build(vars(s), shape, names)
    except ValueError as error:
        sys.exit(f"train.py: {error}")
    network.to(device)
    ema = copy.deepcopy(network).requires_grad_(False).eval()
    if "muon" in s.parts:
        from quick import Muon

        optimizer = Muon(network, s.lr)
    else:
        optimizer = torch.optim.Adam(network.parameters(), s.lr, fused=True)
    saved = {"model": network, "ema": ema, "optimizer": optimizer}
    for name, part in saved.items() if old else ():
        if old[name]:  # published weights have no optimizer
            part.load_state_dict(old[name])
    images = torch.from_numpy(images)
    images = images.to(device) if images.nbytes < 2e9 else images  # larger ones move per batch
    labels = None if labels is None else torch.from_numpy(labels).to(images.device)

    def save(k):
        state = {"settings": vars(s), "shape": shape, "names": names, "images": digest, "step": k}
        with replacing(out / "checkpoint.pt") as file:
            torch.save(state | {name: part.state_dict() for name, part in saved.items()}, file)

    def draw(k):
        preview(out / f"preview-{k:07d}.png", ema, shape, names, s)

    model = network
    if WORLD > 1:
        model = DistributedDataParallel(network, gradient_as_bucket_view=True)
    can_compile = device.type == "cuda" and find_spec("triton") and shutil.which("gcc")
    if given.get("compile", can_compile and s.steps - start >= 5000):
        options = {"force_layout_optimization": True}  # channels_last, which suits tensor cores
        model = torch.compile(model, dynamic=False, options=options)
    other = [as_flag(name, v) for name, (_, default, meaning) in SETTINGS.items()
             if meaning and default is not None and (v := getattr(s, name)) != default]  # fmt: skip
    of = f", in {len(names):,} classes: {', '.join(names[:10])}" if names else ""
    print(f"images   {len(images):,} of {'x'.join(map(str, shape))}{of}")
    print(f"settings the paper's{', except ' * bool(other)}{' '.join(other)}")
    print(f"network  {sum(p.numel() for p in network.parameters()):,} parameters on {WORLD} x "
          f"{device}, {'bfloat16' if s.amp else 'float32'}")  # fmt: skip
    print(f"steps    {start:,} to {s.steps:,}; a preview every {s.preview_every:,}")
    if device.type == "cpu" and WORLD == 1:
        say_days(network, diffusion, shape, s, start)
    step = algorithm_1(model, ema, optimizer, diffusion, images, labels, s)
    done, stop = train(s, out, start, step, save, draw)
    if WORLD > 1:
        from_all(None)  # a process that ends first can abort the others
        time.sleep(1)  # gloo's threads and the end of Python can otherwise wait for each other
        dist.destroy_process_group()
    folder, run = (shlex.quote(str(path)) for path in (Path(sys.argv[0]).parent, out))
    if done < s.steps:
        print(f"stopped at step {done:,}; to go on: python train.py --out {run}", file=sys.stderr)
        stop.end() if stop.number else sys.exit(1)
    if start == done:
        print(f"{out} is finished; --steps continues it, and another --out begins a new run")
    few = " --steps 10" if "v" in s.parts else ""  # with eps, few steps need a long training
    print(f"done: {out} is at step {done:,}; next:")
    print(f"  python {folder}/export.py --checkpoint {run} --onnx model.onnx")
    print(f"  python {folder}/sample.py --onnx model.onnx{few}{' --guidance 1' * bool(names)}")


if __name__ == "__main__":
    main()
