"""Train a DDPM: a folder of images in, run/checkpoint.pt out.

    python train.py                            # the built-in demo, minutes on a CPU, into demo/
    python train.py --data ./images            # the paper's CIFAR-10 run on your images, into run/
    python train.py --data ./images --quick    # a small network, minutes on two CPU cores
    python train.py --data ./images --classes  # the sub-folders are classes, to sample by name
    python train.py --out run                  # resumes a run; so does its first command
    python train.py --data ./others --init run --out new    # begins with the weights of a run
    torchrun --standalone --nproc_per_node=4 train.py --data ./images    # on four GPUs

Besides the checkpoint, the run folder holds the decoded images, log.csv (one row per step) and
preview-STEP.png: samples of the averaged network (EMA), always from the same noise. run.py says
what the settings are, and writes all of this.
"""

import hashlib
import os
import shlex
import signal
import sys
import time
from collections import deque
from datetime import timedelta
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the first step, Ctrl-C ends the program

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from images import demo_images, from_pixels, read_folder
from run import Run, build, choose_device, choose_settings, command_line, compiled, to_device
from run import load as load  # importable from here, too
from sample import StopRequest, guard_output

# torchrun sets these: the rank of this process, the number of processes, the rank on its machine.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))

# -------------------------------------------------------------------------------------- Algorithm 1


class Data(NamedTuple):
    """The training set, on the GPU unless it is large."""

    images: Tensor  # uint8 (N, C, H, W)
    labels: Tensor | None  # int64 (N,), on the same device
    names: tuple  # of the classes
    digest: str  # of all three


def algorithm_1(network, ema, optimizer, diffusion, data, s, start=0):
    """Yield the loss and the norm of its gradient after each step of Algorithm 1, without end.

    They are 0-d tensors on the device of the network, and nothing waits for it: the CPU prepares
    the next step while a GPU computes. With several processes, their mean is the loss.

    network, ema: what is trained, and its average. s: the Settings. start: the number of steps that
    have been taken, on which the batches depend.
    """
    device = next(network.parameters()).device
    for k in count(start):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(k, s)
        total = 0
        for part, (x0, t, noise, y) in enumerate(draw_batch(data, diffusion.T, k, s, device), 1):
            network.require_backward_grad_sync = part == s.accumulate  # if it is on several GPUs
            with torch.autocast(device.type, torch.bfloat16, enabled=s.amp):
                loss = diffusion.loss(partial(network, y=y), x0, t, noise) / s.accumulate
            loss.backward()
            total = total + loss.detach()
        norm = clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, network, k, s.ema)
        yield total, norm


def draw_batch(data, T, k, s, device):
    """Yield (x0, t, noise, y) of the parts of batch k that this process computes.

    (seed, k) alone determines the batch, so that no generator has to be saved. x0 and noise are
    float32 (B, C, H, W), t is int64 (B,), and y the classes, int64 (B,), or None. Each part has
    batch / (processes * accumulate) images.
    """
    set_seed(device, s.seed, k, 0)
    index = torch.randint(len(data.images), (s.batch,), device=data.images.device)
    flip = torch.rand(s.batch, 1, 1, 1, device=device) < (0.5 if s.flip else 0)
    t = torch.randint(T, (s.batch,), device=device)
    noise = torch.randn(s.batch, *data.images.shape[1:], device=device)
    if data.names:  # drop a tenth of the labels: guidance needs eps without a class, too
        drop = torch.rand(s.batch, device=data.images.device) < 0.1
        labels = to_device(data.labels[index].masked_fill(drop, len(data.names)), device)
    size = s.batch // (WORLD * s.accumulate)
    for part in range(RANK * s.accumulate, (RANK + 1) * s.accumulate):
        mine = slice(part * size, (part + 1) * size)
        x0 = from_pixels(to_device(data.images[index[mine]], device))
        x0 = torch.where(flip[mine], x0.flip(3), x0)
        set_seed(device, s.seed, k, 1 + part)  # for the dropout
        yield x0, t[mine], noise[mine], labels[mine] if data.names else None


def set_seed(device, *numbers):
    """Seed the generators of the CPU and the device from (seed, step, part)."""
    # The seed has 64 bits, of which torch's generator for the CPU uses 32.
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":  # torch.manual_seed would visit every device
        torch.get_device_module(device).manual_seed(seed)


def learning_rate(k, s):
    """Return --lr, or less during the linear rise over the first --warmup steps."""
    return s.lr * min(1.0, (k + 1) / max(1, s.warmup))


def update_ema(ema, network, k, decay):
    """Update the averaged weights, which draw the samples, in place; copy the buffers.

    Unlike in the authors' code, the decay grows with the step, so that the initial weights soon
    lose their influence.
    """
    decay = min(decay, (1 + k) / (10 + k))
    get_ema_multi_avg_fn(decay)([*ema.parameters()], [*network.parameters()], None)
    for average, buffer in zip(ema.buffers(), network.buffers(), strict=True):
        average.copy_(buffer)


# ----------------------------------------------------------------------------------------- the loop


def train(run, network, data, s):
    """Take the steps that remain, until asked to stop; return the StopRequest.

    network: that of the run, maybe compiled or on several GPUs. Reading a loss waits for the GPU,
    so the losses of ten steps are read together, which is also when a signal is obeyed.
    """
    ema, optimizer = run.parts["ema"], run.parts["optimizer"]
    steps = algorithm_1(network, ema, optimizer, run.diffusion, data, s, run.step)
    bar = tqdm(total=s.steps, initial=run.step, unit="step", mininterval=1, disable=RANK > 0)
    stop, stops, saved = StopRequest(), False, time.monotonic()
    pending, recent = [], deque(maxlen=100)
    while run.step < s.steps and not stops:
        pending.append(next(steps))
        k = run.step + len(pending)
        draws = k % s.preview_every == 0 or k == s.steps
        is_cpu = pending[0][0].device.type == "cpu"
        if not (draws or is_cpu or k % 10 == 0 or (WORLD == 1 and stop.number)):
            continue
        losses, norms, stops = read(pending, stop)
        pending = []
        if not np.isfinite(losses + norms).all():
            bar.close()
            leave(f"the loss or its gradient is infinite or NaN by step {k:,}, which is not saved; "
                  "try a lower --lr or --no-amp, and a new --out")  # fmt: skip
        rates = [learning_rate(i, s) for i in range(run.step, k)]
        rows = zip(count(run.step + 1), losses, norms, rates)
        run.step = k
        recent.extend(losses)
        if RANK == 0:
            run.log("".join("{},{:.6g},{:.6g},{:.6g}\n".format(*row) for row in rows).encode())
            if k == s.steps or stops:
                run.save()
            elif time.monotonic() - saved > 60 * s.save_minutes:
                save_if_possible(run)
                saved = time.monotonic()
            bar.set_postfix_str(f"loss {np.mean(recent):.4f}", refresh=False)
            bar.update(len(losses))
            if draws:
                run.draw()
    bar.close()
    return stop


def read(pending, stop):
    """Return the losses, the norms, and whether to stop, of all processes in one reduction."""
    loss = pending[0][0]
    values = torch.stack([*chain(*pending), loss.new_tensor(stop.number)])
    if WORLD > 1:
        dist.all_reduce(values)
    *values, stops = (values / WORLD).tolist()
    return values[::2], values[1::2], stops > 0


def save_if_possible(run):
    """Save the run. If the disk is full, say so, because the next save may succeed."""
    try:
        run.save()
    except SystemExit as error:
        tqdm.write(f"{error}; training continues", file=sys.stderr)


# ------------------------------------------------------------------------------------ the processes


def join(device):
    """Connect the processes through gloo and, for gradients on a GPU, the vendor's library."""
    if WORLD > 1:
        if RANK > 0:  # only the first process prints
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        gpu = {"cuda": ",cuda:nccl", "xpu": ",xpu:xccl"}.get(device.type, "")
        dist.init_process_group(f"cpu:gloo{gpu}", timeout=timedelta(hours=4))  # one decodes


def leave(why=None):
    """End the connection. Exits, and one process says why, if there is a reason."""
    if WORLD > 1:
        from_all(None)  # a process that ends first can abort the others
        time.sleep(1)  # gloo's threads and the end of Python can otherwise wait for each other
        dist.destroy_process_group()
    if why:
        sys.exit(why if RANK == 0 else 1)


def from_all(value):
    """Return a list of the values of all processes, when all have called this."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def agree(function, *args):
    """Return function(*args). If it exits in a process, all of them exit, and one says why."""
    value = why = None
    try:
        value = function(*args)
    except SystemExit as error:
        why = error.code
    if reasons := [*filter(None, from_all(why))]:
        leave(reasons[0])
    return value


def from_first(function, *args):
    """Return the first process's function(*args) in every process."""
    values = [agree(function, *args) if RANK == 0 else agree(lambda: None)]
    if WORLD > 1:
        dist.broadcast_object_list(values)
    return values[0]


# -------------------------------------------------------------------------------------- the program


def load_images(s, state, run, device):
    """Return the Data, decoded into the folder of the run unless they are there.

    Exits if they are not the images of the checkpoint `state`.
    """
    images, labels, names = demo_images(), None, ()
    if s.data is not None:
        channels = state["shape"][0] if state else s.in_channels
        run.out.mkdir(parents=True, exist_ok=True)
        images, labels, names = read_folder(s.data, s.image_size, channels, s.classes, run.out)
    digest = hashlib.blake2b(np.ascontiguousarray(images), digest_size=8)
    digest.update(repr((images.shape, names, labels is not None and labels.tolist())).encode())
    digest, shape = digest.hexdigest(), images.shape[1:]
    if state and (shape, names) != (state["shape"], state["names"]):
        sys.exit(f"train.py: {run.out} is for images of {state['shape']} and the classes "
                 f"{state['names']}")  # fmt: skip
    if state and state["images"] not in (None, digest):
        if s.data != state["settings"]["data"]:
            sys.exit(f"train.py: {run.out} was trained on other images; use another --out")
        print(f"the images have changed since step {state['step']:,}; training continues with them")
    if s.data is not None and LOCAL_RANK == 0:
        run.forget_images(images.filename)
    images = torch.from_numpy(images)
    images = images.to(device) if images.nbytes < 2e9 else images  # larger ones move per batch
    labels = None if labels is None else torch.from_numpy(labels).to(images.device)
    return Data(images, labels, names, digest)


def check_processes(s, data):
    """Exit if the settings or the images of the processes differ."""
    mine = vars(s) | {"data": None, "images": data.digest}
    if others := [other for other in from_all(mine) if other != mine]:
        wrong = [name for name in mine if others[0][name] != mine[name]]
        leave(f"the processes have different {' and '.join(wrong)}")


def describe(run, data, s, device):
    """Print what is trained, on what and how."""
    n, names = sum(p.numel() for p in run.parts["model"].parameters()), data.names
    of = f", in {len(names):,} classes: {', '.join(names[:10])}" if names else ""
    print(f"images   {len(data.images):,} of {'x'.join(map(str, data.images.shape[1:]))}{of}")
    print(f"settings {s.describe()}")
    print(f"network  {n:,} parameters on {WORLD} x {device}, {'bfloat16' if s.amp else 'float32'}")
    print(f"steps    {run.step:,} to {s.steps:,}; a preview every {s.preview_every:,}")
    if device.type == "cpu" and n > 5e6:
        print("         on a CPU, a network of this size takes very long; --quick takes minutes")


def say_next(run, start, s, stop):
    """Print the commands that follow; end as the signal does if there was one."""
    out = shlex.quote(str(run.out))
    if run.step < s.steps:
        again = f"{beside('train.py')} --out {out}" if WORLD == 1 else "repeat the command"
        print(f"stopped at step {run.step:,}; to go on: {again}", file=sys.stderr)
        stop.end() if stop.number else sys.exit(1)
    if start == run.step:
        print(f"{run.out} is finished; --steps continues it, and another --out begins a new run")
    few = " --steps 10" if "v" in s.parts else ""  # with eps, few steps need a long training
    print(f"done: {run.out} is at step {run.step:,}; next:")
    print(f"  {beside('export.py')} --checkpoint {out} --onnx model.onnx")
    print(f"  {beside('sample.py')} --onnx model.onnx{few}{' --guidance 1' * bool(run.names)}")


def beside(name):
    """Return a command that runs a program of the project from the current folder."""
    path = Path(__file__).with_name(name)
    return f"python {shlex.quote(name if path.parent == Path.cwd() else str(path))}"


def main(given=None, build=build):
    """Train a run. given: the flags, {name: value}; without them, those of the command line.

    build: returns the network and its Diffusion, as in run.py.
    """
    guard_output()
    given = command_line(__doc__) if given is None else given
    torch.set_float32_matmul_precision("high")  # TF32 for products that stay float32
    torch.backends.cudnn.benchmark = True  # all batches are of one size
    device = choose_device(given.get("device", "auto"), LOCAL_RANK if WORLD > 1 else None)
    join(device)

    run = Run(Path(given.get("out") or ("run" if "data" in given else "demo")), build)
    state = from_first(run.open, given.get("data"), given.get("init"))
    s = agree(choose_settings, given, state, run.out, device, WORLD)
    load_here = partial(load_images, s, state, run, device)
    data = agree(load_here if LOCAL_RANK == 0 else lambda: None)  # the others find them decoded
    data = agree(load_here if LOCAL_RANK > 0 else lambda: data)
    check_processes(s, data)

    run.begin(s, data, state, device)
    if RANK == 0:
        run.begin_log()
    describe(run, data, s, device)
    start, network = run.step, run.parts["model"]
    if WORLD > 1:
        network = DistributedDataParallel(network, gradient_as_bucket_view=True)
    network = compiled(network, device, s.steps - start, given.get("compile"))
    stop = train(run, network, data, s)
    leave()
    say_next(run, start, s, stop)


if __name__ == "__main__":
    main()
