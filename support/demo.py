"""The built-in training set, whose images are so simple that a program can judge the samples."""

from itertools import product

import numpy as np

GLYPHS = [
    ".#. ### .#.", "#.# .#. #.#", "### #.# ###", "### .#. .#.", "#.# #.# ###", "#.# ### #.#",
]  # fmt: skip
COLOURS = [(230, 57, 70), (244, 162, 28), (56, 160, 75), (38, 110, 220)]


def demo_images():
    """Return each glyph in each colour at nine places, on white: uint8 (216, 3, 8, 8)."""
    images = []
    for glyph, colour, left, top in product(GLYPHS, COLOURS, range(3), range(3)):
        cells = np.array([[cell == "#" for cell in row] for row in glyph.split()])
        image = np.full((8, 8, 3), 255, np.uint8)
        image[top : top + 6, left : left + 6][cells.repeat(2, 0).repeat(2, 1)] = colour
        images.append(image.transpose(2, 0, 1))
    return np.stack(images)


def are_right(pixels):
    """Return which pixels, uint8 (N, 3, 8, 8), are demo images to within 48 of 255 per value."""
    allowed = demo_images().astype(int)
    nearest = [np.abs(allowed - image).max((1, 2, 3)).min() for image in pixels.astype(int)]
    return np.array(nearest) <= 48
