"""Measure a trained network: the variational bound on images that it has not seen, in bits.

    python evaluate.py --data ./test-images                             # run/checkpoint.pt
    python evaluate.py --data ./test-images --checkpoint hf:google/ddpm-cifar10-32 --images 256

It prints the terms of the bound in bits per dimension, and saves the rate-distortion curve (the
paper's figure 5) as rate-distortion-test-images.csv and .png. Each image takes T evaluations of the
network. After Ctrl-C, it reports on the finished batches.
"""

import support.start  # noqa: F401  # isort: skip

import argparse
import math
import os
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ddpm import Bound
from images import catch_signals, check_output, from_pixels, guard_output, replacing
from support import cli
from support.data import read_folder
from support.demo import demo_images
from support.device import choose_device, prefer_accuracy
from support.plot import save_plot
from support.trained import DEMO, HUB, load


def rate_distortion(bound):
    """Return the means over the images of a Bound: L_t, the rate and the RMSE of x0_hat, (T,) each.

    The rate is the number of bits per dimension that have been sent when x_t is known: the sum of
    L_T and the terms of all steps s > t. The RMSE is on the scale 0..255.
    """
    L_t = bound.L_t.mean(0)
    rate = bound.L_T.mean() + L_t.flip(0).cumsum(0).flip(0) - L_t
    return L_t, rate, 127.5 * bound.mse.mean(0).sqrt()


def arguments():
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        usage="python evaluate.py --data ./test-images [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag, count = parser.add_argument, cli.number(int, 1)
    seed = cli.number(int, 0, 2**63)
    flag("--data", action=cli.Once,
         help="folder of images [the demo, if the network was trained on it]")  # fmt: skip
    flag("--checkpoint", default="run/checkpoint.pt",
         help="a run, or diffusers weights: a folder, or hf:NAME [%(default)s]")  # fmt: skip
    flag("--images", type=count, help="how many images, evenly spread over the folder [all]")
    flag("--out", type=Path, help="folder of the curve [the checkpoint's]")
    flag("--variance", choices=("large", "small"), help="sigma_t^2 [as in training]")
    flag("--batch", type=count, default=128, help="images at a time [%(default)s]")
    flag("--seed", type=seed, default=0, help="seed of the noise [%(default)s]")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps or xpu [%(default)s]")
    return parser.parse_args()


def measure(trained, diffusion, images, labels, order, device, args):
    """Return the Bound of the images in this order; on Ctrl-C, that of the finished batches."""
    noise, bounds = torch.Generator(device).manual_seed(args.seed), []
    total = len(order) * diffusion.T
    with tqdm(total=total, unit=" passes", unit_scale=True, mininterval=1) as bar:

        def eps(x_t, t, y):
            bar.update(len(x_t))
            return trained.eps(x_t, t, y)

        try:
            for part in order.split(args.batch):
                y = None if labels is None else torch.from_numpy(labels)[part].to(device)
                x0 = from_pixels(images[part].to(device))
                bounds.append(diffusion.vlb(partial(eps, y=y), x0, noise))
                bar.set_postfix_str(f"{bounds[-1].total.mean():.3f} bits/dim in the last batch")
        except KeyboardInterrupt:
            if not bounds:
                raise KeyboardInterrupt("evaluate.py: stopped before a batch was finished; try a "
                                        "smaller --batch") from None  # fmt: skip
    catch_signals(signal.SIG_IGN)  # what is finished is saved
    return Bound(*map(torch.cat, zip(*bounds, strict=True)))


def print_bound(bound, L_t, rmse):
    """Print the terms of the bound, in bits per dimension."""
    n = len(bound.total)
    error = f" +- {bound.total.std() / math.sqrt(n):.4f} (standard error)" if n > 1 else ""
    print(f"  L_T                  {bound.L_T.mean():8.6f}")
    print(f"  L_1 + .. + L_T-1     {L_t[1:].sum():8.4f}    plus L_T: the rate")
    print(f"  L_0                  {L_t[0]:8.4f}    the distortion")
    print(f"  total                {bound.total.mean():8.4f}{error}")
    print(f"  RMSE                 {rmse[0]:8.4f}    of x0_hat at t = 0, on the scale 0..255")


def save_curve(path, L_t, rate, rmse):
    """Save the rate-distortion curve as a table and as a PNG."""
    table = torch.stack([torch.arange(len(rate)), L_t, rate, rmse], 1).numpy()
    with replacing(path) as file:
        np.savetxt(file, table, "%.9g", ",", header="t,L_t,rate,rmse", comments="")
    titles = "rate, bits per dimension", "RMSE of x0_hat, of 255"
    save_plot(path.with_suffix(".png"), rate.tolist(), rmse.tolist(), *titles)
    print(f"the curve: {path} and .png")


def evaluate(args):
    """Measure the bound, print it, and save the curve."""
    path = Path(args.checkpoint.removeprefix(HUB))
    out = args.out or (path if path.is_dir() else path.parent)
    if not args.out and not os.access(out, os.W_OK):
        out = Path()
    data = args.data and Path(args.data).resolve().name
    name = "-".join(filter(None, ["rate-distortion", data, args.variance]))
    check_output(out / f"{name}.csv")
    device = choose_device(args.device)
    prefer_accuracy()
    trained = load(args.checkpoint)
    channels, size, _ = trained.shape
    if args.data is not None:
        images, labels = read_folder(args.data, size, channels, args.images, trained.classes)
    elif trained.source == DEMO:
        images, labels = demo_images(), None
    else:
        sys.exit("evaluate.py: --data must be a folder of images that the network has not seen")
    if trained.source == f"train.py, {data}":
        print(f"the network was trained on a folder named {data}; if the images are the same, the "
              "bound says nothing about new ones")  # fmt: skip
    images = torch.from_numpy(images)
    # Shuffled, so that the batches finished before Ctrl-C are a fair sample:
    random = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(images), generator=random)[: args.images]
    trained.model.to(device)
    diffusion = trained.diffusion
    diffusion = type(diffusion)(diffusion.betas, args.variance or diffusion.variance)
    bound = measure(trained, diffusion, images, labels, order, device, args)
    n, (L_t, rate, rmse) = len(bound.total), rate_distortion(bound)
    step = f" (step {trained.step:,})" if trained.step else ""
    given = ", given the class of each" if trained.classes else ""
    of = f"{n:,} image{'s' * (n > 1)} of {args.data or 'the demo'}"
    print(f"{path}{step} on {of}{given}, bits per dimension")
    print_bound(bound, L_t, rmse)
    part = f"-{n}-images" if args.images or n < len(order) else ""  # beside the curve of all images
    save_curve(out / f"{name}{part}.csv", L_t, rate, rmse)
    if n < len(order):
        raise KeyboardInterrupt(f"evaluate.py: stopped after {n:,} of {len(order):,} images")


def main():
    catch_signals()
    guard_output()
    evaluate(arguments())


if __name__ == "__main__":
    main()
