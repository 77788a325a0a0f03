"""Train a DDPM: a folder of images in, run/checkpoint.pt out.

    python train.py                       # the built-in demo, a few minutes on a laptop CPU
    python train.py --data ./images       # the paper's CIFAR-10 run, on your images
    python train.py --data ./images --quick    # a small network, minutes on two CPU cores
    python train.py --data ./images --classes  # the sub-folders are classes, to sample by name
    python train.py --data ./images --init hf:google/ddpm-cifar10-32   # fine-tune published weights
    torchrun --standalone --nproc_per_node=4 train.py --data ./images   # on four GPUs

Rerunning the same command resumes training. Besides the checkpoint, the run folder holds log.csv
(one row per step), loss.png and preview-STEP.png: samples of the averaged network (EMA), always
from the same noise.
"""

import argparse
import contextlib
import copy
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import device as machine
from beyond import TARGETS, as_eps, loss_weights
from data import class_names, demo_images, fingerprint, forget_others, read_folder
from ddpm import Diffusion, UNet
from device import LOCAL_RANK, RANK, WORLD, to_device
from exact import loss_floor
from images import from_pixels, print_any_name
from muon import Muon

LONG = 3 * 3600  # seconds; the time of a run that takes longer is said in words
LOG_TOGETHER = {"cpu": 1}  # steps logged at once; reading their losses waits for the device

# -------------------------------------------------------------------------------------- Algorithm 1


def draw_batch(step, images, labels, T, args):
    """Yield (x0, y, t, noise) for each of the --accumulate parts that this process computes.

    x0, noise: float32 (B, C, H, W). t: (B,). y: classes (B,), or None. images: uint8 (N, C, H, W).
    labels: int64 (N,), or None. The batch does not depend on the number of processes.
    """
    device, parts = args.device, WORLD * args.accumulate
    set_seed(device, args.seed, step, 0)
    index = torch.randint(len(images), (args.batch,), device=images.device)
    flip = torch.rand(args.batch, 1, 1, 1, device=device) < (0.5 if args.flip else 0)
    t = torch.randint(T, (args.batch,), device=device)
    noise = torch.randn(args.batch, *images.shape[1:], device=device)
    y = [None] * parts
    if labels is not None:  # a tenth is dropped, because guidance needs eps without a class too
        drop = torch.rand(args.batch, device=images.device) < 0.1
        drawn_labels = labels[index].masked_fill(drop, len(args.classes))
        y = to_device(drawn_labels, device).tensor_split(parts)
    index, flip, t, noise = (drawn.tensor_split(parts) for drawn in (index, flip, t, noise))
    for k in range(RANK * args.accumulate, (RANK + 1) * args.accumulate):
        set_seed(device, args.seed, step, 1 + k)  # for the dropout in the step of this part
        x0 = from_pixels(to_device(images[index[k]], device))
        yield torch.where(flip[k], x0.flip(3), x0), y[k], t[k], noise[k]


def loss_of(network, diffusion, args):
    """Return loss(x0, y, t, noise), in which the network computes in bfloat16 with --amp."""
    autocast = torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp)
    eps = autocast(as_eps(network, diffusion, args.predicts))
    weights = loss_weights(diffusion, args.weighting, args.predicts)
    return lambda x0, y, t, noise: diffusion.loss(partial(eps, y=y), x0, t, noise, weights)


def train_step(batch, loss_of_part, network, ema, optimizer, step, args):
    """Take a gradient step of Algorithm 1 on the batch of draw_batch, and update the average.

    The result is a tensor (2,), whose sum over the processes is the loss and the norm of the
    gradient. Nothing here waits for CUDA, so that Python can prepare the next step.
    """
    batch_loss = torch.zeros((), device=args.device)
    for part, (x0, y, t, noise) in enumerate(batch, 1):
        defer_sync = WORLD > 1 and part < args.accumulate  # exchange the gradients only once
        with network.no_sync() if defer_sync else contextlib.nullcontext():
            loss = loss_of_part(x0, y, t, noise) * len(x0) / args.batch
            (loss * WORLD).backward()  # DistributedDataParallel averages over the processes
        batch_loss += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    update_ema(ema, network, step, args.ema)
    return torch.stack([batch_loss, norm / WORLD])  # the norm is the same in every process


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """Update the average of the weights, with which samples are drawn, in place.

    Unlike in the authors' code, the decay grows with the step, so that the first weights are soon
    forgotten.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def learning_rate(step, lr, warmup, decay_steps=None):
    """Return lr after a linear rise over `warmup` steps, falling to 0 over decay_steps if given."""
    decay = 1 - step / decay_steps if decay_steps else 1.0
    return lr * min(1.0, (step + 1) / max(1, warmup)) * decay


def set_seed(device, *numbers):
    """Seed the generators of the CPU and the device from (seed, step, part); no state is saved."""
    # The seed has 64 bits, of which torch's generator for the CPU uses 32.
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":  # torch.manual_seed would visit every device
        torch.get_device_module(device).manual_seed(seed)


# -------------------------------------------------------------------------------------------- flags

# The paper's CIFAR-10 network and run.
PAPER = dict(
    image_size=32, base_channels=128, channel_mults=[1, 2, 2, 2], num_res_blocks=2,
    attention_resolutions=[16], dropout=0.1, schedule="linear", variance="large", predicts="eps",
    weighting="simple", optimizer="adam", batch=128, lr=2e-4, lr_decay=False, steps=800_000,
    ema=0.9999, flip=True,
)  # fmt: skip

# --quick: a run of minutes on a CPU, for small images. benchmarks/speedrun.md has measurements.
QUICK = dict(
    base_channels=16, channel_mults=[1, 2, 4, 4], num_res_blocks=1, attention_resolutions=[],
    dropout=0.0, predicts="v", weighting="min-snr", optimizer="muon", batch=64, lr=6e-3,
    lr_decay=True, steps=1500,
)  # fmt: skip

# The demo: a small network, which learns it on two CPU cores in under four minutes.
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
    count, index = checkpoint.number(int, 1), checkpoint.number(int, 0, 2**63)
    amount, share = checkpoint.number(float, 0), checkpoint.number(float, 0, 1)
    flag("--data", help="folder of images, including its sub-folders [the built-in demo]")
    flag("--classes", action="store_true", help="the sub-folders of --data are classes")
    flag("--out", type=Path, default="run", help="folder of the run [%(default)s]")
    flag("--quick", action="store_true", help="a small network and a short run; see the manual")
    flag("--init", help="start from the weights of a run, or of diffusers: a folder, or hf:NAME")
    flag("--image-size", type=count, help="pixels; images are cropped to a square [%(default)s]")
    flag("--channels", type=int, choices=(1, 3), help="1 for grey, 3 for colour [detected]")
    flag("--base-channels", type=count, help="width of the first level [%(default)s]")
    flag("--channel-mults", type=count, nargs="+", help="relative widths of levels [%(default)s]")
    flag("--num-res-blocks", type=count, help="residual blocks per level [%(default)s]")
    flag("--attention-resolutions", type=int, nargs="*", help="sizes with attention [%(default)s]")
    flag("--dropout", type=share, help="share of the activations to drop [%(default)s]")
    flag("--schedule", choices=checkpoint.SCHEDULES, help="betas [%(default)s]")
    flag("--variance", choices=("large", "small"), help="sigma_t^2 [%(default)s]")
    flag("--predicts", choices=TARGETS, help="network's output [%(default)s]")
    weightings = "simple", "vlb", "min-snr", "native"
    flag("--weighting", choices=weightings, help="weight of each t; see the manual [%(default)s]")
    flag("--batch", type=count, help="images per step, over all GPUs [%(default)s]")
    flag("--accumulate", type=count, default=1, help="parts to split each batch into [%(default)s]")
    flag("--optimizer", choices=("adam", "muon"), help="muon suits short runs [%(default)s]")
    flag("--lr", type=amount, help="learning rate [%(default)s]")
    flag("--warmup", type=index, help="steps until --lr is reached [min(5000, steps / 20)]")
    flag("--lr-decay", action=switch, help="let --lr fall to 0 at --steps, for short runs")
    flag("--steps", type=count, help="number of training steps [%(default)s]")
    flag("--ema", type=share, help="decay of the averaged weights [%(default)s]")
    flag("--flip", action=switch, help="flip images left to right at random")
    flag("--seed", type=index, default=0, help="seed of all random numbers [%(default)s]")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps or xpu [%(default)s]")
    flag("--amp", action=switch, help="bfloat16 [if supported, except to predict mean or x0]")
    flag("--compile", action=switch, help="torch.compile [on CUDA, for 5,000 steps or more]")
    flag("--preview-every", type=count, help="steps between previews [at most 4 %% of the time]")
    flag("--save-minutes", type=amount, default=5.0, help="minutes between saves [%(default)s]")
    parser.set_defaults(norm_groups=None, **PAPER)
    return parser


def arguments():
    """Return the arguments of the command line, and the Trained of --init or None.

    The weights decide the network and its schedule; flags not given come from the presets above.
    """
    parser = make_parser()
    args, weights = parser.parse_args(), None
    if args.data is None and (args.quick or args.classes):
        parser.error("--quick and --classes need --data; the demo is quick by itself")
    if args.data is None or args.quick:
        parser.set_defaults(**(QUICK if args.quick else DEMO))
    if args.init is not None:  # a resumed run has its own weights, so those of --init may be gone
        own = args.out / "checkpoint.pt"
        use_own = own.is_file() and (RANK == 0 or not Path(args.init).exists())
        weights = checkpoint.load(own if use_own else args.init)
        parser.set_defaults(variance=weights.diffusion.variance)
    args = parser.parse_args()
    if weights:
        refuse_overridden(parser, args, weights)
        vars(args).update({name: weights.settings[name] for name in checkpoint.SHAPE})
        args.channels, args.schedule = weights.settings["in_channels"], "weights"
        args.predicts, args.init = weights.predicts, checkpoint.name_of(args.init)
    if args.data is None and (args.image_size, args.channels or 3) != (8, 3):
        parser.error("without --data the images are those of the demo, 8x8 in colour")
    if args.batch < WORLD * args.accumulate:
        parser.error("--batch must be at least the number of GPUs times --accumulate")
    args.classes = class_names(args.data) if args.classes else []
    shape = checkpoint.make_config(args, weights)["model"] | {"in_channels": 3}
    try:
        with torch.device("meta"):
            UNet(**shape)
    except ValueError as error:
        parser.error(str(error))

    args.device = machine.choose_device(args.device)
    if args.amp is None:  # in bfloat16, "mean" and "x0" would give a rough eps at small t
        args.amp = machine.has_bfloat16(args.device) and args.predicts not in ("mean", "x0")
    if args.compile is None:  # it takes a minute or more
        args.compile = args.steps >= 5000 and machine.can_compile(args.device)
    args.preview_gap = 0 if args.preview_every else 25  # each preview takes as long as 240 images
    args.preview_every = args.preview_every or max(25 * 240 // args.batch, args.steps // 100, 1)
    return args, weights


def refuse_overridden(parser, args, weights):
    """Exit if a given flag differs from what the weights of --init decide."""
    decided = {name: weights.settings[name] for name in checkpoint.SHAPE if name != "norm_groups"}
    decided |= {"channels": weights.settings["in_channels"], "predicts": weights.predicts}
    betas = weights.diffusion.betas
    schedules = [n for n, make in checkpoint.SCHEDULES.items() if torch.equal(make(), betas)]
    decided["schedule"] = schedules[0] if schedules else "weights"
    parser.set_defaults(**dict.fromkeys(decided))
    given = vars(parser.parse_args())
    flags = [
        f"--{name.replace('_', '-')}"
        for name, value in decided.items()
        if given[name] not in (None, value, list(value) if isinstance(value, tuple) else value)
    ]
    if flags:
        parser.error(f"{args.init} decides {', '.join(flags)}; leave out what differs from it")


# -------------------------------------------------------------------------------------- the program


class Interrupts:
    """Whether the program was told to stop: by Ctrl-C, SIGTERM or SIGHUP (a closed terminal).

    The step is finished then. A second Ctrl-C, 2 seconds later or more, ends it at once.
    """

    def __init__(self):
        self.since = None
        signal.signal(signal.SIGINT, self.stop)
        signal.signal(signal.SIGTERM, self.stop)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self.stop)  # unless nohup started the program

    def stop(self, number, _):
        if self.since is None:
            self.since = time.monotonic()
            if number == signal.SIGINT and RANK == 0:  # print may be interrupted, os.write is not
                os.write(2, b"\nfinishing the step, to save it; a second Ctrl-C ends it at once\n")
        elif number == signal.SIGINT and WORLD == 1 and time.monotonic() - self.since > 2:
            sys.exit("stopped within a step: what was not saved is lost, and the checkpoint stays")


def say_how_long(bar, seconds_per_step, args):
    """Print how long the run will take if that is long, and on a CPU what is quicker."""
    left = seconds_per_step * (bar.total - bar.n)
    if left < LONG:
        return
    said = f"at {seconds_per_step:.2g} s per step, the run will take {checkpoint.duration(left)}"
    if args.device.type == "cpu":
        said += "; --quick --out quick, a smaller network, takes 8 minutes on two cores at 32x32"
    bar.write(said)


def main():
    print_any_name()
    args, weights = arguments()
    is_main, device, out = RANK == 0, args.device, args.out
    machine.prefer_speed()

    # -- the checkpoint, if this run is resumed; the first process reads it for all
    state, version = checkpoint.find_run(out) if is_main else (None, None)
    states = [state]
    if WORLD > 1:
        machine.join_processes(device)
        dist.broadcast_object_list(states)
    state = states.pop()
    start = state["step"] if state else 0
    checkpoint.complete(args, state)
    checkpoint.refuse_other_run(out, state, checkpoint.make_config(args, weights), args.steps)

    # -- the training set, which the first process of each machine decodes
    if WORLD > 1 and LOCAL_RANK > 0:
        dist.barrier()
    images, labels = demo_images(), None
    if args.data is not None:
        shape = args.image_size, args.channels
        images, labels = read_folder(args.data, *shape, classes=args.classes, cache=out)
    if WORLD > 1 and LOCAL_RANK == 0:
        dist.barrier()
    args.channels = images.shape[1]
    config = checkpoint.make_config(args, weights, fingerprint(images))
    if WORLD > 1:
        everyone = [None] * WORLD
        mine = config["train"] | {"steps": args.steps, "accumulate": args.accumulate}
        dist.all_gather_object(everyone, config | {"train": mine})
        checkpoint.refuse_other_ranks(everyone)
    checkpoint.refuse_other_run(out, state, config, args.steps)
    if args.data is not None and LOCAL_RANK == 0:
        forget_others(images, out)
    images = torch.from_numpy(images)
    images = images.to(device) if images.nbytes < 2e9 else images  # else moved batch by batch
    labels = None if labels is None else torch.from_numpy(labels).to(images.device)

    # -- the network, its average and the optimizer, as they start or as they were saved
    torch.manual_seed(args.seed)
    diffusion = Diffusion(**config["diffusion"])
    model = UNet(**config["model"]).to(device)
    if weights and not state:
        checkpoint.start_from(weights, model, args.classes)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    if args.optimizer == "muon":
        optimizer = Muon(model, args.lr)
    else:
        optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    if state:
        for part, name in ((model, "model"), (ema, "ema"), (optimizer, "optimizer")):
            part.load_state_dict(state[name])
    del state, weights  # they are as large as the network
    network = DistributedDataParallel(model, gradient_as_bucket_view=True) if WORLD > 1 else model
    network = machine.compiled(network) if args.compile else network
    loss_of_part = loss_of(network, diffusion, args)
    if is_main:
        size = sum(p.numel() for p in model.parameters())
        where = f"{device}, {'bfloat16' if args.amp else 'float32'}" + ", compiled" * args.compile
        changed = {name: v for name, v in vars(args).items() if v != PAPER.get(name, v)}
        kind = f", in {len(args.classes):,} classes" * bool(args.classes)
        kind += "; the network will memorise the images" * (len(images) < 100)
        print(f"images   {len(images):,} of {'x'.join(map(str, images.shape[1:]))}{kind}")
        print(f"settings the paper's{f', but {changed}' if changed else ''}")
        print(f"network  {size:,} parameters on {WORLD} x {where}")
        if not args.classes and images[0].numel() <= 300 and images.numel() <= 100_000:  # fast
            all_weights = loss_weights(diffusion, args.weighting, args.predicts)
            floor = loss_floor(diffusion, from_pixels(images.cpu()), all_weights, args.flip)
            print(f"floor    {floor:.4f}; no network's loss is lower, on average (docs/beyond.md)")
        print(f"steps    {start:,} to {args.steps:,}; previews every {args.preview_every} or more")

    # -- the loop
    decay_steps = args.steps if args.lr_decay else None
    lr_at = partial(learning_rate, lr=args.lr, warmup=args.warmup, decay_steps=decay_steps)
    interrupts, said_how_long = Interrupts(), False
    # The (step, time) from which steps are timed; steps that may compile do not count.
    timed_from = (start, time.monotonic()) if device.type == "cpu" and not args.compile else None
    run = checkpoint.Run(out, start, lr_at, version) if is_main else None
    bar = tqdm(total=args.steps, initial=start, unit="step", mininterval=1, disable=not is_main)
    done, pending = start, []
    for step in range(start, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step)
        batch = draw_batch(step, images, labels, diffusion.T, args)
        pending.append(train_step(batch, loss_of_part, network, ema, optimizer, step, args))
        show, last = (step + 1) % args.preview_every == 0, step + 1 == args.steps
        must_log = show or last or (step + 1) % LOG_TOGETHER.get(device.type, 10) == 0
        if not must_log and not (WORLD == 1 and interrupts.since):  # processes stop together
            continue

        # The losses, the norms, and whether a process was told to stop, in one reduction:
        values = torch.stack([*pending, pending[0].new_tensor([bool(interrupts.since), 0])])
        if WORLD > 1:
            dist.all_reduce(values)
        *losses, (stops, _) = values.tolist()
        done, pending = step + 1, []
        if not np.isfinite(losses).all():
            sys.exit(f"the loss or its gradient became infinite or NaN by step {done:,}; the step "
                     "is not saved. Try a lower --lr, a longer --warmup, or --no-amp.")  # fmt: skip
        if is_main:
            mean = run.log(done, losses)
            show = last or (show and run.preview_is_due(args.preview_gap))
            if last or stops or run.save_is_due(args.save_minutes, show):
                run.save(config, done, model, ema, optimizer)
            bar.set_postfix_str(f"loss {mean:.4f}", refresh=False)  # after SIGHUP, this may fail
            bar.update(len(losses))
            if show:
                run.preview(done, ema, diffusion, images.shape[1:], args)
            now = time.monotonic()
            timed_from = timed_from or (done, now)
            if not said_how_long and now - timed_from[1] > 10 and done > timed_from[0]:
                say_how_long(bar, (now - timed_from[1]) / (done - timed_from[0]), args)
                said_how_long = True
        if stops:
            break
    bar.close()

    if WORLD > 1:
        dist.barrier()  # a process that ends before the others sometimes aborts
        dist.destroy_process_group()
    if done < args.steps:
        program = "torchrun ..." if WORLD > 1 else "python"
        words = checkpoint.command(*sys.argv)
        sys.exit(f"stopped at step {done:,}; to resume:\n  {program} {words}" if is_main else 1)
    if is_main:
        if start == done:
            print("no step was taken: to train again after a change to the code, use another --out")
        path = (out / "checkpoint.pt").as_posix()
        print(f"done: {path} is at step {done:,}; next:")
        name = checkpoint.name_of(out)
        words = [] if name == "run" else ["--onnx", f"{name}.onnx"]
        print("  python", checkpoint.command("export.py", "--checkpoint", path, *words))


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # until the loop catches them
        signal.signal(number, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped before the first step")
