"""Measure the speed of a training step: the paper's network, also in diffusers, and --quick.

    pip install -r requirements-dev.txt
    python benchmarks/compare.py            # prints two tables, and writes benchmarks/RESULTS.md

The paper's networks have 35.7 M random weights each. All take turns in one process. Each figure is
the median over the rounds except the first two, with the lowest and the highest in brackets. Run
nothing else meanwhile.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.gpu import DEVICE, IS_CUDA, clock, compiled, machine, train_step, unchanged  # noqa: E402
from images import from_pixels  # noqa: E402
from run import QUICK  # noqa: E402

CIFAR = {
    "sample_size": 32,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [128, 256, 256, 256],
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "attention_head_dim": None,
    "dropout": 0.1,
}


def diffusers_loop(images, batch, dtype=None):
    """Return a function that takes a step of the training loop in diffusers' examples."""
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    model = UNet2DModel(**CIFAR).to(DEVICE)
    ema = EMAModel(model.parameters(), 0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    scheduler = DDPMScheduler()
    optimizer = torch.optim.AdamW(
        model.parameters(), 1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
    )
    rate = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=10_000)
    loader = torch.utils.data.DataLoader(images, batch, shuffle=True, drop_last=True)
    batches = iter(())

    def step():
        nonlocal batches
        x0 = next(batches, None)
        if x0 is None:
            batches = iter(loader)
            x0 = next(batches)
        x0 = x0.to(DEVICE)
        noise = torch.randn_like(x0)
        t = torch.randint(0, 1000, (batch,), device=DEVICE)
        x_t = scheduler.add_noise(x0, noise, t)
        with torch.autocast(DEVICE.type, dtype, enabled=dtype is not None):
            loss = torch.nn.functional.mse_loss(model(x_t, t).sample.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        loss.item()

    return step


def ours(**given):
    """Return a function that runs a training step as train.py configures it."""
    take = train_step(compiled if IS_CUDA else unchanged, **given)

    def step():
        torch.set_float32_matmul_precision("high")  # as train.py does
        torch.backends.cudnn.benchmark = True
        take()
        torch.set_float32_matmul_precision("highest")  # torch's defaults, for diffusers
        torch.backends.cudnn.benchmark = False

    return step


def times(steps, rounds):
    """Return {name: seconds in each round} of {name: step}, which take turns."""
    seconds = {name: [] for name in steps}
    for _ in range(2 + rounds):
        for name, step in steps.items():
            seconds[name].append(clock(step))
    return {name: values[2:] for name, values in seconds.items()}


def summary(values, digits):
    """Return the median of values, and the lowest and the highest of them."""
    low, middle, high = (f"{f(values):.{digits}f}" for f in (min, statistics.median, max))
    return f"{middle} ({low} to {high})"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=16, help="of the first table [%(default)s]")
    parser.add_argument("--rounds", type=int, default=15, help="number of rounds [%(default)s]")
    args = parser.parse_args()
    images = from_pixels(torch.randint(256, (256, 3, 32, 32), dtype=torch.uint8))
    kinds = {"bfloat16": torch.bfloat16, "float32": None}
    name, steps = "train.py, compiled" if IS_CUDA else "train.py", {}  # diffusers is eager
    for kind, dtype in kinds.items():
        steps[name, kind] = ours(batch=args.batch, amp=dtype is not None)
        steps["diffusers", kind] = diffusers_loop(images, args.batch, dtype)
    lines = [
        "# Side by side",
        f"\n`python benchmarks/compare.py`, {time.strftime('%Y-%m-%d')}: {machine()}. "
        f"Medians of {args.rounds} rounds, and {3 * args.rounds} of `--quick`, all taking turns, "
        "with the lowest and the highest in brackets. Ratios are of steps in one round.",
        f"\n| a step of {args.batch} images | ms per image | ratio to diffusers |",
        "| --- | --- | --- |",
    ]
    found = times(steps, args.rounds)
    for (program, kind), seconds in found.items():
        each = summary([1000 * s / args.batch for s in seconds], 1)
        ratios = [s / s0 for s, s0 in zip(seconds, found["diffusers", kind], strict=True)]
        lines.append(f"| {program}, {kind} | {each} | {summary(ratios, 2)} |")
    lines += [
        "\n| steps per second of `--quick`, 64 images each | bfloat16 | float32 |",
        "| --- | --- | --- |",
    ]
    steps = {kind: ours(**QUICK, amp=dtype is not None) for kind, dtype in kinds.items()}
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        measured = times(steps, 3 * args.rounds).values()
        rates = " | ".join(summary([1 / s for s in seconds], 1) for seconds in measured)
        lines.append(f"| {threads} thread{'s' if threads > 1 else ''} | {rates} |")
    text = "\n".join(lines)
    (HERE / "RESULTS.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
