"""Train a DDPM: a folder of images in, run/checkpoint.pt out.

    python train.py                       # the built-in demo, a few minutes on a laptop CPU
    python train.py --data ./images       # the paper's CIFAR-10 run, on your images
    python train.py --data ./images --quick    # a small network, minutes on two CPU cores
    python train.py --data ./images --classes  # the sub-folders are classes, to sample by name
    python train.py --data ./images --init google/ddpm-cifar10-32    # fine-tune published weights
    torchrun --standalone --nproc_per_node=4 train.py --data ./images   # on four GPUs

Rerunning the same command resumes training. Beside the checkpoint, the run folder holds log.csv
(one row per step), loss.png and preview-STEP.png: samples of the averaged network (EMA), always
from the same noise.
"""

import argparse
import contextlib
import copy
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
from data import cached_folder, class_names, demo_images, fingerprint
from ddpm import Diffusion, UNet, cosine_betas, linear_betas
from images import from_pixels, grid, save_image, save_plot, to_pixels
from muon import Muon

# torchrun sets these: the rank of this process, the number of all, and its rank on its machine.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))

# -------------------------------------------------------------------------------------- Algorithm 1


def learning_rate(step, lr, warmup, decay_steps=None):
    """Return the learning rate: it rises linearly to lr over `warmup` steps.

    With decay_steps, it also falls linearly, to 0 at that step.
    """
    decay = 1 - step / decay_steps if decay_steps else 1.0
    return lr * min(1.0, (step + 1) / max(1, warmup)) * decay


def ema_decay(step, decay):
    """Return the decay of the average, which grows so that the first weights are soon forgotten."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(averages, parameters, step, decay):
    """Compute averages = d averages + (1 - d) parameters, in place.

    Samples come from the averages: on CIFAR-10 that is an FID of 3.2 instead of 8 to 12.
    """
    torch._foreach_lerp_(averages, parameters, 1 - ema_decay(step, decay))


def seed_of(*numbers):
    """Return a seed for each (seed, step, ...).

    Because every step is seeded, a checkpoint need not hold the state of a random generator.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def set_seed(number, device):
    """Seed the generators of the CPU and of one device; torch.manual_seed visits every device."""
    torch.default_generator.manual_seed(number)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(number)


def train_step(step, network, averages, optimizer, diffusion, images, args, labels=None):
    """Take a step of Algorithm 1 on one batch, and update the averages of the parameters.

    averages: a list of tensors like the optimizer's parameters. images: uint8 (N, C, H, W). labels:
    int64 (N,), or None without classes. The result is a tensor (2,) on the device; summed over the
    processes, it is the loss and the norm of the gradient. Nothing here waits for CUDA, so that
    Python can prepare the next step meanwhile.
    """
    parameters = optimizer.param_groups[0]["params"]
    device = parameters[0].device
    is_cuda, parts = device.type == "cuda", WORLD * args.accumulate

    def to_device(x):
        if is_cuda and not x.is_cuda:  # a copy from pinned memory need not be waited for
            x = x.pin_memory()
        return x.to(device, non_blocking=is_cuda)

    # Every process draws the whole batch, so that the batch does not depend on their number.
    set_seed(seed_of(args.seed, step), device)
    index = torch.randint(len(images), (args.batch,), device=images.device)
    flip = torch.rand(args.batch, 1, 1, 1, device=device) < (0.5 if args.flip else 0)
    t = torch.randint(diffusion.T, (args.batch,), device=device)
    noise = torch.randn(args.batch, *images.shape[1:], device=device)

    if labels is not None:  # a tenth is dropped, because guidance needs eps without a class too
        drop = torch.rand(args.batch, device=images.device) < 0.1
        y = labels[index].masked_fill(drop, len(args.classes)).tensor_split(parts)

    # Each process computes its share of the batch, in --accumulate parts.
    index, flip, t, noise = (drawn.tensor_split(parts) for drawn in (index, flip, t, noise))
    loss = torch.zeros((), device=device)
    for k in range(RANK * args.accumulate, (RANK + 1) * args.accumulate):
        # For dropout. It is 1 + k, because (seed, step, 0) would give the seed above.
        set_seed(seed_of(args.seed, step, 1 + k), device)
        x0 = from_pixels(to_device(images[index[k]]))
        x0 = torch.where(flip[k], x0.flip(3), x0)
        eps_model = network if labels is None else partial(network, y=to_device(y[k]))
        is_last = (k + 1) % args.accumulate == 0  # the processes exchange their gradients once
        with contextlib.nullcontext() if WORLD == 1 or is_last else network.no_sync():
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                part_loss = diffusion.loss(eps_model, x0, t[k], noise[k], args.weighting)
            part_loss = part_loss * (len(x0) / args.batch)
            (part_loss * WORLD).backward()  # DistributedDataParallel averages over the processes
        loss += part_loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    update_ema(averages, parameters, step, args.ema)
    return torch.stack([loss, norm / WORLD])  # the norm is the same in every process


# -------------------------------------------------------------------------------------------- flags

# The paper's CIFAR-10 network and run.
PAPER = dict(
    image_size=32, base_channels=128, channel_mults=[1, 2, 2, 2], num_res_blocks=2,
    attention_resolutions=[16], dropout=0.1, norm_groups=None, schedule="linear", predicts="eps",
    weighting="simple", optimizer="adam", batch=128, lr=2e-4, lr_decay=False, steps=800_000,
)  # fmt: skip

# --quick: small images after minutes on a CPU. benchmarks/speedrun.md has measurements.
QUICK = dict(
    base_channels=16, channel_mults=[1, 2, 4, 4], num_res_blocks=1, attention_resolutions=[],
    dropout=0.0, predicts="v", weighting="min-snr", optimizer="muon", batch=64, lr=6e-3,
    lr_decay=True, steps=1500,
)  # fmt: skip

# The demo: a network and a schedule that learn it on two CPU cores in under four minutes.
DEMO = dict(
    image_size=8, base_channels=32, channel_mults=[1, 2], num_res_blocks=1,
    attention_resolutions=[], dropout=0.0, batch=64, lr=3e-3, lr_decay=True, steps=2400,
)  # fmt: skip


def make_parser():
    """Return the parser of the command line, whose defaults are PAPER."""
    parser = argparse.ArgumentParser(
        usage="python train.py --data ./images [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag, switch = parser.add_argument, argparse.BooleanOptionalAction
    flag("--data", help="folder of images, including its sub-folders [the built-in demo]")
    flag("--classes", action="store_true", help="the sub-folders of --data are classes")
    flag("--out", type=Path, default="run", help="folder of the run [%(default)s]")
    flag("--quick", action="store_true", help="a small network and a short run; see the manual")
    flag("--init", help="start from these weights: a checkpoint, or weights for diffusers")
    flag("--image-size", type=int, help="pixels; images are cropped to a square [%(default)s]")
    flag("--channels", type=int, choices=(1, 3), help="1 grey, 3 colour [as found]")
    flag("--base-channels", type=int, help="width of the first level [%(default)s]")
    flag("--channel-mults", type=int, nargs="+", help="widths of the levels [%(default)s]")
    flag("--num-res-blocks", type=int, help="residual blocks per level [%(default)s]")
    flag("--attention-resolutions", type=int, nargs="*", help="in pixels [%(default)s]")
    flag("--dropout", type=float, help="share of the activations to drop [%(default)s]")
    flag("--schedule", choices=("linear", "cosine"), help="betas [%(default)s]")
    flag("--variance", default="large", choices=("large", "small"), help="sigma_t^2 [%(default)s]")
    flag("--predicts", choices=("eps", "mean", "x0", "v"), help="network's output [%(default)s]")
    flag("--weighting", choices=("simple", "vlb", "min-snr", "native"),
         help="of the loss: (14), (12), and others; see the manual [%(default)s]")  # fmt: skip
    flag("--batch", type=int, help="images per step, over all GPUs [%(default)s]")
    flag("--accumulate", type=int, default=1, help="parts of a batch, to save memory [%(default)s]")
    flag("--optimizer", choices=("adam", "muon"), help="muon suits short runs [%(default)s]")
    flag("--lr", type=float, help="learning rate [%(default)s]")
    flag("--warmup", type=int, help="steps until --lr is reached [min(5000, steps / 20)]")
    flag("--lr-decay", action=switch, help="let --lr fall to 0 at --steps, for short runs")
    flag("--steps", type=int, help="length of the training [%(default)s]")
    flag("--ema", type=float, default=0.9999, help="decay of the averaged weights [%(default)s]")
    flag("--flip", action=switch, default=True, help="mirror images at random")
    flag("--seed", type=int, default=0, help="seed of all random numbers [%(default)s]")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps or xpu [%(default)s]")
    flag("--amp", action=switch, help="bfloat16 [where the device computes in it]")
    flag("--compile", action=switch, help="use torch.compile [on CUDA, from 5,000 steps on]")
    flag("--preview-every", type=int, help="steps [at most 4 %% of the time]")
    flag("--save-minutes", type=float, default=5.0, help="between checkpoints [%(default)s]")
    parser.set_defaults(**PAPER)
    return parser


def arguments():
    """Return the arguments of the command line, and the weights of --init or None.

    What is not given comes from the weights, else from the demo or --quick, else from the paper.
    """
    parser = make_parser()
    args, weights, fixed = parser.parse_args(), None, {}
    if args.quick and args.data is None:
        parser.error("--quick needs --data; the demo is quick by itself")
    if args.data is None:
        parser.set_defaults(**DEMO)
    elif not Path(args.data).is_dir():
        parser.error(f"--data {args.data}: there is no such folder")
    elif args.quick:
        parser.set_defaults(**QUICK)
    if args.init:  # a run that is resumed reads its own weights, and needs the others no longer
        own = args.out / "checkpoint.pt"
        weights = checkpoint.load(own if own.is_file() else args.init)
        names = "image_size base_channels channel_mults num_res_blocks attention_resolutions"
        fixed = {name: weights.settings[name] for name in names.split()}
        fixed |= {"channels": weights.settings["in_channels"], "schedule": "the weights' own"}
        fixed |= {"predicts": weights.diffusion.predicts}
        parser.set_defaults(variance=weights.diffusion.variance, **fixed)
        parser.set_defaults(norm_groups=weights.settings["norm_groups"])
    args = parser.parse_args()

    for name, value in fixed.items():
        if getattr(args, name) != value:
            parser.error(f"--{name.replace('_', '-')} must be {value}, because of --init")
    if args.classes and args.data is None:
        parser.error("--classes needs --data")
    args.classes = class_names(args.data, args.out.resolve()) if args.classes else []
    if weights and weights.classes and not args.classes:
        parser.error("--init is a network with classes, so --classes is needed")
    if args.data is None and (args.image_size, args.channels or 3) != (8, 3):
        parser.error("without --data the images are those of the demo, 8x8 in colour")
    numbers = args.image_size, args.base_channels, args.batch, args.accumulate, args.steps
    if min(numbers) < 1 or args.preview_every == 0 or args.seed < 0:
        parser.error("sizes and numbers of steps must be at least 1, and --seed at least 0")
    sizes = [args.image_size >> level for level in range(len(args.channel_mults))]
    if args.image_size % 2 ** (len(sizes) - 1):
        parser.error(f"--image-size must be a multiple of {2 ** (len(sizes) - 1)}")
    if not set(args.attention_resolutions) <= set(sizes):
        parser.error(f"--attention-resolutions must be among {' '.join(map(str, sizes))}")
    if args.base_channels % 4:
        parser.error("--base-channels must be a multiple of 4")
    if args.batch < WORLD * args.accumulate:
        parser.error("--batch must have an image for each GPU and each part of --accumulate")

    args.device = choose_device(args.device)
    if args.amp is None:  # these outputs must be exact: at t = 0, eps errs 100 times as much
        args.amp = has_bfloat16(args.device) and args.predicts not in ("mean", "x0")
    if args.compile is None:  # it takes a minute or more
        is_cuda = args.device.type == "cuda"
        args.compile = is_cuda and args.steps >= 5000 and find_spec("triton") is not None
    if args.preview_every is None:  # a preview costs as much as training on 240 images
        args.preview_every = max(25 * 240 // args.batch, args.steps // 100, 1)
    return args, weights


def choose_device(name):
    """Return the torch.device that --device names; "auto" is the accelerator, if there is one.

    Under torchrun, each process of a machine has an accelerator of its own.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    kind, _, index = name.partition(":")
    if kind == "cpu" or (kind == "auto" and not found):
        if kind == "auto" and RANK == 0 and shutil.which("nvidia-smi"):
            cuda = torch.version.cuda
            why = f"its driver may be too old for CUDA {cuda}" if cuda else "torch is a CPU build"
            print(f"torch can't use the NVIDIA GPU: {why}; see Accelerators in docs/guide.md")
        return torch.device("cpu")
    if not found or kind not in ("auto", found.type):
        sys.exit(f"--device {name}: torch sees {found.type if found else 'only a CPU'} here")
    index, count = LOCAL_RANK if WORLD > 1 else int(index or 0), torch.accelerator.device_count()
    if WORLD > 1 and count == 1 and os.environ.get("CUDA_VISIBLE_DEVICES"):
        index = 0  # some launchers show each process one card
    if index >= count:
        sys.exit(f"device {found.type}:{index} is not there: torch sees {count} of them")
    torch.accelerator.set_device_index(index)
    return torch.device(found.type, index)


def has_bfloat16(device):
    """Return whether the device computes in bfloat16; emulating it would only cost time."""
    if device.type == "cpu":
        return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
    if device.type == "mps":  # nobody has measured it
        return False
    return torch.get_device_module(device).is_bf16_supported(including_emulation=False)


def read_every(device):
    """Return how many steps apart the losses are read. Each read waits for the device."""
    return 1 if device.type == "cpu" else 10


def quick_flags(args):
    """Return what --quick stands for, as on a command line."""
    words = []
    for name in QUICK:
        value, flag = getattr(args, name), name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return " ".join(words)


# -------------------------------------------------------------------------------------- the program


def config_of(args, weights, channels, images=None):
    """Return all settings of the run: those of the network, of the process, and the others.

    channels: of the images, None if unknown. images: their fingerprint.
    """
    schedules = {"linear": linear_betas, "cosine": cosine_betas}
    betas = weights.diffusion.betas if weights else schedules[args.schedule]()

    def flags(names):
        return {name: getattr(args, name) for name in names.split()}

    config = {
        "model": flags("image_size base_channels channel_mults num_res_blocks")
        | flags("attention_resolutions dropout norm_groups")
        | {"in_channels": channels},
        "diffusion": flags("variance predicts") | {"betas": betas.tolist()},
        "train": flags("optimizer batch lr warmup lr_decay weighting ema flip seed init")
        | {
            "steps": args.steps if args.lr_decay else None,  # else the run can be made longer
            "data": args.data and Path(args.data).resolve().name,
            "images": images,
        },
    }
    if args.classes:
        config["model"]["num_classes"] = len(args.classes)
        config["train"]["classes"] = args.classes
    return config


def refuse_other_run(out, old, new):
    """Exit unless the config of the checkpoint in the folder `out` has the settings of this run."""
    different = checkpoint.differences(old, new, besides=("data", "images"))
    if different:
        lines = "; ".join(f"{name} was {before}, now {now}" for name, before, now in different)
        sys.exit(
            f"{out} holds a run with other settings: {lines}. Use another --out (--init {out} "
            f"starts from its weights), or move the run aside: mv {out} {out}-old"
        )


def refuse_other_ranks(config, args):
    """Exit in every process unless all processes have the same settings and images."""
    parts = {"steps": args.steps, "accumulate": args.accumulate}
    mine, everyone = config | {"train": config["train"] | parts}, [None] * WORLD
    dist.all_gather_object(everyone, mine)
    for rank, theirs in enumerate(everyone):
        for name, first, other in checkpoint.differences(everyone[0], theirs, ("data", "init")):
            sys.exit(f"{name} is {first} in rank 0, but {other} in rank {rank}")


@contextlib.contextmanager
def catch_signals():
    """Give an Event that SIGINT (Ctrl-C) and SIGTERM set instead of ending the program."""
    stop = threading.Event()
    old = {
        number: signal.signal(number, lambda *_: stop.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def read_losses(pending, stop):
    """Return the (loss, norm) of some steps, and whether a process was told to stop.

    pending: what train_step returned. This waits for the device, and for the other processes.
    """
    values = torch.stack([*pending, pending[0].new_tensor([stop.is_set(), 0])])
    if WORLD > 1:
        dist.all_reduce(values)
    *losses, (stops, _) = values.tolist()
    return losses, stops > 0


def cut_log(path, step):
    """Drop the rows of log.csv after this step, which are newer than the checkpoint."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[: step + 1]))


def write_log(path, step, losses, lr_at):
    """Append the rows of the steps before `step` to log.csv."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "" if path.exists() else "step,loss,grad_norm,lr\n"
    for k, (loss, norm) in enumerate(losses, step - len(losses)):
        text += f"{k + 1},{loss:.6g},{norm:.6g},{lr_at(k):.6g}\n"
    with open(path, "a") as file:
        file.write(text)


def save_loss_plot(log, path):
    """Save the losses of log.csv as a curve, averaged over 200 intervals."""
    rows = np.loadtxt(log, delimiter=",", skiprows=1, ndmin=2)
    parts = np.array_split(rows[:, :2], min(len(rows), 200))
    steps, losses = np.transpose([part.mean(0) for part in parts])
    save_plot(path, steps, losses, "step", "loss", log=True)


def save_preview(path, ema, diffusion, shape, args):
    """Save a grid of 36 images of this shape (C, H, W), drawn by the averaged network.

    With classes, each has a row.
    """
    noise, rows = torch.Generator(args.device).manual_seed(args.seed), len(args.classes)
    y = torch.arange(36, device=args.device) % rows if rows else None
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
        x0 = diffusion.sample(
            partial(ema, y=y), (36, *shape), min(20, diffusion.T), "dpm",
            generator=noise, device=args.device,
        )  # fmt: skip
    save_image(path, grid(to_pixels(x0.cpu().numpy()), rows=rows))


def main():
    args, weights = arguments()
    is_main, device, out = RANK == 0, args.device, args.out
    torch.set_float32_matmul_precision("high")  # TF32 for what stays float32
    if WORLD > 1:
        dist.init_process_group(timeout=timedelta(hours=4))  # to decode images can take hours

    # -- the checkpoint, if this run began before
    state = checkpoint.read_run(out) if is_main else None
    if WORLD > 1:
        states = [state]
        dist.broadcast_object_list(states)
        (state,) = states
    start, channels = 0, args.channels
    if args.warmup is None:  # a run that is made longer keeps its warm-up
        args.warmup = state["config"]["train"]["warmup"] if state else min(5000, args.steps // 20)
    if state:
        start, old = state["step"], state["config"]
        channels = channels or old["model"]["in_channels"]
        refuse_other_run(out, old, config_of(args, weights, channels))
        if start > args.steps:
            sys.exit(f"{out} is at step {start:,} already, so --steps must be larger")

    # -- the training set
    out.mkdir(parents=True, exist_ok=True)
    if WORLD > 1 and LOCAL_RANK > 0:
        dist.barrier()  # the first process of each machine decodes the images
    if args.data is None:
        images, labels = demo_images(), None
    else:
        images, labels = cached_folder(args.data, args.image_size, channels, out, args.classes)
    if WORLD > 1 and LOCAL_RANK == 0:
        dist.barrier()
    config = config_of(args, weights, images.shape[1], fingerprint(images))
    if WORLD > 1:
        refuse_other_ranks(config, args)
    if is_main and state and old["train"]["images"] != config["train"]["images"]:
        print(f"the images have changed since step {start:,}; training continues with them")
    if is_main and len(images) < 100:
        print(f"only {len(images)} images: the network will memorise them")
    images = torch.from_numpy(images)
    if images.nbytes < 2e9:  # larger sets are moved batch by batch
        images = images.to(device)
    if labels is not None:
        labels = torch.from_numpy(labels).to(images.device)

    # -- the network, its average and the optimizer, as they start or as they were saved
    torch.manual_seed(args.seed)
    diffusion = Diffusion(**config["diffusion"])
    model = UNet(**config["model"]).to(device)
    if weights:
        old = weights.model.state_dict()
        if args.classes and weights.classes != args.classes:
            old.pop("class_embedding.weight", None)
            if is_main:
                print("the classes are new to the weights of --init: they begin without effect")
        model.load_state_dict(model.state_dict() | old)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    averages = list(ema.parameters())
    if args.optimizer == "muon":
        optimizer = Muon(model, args.lr)
    else:
        optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    if state:
        checkpoint.restore(state, model, ema, optimizer)
    network = DistributedDataParallel(model, gradient_as_bucket_view=True) if WORLD > 1 else model
    network = torch.compile(network) if args.compile else network

    # -- the run folder
    def save(step):
        checkpoint.save(out / "checkpoint.pt", config, step, model, ema, optimizer)

    if is_main:
        if not state:
            save(0)  # from now on, the folder is that of a run
        cut_log(out / "log.csv", start)
        size = sum(p.numel() for p in model.parameters())
        print(f"images   {len(images):,} of {'x'.join(map(str, images.shape[1:]))}")
        if args.classes:
            each, some = len(images) // len(args.classes), ", ".join(args.classes[:3])
            print(f"classes  {len(args.classes):,}, about {each:,} images each: {some}, ...")
        if args.quick:
            print(f"--quick  {quick_flags(args)}")
        where = f"{device}, {'bfloat16' if args.amp else 'float32'}" + ", compiled" * args.compile
        print(f"network  {size:,} parameters on {WORLD} x {where}")
        print(f"steps    {start:,} to {args.steps:,}, with a preview every {args.preview_every:,}")

    # -- the loop
    def lr_at(step):
        return learning_rate(step, args.lr, args.warmup, args.steps if args.lr_decay else None)

    done, pending, mean_loss, saved = start, [], None, time.monotonic()
    bar = tqdm(total=args.steps, initial=start, unit="step", mininterval=1, disable=not is_main)
    with bar, catch_signals() as stop:
        for step in range(start, args.steps):
            optimizer.param_groups[0]["lr"] = lr_at(step)
            pending.append(
                train_step(step, network, averages, optimizer, diffusion, images, args, labels)
            )
            show = (step + 1) % args.preview_every == 0 or step + 1 == args.steps
            must_read = show or (step + 1) % read_every(device) == 0
            if not must_read and not (WORLD == 1 and stop.is_set()):  # processes stop together
                continue

            losses, stops = read_losses(pending, stop)
            done, pending = step + 1, []
            if not np.isfinite(losses).all():
                sys.exit(
                    f"the loss is not finite at step {done:,}; the checkpoint on disk is from an "
                    "earlier step. Try a lower --lr, a longer --warmup, or --no-amp."
                )
            if is_main:
                write_log(out / "log.csv", done, losses, lr_at)
                for loss, _ in losses:
                    mean_loss = loss if mean_loss is None else 0.98 * mean_loss + 0.02 * loss
                bar.set_postfix_str(f"loss {mean_loss:.4f}", refresh=False)
                bar.update(len(losses))
                if show or stops or time.monotonic() - saved > 60 * args.save_minutes:
                    save(done)
                    saved = time.monotonic()
                if show:
                    preview = out / f"preview-{done:07d}.png"
                    save_preview(preview, ema, diffusion, images.shape[1:], args)
                    save_loss_plot(out / "log.csv", out / "loss.png")
            if stops:
                break

    if WORLD > 1:
        dist.destroy_process_group()
    if is_main and done == args.steps:
        print(f"done: {out / 'checkpoint.pt'} is at step {done:,}; next:")
        print(f"  python export.py --checkpoint {shlex.quote(str(out / 'checkpoint.pt'))}")
    elif is_main:
        program = "torchrun ..." if WORLD > 1 else "python"
        print(f"stopped at step {done:,}; to resume:\n  {program} {shlex.join(sys.argv)}")
    if done < args.steps:
        sys.exit(1)


if __name__ == "__main__":
    main()
