"""Why samples are not copies of the training images: measurements on Fashion-MNIST.

    python docs/copies.py --data fashion-mnist         # minutes: transition.png and nearest.png
    python docs/copies.py --data fashion-mnist --runs runs     # also copies.png, 40 minutes more
    python docs/copies.py --data images --samples samples      # how near each sample is to an image

The folder fashion-mnist has the images in train/ and test/. The program compares the included
network with the exact networks of 100 to 60,000 training images, and draws the garments of the page
above the training images nearest to them. With --runs, it trains ten small networks, on two
disjoint sets for each of five sizes. It measures what beyond.md reports. With --samples, it only
prints the distance from each sample to its nearest image in --data, and draws twelve such pairs in
nearest.png. Printed and drawn values of t count from 1, as in the paper; the code's index is one
less.
"""

import argparse
import math
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from ddpm import Diffusion, linear_betas  # noqa: E402
from docs.make_figures import FIGURES, PAGE, page_noise, show  # noqa: E402
from extras.exact import exact_network, mean_squared_error  # noqa: E402
from extras.variants import sample  # noqa: E402
from images import from_pixels, read_folder, read_image  # noqa: E402
from run import load  # noqa: E402
from sample import Network, to_pixels  # noqa: E402

SIZES, STEPS = (100, 300, 1_000, 10_000, 30_000), 4_000
TIMES = (0, 5, 20, 50, 100, 200, 250, 300, *range(350, 651, 25), 700, 850, 999)
EXACT = (100, 1_000, 10_000, 60_000)  # numbers of images of the exact networks
TRAIN = "--quick --image-size 16 --no-flip --preview-every 1000000".split()


def read(folder, size):
    """Return the images of a folder in greyscale, float32 (N, 1, size, size)."""
    return from_pixels(torch.from_numpy(read_folder(folder, size, 1)[0]))


def split(data, runs):
    """Return {(N, side): folder} of disjoint sets of training images, as links to the files."""
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
    """Return run.load of a run on each set, trained two at a time on one core each."""

    def run(key):
        out = runs / "run-{}-{}".format(*key)
        words = ["--data", sets[key], "--out", out, *TRAIN, "--steps", STEPS, "--seed", key[1]]
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
        mean_squared_error(diffusion, model, x0, torch.full((len(x0),), t), seed=9).mean().item()
        for t in TIMES
    ]


def nearest(x, images):
    """Return the index of the image nearest to each x, and its rms distance in grey levels."""
    distance, index = torch.cdist(x.flatten(1), images.flatten(1)).min(1)
    return index, 127.5 * distance / x[0].numel() ** 0.5


def compare_samples(folder, data, path):
    """Print how far each image of a folder is from its nearest image of the data, nearest first.

    Then print the median and the 5% quantile of these distances, and of those between the data. The
    sheet at `path` has up to fifteen of the images, evenly spaced in this order.
    """
    paths, images = sorted(folder.rglob("*.png")), read_folder(data, 32)[0]
    samples = np.stack([read_image(path, 32, images.shape[1]) for path in paths])
    samples, images = (from_pixels(torch.from_numpy(x)) for x in (samples, images))
    _, distance = nearest(samples, images)
    for value, file in sorted(zip(distance.tolist(), paths, strict=True)):
        print(f"{value:5.1f}  {file}")
    ranks = torch.linspace(0, len(paths) - 1, min(15, len(paths))).round().long()
    draw_nearest(path, samples[distance.argsort()[ranks]], images)
    flat = images.flatten(1)  # each image is the first of those nearest to itself
    apart = torch.cat([torch.cdist(x, flat).kthvalue(2, 1).values for x in flat.split(1000)])
    apart = 127.5 * apart / images[0].numel() ** 0.5
    for name, values in ("samples to images", distance), ("images to other images", apart):
        print(f"{name}: median {values.median():.1f}, 5% below {values.quantile(0.05):.1f}")


def draw_nearest(path, samples, images):
    """Draw samples, five in a row, above the images nearest to them, below the distances."""
    index, distance = nearest(samples, images)
    pairs = torch.stack([samples, images[index]], 1).split(5)
    figure = Figure(figsize=(4.9, 2.05 * len(pairs) + 0.3), layout="constrained")
    axes = figure.subplots(len(pairs), squeeze=False)[:, 0]
    for its_axes, its, values in zip(axes, pairs, distance.split(5), strict=True):
        columns = [f"{value:.0f}" for value in values]
        show(its_axes, its.transpose(0, 1).numpy(), columns, ("sample", "nearest\ntraining image"))
    axes[0].set_title("root-mean-square difference in grey levels (of 255)", fontsize=9)
    figure.savefig(path, dpi=100, bbox_inches="tight")


def page_estimates(network=None):
    """Return the estimates of the first garments of page/index.html, uint8 (10, 15, 1, 32, 32).

    The ten steps begin with the page's noise. network(x_t, t) replaces the included network.
    """
    included = Network(PAGE / "fashion-mnist.onnx", "cpu")
    x_T = np.float32([page_noise(0, k, 1024) for k in range(15)]).reshape(15, 1, 32, 32)
    process = included.reverse(network or included, lambda: x_T, steps=10, sampler="ddim")
    return np.stack([to_pixels(x0) for _, _, x0 in process])


def record_exact(path, images):
    """Save the estimates of the exact network of the images, for the page: a row for each step."""
    exact = exact_network(Diffusion(linear_betas()), images)
    network = lambda x, t: exact(torch.from_numpy(x), torch.tensor([t])).numpy()  # noqa: E731
    rows = [np.concatenate(list(row[:, 0]), 1) for row in page_estimates(network)]
    Image.fromarray(np.concatenate(rows)).save(path, lossless=True, method=6)


def bits_known(diffusion, error, size):
    """Return how many bits x_t tells about an image of `size` values, (T,), by a network's error.

    error: the squared error of eps at every t, (T,). The bits are the rate with the small variance:
    the area under half the squared error of x0_hat against the SNR, from T to t.
    """
    snr = diffusion.alphas_bar / (1 - diffusion.alphas_bar)
    terms = (snr[:-1] - snr[1:]) * error[1:] / snr[1:] / (2 * math.log(2))
    return size * torch.cat([terms.flip(0).cumsum(0).flip(0), torch.zeros(1)])


def at_every_t(values):
    """Return the errors at TIMES, interpolated on a logarithmic scale, (T,)."""
    log_values = np.log(np.maximum(values, 1e-30))
    return torch.from_numpy(np.exp(np.interp(np.arange(1000), TIMES, log_values)))


def draw_transition(path, data):
    """Compare the included network with exact ones: print their errors, and draw them against t.

    The figure has the error of each exact network on its own images, relative to the included
    network's on test images. N images can represent all possible ones only where x_t tells less
    than log2 N bits about x_0. Each dotted line shows the t from which on this holds, by the error
    of the included network on test images.
    """
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes, diffusion = figure.subplots(), Diffusion(linear_betas())
    network = Network(PAGE / "fashion-mnist.onnx", "cpu")
    images, unseen = read(data / "train", 32), read(data / "test", 32)
    generator = torch.Generator().manual_seed(0)
    images = images[torch.randperm(len(images), generator=generator)]
    unseen = unseen[torch.randperm(len(unseen), generator=generator)[:512]]

    def included(x, t):
        return torch.from_numpy(network(x.numpy(), t.numpy()))

    def compare(name, model, n):
        """Print and return the errors on at most 512 of n training images, and on test images."""
        found = [errors(diffusion, model, x0) for x0 in (images[: min(n, 512)], unseen)]
        for kind, values in zip(("training", "test"), found, strict=True):
            print(*(f"{e:.5f}" for e in values), f"{name}, {kind} images", sep="\t")
        return found

    times = [i + 1 for i in TIMES]
    print("t", *times, sep="\t")
    _, of_included = compare("included network", included, len(images))
    bits = bits_known(diffusion, at_every_t(of_included), unseen[0].numel())
    for k, n in enumerate(EXACT):
        colour, model = f"C{k}", exact_network(diffusion, images[:n])
        seen, _ = compare(f"exact network of {n}", model, n)
        known = 1 + (bits > math.log2(n)).nonzero().max().item()
        ratio = at_every_t(seen) / at_every_t(of_included)
        axes.plot(range(1, 1001), ratio, colour, label=f"{n:,} images")
        falls = [1 + (ratio < share).nonzero().max().item() for share in (0.25, 0.5, 0.75)]
        axes.axvline(known, color=colour, linestyle=":")
        print(f"  log2 {n} = {math.log2(n):.1f} bits are known at t = {known}; the error on its "
              f"images is 1/4, 1/2 and 3/4 of the included network's at t = {falls}")  # fmt: skip
    print("bits known:", *(f"{bits[t - 1]:.1f} at t = {t}," for t in range(300, 601, 50)))
    axes.plot([], [], "0.5", linestyle=":", label="$x_t$ reveals $\\log_2 N$ bits")
    axes.set(xlabel="t", ylabel="relative squared error", xlim=(300, 750), ylim=(0, 1.1))
    axes.set_yticks((0, 0.25, 0.5, 0.75, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def draw_copies(path, data, runs):
    """Train the ten networks, print how far their samples are from images, and draw samples."""
    sets = split(data, runs)
    trained, test = train(sets, runs), read(data / "test", 16)
    x_T = torch.randn(128, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    figure = Figure(figsize=(7.2, 7.2), layout="constrained")
    axes = dict(zip((100, 300, 10_000), figure.subplots(3), strict=True))
    for n in SIZES:
        images = read(sets[n, 0], 16)
        (network, diffusion, _), (other_network, _, _) = trained[n, 0], trained[n, 1]
        samples = [
            sample(diffusion, model, x_T.shape, 50, draw_noise=lambda: x_T)
            for model in (network, other_network)
        ]
        index, distance = nearest(samples[0], images)
        _, of_test = nearest(test, images)  # of all classes, as the samples are
        apart, other = (  # samples of both networks from one x_T, and of one network from two x_T
            127.5 * (samples[0] - x).square().flatten(1).mean(1).sqrt()
            for x in (samples[1], samples[0].roll(1, 0))
        )
        print(f"{n} images: samples are {distance.median():.1f} from the nearest training image, "
              f"test images {of_test.median():.1f}; samples of both networks are "
              f"{apart.median():.1f} apart, a tenth of them more than {apart.quantile(0.9):.1f}, "
              f"and from different x_T {other.median():.1f}")  # fmt: skip
        if n not in axes:
            continue
        rows = torch.stack([images[index[:10]], samples[0][:10], samples[1][:10]])
        names = "nearest image", f"trained on {n:,}", f"on {n:,} others"
        columns = [f"{value:.0f}" for value in distance[:10]]
        show(axes[n], rows.clamp(-1, 1).numpy(), columns, names)
    figure.savefig(path, dpi=100, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="images, in train/ and test/")
    parser.add_argument("--runs", type=Path, help="folder of the runs")
    parser.add_argument("--samples", type=Path, help="32x32 images to find in --data")
    parser.add_argument("--out", type=Path, default=FIGURES, help="[docs/figures]")
    args = parser.parse_args()

    if args.samples:
        return compare_samples(args.samples, args.data, args.out / "nearest.png")
    images, garments = read(args.data / "train", 32), torch.from_numpy(page_estimates()[-1])
    draw_nearest(args.out / "nearest.png", from_pixels(garments), images)
    if args.out.resolve() == FIGURES:
        record_exact(PAGE / "exact.webp", images)
    draw_transition(args.out / "transition.png", args.data)
    if args.runs:
        draw_copies(args.out / "copies.png", args.data, args.runs)


if __name__ == "__main__":
    main()
