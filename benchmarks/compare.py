"""Compare the speed of this project and diffusers, on the paper's CIFAR-10 network.

    pip install -r requirements-dev.txt
    python benchmarks/compare.py            # prints the tables and writes benchmarks/RESULTS.md

The networks have 35.7 M random weights each. The two take turns in one process. Each figure is the
median over the rounds except the first few. Run nothing else meanwhile.
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import onnx
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.gpu import DEVICE, IS_CUDA, clock, compiled, machine, train_step  # noqa: E402
from ddpm import Diffusion, UNet, linear_betas  # noqa: E402
from export import to_onnx  # noqa: E402
from extras.half import to_half  # noqa: E402
from images import from_pixels  # noqa: E402
from sample import Network  # noqa: E402

ONNX = "cuda" if IS_CUDA else "cpu"  # what ONNX Runtime computes on
SHAPE = 3, 32, 32
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


def in_turn(steps, rounds, warm_up=5):
    """Return {name: median seconds of a call}, from rounds in which each step has its turn.

    The pause lets the threads of the previous step go to sleep: ONNX Runtime's spin for a while.
    """
    seconds = {name: [] for name in steps}
    for _ in range(warm_up + rounds):
        for name, step in steps.items():
            time.sleep(0.2)
            seconds[name].append(clock(step))
    return {name: statistics.median(s[warm_up:]) for name, s in seconds.items()}


# ----------------------------------------------------------------------------------------- training


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


def ours(batch):
    """Return a function that takes a step of train.py, with the settings that train.py has."""
    take = train_step(compiled if IS_CUDA else lambda network: network, batch=batch)

    def step():
        torch.set_float32_matmul_precision("high")  # as train.py does
        torch.backends.cudnn.benchmark = True
        take()
        torch.set_float32_matmul_precision("highest")  # torch's defaults, for diffusers
        torch.backends.cudnn.benchmark = False

    return step


# --------------------------------------------------------------------------------------- the tables


def table(head, rows):
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def training_table(batch, rounds):
    """Return the times of training steps."""
    images = torch.randint(256, (256, *SHAPE), dtype=torch.uint8)
    steps = {
        "train.py": ours(batch),
        "diffusers, float32": diffusers_loop(from_pixels(images), batch),
        "diffusers, bfloat16": diffusers_loop(from_pixels(images), batch, torch.bfloat16),
    }
    seconds = in_turn(steps, rounds, warm_up=2)
    rows = [
        [name, f"{1000 * s / batch:.1f}", f"{s / seconds['diffusers, float32']:.2f}"]
        for name, s in seconds.items()
    ]
    return table(["a training step", "ms per image", "ratio to diffusers, float32"], rows)


@torch.no_grad()
def network_table(model, paths, rounds):
    """Return the times of one eps. paths: {precision: the exported network}."""
    from diffusers import UNet2DModel

    theirs = UNet2DModel(**CIFAR).to(DEVICE).eval()
    model = copy.deepcopy(model).to(DEVICE)
    rows = []
    for batch in (64, 1) if IS_CUDA else (16, 1):
        x = torch.randn(batch, *SHAPE)
        on_device = x.to(DEVICE), torch.full((batch,), 500, device=DEVICE)
        steps = {
            "torch, ours": partial(model, *on_device),
            "torch, diffusers": partial(theirs, *on_device),
        }
        for name, path in paths.items():
            network = Network(path, ONNX)
            steps[f"ONNX Runtime on {ONNX}, {name}"] = partial(network, x.numpy(), 500)
        seconds = in_turn(steps, rounds)
        for name, s in seconds.items():
            ratio = s / seconds["torch, diffusers"]
            rows.append([f"{name}, batch {batch}", f"{1000 * s / batch:.3g}", f"{ratio:.2f}"])
    return table(["one eps", "ms per image", "ratio to diffusers"], rows)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=16, help="batch size in training [16]")
    parser.add_argument("--rounds", type=int, default=7, help="the median is over these [7]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = UNet().eval()
        proto = to_onnx(model, Diffusion(linear_betas()), SHAPE)
        paths = {"TF32" if ONNX == "cuda" else "float32": f"{folder}/model.onnx"}
        onnx.save(proto, f"{folder}/model.onnx")
        if ONNX == "cuda":
            paths["float16"] = f"{folder}/half.onnx"
            onnx.save(to_half(proto), f"{folder}/half.onnx")
        if IS_CUDA:  # TF32, as in the rows
            torch.set_float32_matmul_precision("high")
        text = "\n\n".join([
            "# Side by side",
            f"`python benchmarks/compare.py`, {time.strftime('%Y-%m-%d')}: {machine()}.",
            training_table(args.batch, args.rounds), network_table(model, paths, args.rounds),
        ])  # fmt: skip
    (HERE / "RESULTS.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
