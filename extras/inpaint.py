"""Regenerate the part of an image that is white in a mask.

python -m extras.inpaint --onnx model.onnx image.png mask.png

The network needs no special training: in each step, the image replaces x0_hat outside the mask.
"""

import numpy as np

import sample
from images import from_pixels, read_image
from program import check_writable


class Inpainting(sample.Network):
    """A Network that generates only where the mask is white. Elsewhere, x0_hat is the image.

    image, mask: files, cropped to their centre square, which become the attributes image, float32
    (C, H, W), and mask, bool (1, H, W). Raises what Network and read_image raise.
    """

    def __init__(self, path, image, mask, device="auto"):
        super().__init__(path, device)
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
    parser = sample.flags(__doc__.split("\n")[0])
    parser.set_defaults(n=16, steps=50, out="inpainted.png")
    parser.add_argument("image")
    parser.add_argument("mask")

    def open_network(args):
        check_writable(args.out, args.image, args.mask)
        return Inpainting(args.onnx, args.image, args.mask, args.device)

    sample.main(parser, open_network)


if __name__ == "__main__":
    main()
