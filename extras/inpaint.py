"""Regenerate the part of an image that is white in a mask.

python -m extras.inpaint --onnx model.onnx image.png mask.png

The network needs no special training: in each step, the image replaces x0_hat outside the mask.
"""

import argparse
import sys

import numpy as np
from tqdm import tqdm

from images import from_pixels, read_image
from sample import Network, check_output, grid, guard_output, sample_progressive, save, to_pixels


class Inpainting(Network):
    """A Network that generates only where the mask is white. Elsewhere, x0_hat is the image.

    image, mask: files, cropped to their centre square, which become the attributes image, float32
    (C, H, W), and mask, bool (1, H, W). Raises what Network and read_image raise.
    """

    def __init__(self, path, image, mask):
        super().__init__(path)
        channels, size, _ = self.shape
        self.image = from_pixels(read_image(image, size, channels))
        mask = read_image(mask, size, 1, background=0)
        self.mask = mask > mask.max() / 2  # the lightest grey is white: masks of 0 and 1 work

    def reverse(self, eps, draw_noise, **options):
        """Return the generator of sample.reverse for eps inside of the mask."""

        def partly(x_t, t):
            abar = np.prod(1 - self.betas[: t + 1]).item()
            known = (x_t - abar**0.5 * self.image) / (1 - abar) ** 0.5  # (4), solved for the noise
            return np.where(self.mask, eps(x_t, t), known)

        return super().reverse(partly, draw_noise, **options)


def main():
    guard_output()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("image")
    flag("mask")
    flag("--onnx", default="model.onnx", help="network from export.py [%(default)s]")
    flag("--out", default="inpainted.png", help="a PNG file [%(default)s]")
    flag("-n", type=int, default=16, help="number of versions [%(default)s]")
    flag("--steps", type=int, default=50, help="steps of the reverse process [%(default)s]")
    flag("--class", dest="classes", nargs="+", metavar="NAME", help="classes to generate [all]")
    flag("--guidance", type=float, default=0.0, help="w: makes images more typical of a class [0]")
    args = parser.parse_args()
    check_output(args.out, args.onnx, args.image, args.mask)
    try:
        network = Inpainting(args.onnx, args.image, args.mask)
        if args.n < 1 or not 1 <= args.steps <= len(network.betas):
            raise ValueError(f"-n must be at least 1, and --steps 1..{len(network.betas)}")
        chain = sample_progressive(network, args.n, args.classes, args.guidance, steps=args.steps)
    except (OSError, ValueError) as error:
        sys.exit(f"inpaint.py: {error}")
    for _, _, x0_hat in tqdm(chain, total=args.steps, unit="step"):
        x0 = x0_hat
    if not np.isfinite(x0).all():
        sys.exit("inpaint.py: the network's output is not finite")
    save(grid(to_pixels(x0), len(args.classes or network.classes)), args.out)
    print(f"{args.out}: {args.n} images; the mask selects {network.mask.mean():.0%}")


if __name__ == "__main__":
    main()
