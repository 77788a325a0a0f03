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
import signal
import sys
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from beyond import TARGETS, WEIGHTINGS, as_eps, loss_weights
from ddpm import Diffusion, UNet
from exact import loss_floor
from images import escape_unprintable, from_pixels
from support import cli, data, device, ranks, run, trained
from support.device import to_device
from support.ranks import LOCAL_RANK, RANK, WORLD

LOG_EVERY = {"cpu": 1}  # steps per log entry, else 10; reading a loss waits for the device

# -------------------------------------------------------------------------------------- Algorithm 1


def draw_batch(step, images, labels, T, args):
    """Return (index, flip, y, t, noise) of a batch, which depends on the seed and the step alone.

    index: of the images, int64 (B,). flip: whether to mirror them. t: (B,). noise: float32
    (B, C, H, W). y: classes (B,), or None. images: uint8 (N, C, H, W). labels: int64 (N,), or None.
    """
    set_seed(args.device, args.seed, step, 0)
    index = torch.randint(len(images), (args.batch,), device=images.device)
    flip = torch.rand(args.batch, 1, 1, 1, device=args.device) < (0.5 if args.flip else 0)
    t = torch.randint(T, (args.batch,), device=args.device)
    noise = torch.randn(args.batch, *images.shape[1:], device=args.device)
    if labels is None:
        return index, flip, None, t, noise
    # A tenth of the labels is dropped, because guidance needs eps without a class, too:
    drop = torch.rand(args.batch, device=images.device) < 0.1
    y = labels[index].masked_fill(drop, len(args.classes))
    return index, flip, to_device(y, args.device), t, noise


def parts_of(batch, step, images, args):
    """Yield (x0, y, t, noise) for each of the --accumulate parts that this process computes.

    It seeds the dropout of a part before it yields the part, so it must not run ahead.
    """
    for k in range(RANK * args.accumulate, (RANK + 1) * args.accumulate):
        set_seed(args.device, args.seed, step, 1 + k)
        index, flip, y, t, noise = (
            drawn if drawn is None else drawn.tensor_split(WORLD * args.accumulate)[k]
            for drawn in batch
        )
        x0 = from_pixels(to_device(images[index], args.device))
        yield torch.where(flip, x0.flip(3), x0), y, t, noise


def make_loss(network, diffusion, args):
    """Return loss(x0, y, t, noise), in which the network computes in bfloat16 with --amp."""
    eps = as_eps(network, diffusion, args.predicts)
    weights = loss_weights(diffusion, args.weighting, args.predicts)

    def loss(x0, y, t, noise):
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
            return diffusion.loss(partial(eps, y=y), x0, t, noise, weights)

    return loss


def train_step(parts, loss_fn, network, ema, optimizer, step, args):
    """Take a gradient step of Algorithm 1 on the parts of a batch, and update the average.

    The result is a tensor (2,), whose sum over the processes is the loss and the norm of the
    gradient. Nothing here waits for CUDA, so that Python can prepare the next step.
    """
    batch_loss = torch.zeros((), device=args.device)
    for part, (x0, y, t, noise) in enumerate(parts, 1):
        defer_sync = WORLD > 1 and part < args.accumulate  # exchange the gradients only once
        with network.no_sync() if defer_sync else contextlib.nullcontext():
            loss = loss_fn(x0, y, t, noise) * len(x0) / args.batch
            (loss * WORLD).backward()  # DistributedDataParallel averages over the processes
        batch_loss += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    update_ema(ema, network, step, args.ema)
    return torch.stack([batch_loss, norm / WORLD])  # the norm is the same in every process


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """Update the averaged weights in place; samples are drawn with them.

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


def flag(default, meaning, **options):
    """Declare a setting that is also a flag. options: those of argparse."""
    return field(default=default, metadata={"help": meaning, **options})


RUN, CPU = Path("run"), torch.device("cpu")
count, whole, amount = cli.number(int, 1), cli.number(int, 0, 2**63), cli.number(float, 0)
share, switch = cli.number(float, 0, 1), argparse.BooleanOptionalAction


@dataclass(frozen=True)
class Settings:
    """What a run depends on. The defaults are the paper's CIFAR-10 network and run, on a CPU."""

    data: str = flag(None, "folder of images, including its sub-folders [the built-in demo]")
    classes: tuple = flag((), "the sub-folders of --data are classes", action="store_true")
    out: Path = flag(RUN, "folder of the run", type=Path)
    init: str = flag(None, "start from a run's weights, or diffusers': a folder, or hf:NAME")
    image_size: int = flag(32, "pixels; images are cropped to a square", type=count)
    channels: int = flag(None, "1 for grey, 3 for colour [detected]", type=int, choices=(1, 3))
    base_channels: int = flag(128, "width of the first level", type=count)
    channel_mults: tuple = flag((1, 2, 2, 2), "relative widths of levels", type=count, nargs="+")
    num_res_blocks: int = flag(2, "residual blocks per level", type=count)
    attention_resolutions: tuple = flag((16,), "sizes with attention", type=int, nargs="*")
    dropout: float = flag(0.1, "share of the activations to drop", type=share)
    norm_groups: int = None  # of the weights of --init
    schedule: str = flag("linear", "betas", choices=run.SCHEDULES)
    betas: list = None  # of the weights of --init, instead of the schedule
    variance: str = flag("large", "sigma_t^2", choices=("large", "small"))
    predicts: str = flag("eps", "network's output", choices=TARGETS)
    weighting: str = flag("simple", "weight of each t; see the manual", choices=WEIGHTINGS)
    batch: int = flag(128, "images per step, over all GPUs", type=count)
    accumulate: int = flag(1, "parts to split each batch into", type=count)
    optimizer: str = flag("adam", "muon suits short runs", choices=("adam", "muon"))
    lr: float = flag(2e-4, "learning rate", type=amount)
    warmup: int = flag(None, "steps until --lr is reached [min(5000, steps / 20)]", type=whole)
    lr_decay: bool = flag(False, "let --lr fall to 0 at --steps, for short runs", action=switch)
    steps: int = flag(800_000, "number of training steps", type=count)
    ema: float = flag(0.9999, "decay of the averaged weights", type=share)
    flip: bool = flag(True, "flip images left to right at random", action=switch)
    seed: int = flag(0, "seed of all random numbers", type=whole)
    device: torch.device = flag(CPU, "auto, cpu, cuda, cuda:1, mps or xpu [auto]")
    amp: bool = flag(False, "bfloat16 [if supported, except to predict mean or x0]", action=switch)
    compile: bool = flag(False, "torch.compile [on CUDA, for 5,000 steps or more]", action=switch)
    preview_every: int = flag(8000, "steps between previews [at most 4 %% of the time]", type=count)
    preview_gap: float = 0  # the minimum gap, in multiples of the last preview's duration
    save_minutes: float = flag(5.0, "minutes between saves", type=amount)


# --quick: a run of minutes on a CPU, for small images. benchmarks/speedrun.md has measurements.
QUICK = dict(
    base_channels=16, channel_mults=(1, 2, 4, 4), num_res_blocks=1, attention_resolutions=(),
    dropout=0.0, predicts="v", weighting="min-snr", optimizer="muon", batch=64, lr=6e-3,
    lr_decay=True, steps=1500,
)  # fmt: skip

# The demo: a small network that learns the 216 images on two CPU cores in under four minutes.
DEMO = dict(
    image_size=8, base_channels=32, channel_mults=(1, 2), num_res_blocks=1,
    attention_resolutions=(), dropout=0.0, batch=64, lr=3e-3, lr_decay=True, steps=2400,
)  # fmt: skip


def given_flags():
    """Return the flags of the command line, {name: value}, without those that are not given."""
    parser = argparse.ArgumentParser(
        usage="python train.py --data ./images [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--quick", action="store_true",
                        help="a small network and a short run; see the manual")  # fmt: skip
    for setting in (f for f in fields(Settings) if f.metadata):
        options, default = dict(setting.metadata), setting.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        if "[" not in options["help"] and shown not in ("", None) and "action" not in options:
            options["help"] += f" [{shown}]"
        parser.add_argument(f"--{setting.name.replace('_', '-')}", **options)
    return vars(parser.parse_args())


def decided_by(weights, given):
    """Return the settings that the weights of --init decide. Exits if a given flag differs."""
    betas = weights.diffusion.betas.tolist()
    names = [name for name, make in run.SCHEDULES.items() if make().tolist() == betas]
    decided = {name: weights.settings[name] for name in run.SHAPE}
    decided |= {"channels": weights.settings["in_channels"], "predicts": weights.predicts}
    decided |= {"schedule": names[0] if names else "weights"}
    if wrong := [name for name in decided if given.get(name, decided[name]) != decided[name]]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in wrong)
        sys.exit(f"train.py: {given['init']} decides {flags}; leave out what differs from it")
    return decided | {"betas": betas, "init": trained.name_of(given["init"])}


def decide(given, weights=None):
    """Return the Settings from the flags that are given. Exits if they do not fit.

    weights: the Trained of --init. Other flags that are not given come from the presets above.
    given["device"] is a torch.device.
    """
    is_demo, quick = given.get("data") is None, given.get("quick")
    if is_demo and (quick or "classes" in given):
        sys.exit("train.py: --quick and --classes need --data; the demo is already quick")
    values = {f.name: f.default for f in fields(Settings)}
    values |= DEMO if is_demo else QUICK if quick else {}
    if weights:
        values["variance"] = weights.variance
    values |= {name: value for name, value in given.items() if name != "quick"}
    if weights:
        values |= decided_by(weights, given)
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    if is_demo and (values["image_size"], values["channels"] or 3) != (8, 3):
        sys.exit("train.py: without --data the images are those of the demo, 8x8 in colour")
    if values["batch"] < WORLD * values["accumulate"]:
        sys.exit("train.py: --batch must be at least the number of GPUs times --accumulate")
    if values["classes"]:
        values["classes"] = data.class_names(values["data"])
    values["amp"] = device.uses_bfloat16(values["predicts"], given["device"], given.get("amp"))
    if "compile" not in given:  # it takes a minute or more
        values["compile"] = values["steps"] >= 5000 and device.can_compile(given["device"])
    if "preview_every" not in given:  # each preview takes as long as 240 images
        values["preview_every"] = max(25 * 240 // values["batch"], values["steps"] // 100, 1)
        values["preview_gap"] = 25
    return Settings(**values)


def refuse_impossible(network):
    """Exit if UNet refuses these arguments. The number of channels may not be known yet."""
    try:
        with torch.device("meta"):
            UNet(**network | {"in_channels": network["in_channels"] or 3})
    except ValueError as error:
        sys.exit(f"train.py: {error}")


# -------------------------------------------------------------------------------------- the program


def main():
    escape_unprintable()
    given, is_main = given_flags(), RANK == 0
    out, name = given.get("out", Settings.out), given.get("device", "auto")
    given["device"] = device.choose_device(name)
    device.prefer_speed()

    # -- the checkpoint, if this run is resumed; the first process reads it for all
    state, version = run.find_run(out) if is_main else (None, None)
    ranks.join(given["device"])
    state, weights = ranks.from_first(state), None
    start = state["step"] if state else 0
    if given.get("init") is not None:  # a resumed run has its own weights; the others may be gone
        weights = trained.from_checkpoint(state) if state else trained.load(given["init"])
    args = decide(given, weights)
    if name == "auto" and args.base_channels >= Settings.base_channels and args.steps >= 5000:
        device.refuse_idle_gpu(args.device)
    channels = args.channels or (state and state["config"]["model"]["in_channels"])
    config = run.make_config(args, channels, state)
    refuse_impossible(config["model"])
    run.refuse_other_run(out, state, config, args.steps)

    # -- the training set, which the first process of each machine decodes
    with ranks.first_of_machine_first():
        images, labels = data.demo_images(), None
        if args.data is not None:
            images, labels = data.read_folder(
                args.data, args.image_size, channels, classes=args.classes, cache=out
            )
    config["model"]["in_channels"] = images.shape[1]
    config["train"]["images"] = data.fingerprint(images)
    ours = config["train"] | {"steps": args.steps, "accumulate": args.accumulate}
    run.refuse_other_ranks(ranks.from_all(config | {"train": ours}))
    run.refuse_other_run(out, state, config, args.steps)
    if args.data is not None and LOCAL_RANK == 0:
        data.forget_others(images, out)
    images = torch.from_numpy(images)
    if images.nbytes < 2e9:  # else they are moved batch by batch
        images = images.to(args.device)
    labels = None if labels is None else torch.from_numpy(labels).to(images.device)

    # -- the network, its average and the optimizer, as they start or as they were saved
    torch.manual_seed(args.seed)
    diffusion = Diffusion(**config["diffusion"])
    model = UNet(**config["model"]).to(args.device)
    if weights and not state:
        trained.start_from(weights, model, args.classes)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    if args.optimizer == "muon":
        from support.muon import Muon

        optimizer = Muon(model, args.lr)
    else:
        optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    if state:
        for part, name in ((model, "model"), (ema, "ema"), (optimizer, "optimizer")):
            part.load_state_dict(state[name])
    del state, weights  # they are as large as the network
    network = DistributedDataParallel(model, gradient_as_bucket_view=True) if WORLD > 1 else model
    network = device.compiled(network) if args.compile else network
    loss_fn = make_loss(network, diffusion, args)
    if is_main:
        describe(args, images, diffusion, sum(p.numel() for p in model.parameters()))
        print(f"steps    {start:,} to {args.steps:,}; previews at least {args.preview_every} apart")

    # -- the loop
    decay_steps, warmup = args.steps if args.lr_decay else None, config["train"]["warmup"]
    lr_at = partial(learning_rate, lr=args.lr, warmup=warmup, decay_steps=decay_steps)
    interrupts = cli.Interrupts()
    folder = run.RunFolder(args, config, start, lr_at, version) if is_main else None
    bar = tqdm(total=args.steps, initial=start, unit="step", mininterval=1, disable=not is_main)
    done, pending = start, []
    for step in range(start, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step)
        batch = draw_batch(step, images, labels, diffusion.T, args)
        parts = parts_of(batch, step, images, args)
        pending.append(train_step(parts, loss_fn, network, ema, optimizer, step, args))
        show, last = (step + 1) % args.preview_every == 0, step + 1 == args.steps
        must_log = show or last or (step + 1) % LOG_EVERY.get(args.device.type, 10) == 0
        if not must_log and not (WORLD == 1 and interrupts.since):  # processes stop together
            continue

        # The losses, the norms, and whether a process was told to stop, in one reduction:
        stop = pending[0].new_tensor([bool(interrupts.since), 0])
        *losses, (stops, _) = ranks.sum_of_all(torch.stack([*pending, stop])).tolist()
        done, pending = step + 1, []
        if not np.isfinite(losses).all():
            sys.exit(f"the loss or its gradient became infinite or NaN by step {done:,}; the step "
                     "is not saved. Try a lower --lr, a longer --warmup, or --no-amp.")  # fmt: skip
        if is_main:
            mean = folder.log(done, losses)
            show = last or (show and folder.preview_is_due())
            if last or stops or folder.save_is_due(show):
                folder.save(done, model, ema, optimizer)
            bar.set_postfix_str(f"loss {mean:.4f}", refresh=False)  # after SIGHUP, this may fail
            bar.update(len(losses))
            if show:
                folder.preview(done, ema, diffusion)
            if line := folder.time_left(done):
                bar.write(line)
        if stops:
            break
    bar.close()
    ranks.leave()
    if done < args.steps:
        program = "torchrun ..." if WORLD > 1 else "python"
        words = cli.command(*sys.argv)
        sys.exit(f"stopped at step {done:,}; to resume:\n  {program} {words}" if is_main else 1)
    if is_main:
        say_what_is_next(out, start, done)


def describe(args, images, diffusion, size):
    """Print what is trained on what: the images, the settings, the network, and the floor."""
    names = {*run.SHAPE, *run.TRAINING, "dropout", "schedule", "variance", "steps"} - {"seed"}
    paper = {f.name: f.default for f in fields(Settings) if f.name in names}
    changed = {n: v for n in paper if (v := getattr(args, n)) != paper[n]}
    kind = f", in {len(args.classes):,} classes" if args.classes else ""
    kind += "; the network will memorise the images" if len(images) < 100 else ""
    where = f"{args.device}, {'bfloat16' if args.amp else 'float32'}"
    where += ", compiled" if args.compile else ""
    print(f"images   {len(images):,} of {'x'.join(map(str, images.shape[1:]))}{kind}")
    print(f"settings the paper's{f', but {changed}' if changed else ''}")
    print(f"network  {size:,} parameters on {WORLD} x {where}")
    if not args.classes and images[0].numel() <= 300 and images.numel() <= 100_000:  # fast
        weights = loss_weights(diffusion, args.weighting, args.predicts)
        floor = loss_floor(diffusion, from_pixels(images.cpu()), weights, args.flip)
        print(f"floor    {floor:.4f}; no network's loss is lower, on average (docs/beyond.md)")


def say_what_is_next(out, start, done):
    """Print where the checkpoint is, and the command that draws with it."""
    if start == done:
        print("no step was taken: to train again after a change to the code, use another --out")
    print(f"done: {(out / 'checkpoint.pt').as_posix()} is at step {done:,}; next:")
    print("  python", cli.command("sample.py", "--checkpoint", out.as_posix()))


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # until the loop catches them
        signal.signal(number, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped before the first step")
