"""Show the reverse process of a grid of images as a GIF: x_t, from the noise to the samples.

python -m extras.animate --onnx model.onnx --out samples.gif
"""

import argparse
import sys

from tqdm import tqdm

from sample import Network, check_output, grid, sample_progressive, to_pixels

FRAMES = 50


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--onnx", default="model.onnx", help="network from export.py [%(default)s]")
    flag("--out", default="samples.gif", help="a GIF file [%(default)s]")
    flag("-n", type=int, default=16, help="number of images [%(default)s]")
    flag("--steps", type=int, help="steps of the reverse process [T]")
    flag("--seed", type=int, default=0, help="image k depends on (seed, k) alone [%(default)s]")
    flag("--class", dest="classes", nargs="+", metavar="NAME", help="classes to draw [all]")
    flag("--guidance", type=float, default=0.0, help="w: makes images more typical of a class [0]")
    args = parser.parse_args()
    check_output(args.out, args.onnx)
    try:
        network = Network(args.onnx)
        steps = len(network.betas) if args.steps is None else args.steps
        if args.n < 1 or not 1 <= steps <= len(network.betas):
            raise ValueError(f"-n must be at least 1, and --steps 1..{len(network.betas)}")
        how = args.n, args.classes, args.guidance, args.seed
        chain = sample_progressive(network, *how, steps=steps)
    except ValueError as error:
        sys.exit(f"animate.py: {error}")
    states, each = [], -(-steps // FRAMES)
    for k, (_, x_t, x0_hat) in enumerate(tqdm(chain, total=steps, unit="step")):
        if k % each == 0:
            states.append(x_t)
        x0 = x0_hat
    rows = len(args.classes or network.classes)
    first, *others = [grid(to_pixels(x), rows) for x in [*states, x0]]
    durations = [60] * len(others) + [2000]  # in milliseconds
    first.save(args.out, "GIF", save_all=True, append_images=others, duration=durations, loop=0)
    print(f"{args.out}: {args.n} images in {len(states) + 1} frames")


if __name__ == "__main__":
    main()
