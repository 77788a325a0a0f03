"""Draw a small data set: 300 pictures of four shapes.

    python benchmarks/shapes.py shapes
    python train.py --data shapes/images --classes --quick --no-flip --out shapes-run
    python export.py --checkpoint shapes-run/checkpoint.pt --onnx shapes.onnx
    python sample.py --onnx shapes.onnx -n 400 --steps 20 --dir samples
    python benchmarks/frechet.py samples --data shapes/judge    # how many have the right shape

The folder `judge` has many more pictures, from which frechet.py learns to tell the shapes apart.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parent.parent))

from images import check_new_folder

CORNERS = {"circle": 0, "square": 4, "triangle": 3, "star": 10}


def draw(kind, random):
    """Return a shape of random size, place, turn and colour on a light background, 64x64."""
    image = Image.new("RGB", (128, 128), tuple(random.integers(200, 256, 3)))
    radius = random.uniform(28, 52)
    x, y = random.uniform(radius + 4, 124 - radius, 2)
    n, turn = CORNERS[kind], random.uniform(-20, 20) + (45 if kind == "square" else 0)
    colour, canvas = tuple(random.integers(0, 160, 3)), ImageDraw.Draw(image)
    if kind == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    else:
        angles = np.radians(turn - 90 + 360 / n * np.arange(n))
        radii = np.where((np.arange(n) % 2 == 1) & (kind == "star"), 0.42 * radius, radius)
        corners = zip(x + radii * np.cos(angles), y + radii * np.sin(angles), strict=True)
        canvas.polygon([*corners], fill=colour)
    return image.resize((64, 64), Image.Resampling.LANCZOS)


def main():
    parser = argparse.ArgumentParser(usage="python benchmarks/shapes.py NEW_FOLDER")
    parser.add_argument("out", type=Path)
    out, random = parser.parse_args().out, np.random.default_rng(0)
    check_new_folder(out)
    for part, n in (("images", 75), ("judge/train", 3000), ("judge/test", 250)):
        for kind in CORNERS:
            (out / part / kind).mkdir(parents=True)
            for k in range(n):
                draw(kind, random).save(out / part / kind / f"{k:04d}.png")


if __name__ == "__main__":
    main()
