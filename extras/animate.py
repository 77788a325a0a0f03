"""Show the reverse process of 16 images as a GIF: x_t in each step, and the samples.

python -m extras.animate --onnx model.onnx --out samples.gif
"""

import argparse
import sys

import numpy as np
from tqdm import tqdm

from sample import Network, check_output, grid, sample_progressive, to_pixels


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--onnx", default="model.onnx", help="network from export.py [%(default)s]")
    flag("--out", default="samples.gif", help="a GIF file [%(default)s]")
    flag("--steps", type=int, default=50, help="steps of the reverse process [%(default)s]")
    flag("--class", dest="classes", nargs="+", metavar="NAME", help="classes to draw [all]")
    flag("--guidance", type=float, default=0.0, help="w: makes images more typical of a class [0]")
    args = parser.parse_args()
    check_output(args.out, args.onnx)
    try:
        network = Network(args.onnx)
        if not 1 <= args.steps <= len(network.betas):
            raise ValueError(f"--steps must be 1..{len(network.betas)}")
        chain = sample_progressive(network, 16, args.classes, args.guidance, steps=args.steps)
    except ValueError as error:
        sys.exit(f"animate.py: {error}")
    states = []
    for _, x_t, x0_hat in tqdm(chain, total=args.steps, unit="step"):
        states[-1:] = x_t, x0_hat  # only the last x0_hat stays
    if not np.isfinite(states).all():
        sys.exit("animate.py: the network's output is not finite")
    first, *others = [grid(to_pixels(x), len(args.classes or network.classes)) for x in states]
    durations = [60] * len(others) + [2000]  # in milliseconds
    first.save(args.out, "GIF", save_all=True, append_images=others, duration=durations, loop=0)
    print(f"{args.out}: {len(states)} frames")


if __name__ == "__main__":
    main()
