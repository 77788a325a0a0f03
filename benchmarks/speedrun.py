"""Train for some minutes, and measure how good the samples are: a row of benchmarks/speedrun.md.

    python benchmarks/speedrun.py --data fashion-mnist                      # --quick --no-flip
    python benchmarks/speedrun.py --data fashion-mnist --seed 1 --lr 3e-3   # with flags of train.py
    python benchmarks/speedrun.py --data fashion-mnist --peer diffusers     # another project

--data is that of frechet.py. The time is that of the whole command train.py, with start-up,
decoding and previews. A copy of the checkpoint each minute shows when a distance was reached.

A peer trains for 480 s, without start and decoding, with its own defaults (optimizer, rate, loss,
average), which are meant for longer runs, and its own network in a size of our choice, about that
of --quick. The sampler is the same. The peers need `pip install -r benchmarks/requirements.txt`.
"""

import argparse
import contextlib
import io
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import compare  # noqa: E402
import frechet  # noqa: E402

import ddpm_numpy  # noqa: E402
import export  # noqa: E402
from beyond import as_eps, sample  # noqa: E402
from ddpm import Diffusion, linear_betas  # noqa: E402
from images import from_pixels, to_pixels  # noqa: E402
from support.trained import load, open_checkpoint  # noqa: E402

GOALS = 30, 10  # the distances for which the table says when they were reached
SECONDS = 480  # of a peer's training


def train(data, flags, folder):
    """Run train.py; return [(seconds, a copy of the checkpoint)], with the final one last."""
    command = [sys.executable, HERE.parent / "train.py", "--data", data / "train", *flags]
    command += ["--out", folder / "run", "--save-minutes", "1"]
    began, copies = time.perf_counter(), []
    process = subprocess.Popen(list(map(str, command)))
    while process.poll() is None:
        time.sleep(0.2)
        seconds = time.perf_counter() - began
        if seconds > 60 * (len(copies) + 1) and (folder / "run" / "checkpoint.pt").exists():
            copies.append((seconds, folder / f"{seconds:.0f}.pt"))
            shutil.copy(folder / "run" / "checkpoint.pt", copies[-1][1])
    if process.returncode:
        sys.exit(process.returncode)
    return [*copies, (time.perf_counter() - began, folder / "run" / "checkpoint.pt")]


def diffusers_peer():
    """Return diffusers' training example: (network, Diffusion, loss, optimizer, its average).

    loss takes x0. The average is a pair of functions: one follows a step, one puts it in place.
    """
    from diffusers import UNet2DModel
    from diffusers.training_utils import EMAModel

    unet, diffusion = UNet2DModel(
        sample_size=32, in_channels=1, out_channels=1, layers_per_block=1,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ), Diffusion(linear_betas())  # fmt: skip
    weights = list(unet.parameters())
    optimizer = torch.optim.AdamW(weights, 1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 500, 1, 500)
    ema = EMAModel(weights, 0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)

    def network(x, t):
        return unet(x, t).sample

    def update():
        warmup.step()
        ema.step(weights)

    return (
        network, diffusion, lambda x0: diffusion.loss(network, x0), optimizer,
        (update, lambda: ema.copy_to(weights)),
    )  # fmt: skip


def lucidrains_peer():
    """Return the same for denoising-diffusion-pytorch, with its Trainer's settings."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    process = GaussianDiffusion(Unet(dim=32, dim_mults=(1, 2, 2), channels=1), image_size=32)
    optimizer = torch.optim.Adam(process.parameters(), 8e-5, betas=(0.9, 0.99))
    ema, diffusion = EMA(process, beta=0.995, update_every=10), Diffusion(process.betas)
    return (
        as_eps(process.model, diffusion, "v"), diffusion, lambda x0: process((x0 + 1) / 2),
        optimizer, (ema.update, lambda: process.load_state_dict(ema.ema_model.state_dict())),
    )  # fmt: skip


def train_peer(peer, images):
    """Train a peer for SECONDS; return the network, its Diffusion and the number of steps."""
    torch.manual_seed(0)
    network, diffusion, loss, optimizer, (update, use_average) = peer()
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        loss(from_pixels(images[torch.randint(len(images), (64,))])).backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update()
        steps += 1
    use_average()
    return network, diffusion, steps


def peer_samples(network, diffusion, steps, count):
    """Return `count` samples of a peer, uint8 (count, 1, 32, 32)."""
    generator, pixels = torch.Generator().manual_seed(0), []
    for first in range(0, count, 50):
        shape = min(50, count - first), 1, frechet.SIZE, frechet.SIZE
        x0 = sample(diffusion, network, shape, steps, "sa-solver", generator=generator)
        pixels.append(torch.from_numpy(to_pixels(x0.numpy())))
    return torch.cat(pixels)


def samples(path, steps, count):
    """Return `count` samples of a checkpoint, drawn as sample.py draws, uint8 (count, C, H, W)."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        export.write_onnx(load(path), Path(folder, "model.onnx"))
        network = ddpm_numpy.Network(Path(folder, "model.onnx"), "cpu")
    pixels = []
    for first in range(0, count, 50):
        n = min(50, count - first)
        x0 = ddpm_numpy.sample(network, n, steps=steps, sampler="sa-solver", first=first)
        pixels.append(torch.from_numpy(to_pixels(x0)))
    return torch.cat(pixels)


def main():
    parser = argparse.ArgumentParser(
        usage="python benchmarks/speedrun.py --data fashion-mnist [flags of train.py]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with train and test")
    parser.add_argument("--samples", type=int, default=1000, help="[%(default)s]")
    parser.add_argument("--peer", choices=("diffusers", "lucidrains"), help="train another project")
    args, flags = parser.parse_known_args()
    classifier, test, _ = frechet.reference(args.data)

    def distance(pixels):
        return frechet.frechet_distance(frechet.statistics(classifier, pixels), test)

    if args.peer:
        peer = {"diffusers": diffusers_peer, "lucidrains": lucidrains_peer}[args.peer]
        network, diffusion, step = train_peer(peer, frechet.read(args.data / "train"))
        seconds, flags = SECONDS, [args.peer]
        five, ten = (
            distance(peer_samples(network, diffusion, steps, args.samples)) for steps in (5, 10)
        )
        curve = [(seconds, five)]
    else:
        with tempfile.TemporaryDirectory() as folder:
            copies = train(args.data, ["--quick", "--no-flip", *flags], Path(folder))
            seconds, last = copies[-1]
            five, ten = (distance(samples(last, steps, args.samples)) for steps in (5, 10))
            curve = [(at, distance(samples(path, 5, args.samples))) for at, path in copies[:-1]]
            curve.append((seconds, five))
            step = open_checkpoint(last)["step"]
    reached = [next((f"{at:.0f} s" for at, d in curve if d <= goal), "-") for goal in GOALS]
    print("distance in 5 steps, by time:", *(f"{at:.0f} s: {d:.1f}," for at, d in curve))
    commit = subprocess.run(
        ["git", "-C", HERE, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    print("| date | seconds | steps | distance, 5 sampling steps | 10 sampling steps | to 30 | "
          "to 10 | flags | commit | machine |")  # fmt: skip
    row = [time.strftime("%Y-%m-%d"), f"{seconds:.0f}", f"{step:,}", f"{five:.1f}", f"{ten:.1f}"]
    row += [*reached, " ".join(flags), commit, compare.machine()]
    print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
