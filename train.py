"""Train a DDPM: a folder of images in, run/checkpoint.pt out.

    python train.py                            # the built-in demo, minutes on a CPU, into demo/
    python train.py --data ./images            # the paper's CIFAR-10 run on your images, into run/
    python train.py --data ./images --quick    # a small network, minutes on two CPU cores
    python train.py --data ./images --classes  # the sub-folders are classes, to sample by name
    python train.py --out run                  # resumes a run, as repeating its first command does
    python train.py --data ./others --init run --out new    # starts from the weights of a run
    torchrun --standalone --nproc_per_node=4 train.py --data ./images    # on four GPUs

Besides the checkpoint, the run folder holds the decoded images, log.csv (one row per step) and
preview-STEP.png: samples of the averaged network (EMA), always from the same noise. run.py defines
the settings, folder.py manages the folder, and processes.py connects the processes of torchrun.
"""

import copy
import hashlib
import shlex
import sys
import time
from collections import deque
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

import processes
from arguments import choose_settings, command_line
from folder import Folder
from images import demo_images, from_pixels, read_folder
from program import end_by_signal, guard_output, stop_requests
from run import (
    Run,
    build,
    choose_device,
    compiled,
    make_optimizer,
    to_device,
)

# -------------------------------------------------------------------------------------- Algorithm 1


def algorithm_1(network, ema, optimizer, diffusion, data, s, start=0):
    """Yield the loss and its gradient norm after each step of Algorithm 1, indefinitely.

    Both are 0-d tensors on the device of the network. No step waits for the device, so that the CPU
    prepares the next step while a GPU computes. With several processes, DistributedDataParallel
    averages the gradients, and the loss of the step is the mean of what the processes yield.

    network: what is trained. ema: the average of its weights. data: a Data. s: the Settings. start:
    the number of steps already taken, which determines the next batch.
    """
    device = next(network.parameters()).device
    for k in count(start):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(k, s)
        loss_sum = 0
        for i, (x0, t, noise, y) in enumerate(draw_batch(data, diffusion, k, s, device)):
            model = partial(network, y=y)  # eps_theta(x_t, t), given the classes
            # Like DDP's no_sync(): average the gradients only once, after the last micro-batch.
            network.require_backward_grad_sync = i == s.accumulate - 1
            with torch.autocast(device.type, torch.bfloat16, enabled=s.amp):
                loss = diffusion.loss(model, x0, t, noise) / s.accumulate
            loss.backward()
            loss_sum = loss_sum + loss.detach()
        norm = clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, network, k, s.ema)
        yield loss_sum, norm


def draw_batch(data, diffusion, k, s, device):
    """Yield (x0, t, noise, y) for each micro-batch of batch k that this process computes.

    The batch depends only on the seed and k, so that no state of a generator has to be saved. Each
    process draws the whole batch, and computes its share of it in --accumulate micro-batches. x0
    and noise are float32 (B, C, H, W), t is int64 (B,), and y the classes, int64 (B,), or None.
    """
    home = data.images.device  # the CPU if they are too large for the GPU
    set_seed(device, s.seed, k, 0)
    index = torch.randint(len(data.images), (s.batch,), device=home)
    flip = torch.rand(s.batch, 1, 1, 1, device=device) < (0.5 if s.flip else 0)
    t = diffusion.draw_t(s.batch, device)
    noise = torch.randn(s.batch, *data.images.shape[1:], device=device)
    y = None
    if data.names:  # drop a tenth of the labels, because guidance also needs eps without a class
        drop = torch.rand(s.batch, device=home) < 0.1
        y = to_device(data.labels[index].masked_fill(drop, len(data.names)), device)
    size = s.batch // (processes.WORLD * s.accumulate)
    for share in range(processes.RANK * s.accumulate, (processes.RANK + 1) * s.accumulate):
        mine = slice(share * size, (share + 1) * size)
        x0 = from_pixels(to_device(data.images[index[mine]], device))
        x0 = torch.where(flip[mine], x0.flip(3), x0)
        set_seed(device, s.seed, k, 1 + share)  # for dropout
        yield x0, t[mine], noise[mine], None if y is None else y[mine]


def set_seed(device, *numbers):
    """Seed the generators of the CPU and the device from (seed, step, part)."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":  # torch.manual_seed would seed every device
        torch.get_device_module(device).manual_seed(seed)


def learning_rate(k, s):
    """Return --lr, or less in the first --warmup steps and in the --cooldown at the end."""
    rise = (k + 1) / max(1, s.warmup)
    fall = (s.steps - k) / max(1, s.cooldown * s.steps)  # at least 1 if --cooldown is 0
    return s.lr * min(1.0, rise, fall)


def update_ema(ema, network, k, decay):
    """Update the averaged weights, which are used for sampling, in place.

    Unlike in the authors' code, the decay grows with the step, so that the initial weights soon
    lose their influence.
    """
    decay = min(decay, (1 + k) / (10 + k))
    get_ema_multi_avg_fn(decay)([*ema.parameters()], [*network.parameters()], None)


# ----------------------------------------------------------------------------------------- the loop


def train(updates, run, folder, stop):
    """Take the steps that remain, until `stop` has a signal; log, draw and save.

    updates: the generator algorithm_1.
    """
    s, last_save, recent = run.settings, time.monotonic(), deque(maxlen=100)
    options = {"initial": run.step, "unit": "step", "mininterval": 1, "disable": processes.RANK > 0}
    with tqdm(total=s.steps, **options) as bar:
        for block in blocks(updates, run.step, s, stop):
            losses, norms, stopping = read(block, stop)
            begun, run.step = run.step, run.step + len(block)
            if not np.isfinite([*losses, *norms]).all():
                also = ", or repeat the command with --no-amp" if s.amp else ""
                sys.exit("train.py: the loss or its gradient is infinite or NaN at or before step "
                         f"{run.step:,}; the steps since the last checkpoint are lost; begin "
                         "another run with a lower --lr" + also)  # fmt: skip
            if processes.RANK == 0:
                folder.still_hold()
                rates = [learning_rate(k, s) for k in range(begun, run.step)]
                steps = range(begun + 1, run.step + 1)
                folder.log(zip(steps, losses, norms, rates, strict=True))
                if has_preview(run.step, s):
                    folder.save_preview(run)
                is_due = time.monotonic() - last_save > 60 * s.save_minutes
                if is_due or stopping or run.step == s.steps:
                    folder.save(run)
                    last_save = time.monotonic()
            recent.extend(losses)
            bar.set_postfix_str(f"loss {np.mean(recent):.4f}", refresh=False)
            bar.update(len(block))
            if stopping:
                return


def blocks(updates, step, s, stop):
    """Yield lists of the next steps' (loss, norm), from `step` on, to be read together.

    Reading a loss waits for a GPU, so a list has up to ten of them. All processes end it at the
    same step.
    """
    block = []
    for k in range(step + 1, s.steps + 1):
        block.append(next(updates))
        at_once = block[0][0].device.type == "cpu" or (stop and processes.WORLD == 1)
        if at_once or k % 10 == 0 or has_preview(k, s):
            yield block
            block = []


def has_preview(k, s):
    """Return whether a preview is drawn after step k: at regular intervals, and at the end."""
    return k % s.preview_every == 0 or k == s.steps


def read(block, stop):
    """Return the losses and norms of a block of steps, and whether a process was asked to stop.

    With several processes, they are means over the processes, in one reduction.
    """
    losses, norms = map(torch.stack, zip(*block, strict=True))
    values = torch.cat([losses, norms, losses.new_tensor([len(stop)])])
    *values, signals = processes.mean(values).tolist()
    return values[: len(block)], values[len(block) :], signals > 0


# -------------------------------------------------------------------------------------- the program


class Data(NamedTuple):
    """The training set, on the device if it has less than 2 GB."""

    images: Tensor  # uint8 (N, C, H, W)
    labels: Tensor | None  # int64 (N,), on the same device
    names: tuple  # the names of the classes
    digest: str  # a hash of images, labels and names


def load_images(s, channels, folder, device):
    """Return the Data, decoding the images into the folder of the run unless they are there.

    channels: 1, 3, or None to detect them.
    """
    images, labels, names = demo_images(), None, ()
    if s.data is not None:
        images, labels, names = read_folder(s.data, s.image_size, channels, s.classes, folder.path)
    digest = hashlib.blake2b(np.ascontiguousarray(images), digest_size=8)
    digest.update(repr((images.shape, names, labels is not None and labels.tolist())).encode())
    images = torch.from_numpy(images)
    if images.nbytes < 2e9:  # larger sets move to the device batch by batch
        images = images.to(device)
    labels = None if labels is None else torch.from_numpy(labels).to(images.device)
    return Data(images, labels, names, digest.hexdigest())


def check_images(data, s, state):
    """Exit if the images are not those of the checkpoint that the run begins with."""
    source, shape = state["source"], tuple(data.images.shape[1:])
    if (shape, data.names) != (state["shape"], state["names"]):
        sys.exit(f"train.py: {source} is for images of {state['shape']} and the classes "
                 f"{state['names']}, not {shape} and {data.names}")  # fmt: skip
    if state["images"] not in (None, data.digest):
        if s.data != state["settings"]["data"]:
            sys.exit(f"train.py: {source} was trained on other images; use another --out")
        print(f"the images have changed since step {state['step']:,}; training uses the new ones")


def check_processes(s, data):
    """Exit if the settings or the images of the processes differ."""
    mine = vars(s) | {"data": None, "images": data.digest}
    if others := [other for other in processes.from_all(mine) if other != mine]:
        wrong = [name for name in mine if others[0][name] != mine[name]]
        sys.exit(f"train.py: the processes have different {' and '.join(wrong)}")


def prepare(folder, given, device, build):
    """Return (state, s, data): a checkpoint to begin with, or None, the Settings and the Data.

    The first process of each machine decodes the images, while the others wait.
    """
    state = processes.from_first(folder.open, given.get("data"), given.get("init"))
    s = choose_settings(given, state, device, processes.WORLD, build)
    processes.from_first(folder.begin)
    if processes.LOCAL_RANK == 0 < processes.RANK:  # on another machine
        folder.make()
    with processes.first_on_each_machine():
        data = load_images(s, state["shape"][0] if state else s.in_channels, folder, device)
    if state:
        check_images(data, s, state)
    check_processes(s, data)
    s.in_channels = data.images.shape[1]  # what was detected is saved
    return state, s, data


def make_run(state, s, data, device, build):
    """Return (run, diffusion): a Run with new weights, or with those of a checkpoint `state`."""
    torch.manual_seed(s.seed)
    shape = tuple(data.images.shape[1:])
    network, diffusion = build(s, shape, data.names)
    ema = copy.deepcopy(network.to(device)).requires_grad_(False).eval()
    run = Run(
        settings=s, shape=shape, names=data.names, images=data.digest, step=0,
        model=network, ema=ema, optimizer=make_optimizer(network, s),
    )  # fmt: skip
    if state:
        run.load(state)
    return run, diffusion


def describe(run, data, device):
    """Print what is trained, on what and how."""
    n, names, s = sum(p.numel() for p in run.ema.parameters()), data.names, run.settings
    kind = "bfloat16" if s.amp else "float32"
    of = f", in {len(names):,} classes: {', '.join(names[:10])}" if names else ""
    print(f"images   {len(data.images):,} of {'x'.join(map(str, run.shape))}{of}")
    print(f"network  {n:,} parameters on {processes.WORLD} x {device}, {kind}")
    print(f"steps    {run.step:,} to {s.steps:,}; a preview every {s.preview_every:,}")
    if run.step == s.steps:
        print("the run is finished; a larger --steps continues it, another --out begins a new run")
    if s.data and len(data.images) < 1000:
        print("with fewer than 1,000 images, long training can copy them (docs/beyond.md)")
    if device.type == "cpu" and n > 5e6:
        print("on a CPU, training a network of this size takes very long; --quick takes minutes")


def say_next(run, out):
    """Print the commands that follow. out: the folder of the run."""
    if run.step < run.settings.steps:
        print(f"stopped at step {run.step:,}; to go on, repeat the command", file=sys.stderr)
        return
    here = Path(__file__).parent
    here = "" if here == Path.cwd() else f"{here}/"
    # After a short run of the paper's recipe, few steps fail (benchmarks/ladder.md).
    few = " --steps 10" if "v" in run.settings.parts else ""
    guidance = " --guidance 1" if run.names else ""
    print(f"done: {out} is at step {run.step:,}; next:")
    quoted = shlex.quote(str(out))
    print(f"  python {shlex.quote(here + 'export.py')} --checkpoint {quoted} --onnx model.onnx")
    print(f"  python {shlex.quote(here + 'sample.py')} --onnx model.onnx{few}{guidance}")


def main(given=None, build=build):
    """Start or resume a run; return it as a Run. A signal stops the training.

    given: flags, {name: value}; None reads the command line, and a signal then ends the program.
    build: makes the network and its Diffusion, as in run.py. Raises SystemExit for a mistake in
    what is given.
    """
    is_program = given is None
    if is_program:
        guard_output()
    given = command_line(__doc__, given)
    torch.set_float32_matmul_precision("high")  # TF32 for the remaining float32 products
    torch.backends.cudnn.benchmark = True  # all batches are of one size
    index = processes.LOCAL_RANK if processes.WORLD > 1 else None
    device = choose_device(given.get("device", "auto"), index)
    processes.join(device)
    out = Path(given.get("out") or ("run" if "data" in given else "demo"))
    with Folder(out) as folder:  # which the first process holds
        state, s, data = prepare(folder, given, device, build)
        run, diffusion = make_run(state, s, data, device, build)
        folder.keep()
        describe(run, data, device)
        if processes.RANK == 0:
            folder.begin_log(run.step)
        network = run.model
        if processes.WORLD > 1:
            network = DistributedDataParallel(network, gradient_as_bucket_view=True)
        if given.get("compile"):
            network = compiled(network)
        updates = algorithm_1(network, run.ema, run.optimizer, diffusion, data, s, run.step)
        with stop_requests() as stop:
            train(updates, run, folder, stop)
    processes.leave()
    if processes.RANK == 0:
        say_next(run, out)
    if run.step < s.steps and is_program:
        if not stop:  # another process received the signal
            sys.exit(1)
        end_by_signal(stop[0])
    return run


if __name__ == "__main__":
    main()
