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

import support.start  # noqa: F401  # isort: skip

import argparse
import contextlib
import copy
import sys
import time
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from beyond import TARGETS, WEIGHTINGS, as_eps, cosine_betas, loss_weights, weighted_loss
from ddpm import Diffusion, linear_betas
from images import catch_signals, from_pixels, guard_output
from support import cli, data, device, ranks, run, trained
from support.demo import demo_images
from support.device import to_device
from support.ranks import LOCAL_RANK, RANK, WORLD
from support.settings import (
    as_flag,
    config_of,
    flag,
    given_flags,
    refuse_other_ranks,
    refuse_other_run,
)
from support.trained import Network

# -------------------------------------------------------------------------------------- Algorithm 1


def algorithm_1(network, ema, optimizer, diffusion, images, labels, args):
    """Return step(k), which takes gradient step k on a batch that (seed, k) alone determines.

    Its result is a tensor (2,), whose sum over the processes is the loss and the norm of the
    gradient. Nothing in a step waits for CUDA, so that Python can prepare the next one.

    network, ema: what is trained, and its average. images: uint8 (N, C, H, W). labels: int64 (N,)
    on the same device, or None. args: the Settings.
    """
    eps = as_eps(network, diffusion, args.predicts, args.device)
    weights = loss_weights(diffusion, args.weighting, args.predicts).to(args.device, torch.float32)
    diffusion = device.with_tables_on(diffusion, args.device)
    parts = WORLD * args.accumulate  # of a batch; each process computes --accumulate of them

    def step(k):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(k, args)
        set_seed(args.device, args.seed, k, 0)
        index = torch.randint(len(images), (args.batch,), device=images.device)
        flip = torch.rand(args.batch, 1, 1, 1, device=args.device) < (0.5 if args.flip else 0)
        t = torch.randint(diffusion.T, (args.batch,), device=args.device)
        noise = torch.randn(args.batch, *images.shape[1:], device=args.device)
        batch = [index, flip, t, noise]
        if labels is not None:  # drop a tenth: guidance needs eps without a class, too
            drop = torch.rand(args.batch, device=images.device) < 0.1
            batch.append(labels[index].masked_fill(drop, len(args.classes)))

        total = torch.zeros((), device=args.device)
        for part in range(RANK * args.accumulate, (RANK + 1) * args.accumulate):
            index, flip, t, noise, *y = (drawn.tensor_split(parts)[part] for drawn in batch)
            x0 = from_pixels(to_device(images[index], args.device))
            x0 = torch.where(flip, x0.flip(3), x0)
            model = partial(eps, y=to_device(*y, args.device)) if y else eps
            set_seed(args.device, args.seed, k, 1 + part)  # for the dropout
            is_last = WORLD == 1 or (part + 1) % args.accumulate == 0  # it exchanges the gradients
            with contextlib.nullcontext() if is_last else network.no_sync():
                with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
                    loss = weighted_loss(diffusion, model, x0, t, noise, weights)
                    loss = loss * len(x0) / args.batch
                (loss * WORLD).backward()  # DistributedDataParallel averages over the processes
            total += loss.detach()

        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, network, k, args.ema)
        return torch.stack([total, norm / WORLD])  # the norm is the same in every process

    return step


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """Update the averaged weights, which draw the samples, in place; copy the buffers.

    Unlike in the authors' code, the decay grows with the step, so that the initial weights soon
    lose their influence.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for average, buffer in zip(ema.buffers(), model.buffers(), strict=True):
        average.copy_(buffer)


def learning_rate(step, args):
    """Return --lr after a linear rise over --warmup steps; with --lr-decay, it falls to 0."""
    decay = 1 - step / args.steps if args.lr_decay else 1.0
    return args.lr * min(1.0, (step + 1) / max(1, args.warmup)) * decay


def set_seed(device, *numbers):
    """Seed the generators of the CPU and the device from (seed, step, part): no state is saved."""
    # The seed has 64 bits, of which torch's generator for the CPU uses 32.
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":  # torch.manual_seed would visit every device
        torch.get_device_module(device).manual_seed(seed)


# -------------------------------------------------------------------------------------------- flags


RUN, CPU = Path("run"), torch.device("cpu")
SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas}
LOG_EVERY = {"cpu": 1}  # steps between readings of the losses; else 10, as each waits for a GPU
count, whole, amount = cli.number(int, 1), cli.number(int, 0, 2**63), cli.number(float, 0)
share, switch = cli.number(float, 0, 1), argparse.BooleanOptionalAction


@dataclass(frozen=True)
class Settings:
    """The settings of a run. The defaults are the paper's CIFAR-10 network and run, on a CPU."""

    data: str = flag(None, "train", "folder of images [the built-in demo]", action=cli.Once)
    classes: tuple = flag((), "train", "the sub-folders of --data are classes", action="store_true")
    out: Path = flag(RUN, None, "folder of the run", type=Path)
    init: str = flag(None, "train", "start from a run or diffusers weights: a folder, or hf:NAME")
    image_size: int = flag(32, "model", "pixels; images are cropped to a square", type=count)
    in_channels: int = flag(None, "model", "1 for greyscale [detected]", type=int, choices=(1, 3))
    base_channels: int = flag(128, "model", "width of the first level", type=count)
    channel_mults: tuple = flag((1, 2, 2, 2), "model", "relative widths", type=count, nargs="+")
    num_res_blocks: int = flag(2, "model", "residual blocks per level", type=count)
    attention_resolutions: tuple = flag((16,), "model", "sizes with attention", type=int, nargs="*")
    dropout: float = flag(0.1, "model", "share of the activations to drop", type=share)
    norm_groups: int = flag(None, "model")  # from the weights of --init
    schedule: str = flag("linear", "diffusion", "betas", choices=SCHEDULES)
    betas: tuple = flag(None, "diffusion")  # from the weights of --init, instead of the schedule
    variance: str = flag("large", "diffusion", "sigma_t^2", choices=("large", "small"))
    predicts: str = flag("eps", "train", "network's output", choices=TARGETS)
    weighting: str = flag("simple", "train", "weight of each t; see the manual", choices=WEIGHTINGS)
    batch: int = flag(128, "train", "images per step, over all GPUs", type=count)
    accumulate: int = flag(1, None, "parts to split each batch into", type=count)
    optimizer: str = flag("adam", "train", "muon suits short runs", choices=("adam", "muon"))
    lr: float = flag(2e-4, "train", "learning rate", type=amount)
    warmup: int = flag(None, "train", "steps until --lr [min(5000, steps / 20)]", type=whole)
    lr_decay: bool = flag(False, "train", "let --lr fall to 0 at --steps", action=switch)
    steps: int = flag(800_000, "train", "number of training steps", type=count)
    ema: float = flag(0.9999, "train", "decay of the averaged weights", type=share)
    flip: bool = flag(True, "train", "flip images left to right at random", action=switch)
    seed: int = flag(0, "train", "seed of all random numbers", type=whole)
    device: torch.device = flag(CPU, None, "auto, cpu, cuda, cuda:1, mps or xpu [auto]")
    amp: bool = flag(False, None, "bfloat16 [where it is fast and exact enough]", action=switch)
    compile: bool = flag(False, None, "torch.compile [on CUDA, from 5,000 steps]", action=switch)
    preview_every: int = flag(8000, None, "steps between previews [4%% of the time]", type=count)
    save_minutes: float = flag(5.0, None, "minutes between saves", type=amount)


# --quick: a run of minutes on a CPU, for small images. benchmarks/ladder.md has measurements.
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


def command_line():
    """Return the flags that are given, {name: value}."""
    parser = argparse.ArgumentParser(
        usage="python train.py --data ./images [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--quick", action="store_true",
                        help="a small network and a short run; see the manual")  # fmt: skip
    return given_flags(parser, Settings)


def decided_by(weights, given):
    """Return the settings that the weights of --init fix. Exits if a given flag differs."""
    shape = [f for f in fields(Settings) if f.metadata["kept"] == "model" and f.name != "dropout"]
    decided = {f.name: weights.settings.get(f.name, f.default) for f in shape}
    decided = {name: tuple(v) if isinstance(v, list) else v for name, v in decided.items()}
    decided |= {"predicts": weights.predicts, "betas": tuple(weights.diffusion.betas.tolist())}
    if "schedule" in given:
        given = given | {"betas": tuple(SCHEDULES[given["schedule"]]().tolist())}
    if wrong := [name for name in decided if given.get(name, decided[name]) != decided[name]]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in wrong)
        sys.exit(f"train.py: --init fixes {flags.replace('betas', 'schedule')}; omit the "
                 "flags that contradict it")  # fmt: skip
    return decided | ({"init": trained.name_of(given["init"])} if "init" in given else {})


def decide(given, weights=None, state=None):
    """Return the Settings from the flags that are given. Exits if they do not fit.

    weights: the Trained of --init. state: the checkpoint to resume, whose warm-up and --init are
    kept. given["device"] is a torch.device.
    """
    is_demo, quick = given.get("data") is None, given.get("quick")
    if is_demo and (quick or "classes" in given):
        sys.exit("train.py: --quick and --classes need --data; the demo is already quick")
    old = state["config"]["train"] if state else {}
    v = {f.name: f.default for f in fields(Settings)} | {"init": old.get("init")}
    v |= DEMO if is_demo else QUICK if quick else {}
    v |= {"variance": weights.diffusion.variance} if weights else {}
    v |= {name: value for name, value in given.items() if name != "quick"}
    v |= decided_by(weights, given) if weights else {}
    if is_demo and (v["image_size"], v["in_channels"] or 3) != (8, 3):
        sys.exit("train.py: without --data the images are those of the demo, 8x8 in colour")
    if v["batch"] < WORLD * v["accumulate"]:
        sys.exit("train.py: --batch must be at least the number of GPUs times --accumulate")
    v["classes"] = tuple(data.class_names(v["data"])) if v["classes"] else ()
    v["betas"] = v["betas"] or tuple(SCHEDULES[v["schedule"]]().tolist())
    if v["in_channels"] is None and state:
        v["in_channels"] = state["config"]["model"]["in_channels"]
    if v["warmup"] is None:
        v["warmup"] = old.get("warmup", min(5000, v["steps"] // 20))
    v["amp"] = device.uses_bfloat16(v["predicts"], v["device"], given.get("amp"))
    if "compile" not in given:  # it takes a minute or more
        v["compile"] = v["steps"] >= 5000 and device.can_compile(v["device"])
    if "preview_every" not in given:  # each preview takes as long as 240 images
        v["preview_every"] = max(25 * 240 // v["batch"], v["steps"] // 100, 1)
    return Settings(**v)


# -------------------------------------------------------------------------------------- the program


def settings_of(given, state):
    """Return (the Settings, the config, the Trained of --init or None).

    state: the checkpoint to resume, or None; settings that an older run lacks get their defaults.
    Exits if the flags do not fit, or do not fit the checkpoint.
    """
    weights, init = None, given.get("init")
    if state:
        known = config_of(Settings())
        state["config"] = {part: known[part] | state["config"][part] for part in known}
        init = state["config"]["train"]["init"] if init is None else init
    if init is not None:  # a resumed run has its own weights; those of --init may be gone
        with ranks.said_by(LOCAL_RANK == 0):
            weights = trained.from_checkpoint(state) if state else trained.load(init)
    with ranks.said_by(RANK == 0):
        args = decide(given, weights, state)
        config = config_of(args)
        try:
            with torch.device("meta"):
                Network(**config["model"] | {"in_channels": args.in_channels or 3})
        except ValueError as error:
            sys.exit(f"train.py: {error}")
        refuse_other_run(args.out, state, config, args.steps)
    return args, config, weights


def load_images(args, config, state):
    """Return (images, labels) as tensors, which the first process of each machine decodes.

    Enters the number of channels and the fingerprint into the config. Exits if they do not fit the
    run.
    """
    with ranks.first_of_machine_first():
        images, labels = demo_images(), None
        if args.data is not None:
            images, labels = data.read_folder(
                args.data, args.image_size, args.in_channels, classes=args.classes, cache=args.out
            )
    config["model"]["in_channels"] = images.shape[1]
    config["train"]["images"] = data.fingerprint(images)
    ours = config["train"] | {"steps": args.steps, "accumulate": args.accumulate}
    configs = ranks.from_all(config | {"train": ours})
    with ranks.said_by(RANK == 0):
        refuse_other_ranks(configs)
        refuse_other_run(args.out, state, config, args.steps)
    if args.data is not None and LOCAL_RANK == 0:
        data.forget_others(images, args.out)
    images = torch.from_numpy(images)
    if images.nbytes < 2e9:  # otherwise, they are moved batch by batch
        images = images.to(args.device)
    return images, None if labels is None else torch.from_numpy(labels).to(images.device)


def build(args, config, state, weights):
    """Return (diffusion, model, its average, optimizer), new or as they were saved."""
    torch.manual_seed(args.seed)
    diffusion = Diffusion(**config["diffusion"])
    model = Network(**config["model"]).to(args.device)
    if weights and not state:
        trained.start_from(weights, model, list(args.classes))
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    if args.optimizer == "muon":
        from support.muon import Muon

        optimizer = Muon(model, args.lr)
    else:
        optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    if state:
        for part, name in ((model, "model"), (ema, "ema"), (optimizer, "optimizer")):
            part.load_state_dict(state[name])
    return diffusion, model, ema, optimizer


def describe(args, images, start, size):
    """Print what will be trained. start: the first step. size: the number of parameters."""
    has_default = (f for f in fields(args) if f.metadata["kept"] and f.default not in (None, ()))
    changed = [as_flag(f.name, v) for f in has_default if (v := getattr(args, f.name)) != f.default]
    names = ", ".join([*args.classes[:10], *["..."] * (len(args.classes) > 10)])
    kind = f", in {len(args.classes):,} classes: {names}" if args.classes else ""
    kind += "; the network will memorise the images" if len(images) < 100 else ""
    where = f"{args.device}, {'bfloat16' if args.amp else 'float32'}"
    where += ", compiled" if args.compile else ""
    print(f"images   {len(images):,} of {'x'.join(map(str, images.shape[1:]))}{kind}")
    print(f"settings the paper's{', but ' * bool(changed)}{' '.join(changed)}")
    print(f"network  {size:,} parameters on {WORLD} x {where}")
    print(f"steps    {start:,} to {args.steps:,}; a preview every {args.preview_every:,}")


def train(args, config, start, diffusion, model, ema, optimizer, images, labels):
    """Take the steps from `start` on, until told to stop; return the step where it stops."""
    is_main, path = RANK == 0, args.out / "checkpoint.pt"
    network = DistributedDataParallel(model, gradient_as_bucket_view=True) if WORLD > 1 else model
    network = device.compiled(network) if args.compile else network
    if is_main:
        describe(args, images, start, sum(p.numel() for p in model.parameters()))
        log = run.Log(args.out / "log.csv", start, partial(learning_rate, args=args))
    step = algorithm_1(network, ema, optimizer, diffusion, images, labels, args)
    bar = tqdm(total=args.steps, initial=start, unit="step", mininterval=1, disable=not is_main)
    stop, saved, done, pending = cli.StopRequest(), time.monotonic(), start, []
    for k in range(start, args.steps):
        pending.append(step(k))
        show = (k + 1) % args.preview_every == 0 or k + 1 == args.steps
        must_read = show or (k + 1) % LOG_EVERY.get(args.device.type, 10) == 0
        if not must_read and not (WORLD == 1 and stop.made):  # processes stop together
            continue

        # The losses, the norms, and whether a process was told to stop, in one reduction:
        stops = pending[0].new_tensor([stop.made, 0])
        *losses, (stops, _) = ranks.sum_of_all(torch.stack([*pending, stops])).tolist()
        done, pending = k + 1, []
        if not np.isfinite(losses).all():
            bar.close()
            why = f"the loss or its gradient became infinite or NaN by step {done:,}"
            remedy = "the step is not saved. Try a lower --lr, a longer --warmup, or --no-amp."
            sys.exit(f"{why}; {remedy}" if is_main else 1)
        if is_main:
            mean, is_late = log.add(done, losses), time.monotonic() - saved > 60 * args.save_minutes
            # There is a checkpoint before a preview: support/data.py then leaves out the folder.
            if done == args.steps or stops or is_late or (show and not path.exists()):
                run.save(path, config, done, model, ema, optimizer)
                saved = time.monotonic()
            bar.set_postfix_str(f"loss {mean:.4f}", refresh=False)
            bar.update(len(losses))
            if show:
                image = args.out / f"preview-{done:07d}.png"
                run.preview(image, images.shape[1:], ema, diffusion, args)
                log.plot(args.out / "loss.png", done)
        if stops:
            break
    bar.close()
    ranks.leave()
    return done


def main():
    guard_output()
    with ranks.said_by(RANK == 0):
        given = command_line()
    device.prefer_speed()
    with ranks.said_by(LOCAL_RANK == 0):
        given["device"] = device.choose_device(given.get("device", "auto"))
    ranks.join(given["device"])
    with contextlib.ExitStack() as held:
        state = ranks.from_first(held.enter_context, run.opened(given.get("out", RUN)))
        args, config, weights = settings_of(given, state)
        images, labels = load_images(args, config, state)
        parts, start = build(args, config, state, weights), state["step"] if state else 0
        del state, weights  # they are as large as the network
        done = train(args, config, start, *parts, images, labels)
    if done < args.steps:
        program, words = "torchrun ..." if WORLD > 1 else "python", cli.command(*sys.argv)
        said = f"stopped at step {done:,}; to resume:\n  {program} {words}"
        raise KeyboardInterrupt(said) if RANK == 0 else SystemExit(1)
    if RANK == 0:
        if start == done:
            print("no step was taken: the run is finished; for a new run, use another --out")
        print(f"done: {(args.out / 'checkpoint.pt').as_posix()} is at step {done:,}")
        print(cli.drawing("--checkpoint", args.out, args.classes, args.data is None))


if __name__ == "__main__":
    catch_signals()  # until the training loop handles them
    main()
