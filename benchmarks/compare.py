"""Compare the speed of this project and its peers on the same images.

    pip install -r benchmarks/requirements.txt
    python benchmarks/compare.py            # prints the tables and writes benchmarks/RESULTS.md

The three take turns in one process. Each figure is the median over the rounds except the first few.
Run nothing else meanwhile. This project and diffusers use the paper's CIFAR-10 U-Net with 35.7 M
random weights, and denoising-diffusion-pytorch uses its own U-Net, of the nearest size.
"""

import argparse
import contextlib
import copy
import importlib.metadata
import io
import itertools
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import ddpm_numpy  # noqa: E402
import export  # noqa: E402
import train  # noqa: E402
from ddpm import Diffusion, UNet, linear_betas  # noqa: E402
from images import from_pixels  # noqa: E402
from support import device, reduced  # noqa: E402
from support.data import read_folder  # noqa: E402
from support.settings import config_of  # noqa: E402
from support.trained import Trained  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ONNX = "cpu" if torch.version.hip else DEVICE.type  # what ONNX Runtime computes on
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


def clock(step):
    """Return the seconds per call. On CUDA, 20 calls are timed, which overlap as in a loop."""
    calls = 20 if DEVICE.type == "cuda" else 1
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / calls


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


def flops(network, size=32):
    """Return the number of operations of a forward pass of one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, size, size), torch.zeros(1, dtype=torch.int64))
    return counter.get_total_flops()


def matmul_flops(dtype):
    """Return the most operations per second that the device reaches in a product of matrices."""
    n = 8192 if DEVICE.type == "cuda" else 3072
    a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
    return 2 * n**3 / min(clock(lambda: a @ b) for _ in range(8))


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


def lucidrains_loop(folder, batch):
    """Return a function that takes a step of denoising-diffusion-pytorch's Trainer.

    Also return the number of its parameters, and how many times larger its batch is.
    """
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet

    network = Unet(128, dim_mults=(1, 2, 2, 2), dropout=0.1)
    trainer = Trainer(
        GaussianDiffusion(network, image_size=32, objective="pred_noise", beta_schedule="linear"),
        str(folder),
        train_batch_size=max(16, batch),  # it takes no less
        train_num_steps=0,
        save_and_sample_every=10**9,
        results_folder=str(folder.parent / "results"),
        calculate_fid=False,
    )
    size = sum(p.numel() for p in network.parameters())

    def step():
        trainer.train_num_steps = trainer.step + 1
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trainer.train()

    return step, size, max(16, batch) / batch


def train_py(images, batch):
    """Return a function that takes a step of train.py with its default flags.

    The network is compiled where and as train.py does. images: uint8 (N, 3, 32, 32).
    """
    args = train.Settings(
        batch=batch, device=DEVICE, amp=device.has_bfloat16(DEVICE), in_channels=3, warmup=5000,
        betas=tuple(linear_betas().tolist()),
    )  # fmt: skip
    diffusion, model, ema, optimizer = train.build(args, config_of(args), None, None)
    if device.can_compile(DEVICE):
        torch.compiler.reset()
        model = device.compiled(model)
    images, steps = images.to(DEVICE), itertools.count()
    take = train.algorithm_1(model, ema, optimizer, diffusion, images, None, args)

    def step():
        device.prefer_speed()  # as train.py does
        take(next(steps))
        torch.set_float32_matmul_precision("highest")  # torch's defaults, for the peers
        torch.backends.cudnn.benchmark = False

    return step


def peak_memory(which, folder, batch):
    """Return the peak memory of three training steps in a process of their own, in GB."""
    command = [sys.executable, __file__, "--memory", which, "--batch", str(batch)]
    done = subprocess.run([*command, "--folder", str(folder)], capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def print_memory(which, folder, batch):
    """Take three training steps, and print the peak memory of this process in GB."""
    images = torch.from_numpy(read_folder(folder, 32)[0])
    if which == "train.py":
        step = train_py(images, batch)
    else:
        dtype = torch.bfloat16 if which == "bf16" else None
        step = diffusers_loop(from_pixels(images), batch, dtype)
    for _ in range(3):
        step()
    if DEVICE.type == "cuda":
        return print(torch.cuda.max_memory_allocated() / 1e9)
    # not from getrusage, which also counts the process before this one's exec
    status = Path("/proc/self/status").read_text().split()
    print(int(status[status.index("VmHWM:") + 1]) * 1024 / 1e9)


# --------------------------------------------------------------------------------------- the tables


def table(head, rows):
    """Return a table in Markdown."""
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def training_table(folder, batch, rounds, floor):
    """Return the times and memory of training steps. floor: the fewest seconds per image."""
    kinds = {"train.py": "train.py", "diffusers, float32": "f32", "diffusers, bfloat16": "bf16"}
    if DEVICE.type == "cpu" and sys.platform != "linux":  # only Linux has /proc
        kinds = {}
    memory = {name: f"{peak_memory(kind, folder, batch):.2f}" for name, kind in kinds.items()}
    images = torch.from_numpy(read_folder(folder, 32)[0])
    lucidrains, size, larger = lucidrains_loop(folder, batch)
    steps = {
        "train.py": train_py(images, batch),
        "diffusers, float32": diffusers_loop(from_pixels(images), batch),
        "diffusers, bfloat16": diffusers_loop(from_pixels(images), batch, torch.bfloat16),
        f"denoising-diffusion-pytorch, {size / 1e6:.1f} M": lucidrains,
    }
    times = {
        name: seconds / batch / (larger if name.startswith("denoising") else 1)
        for name, seconds in in_turn(steps, rounds, warm_up=2).items()
    }
    rows = []
    for name, s in times.items():
        ratio = s / times["diffusers, float32"]
        of_floor = "" if name.startswith("denoising") else f"{s / floor:.2f}"  # another network
        rows.append([name, f"{1000 * s:.1f}", f"{ratio:.2f}", of_floor, memory.get(name, "")])
    head = (
        "a training step", "ms per image", "ratio to diffusers, float32", "ratio to the bf16 floor",
        "peak GB",
    )  # fmt: skip
    return table(head, rows)


def torch_step(network, *args):
    """Return a function that runs a network of torch."""

    def step():
        with torch.no_grad():
            network(*args)

    return step


def network_table(model, paths, rounds, floor):
    """Return the times of one eps. paths: {precision: the exported network}."""
    from diffusers import UNet2DModel

    theirs = UNet2DModel(**CIFAR).to(DEVICE).eval()
    model = copy.deepcopy(model).to(DEVICE)
    rows = []
    for batch in (64, 1) if DEVICE.type == "cuda" else (16, 1):
        x, t = torch.randn(batch, 3, 32, 32), torch.full((batch,), 500)
        on_device = x.to(DEVICE), t.to(DEVICE)
        x, t = x.numpy(), t.numpy()
        steps = {
            "torch, ours": torch_step(model, *on_device),
            "torch, diffusers": torch_step(theirs, *on_device),
        }
        for name, path in paths.items():
            network = ddpm_numpy.Network(path, ONNX)
            steps[f"ONNX Runtime on {ONNX}, {name}"] = lambda n=network, x=x, t=t: n(x, t)
        seconds = in_turn(steps, rounds)
        for name, s in seconds.items():
            rows.append([
                f"{name}, batch {batch}", f"{1000 * s / batch:.3g}",
                f"{s / seconds['torch, diffusers']:.2f}", f"{s / batch / floor:.2f}",
            ])  # fmt: skip
    head = "one eps", "ms per image", "ratio to diffusers", "ratio to the float32 floor"
    return table(head, rows)


def loop_line(path, batch=16, steps=6):
    """Return a sentence on how much longer the loop of sample.py takes than the network in it."""
    network, inside = ddpm_numpy.Network(path), []

    def timed(x, t):
        began = time.perf_counter()
        eps = network(x, t)
        inside.append(time.perf_counter() - began)
        return eps

    draw_noise = ddpm_numpy.noise_of(0, 0, (batch, *network.shape))
    whole = []
    for _ in range(3):
        inside.clear()
        began = time.perf_counter()
        chain = ddpm_numpy.sample_progressive(
            timed, draw_noise, network.betas, network.variance, steps
        )
        for _ in chain:
            pass
        whole.append((time.perf_counter() - began) / sum(inside))
    return (
        f"The loop of sample.py takes {statistics.median(whole):.3f} times as long as its calls "
        "to the network alone.\n"
    )


def processor():
    """Return the name of the CPU."""
    with contextlib.suppress(OSError, StopIteration):  # on ARM, the file names no model
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def machine():
    """Return what the figures depend on: the processor or GPU, and the versions."""
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else processor()
    packages = "torch onnxruntime-gpu onnxruntime diffusers denoising-diffusion-pytorch"
    versions = []
    for package in packages.split():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package).split('+')[0]}")
    threads = f"{torch.get_num_threads()} threads, " if DEVICE.type == "cpu" else ""
    return f"{name}, {threads}Python {platform.python_version()}, {', '.join(versions)}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=16, help="batch size in training [16]")
    parser.add_argument("--rounds", type=int, default=7, help="the median is over these [7]")
    parser.add_argument("--out", default=str(HERE / "RESULTS.md"), help="[benchmarks/RESULTS.md]")
    parser.add_argument("--memory", help=argparse.SUPPRESS)  # how it calls itself
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        return print_memory(args.memory, args.folder, args.batch)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pictures"
        folder.mkdir()
        random = np.random.default_rng(0)
        for k in range(256):
            pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{k}.png")

        torch.manual_seed(0)
        model = UNet().eval()
        kinds = {"float32": None, "int8": "int8"}
        if ONNX == "cuda":  # ONNX Runtime uses TF32 there
            kinds = {"TF32": None, "float16": "half"}
        paths = {name: Path(temporary) / f"{name}.onnx" for name in kinds}
        settings = {"in_channels": 3, "image_size": 32}
        with contextlib.redirect_stdout(io.StringIO()):
            trained = Trained(model, Diffusion(linear_betas()), settings, 0, "random")
            reduced.MAX_ERROR = 1e9  # random weights have larger errors and take as long
            for name, kind in kinds.items():
                export.write_onnx(trained, paths[name], kind)
        if DEVICE.type == "cuda":  # TF32, as in the rows
            torch.set_float32_matmul_precision("high")
        forward = flops(model)
        rates = {dtype: matmul_flops(dtype) for dtype in (torch.float32, torch.bfloat16)}
        floors = {dtype: forward / rate for dtype, rate in rates.items()}
        text = "\n".join([
            "# Side by side\n",
            f"`python benchmarks/compare.py`, {time.strftime('%Y-%m-%d')}: {machine()}.\n",
            f"A forward pass of the network takes {forward / 1e9:.2f} GFLOP per image. Large "
            f"matrices are multiplied at {rates[torch.float32] / 1e9:.0f} GFLOP/s in float32 and "
            f"{rates[torch.bfloat16] / 1e9:.0f} in bfloat16. At these rates, a pass "
            f"takes at least {1000 * floors[torch.float32]:.1f} and "
            f"{1000 * floors[torch.bfloat16]:.1f} ms per image (the floors below), and a training "
            "step takes at least three times as long.\n",
        ])  # fmt: skip
        for make in (
            partial(training_table, folder, args.batch, args.rounds, 3 * floors[torch.bfloat16]),
            partial(network_table, model, paths, args.rounds, floors[torch.float32]),
            partial(loop_line, next(iter(paths.values()))),
        ):
            text += "\n" + make()
            Path(args.out).write_text(text)  # after each part, because a later one may fail
    print(text)


if __name__ == "__main__":
    main()
