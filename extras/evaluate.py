"""Measure the variational bound of a run on images that it has not seen, in bits per dimension.

    python -m extras.evaluate --data ./test-images [--checkpoint run] [--images 1000]

It prints the terms of the bound, and saves the rate-distortion curve (the paper's Figure 5) as
rate-distortion.csv in the folder of the run. Each image takes T evaluations of the network.
"""

import argparse
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ddpm import Bound, Diffusion
from images import demo_images, from_pixels, read_folder
from program import check_writable, guard_output, replacing
from run import choose_device, default_run, load, positive


def rate_distortion(bound):
    """Return the means over the images of a Bound: L_t, the rate and the RMSE of x0_hat, (T,) each.

    The rate is the number of bits per dimension that have been sent when x_t is known: the sum of
    L_T and the terms of all steps s > t. The RMSE is on the scale 0..255.
    """
    L_t = bound.L_t.mean(0)
    rate = bound.L_T.mean() + L_t.flip(0).cumsum(0).flip(0) - L_t
    return L_t, rate, 127.5 * bound.mse.mean(0).sqrt()


def measure(network, diffusion, images, labels, batch, noise):
    """Return the Bound of the images, uint8 (N, C, H, W).

    labels: their classes, int64 (N,), or None. noise: a torch.Generator on the network's device.
    """
    bounds = []
    with tqdm(total=len(images) * diffusion.T, unit=" passes", unit_scale=True) as bar:

        def eps(x_t, t, y):
            bar.update(len(x_t))
            return network(x_t, t, y)

        for k in range(0, len(images), batch):
            y = None if labels is None else labels[k : k + batch].to(noise.device)
            x0 = from_pixels(images[k : k + batch].to(noise.device))
            bounds.append(diffusion.vlb(partial(eps, y=y), x0, noise))
            bar.set_postfix_str(f"{bounds[-1].total.mean():.3f} bits/dim in the last batch")
    return Bound(*map(torch.cat, zip(*bounds, strict=True)))


def main():
    guard_output()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", help="folder of images [the demo, for a run on the demo]")
    parser.add_argument("--checkpoint", type=Path, default=default_run(), help="run [%(default)s]")
    parser.add_argument("--images", type=positive, help="how many images, picked at random [all]")
    parser.add_argument("--variance", choices=("large", "small"), help="[as in training]")
    parser.add_argument("--batch", type=positive, default=128, help="[%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of noise and images [%(default)s]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps or xpu [auto]")
    args = parser.parse_args()
    device = choose_device(args.device)
    torch.backends.cudnn.allow_tf32 = False  # float32 as float32
    network, diffusion, state = load(args.checkpoint)
    out = args.checkpoint if args.checkpoint.is_dir() else args.checkpoint.parent
    check_writable(out / "rate-distortion.csv")
    seen, (channels, size, _) = state["settings"]["data"], state["shape"]
    if args.data:
        if seen and Path(args.data).resolve().is_relative_to(Path(seen).resolve()):
            print("--data has the training images, whose bound says little about new images")
        images, labels, _ = read_folder(args.data, size, channels, names=state["names"])
    elif state["images"] and not seen:
        images, labels = demo_images(), None
    else:
        sys.exit("--data must be a folder of images that the network has not seen")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))
    order = order[: args.images]
    images = torch.from_numpy(images)[order]
    labels = None if labels is None else torch.from_numpy(labels)[order]
    diffusion = Diffusion(diffusion.betas, args.variance or diffusion.variance)
    noise = torch.Generator(device).manual_seed(args.seed)
    bound = measure(network.to(device), diffusion, images, labels, args.batch, noise)
    n, (L_t, rate, rmse) = len(bound.total), rate_distortion(bound)
    error = f" +- {bound.total.std() / math.sqrt(n):.4f} (standard error)" if n > 1 else ""
    print(f"{args.checkpoint}, step {state['step']:,}, on {n:,} images, bits per dimension")
    print(f"  L_T                  {bound.L_T.mean():8.6f}")
    print(f"  L_1 + .. + L_T-1     {L_t[1:].sum():8.4f}    plus L_T: the rate")
    print(f"  L_0                  {L_t[0]:8.4f}    the distortion")
    print(f"  total                {bound.total.mean():8.4f}{error}")
    print(f"  RMSE                 {rmse[0]:8.4f}    of x0_hat at t = 0, on the scale 0..255")
    path = out / "rate-distortion.csv"
    table = torch.stack([torch.arange(len(rate)), L_t, rate, rmse], 1).numpy()
    with replacing(path) as file:
        np.savetxt(file, table, "%.9g", ",", header="t,L_t,rate,rmse", comments="")
    print(f"the curve: {path}")


if __name__ == "__main__":
    main()
