"""Why samples are not copies of the training images: measurements on Fashion-MNIST.

    python docs/copies.py --data fashion-mnist --runs runs    # about 40 minutes on two cores

The folder fashion-mnist has the images in train/ and test/. The program compares the included
network with the exact one of its 60,000 training images. It trains ten small networks, on two
disjoint sets for each of five sizes, prints the numbers of beyond.md, and draws copies.png.
"""

import argparse
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from beyond import sample  # noqa: E402
from ddpm import Diffusion, linear_betas  # noqa: E402
from ddpm_numpy import Network  # noqa: E402
from docs.make_figures import FIGURES, PAGE, plot, show  # noqa: E402
from exact import exact_network, squared_error  # noqa: E402
from images import from_pixels  # noqa: E402
from support.data import read_folder  # noqa: E402
from support.trained import load  # noqa: E402

SIZES, STEPS = (100, 300, 1_000, 10_000, 30_000), 4_000
TIMES = (0, 5, 20, 50, 100, 200, 300, 400, 500, 600, 700, 850, 999)
TRAIN = "--quick --image-size 16 --no-flip --preview-every 1000000".split()


def read(folder, size):
    """Return the grey images of a folder, float32 (N, 1, size, size)."""
    return from_pixels(torch.from_numpy(read_folder(folder, size, 1)[0]))


def split(data, runs):
    """Return {(N, side): folder} of disjoint sets of training images, which are links to files."""
    files, sets = sorted((data / "train").rglob("*.png"), key=lambda path: path.name), {}
    random.Random(0).shuffle(files)
    for n in SIZES:
        for side in (0, 1):
            folder = runs / f"images-{n}-{side}"
            folder.mkdir(parents=True, exist_ok=True)
            for file in files[side * len(files) // 2 :][:n]:
                if not (folder / file.name).exists():
                    os.link(file, folder / file.name)
            sets[n, side] = folder
    return sets


def train(sets, runs):
    """Train a network on each set, two at a time on one core each; finished runs stay."""

    def run(key):
        out = runs / "run-{}-{}".format(*key)
        words = ["--data", sets[key], "--out", out, *TRAIN, "--steps", STEPS]
        subprocess.run(
            [str(word) for word in (sys.executable, HERE.parent / "train.py", *words)],
            check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return load(out)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(sets, pool.map(run, sets), strict=True))


def errors(diffusion, model, x0):
    """Return the mean squared error of eps at each of TIMES."""
    return [
        squared_error(diffusion, model, x0, torch.full((len(x0),), t), seed=9).mean().item()
        for t in TIMES
    ]


def nearest(x, images):
    """Return the index of the image nearest to each x, and its rms distance in grey levels."""
    distance, index = torch.cdist(x.flatten(1), images.flatten(1)).min(1)
    return index, 127.5 * distance / x[0].numel() ** 0.5


def included_and_exact(data):
    """Compare both networks on 512 training images and 512 test images, at each of TIMES."""
    diffusion, network = (
        Diffusion(linear_betas()),
        Network(PAGE / "fashion-mnist.onnx", "cpu"),
    )
    images, unseen = read(data / "train", 32), read(data / "test", 32)
    generator = torch.Generator().manual_seed(0)
    seen = images[torch.randperm(len(images), generator=generator)[:512]]
    unseen = unseen[torch.randperm(len(unseen), generator=generator)[:512]]
    models = {
        "included": lambda x, t: torch.from_numpy(network(x.numpy(), t.numpy())),
        "exact": exact_network(diffusion, images),
    }
    return {
        f"{name} network, {kind} images": errors(diffusion, model, x0)
        for name, model in models.items()
        for kind, x0 in (("training", seen), ("test", unseen))
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="with train/ and test/")
    parser.add_argument("--runs", type=Path, required=True, help="where the runs are, or will be")
    parser.add_argument("--out", type=Path, default=FIGURES / "copies.png", help="[docs/figures]")
    args = parser.parse_args()

    sets = split(args.data, args.runs)
    trained, test = train(sets, args.runs), read(args.data / "test", 16)[:512]
    curves = included_and_exact(args.data)
    print("t", *TIMES, sep="\t")
    for name, values in curves.items():
        print(*(f"{value:.5f}" for value in values), name, sep="\t")

    x_T = torch.randn(128, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    rows, names = [], []
    for n in SIZES:
        images = read(sets[n, 0], 16)
        samples = [
            sample(trained[n, side].diffusion, trained[n, side].eps, x_T.shape, 50, x_T=x_T)
            for side in (0, 1)
        ]
        index, distance = nearest(samples[0], images)
        _, of_test = nearest(test, images)
        apart, other = (  # samples of both networks from one x_T, and of one network from two x_T
            127.5 * (samples[0] - x).square().flatten(1).mean(1).sqrt()
            for x in (samples[1], samples[0].roll(1, 0))
        )
        diffusion, eps_model = trained[n, 0].diffusion, torch.no_grad()(trained[n, 0].eps)
        seen, unseen = (errors(diffusion, eps_model, x) for x in (images[:512], test))
        print(f"{n} images: samples are {distance.median():.1f} from the nearest training image, "
              f"test images {of_test.median():.1f}; samples of both networks are "
              f"{apart.median():.1f} apart, a tenth of them more than {apart.quantile(0.9):.1f}, "
              f"and from different x_T {other.median():.1f}")  # fmt: skip
        print("  training", *(f"{e:.4f}" for e in seen), "\n  test", *(f"{e:.4f}" for e in unseen))
        rows += [samples[0][:10], images[index[:10]], samples[1][:10]]
        names += [f"{n:,} images", "the nearest of them", f"{n:,} others"]

    figure = Figure(figsize=(10, 7.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(4, 5))
    scales = {"yscale": "log", "ylim": (1e-5, 100)}
    curves = {name: (TIMES, values) for name, values in curves.items()}
    plot(left, curves, "t", "squared error of the noise", **scales)
    left.set_box_aspect(1.2)
    show(right, torch.stack(rows).clamp(-1, 1).numpy(), rows=names)
    figure.savefig(args.out, dpi=100)


if __name__ == "__main__":
    main()
