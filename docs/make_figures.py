"""Make the README's pictures again, out of a trained run and the pictures it has not seen.

    python docs/make_figures.py --run run --data fashion-mnist/test --out docs

needs checkpoint.pt in the folder of the run, and takes some twenty minutes on two cores. Each
picture has a white ground of its own, so that it can be read on a dark page.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageSequence

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import sample  # noqa: E402
import train  # noqa: E402
from ddpm import Diffusion, cosine_betas, linear_betas  # noqa: E402

SHOWN = (0, 50, 100, 200, 300, 400, 500, 700, 999)  # the t of the forward process
STEPS = (1000, 250, 50, 20)


def labelled(image, above, beside=(), left=0):
    """The image on white, with words above it at even distances, and beside it."""
    font, high = ImageFont.load_default(22), 40
    page = Image.new("RGB", (image.width + left + 8, image.height + high + 8), "white")
    page.paste(image, (left, high))
    draw = ImageDraw.Draw(page)
    for words, length, vertical in ((above, image.width, False), (beside, image.height, True)):
        for k, word in enumerate(words):
            middle = (k + 0.5) * length / len(words)
            place = (left - 12, high + middle) if vertical else (left + middle, high - 8)
            draw.text(place, word, "black", font, "rm" if vertical else "md")
    return page


def grid(x, columns):
    """Pictures (B, C, H, W) in [-1, 1] in rows of so many."""
    return sample.grid(sample.to_pixels(np.asarray(x)), columns)


def forward(diffusion, x0):
    """x_t of four pictures at growing t: a row for each, its noise the same all along."""
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    at = [diffusion.q_sample(x0, torch.full((len(x0),), t), noise) for t in SHOWN]
    rows = torch.stack([x0, *at], 1).flatten(0, 1).clamp(-1, 1)
    return labelled(grid(rows, 1 + len(SHOWN)), ["x0", "t = 0", *map(str, SHOWN[1:])])


def schedule(path):
    """The signal-to-noise ratio abar_t / (1 - abar_t) of the two schedules."""
    curves = {}
    for name, betas in (("linear", linear_betas()), ("cosine", cosine_betas())):
        abar = Diffusion(betas).alphas_bar
        keep = slice(0, 995)  # the cosine's ends at 1e-9
        curves[name] = range(995), (abar / (1 - abar))[keep].tolist()
    train.save_plot(path, curves, "t", "signal-to-noise ratio", "y")


def loss_by_t(trained, x0, path):
    """The mean squared error of the noise at each t, on pictures not seen in training."""
    times = sorted({int(t) for t in np.geomspace(1, trained.diffusion.T, 40)})
    random, losses = torch.Generator().manual_seed(0), []
    for t in times:  # the plot's t is the paper's, from 1
        noise = torch.randn(x0.shape, generator=random)
        with torch.no_grad():
            index = torch.full((len(x0),), t - 1)
            losses.append(trained.diffusion.loss(trained.model, x0, index, noise).item())
    for t in (1, 10, 100, 300, 1000):
        nearest = min(times, key=lambda other, t=t: abs(other - t))
        print(f"  loss at t = {nearest - 1}: {losses[times.index(nearest)]:.4f}")
    train.save_plot(path, {"": (times, losses)}, "t, from 1", "squared error of the noise", "xy")


def bound_by_t(csv, path):
    """L_t in bits per dimension, of the table that train.py --eval leaves."""
    rows = [line.split(",") for line in csv.read_text().splitlines()[1:]]
    curve = [int(row[0]) + 1 for row in rows], [float(row[1]) for row in rows]
    train.save_plot(path, {"": curve}, "t, from 1", "L_t-1, bits per dimension", "xy")


def fewer_steps(onnx, folder):
    """The same noise to pictures in 1000, 250, 50 and 20 steps, by the paper's step and by DDIM."""
    rows = []
    for name, eta in (("Algorithm 2", None), ("DDIM", 0.0)):
        tiles = []
        for steps in STEPS:
            print(f"  {name}, {steps} steps")
            network = sample.Network(onnx, 16, "cpu")
            noise = sample.noise_of(0, 0, network.shape)
            chain = sample.sample_progressive(
                network, noise, network.betas, network.variance, steps, eta
            )
            for _, _, x0 in chain:
                last = x0
            tile = np.asarray(grid(last, 4).resize((256, 256), Image.Resampling.NEAREST))
            tiles.append(np.pad(np.atleast_3d(tile), ((6, 6), (6, 6), (0, 0)), constant_values=255))
        rows.append(np.concatenate(tiles, 1))
    image = np.concatenate(rows, 0)
    above = [f"{steps} steps" for steps in STEPS]
    labelled(sample.to_image(image), above, ["Algorithm 2", "DDIM"], 140).save(folder / "steps.png")


def shrink(gif, factor=4):
    """The enlarged pixels of an animation smaller again: a page loads it faster."""
    with Image.open(gif) as image:
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]
        duration = [frame.info["duration"] for frame in ImageSequence.Iterator(image)]
    size = frames[0].width // factor, frames[0].height // factor
    frames = [frame.resize(size, Image.Resampling.NEAREST) for frame in frames]
    frames = [frame.convert("P", palette=Image.Palette.ADAPTIVE, colors=32) for frame in frames]
    frames[0].save(gif, save_all=True, append_images=frames[1:], duration=duration, loop=0)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("run"), help="of train.py [run]")
    parser.add_argument(
        "--data", type=Path, required=True, help="a folder of pictures that it has not seen"
    )
    parser.add_argument("--out", type=Path, default=HERE, help="where to put the pictures [docs]")
    args = parser.parse_args()

    def program(name, *flags):
        subprocess.run([sys.executable, HERE.parent / name, *map(str, flags)], check=True)

    args.out.mkdir(parents=True, exist_ok=True)
    trained = train.load(args.run)
    channels, size, _ = trained.shape
    x0 = train.read_folder(args.data, size, channels, 64).float() / 127.5 - 1
    forward(trained.diffusion, x0[:: len(x0) // 4][:4]).save(args.out / "forward.png")
    schedule(args.out / "schedule.png")
    loss_by_t(trained, x0, args.out / "loss-by-t.png")

    onnx = args.run / "model.onnx"
    program("export.py", "--checkpoint", args.run / "checkpoint.pt", "--onnx", onnx)
    strip = ["--strip", args.out / "strip.png", "--gif", args.out / "reverse.gif"]
    program("sample.py", "--onnx", onnx, "-n", 4, "--out", args.run / "four.png", *strip)
    shrink(args.out / "reverse.gif")
    fewer_steps(onnx, args.out)

    program(
        "train.py", "--data", args.data, "--eval", args.run / "checkpoint.pt", "--eval-images", 64
    )
    (args.run / "rate-distortion.png").replace(args.out / "rate-distortion.png")
    bound_by_t(args.run / "rate-distortion.csv", args.out / "bound-by-t.png")


if __name__ == "__main__":
    main()
