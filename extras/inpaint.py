"""Redraw a part of an image: where the mask is white.

    python -m extras.inpaint --onnx model.onnx image.png mask.png
    python -m extras.inpaint --onnx model.onnx image.png mask.png --class boot --guidance 2

The network needs no special training: in each step, the image replaces x0_hat outside the mask.
Both files are cropped to their centre square.
"""

import argparse
import sys

import numpy as np
from tqdm import tqdm

from images import from_pixels, read_image
from sample import Network, check_output, grid, sample_progressive, to_pixels


class Inpainting(Network):
    """A Network that draws only where `mask`, bool (1, H, W), is True.

    Elsewhere, x0_hat is `image`, float32 (C, H, W). Set both before you draw.
    """

    def reverse(self, eps, draw_noise, **options):
        """Return the generator of sample.reverse for eps inside of the mask."""
        alphas_bar = np.cumprod(1 - self.betas).tolist()

        def partly(x_t, t):
            abar = alphas_bar[t]
            known = (x_t - abar**0.5 * self.image) / (1 - abar) ** 0.5  # (4), solved for the noise
            return np.where(self.mask, eps(x_t, t), known)

        return super().reverse(partly, draw_noise, **options)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("image")
    flag("mask")
    flag("--onnx", default="model.onnx", help="network from export.py [%(default)s]")
    flag("--out", default="inpainted.png", help="a PNG file [%(default)s]")
    flag("-n", type=int, default=16, help="number of versions [%(default)s]")
    flag("--steps", type=int, default=50, help="steps of the reverse process [%(default)s]")
    flag("--seed", type=int, default=0, help="seed of the noise [%(default)s]")
    flag("--class", dest="classes", nargs="+", metavar="NAME", help="classes to draw [all]")
    flag("--guidance", type=float, default=0.0, help="w: makes images more typical of a class [0]")
    args = parser.parse_args()
    check_output(args.out, args.onnx, args.image, args.mask)
    try:
        network = Inpainting(args.onnx)
        channels, size, _ = network.shape
        network.image = from_pixels(read_image(args.image, size, channels))
        mask = read_image(args.mask, size, 1)
        network.mask = mask > mask.max() / 2  # the lightest grey is white: masks of 0 and 1 work
        if args.n < 1 or not 1 <= args.steps <= len(network.betas):
            raise ValueError(f"-n must be at least 1, and --steps 1..{len(network.betas)}")
        how = args.n, args.classes, args.guidance, args.seed
        chain = sample_progressive(network, *how, steps=args.steps)
    except (OSError, ValueError) as error:
        sys.exit(f"inpaint.py: {error}")
    for _, _, x0_hat in tqdm(chain, total=args.steps, unit="step"):
        x0 = x0_hat
    grid(to_pixels(x0), len(args.classes or network.classes)).save(args.out, "PNG")
    print(f"{args.out}: {args.n} images; the mask selects {network.mask.mean():.0%}")


if __name__ == "__main__":
    main()
