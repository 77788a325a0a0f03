"""Generate images between two images, as in Figure 8 of the paper.

    python -m extras.interpolate --onnx model.onnx a.png b.png --t 200

Both images are diffused to x_t and mixed, and the reverse process goes on from there. The larger t
is, the more the network invents.
"""

import argparse
import math
import sys

import numpy as np
from tqdm import tqdm

from images import from_pixels, read_image
from program import check_writable, guard_output
from sample import Network, grid, last_x0, noise_of, reverse, save, to_pixels

LAMBDAS = np.linspace(0, 1, 11, dtype=np.float32)  # the shares of the second image


def starting_at(x_t, draw_noise):
    """Return a draw_noise() that returns x_t first: the reverse process starts there."""
    waiting = [x_t]
    return lambda: waiting.pop() if waiting else draw_noise()


def interpolate(network, a, b, t, steps=None, seed=0):
    """Return the reverse process of eleven mixtures from x_t on: yields (t, x_t, x0_hat).

    a, b: float32 in [-1, 1], (C, H, W). t: 0..T-1. steps: 1..t+1, or all if None.

    All images have the same noise. In the paper, the two images have different noise, so the
    noise of the middle mixture has 71% of the right standard deviation, which blurs the image.
    """
    betas, shares = network.betas[: t + 1], LAMBDAS[:, None, None, None]
    abar = math.prod(1 - betas)
    draw_noise = noise_of(seed, 0, 1, network.shape)
    x_t = math.sqrt(abar) * ((1 - shares) * a + shares * b) + math.sqrt(1 - abar) * draw_noise()
    return reverse(network, starting_at(x_t, draw_noise), betas, network.variance, steps)


def main():
    guard_output()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("images", nargs=2, metavar="IMAGE")
    flag("--onnx", default="model.onnx", help="network from export.py [%(default)s]")
    flag("--out", default="interpolated.png", help="a PNG file [%(default)s]")
    flag("--t", type=int, default=200, help="where to mix, 0..T-1 [%(default)s]")
    flag("--steps", type=int, help="steps of the reverse process, 1..t+1 [all]")
    flag("--seed", type=int, default=0, help="seed of the noise [%(default)s]")
    args = parser.parse_args()
    check_writable(args.out, args.onnx, *args.images)
    if not args.out.lower().endswith(".png"):
        parser.error("--out must be a PNG file")
    try:
        network = Network(args.onnx)
        channels, size, _ = network.shape
        a, b = (read_image(path, size, channels) for path in args.images)
        steps = args.t + 1 if args.steps is None else args.steps
        if not 0 < steps <= args.t + 1 <= len(network.betas):
            raise ValueError(f"--t must be 0..{len(network.betas) - 1}, and --steps 1..t+1")
        process = interpolate(network, from_pixels(a), from_pixels(b), args.t, steps, args.seed)
    except (OSError, ValueError) as error:
        sys.exit(f"interpolate.py: {error}")
    x0 = last_x0(tqdm(process, total=steps, unit="step"))
    if not np.isfinite(x0).all():
        sys.exit("interpolate.py: the network's output is not finite")
    save(grid(np.stack([a, *to_pixels(x0), b]), rows=1), args.out)
    print(f"{args.out}: the first image, 11 mixtures (lambda = 0 to 1), and the second image")


if __name__ == "__main__":
    main()
