"""Make the figures of the documentation from a network and images that it has not seen.

    python docs/make_figures.py --data fashion-mnist/test                  # the included network
    python docs/make_figures.py --data ./test --onnx model.onnx --out figures
    python docs/make_figures.py --data ./test --demo demo.onnx             # demo.png
    python docs/make_figures.py --data ./test --samples ./samples          # only beside.png

It takes about ten minutes on two cores. Every figure has a white background, so that it can be read
on a dark page. Figures and printed values count t from 1, as the paper does; the code's index is
one less.
"""

import argparse
import copy
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

HERE = Path(__file__).resolve().parent
FIGURES, PAGE = HERE / "figures", HERE.parent / "page"
sys.path.insert(0, str(HERE.parent))

from ddpm import Bound, Diffusion, linear_betas  # noqa: E402
from extras import variants  # noqa: E402
from extras.evaluate import rate_distortion  # noqa: E402
from extras.exact import exact_network, mean_squared_error  # noqa: E402
from extras.interpolate import LAMBDAS, interpolate, starting_at  # noqa: E402
from images import demo_images, from_pixels, read_folder, read_image  # noqa: E402
from sample import (  # noqa: E402
    Network,
    grid,
    guided,
    noise_of,
    reverse,
    sample,
    sample_progressive,
    to_pixels,
)

DPI, BATCH = 100, 16


def sheet(images):
    """Return images, (rows, columns, C, H, W) in [-1, 1], as one Pillow image."""
    rows, _, *shape = images.shape
    return grid(to_pixels(images.swapaxes(0, 1).reshape(-1, *shape)), rows)


def show(axes, images, columns=(), rows=(), frames=()):
    """Draw images, (rows, columns, C, H, W) in [-1, 1], as one labelled grid.

    frames: the (row, column) of the images to mark.
    """
    R, C = images.shape[:2]
    image = sheet(images).convert("RGB")
    axes.imshow(image, extent=(0, C, R, 0), interpolation="nearest")
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    for row, column in frames:
        axes.add_patch(
            Rectangle((column, row), 1, 1, edgecolor="red", facecolor="none", linewidth=2)
        )


def save_sheet(path, images, columns=(), rows=(), frames=(), inches=0.85):
    """Save the grid of show() as a PNG."""
    R, C = images.shape[:2]
    figure = Figure(figsize=(inches * C + 0.9 * bool(len(rows)), inches * R + 0.4))
    figure.set_layout_engine("constrained")
    show(figure.subplots(), images, columns, rows, frames)
    figure.savefig(path, dpi=DPI, bbox_inches="tight")


def plot(axes, curves, x_label, y_label, **scales):
    """Draw curves, {name: (x, y)}, on axes of matplotlib."""
    for name, (x, y) in curves.items():
        axes.plot(x, y, label=name)
    axes.set(xlabel=x_label, ylabel=y_label, **scales)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend()


# ------------------------------------------------------------------------------- without a network


def draw_schedule(path, x0):
    """Plot abar_t of both schedules, above an image with this noise."""
    times = (1, 125, 250, 375, 500, 625, 750, 875, 1000)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    curves, rows = {}, []
    for name, betas in (("linear", linear_betas()), ("cosine", variants.cosine_betas())):
        diffusion = Diffusion(betas)
        curves[name] = range(1, diffusion.T + 1), diffusion.alphas_bar
        rows.append([diffusion.q_sample(x0, torch.tensor([t - 1]), noise)[0] for t in times])
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(3, 2))
    plot(above, curves, "t", "$\\bar\\alpha_t$")
    above.set_xlim(-62.5, 1062.5)  # nine images are as wide as the axes
    images = torch.stack([torch.stack(row) for row in rows]).numpy()
    show(below, images, [f"t = {t}" for t in times], list(curves))
    figure.savefig(path, dpi=DPI)


# If the data are +1 and -1 with equal probability, q(x_{t-1} | x_t) is a mixture of the two
# posteriors (6). In these functions, t is an index, which counts from 0.
TWO = torch.tensor([1.0, -1.0], dtype=torch.float64)


def log_normal(x, mean, variance):
    """Return the logarithm of the density of a Gaussian. variance: a tensor."""
    return -((x - mean) ** 2) / (2 * variance) - (2 * torch.pi * variance).log() / 2


def log_two(chain, t, x):
    """Return log q(x_t) at x (N,) for each of the two points, (N, 2), without the factor 1/2."""
    return log_normal(x[:, None], chain.sqrt_alphas_bar[t] * TWO, 1 - chain.alphas_bar[t])


def reverse_step(chain, t, x_t, u):
    """Return x_{t-1}, log q(x_{t-1} | x_t) there, and that of the Gaussian with its moments.

    x_t: (N,). u: (M,), distances from the mean in standard deviations. All results are (N, M).
    """
    log_shares, variance = log_two(chain, t, x_t).log_softmax(1), chain.posterior_variance[t]
    means = chain.posterior_x0[t] * TWO + chain.posterior_x_t[t] * x_t[:, None]
    mean = (log_shares.exp() * means).sum(1, keepdim=True)
    spread = (log_shares.exp() * (means - mean) ** 2).sum(1, keepdim=True)
    x = mean + (variance + spread).sqrt() * u
    mixture = log_shares[:, None] + log_normal(x[..., None], means[:, None], variance)
    return x, mixture.logsumexp(2), log_normal(x, mean, variance + spread)


def distance_to_gaussian(chain, t):
    """Return the mean KL in bits of q(x_{t-1} | x_t) to the Gaussian with its moments."""
    x_t, u = torch.linspace(-4, 4, 401).double(), torch.linspace(-8, 8, 401).double()
    _, log_p, log_g = reverse_step(chain, t, x_t, u)
    r = log_p - log_g
    # KL = E_g[r e^r - e^r + 1]; for a small r, the difference would cancel
    terms = torch.where(r.abs() < 1e-4, r**2 / 2, r * r.exp() - r.expm1())
    kl = terms @ log_normal(u, 0, torch.ones(1).double()).exp() * (u[1] - u[0])
    weights = log_two(chain, t, x_t).logsumexp(1).softmax(0)
    return (weights @ kl).item() / np.log(2)


def short_chain(steps):
    """Return the paper's schedule in this many steps: a Diffusion, and the t that it visits."""
    tau = [1000 * k // steps - 1 for k in range(1, steps + 1)]
    abar = (1 - linear_betas()).cumprod(0)[tau]
    return Diffusion(1 - abar / torch.cat([torch.ones(1), abar[:-1]])), tau


def draw_small_steps(path):
    """Draw a reverse step of a long and of a short chain, and how far each is from a Gaussian."""
    figure = Figure(figsize=(10, 3.1), layout="constrained")
    *steps, distances = figure.subplots(1, 3, width_ratios=(3, 3, 4))
    for axes, n, t in ((steps[0], 1000, 199), (steps[1], 10, 1)):
        chain, tau = short_chain(n)
        x_t, x = torch.tensor([0.15]).double(), torch.linspace(-1.6, 1.6, 801).double()
        curves = {
            "$q(x_s)$": (x, log_two(chain, t - 1, x).logsumexp(1)),
            "$q(x_t\\mid x_s)$": (x, log_normal(x_t, chain.alphas[t].sqrt() * x, chain.betas[t])),
        }
        places, product, gaussian = reverse_step(chain, t, x_t, torch.linspace(-5, 5, 801).double())
        curves["$q(x_s\\mid x_t)$"] = places[0], product[0]
        for width, (name, (where, log_density)) in zip((1.5, 6, 3), curves.items(), strict=True):
            density = (log_density - log_density.max()).exp()
            axes.plot(where, density, label=name, linewidth=width)
        axes.plot(places[0], (gaussian[0] - product[0].max()).exp(), "k--", label="Gaussian")
        axes.set(xlabel="$x_s$", yticks=[], xlim=(-1.6, 1.6), ylim=(0, 1.5))
        axes.set_title(f"from t = {tau[t] + 1} to s = {tau[t - 1] + 1}", fontsize=10)
        axes.legend(fontsize=8, ncols=2, loc="upper left")
    curves = {}
    for n in (1000, 50, 10):
        chain, tau = short_chain(n)
        bits = [distance_to_gaussian(chain, t) for t in range(1, n)]
        curves[f"{n} steps"] = [i + 1 for i in tau[1:]], bits
    scales = {"yscale": "log", "ylim": (1e-16, 3)}
    plot(distances, curves, "t", "distance to a Gaussian, in bits", **scales)
    figure.savefig(path, dpi=DPI)


def ddim_paths(count):
    """Return paths of DDIM to the two points, (count, 1000), from equally probable x_T on."""
    paper = Diffusion(linear_betas())
    network = exact_network(paper, TWO.view(2, 1, 1, 1))
    x_T = torch.special.ndtri((torch.arange(count).double() + 0.5) / count).view(count, 1, 1, 1)
    chain = variants.sample_progressive(
        paper, network, x_T.shape, 1000, "ddim", draw_noise=lambda: x_T
    )
    return torch.stack([x_t.flatten() for _, x_t, _ in chain], 1)


def draw_two_points(path):
    """Draw E[x_0 | x_t] and q(x_t) of the two points at four t, and paths of DDIM."""
    paper = Diffusion(linear_betas())
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    x, estimates, densities = torch.linspace(-3, 3, 601).double(), {}, {}
    for t in (50, 200, 400, 700):
        log_q = log_two(paper, t - 1, x)
        estimates[f"t = {t}"] = x, log_q.softmax(1) @ TWO
        densities[f"t = {t}"] = x, log_q.exp().mean(1)
    plot(left, estimates, "$x_t$", "$E[x_0\\mid x_t]$")
    plot(middle, densities, "$x_t$", "$q(x_t)$")
    middle.get_legend().remove()
    middle.lines[-1].set_linestyle("--")  # it lies on the line before it
    for path_of_one in ddim_paths(14):
        colour = "tab:purple" if path_of_one[-1] > 0 else "tab:olive"
        right.plot(range(1000, 0, -1), path_of_one, colour, linewidth=1)
    right.set(xlabel="t", ylabel="$x_t$", xlim=(1000, 1))
    right.grid(alpha=0.3)
    for axes, title in ((left, "the mean of $x_0$, given $x_t$"), (middle, "the density of $x_t$"),
                        (right, "paths of DDIM")):  # fmt: skip
        axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=DPI)


def draw_rectangles(path):
    """Draw terms of the bound of the two points as rectangles under the curve of the error."""
    chain, _ = short_chain(30)
    snr = chain.alphas_bar / (1 - chain.alphas_bar)
    u = torch.linspace(-8, 8, 2001).double()

    def half_error(snr):
        """E[1 - tanh^2] / 2 for x_t / sqrt(1 - abar) = sqrt(SNR) + u, by symmetry."""
        density = log_normal(u, 0, torch.ones(1).double()).exp() * (u[1] - u[0])
        return (1 - (snr.sqrt()[:, None] * (snr.sqrt()[:, None] + u)).tanh() ** 2) @ density / 2

    figure = Figure(figsize=(5.4, 3), layout="constrained")
    axes, fine = figure.subplots(), torch.linspace(0, 4, 400).double()
    heights, widths = half_error(snr[1:]), snr[:-1] - snr[1:]
    axes.bar(snr[1:], heights, widths, align="edge", facecolor="#fbdcb8", edgecolor="C1")
    axes.plot(fine, half_error(fine), "C0", linewidth=2)
    axes.set(
        xlim=(0, 4), ylim=(0, 0.55), xlabel="SNR", ylabel="half the squared error of $\\hat x_0$"
    )
    figure.savefig(path, dpi=DPI)


def draw_velocity(path):
    """Draw the curves of pairs of image and noise, which cross, and paths of average velocity.

    Left in the coordinates of DDPM, right in those of flow matching, for the two points.
    """
    paper = Diffusion(linear_betas())
    signal, spread = paper.alphas_bar.sqrt(), (1 - paper.alphas_bar).sqrt()
    tau, t = spread / (signal + spread), torch.arange(1, paper.T + 1)
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    paths = ddim_paths(8)
    for x0, colour in ((1, "tab:purple"), (-1, "tab:olive")):
        for noise in paths[:, 0]:
            x = signal * x0 + spread * noise
            left.plot(t, x, colour, linewidth=0.8, alpha=0.6)
            right.plot(tau, x / (signal + spread), colour, linewidth=0.8, alpha=0.6)
    for x in paths.flip(1):
        left.plot(t, x, "black", linewidth=1.6)
        right.plot(tau, x / (signal + spread), "black", linewidth=1.6)
    left.set(xlabel="t", ylabel="$x_t$", xlim=(1000, 1), title="DDPM")
    right.set(xlabel="$\\tau$", ylabel="r", xlim=(1, 0), title="flow matching")
    figure.savefig(path, dpi=DPI)


def draw_unet(path):
    """Draw the U-Net of the CIFAR-10 network: sizes, widths, attention and skip connections."""
    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-0.4, 12.9), ylim=(-5.3, 1.55))
    axes.axis("off")
    arrow = dict(arrowstyle="-|>", color="0.25")

    def box(x, y, width, text, colour):
        style = dict(facecolor=colour, edgecolor="0.25")
        axes.add_patch(Rectangle((x - width / 2, y - 0.31), width, 0.62, **style))
        axes.text(x, y, text, ha="center", va="center", fontsize=8)

    blue, orange, grey = "#dbe8f8", "#fbdcb8", "0.92"
    levels = [(32, 128), (16, 256), (8, 256), (4, 256)]
    skips = "skip connections, concatenated", "skip connections", "skip connections", "skip"
    for k, (size, width) in enumerate(levels):
        x, y, colour = 1.9 + 0.9 * k, -1.25 * k, orange if size == 16 else blue
        with_attention = " + attention" if size == 16 else ""
        box(x, y, 2.0, f"2 blocks{with_attention}\n{width} x {size} x {size}", colour)
        box(12.5 - x, y, 2.0, f"3 blocks{with_attention}\n{width} x {size} x {size}", colour)
        skip = arrow | dict(linestyle="--")
        axes.annotate("", (11.5 - x, y), (x + 1.0, y), arrowprops=skip)
        axes.text(6.25, y + 0.08, skips[k], ha="center", fontsize=7, color="0.25")
        if k < 3:
            axes.annotate("", (x + 0.9, y - 0.94), (x + 0.25, y - 0.31), arrowprops=arrow)
            axes.text(x + 0.42, y - 0.66, "stride 2", fontsize=7, ha="right", color="0.25")
            axes.annotate("", (12.25 - x, y - 0.31), (11.6 - x, y - 0.94), arrowprops=arrow)
            axes.text(12.1 - x, y - 0.66, "upsample", fontsize=7, color="0.25")
    box(6.25, -4.95, 4.2, "middle: block + attention, block\n256 x 4 x 4", orange)
    axes.annotate("", (5.2, -4.64), (4.7, -4.06), arrowprops=arrow)
    axes.annotate("", (7.8, -4.06), (7.3, -4.64), arrowprops=arrow)
    box(1.4, 1.2, 2.9, "$x_t$: 3 x 32 x 32, conv to 128", grey)
    box(11.1, 1.2, 2.9, "norm, SiLU, conv to 3: $\\epsilon_\\theta$", grey)
    box(6.25, 1.2, 5.0, "t: sinusoids, linear, SiLU, linear: 512, to every block", grey)
    axes.annotate("", (1.9, 0.31), (1.9, 0.89), arrowprops=arrow)
    axes.annotate("", (10.6, 0.89), (10.6, 0.31), arrowprops=arrow)
    figure.savefig(path, dpi=DPI)


# ---------------------------------------------------------------------------------- with a network


def draw_strip(folder, network):
    """Save strip.png, two samples along the chain, and reverse.gif, nine: x_t beside x0_hat."""
    times, states, frames = [1000, 850, 700, 600, 500, 400, 300, 200, 100, 1], [], []
    for i, x, x0 in sample_progressive(network, 9):
        if i + 1 in times:
            states += [x[:2], x0[:2]]
        if i % 20 == 0 or i == network.betas.size - 1:
            frames.append(beside(x, x0))
    images = np.stack(states, 1).reshape(2, 10, 2, *network.shape)
    images = images.swapaxes(1, 2).reshape(4, 10, *network.shape)
    rows = ["$x_t$", "$\\hat x_0$"] * 2
    save_sheet(folder / "strip.png", images, [f"t = {t}" for t in times], rows)
    frames.append(beside(x0, x0))
    size = 6 * (network.shape[-1] + 2)  # without the enlargement of grid()
    for scale in (1, max(1, 408 // size)):
        sizes = size * scale, size * scale // 2
        frames = [frame.resize(sizes, Image.Resampling.NEAREST) for frame in frames]
    first, *others = [frame.quantize(32, dither=Image.Dither.NONE) for frame in frames]
    durations = [80] * len(others) + [3000]
    first.save(folder / "reverse.gif", save_all=True, append_images=others, duration=durations,
               loop=0)  # fmt: skip


def beside(x, x0):
    """Return the first nine x_t as three columns, and three columns of x0_hat beside them."""
    left, right = (images[:9].reshape(3, 3, *images.shape[1:]) for images in (x, x0))
    return sheet(np.concatenate([left, right], 1))


def page_noise(seed, k, count):
    """Return the first `count` numbers that noiseOf of page/sampler.js draws for image k."""
    mask = 2**32 - 1
    a, b, c, counter = seed & mask, k, seed >> 32, 1

    def uniform():
        nonlocal a, b, c, counter
        total, counter = (a + b + counter) & mask, (counter + 1) & mask
        a, b, c = b ^ (b >> 9), (c + (c << 3)) & mask, ((c << 21 | c >> 11) + total) & mask
        return total / 2**32

    for _ in range(15):
        uniform()
    z = []
    while len(z) < count:
        radius, angle = np.sqrt(-2 * np.log(1 - uniform())), 2 * np.pi * uniform()
        z.append(radius * np.cos(angle))
    return z


def draw_recorded(folder, network):
    """Save what the page shows before its network is loaded, as rows of emoji.

    recorded.webp: 12 emoji, and then the x0_hat of 10 steps of DDIM, with guidance 1, from the
    page's noise; the classes take turns.
    """

    def chain(seed, y):
        x_T = np.array([page_noise(seed, k, 3072) for k in range(len(y))], np.float32)
        x_T, eps = x_T.reshape(-1, *network.shape), guided(network, np.array(y), 1)
        return [*network.reverse(eps, lambda: x_T, steps=10, sampler="ddim")]

    names = "face-smiling", "heart", "person"
    kinds = [network.classes.index(name) for name in names]
    before, after = (
        chain(seed, [kinds[(k + k // 6 + turn) % 3] for k in range(12)])
        for seed, turn in ((2, 0), (0, 1))
    )
    rows = [np.concatenate(list(to_pixels(x0)), 2) for _, _, x0 in before[-1:] + after]
    image = Image.fromarray(np.concatenate(rows, 1).transpose(1, 2, 0))
    image.save(folder / "recorded.webp", method=6, quality=90)


def draw_ends(path, network):
    """Draw the paper's figure 7: eight ends of the chain from one shared x_t, for several t."""
    shared = {i + 1: x for i, x, _ in sample_progressive(network, 1)}
    rows, columns = [], 8
    times = [1000, 750, 500, 250]
    for t in times:
        noise = noise_of(1, 0, columns, network.shape)
        draw_noise = starting_at(shared[t].repeat(columns, 0), noise)
        *_, (_, _, x0) = reverse(network, draw_noise, network.betas[:t], network.variance)
        rows.append(np.concatenate([shared[t], x0]))
    save_sheet(
        path, np.stack(rows), ["shared $x_t$", *map(str, range(1, columns + 1))],
        [f"t = {t}" for t in times],
    )  # fmt: skip


def draw_steps(path, network):
    """Draw ten samples from the same first noise, by each sampler and number of steps."""
    network = copy.copy(network)
    network.variance = "small"  # of Algorithm 2
    counts, figure = (5, 10, 50, network.betas.size), Figure(figsize=(6.4, 7.4))
    figure.set_layout_engine("constrained")
    names = {"ddpm": "Algorithm 2", "ddim": "DDIM", "dpm-solver++": "DPM-Solver++"}
    for axes, sampler in zip(figure.subplots(len(names)), names, strict=True):
        rows = [sample(network, BATCH, steps=k, sampler=sampler)[:10] for k in counts]
        show(axes, np.stack(rows), rows=counts)
        axes.set_ylabel("steps")
        axes.set_title(names[sampler], fontsize=10)
    figure.savefig(path, dpi=DPI, bbox_inches="tight")


def draw_classes(path, network):
    """Draw four samples of each class from the same first noise, for several guidance weights."""
    weights, classes = (0, 1, 2, 4), len(network.classes)
    figure = Figure(figsize=(9.6, 0.57 * classes + 0.4), layout="constrained")
    for axes, w in zip(figure.subplots(1, len(weights)), weights, strict=True):
        images = sample(network, 4 * classes, guidance=w, steps=10)
        images = images.reshape(4, classes, *network.shape).swapaxes(0, 1)
        show(axes, images, rows=network.classes if w == 0 else ())
        axes.set_title(f"w = {w}", fontsize=10)
    figure.savefig(path, dpi=DPI)


def draw_interpolation(path, network, pairs):
    """Draw mixtures of the images of each pair at several t, as in the paper's figure 8."""
    times, rows = (250, 500), []
    for a, b in pairs:
        for t in times:
            *_, (_, _, x0) = interpolate(network, a, b, t - 1)
            rows.append([a, *x0[::2], b])
    columns = ["image A", *(f"$\\lambda$ = {x:.1f}" for x in LAMBDAS[::2]), "image B"]
    save_sheet(path, np.array(rows), columns, [f"t = {t}" for t in times] * len(pairs), inches=0.8)


def draw_beside(path, samples, real):
    """Draw images of folders of samples, and of real images: a row for each sub-folder, a class.

    Of more than 25 classes, evenly spaced ones are drawn.
    """
    names = sorted(folder.name for folder in samples[0].iterdir() if folder.is_dir())
    names = names[:: -(-len(names) // 25)]
    each = min(len([*(samples[0] / name).glob("*.png")]) for name in names)
    folders, titles = [*samples, real], [*(folder.name for folder in samples), "real images"]
    if len(samples) == 1:
        titles[0] = "samples"
    counts = [min(16, each), 6] if len(samples) == 1 else [22 // len(folders)] * len(folders)
    size = 0.33 * sum(counts) + 1.4, 0.36 * len(names) + 0.2
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(folders), width_ratios=counts)
    for axes, folder, title, count in zip(panels, folders, titles, counts, strict=True):
        rows = []
        for name in names:
            files = sorted((folder / name).glob("*.png"))
            some = [files[k * len(files) // count] for k in range(count)]
            rows.append([read_image(file, 32, 3) for file in some])
        images = from_pixels(torch.from_numpy(np.array(rows))).numpy()
        show(axes, images, rows=names if axes is panels[0] else ())
        axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=2 * DPI, bbox_inches="tight")


def print_loss(network, x0):
    """Print how much of the loss (14) comes from small t."""
    diffusion, times = Diffusion(network.betas), range(0, network.betas.size, 5)

    def eps(x_t, t):
        return torch.from_numpy(network(x_t.numpy(), t.numpy()))

    same = [torch.full((len(x0),), t) for t in times]
    losses = [mean_squared_error(diffusion, eps, x0, t, seed=k).sum() for k, t in enumerate(same)]
    for end in (100, 300):
        share = sum(losses[: end // 5]) / sum(losses)
        print(f"  {100 * share:.0f}% of the loss is from t <= {end}")


def draw_bound(folder, network, x0, labels):
    """Save rate-distortion.png (figure 5), and snr.png.

    With classes, the network is given the labels (N,) of the images.
    """

    def eps(x_t, t, y=labels):
        return torch.from_numpy(network(x_t.numpy(), t.numpy(), y))

    diffusion = Diffusion(network.betas, network.variance)
    random, bounds = torch.Generator().manual_seed(0), []
    for part in torch.arange(len(x0)).split(BATCH):
        y = None if labels is None else labels[part]
        bounds.append(diffusion.vlb(partial(eps, y=y), x0[part], random))
    bound = Bound(*map(torch.cat, zip(*bounds, strict=True)))
    bits, (L_t, rate, rmse) = bound.total.mean(), rate_distortion(bound)
    error = bound.total.std() / len(x0) ** 0.5
    print(f"  bound {bits:.3f} +- {error:.3f}, rate {bits - L_t[0]:.3f}, distortion {L_t[0]:.3f}, "
          f"RMSE {rmse[0]:.3f} on {len(x0)} images")  # fmt: skip

    draw_snr(folder / "snr.png", diffusion, bound)
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    labels = "rate, bits per dimension", "RMSE of $\\hat x_0$, of 255"
    plot(axes, {"": (rate, rmse)}, *labels, xscale="log", xlim=(1e-3, 3))
    figure.savefig(folder / "rate-distortion.png", dpi=DPI)


def draw_snr(path, diffusion, bound):
    """Plot the error of x0_hat against the SNR, and its cost in bits.

    With the small variance, the terms of the bound are (SNR_{t-1} - SNR_t) mse_t / 2 nats, so the
    rate is about the area under SNR mse / 2 on an axis of log SNR.
    """
    snr, mse = diffusion.alphas_bar / (1 - diffusion.alphas_bar), bound.mse.mean(0)
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot(left, {"": (snr, mse)}, "SNR", "squared error of $\\hat x_0$", yscale="log")
    per_decade = snr * mse * np.log2(10) / 2
    plot(right, {"": (snr, per_decade)}, "SNR", "bits/dim per factor of 10", ylim=(0, None))
    right.fill_between(snr, per_decade, alpha=0.3)
    times = np.array([1, 10, 100, 300, 500, 1000])
    for axes in (left, right):
        axes.set(xscale="log", xticks=(1e-4, 1e-2, 1, 1e2, 1e4))
        top = axes.secondary_xaxis("top")
        top.set_xticks(snr[times - 1].tolist(), times, fontsize=8)
        top.minorticks_off()
        top.set_xlabel("t")
    figure.savefig(path, dpi=DPI)


def are_right(pixels):
    """Return which pixels, uint8 (N, 3, 8, 8), are demo images to within 48 of 255 per value."""
    allowed = demo_images().astype(int)
    nearest = [np.abs(allowed - image).max((1, 2, 3)).min() for image in pixels.astype(int)]
    return np.array(nearest) <= 48


def draw_demo(path, onnx):
    """Draw 64 samples of the demo's network, and mark the wrong ones."""
    images = sample(Network(onnx, "cpu"), 64)
    right = are_right(to_pixels(images))
    print(f"  {right.sum()} of 64 samples of the demo are right")
    frames = [divmod(k, 16) for k in np.flatnonzero(~right)]
    save_sheet(path, images.reshape(4, 16, *images.shape[1:]), frames=frames, inches=0.5)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="images that are new to it")
    parser.add_argument(
        "--onnx", default=PAGE / "fashion-mnist.onnx", help="[the included network]"
    )
    parser.add_argument(
        "--paper", default=HERE / "paper.onnx", help="of the paper's recipe [docs/paper.onnx]"
    )
    parser.add_argument("--demo", help="the demo's network")
    parser.add_argument("--samples", type=Path, nargs="+", help="folders of sample.py --dir")
    parser.add_argument(
        "--out", type=Path, default=FIGURES, help="folder of the figures [docs/figures]"
    )
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    if args.samples:
        return draw_beside(args.out / "beside.png", args.samples, args.data)
    network, paper = Network(args.onnx, "cpu"), Network(args.paper, "cpu")
    channels, size, _ = network.shape
    images, labels, _ = read_folder(args.data, size, channels, names=network.classes)
    n = min(len(images), 4 * BATCH)
    some = np.arange(n) * len(images) // n  # evenly spread over the folder
    x0, labels = (
        from_pixels(torch.from_numpy(images[some])),
        None if labels is None else labels[some],
    )
    draw_schedule(args.out / "schedule.png", x0[:1])
    draw_small_steps(args.out / "small-steps.png")
    draw_two_points(args.out / "two-points.png")
    draw_rectangles(args.out / "rectangles.png")
    draw_velocity(args.out / "velocity.png")
    draw_unet(args.out / "unet.png")
    grid(to_pixels(sample(paper, 64))).save(args.out / "paper.png")  # as sample.py does
    draw_strip(args.out, paper)
    if args.out.resolve() == FIGURES:
        draw_recorded(PAGE, Network(PAGE / "emoji.onnx", "cpu"))
    draw_ends(args.out / "ends.png", paper)
    draw_steps(args.out / "steps.png", network)
    if network.classes:
        draw_classes(args.out / "classes.png", network)
    pairs = np.array([[47, 48], [58, 30]]) % len(x0)
    draw_interpolation(args.out / "interpolation.png", network, x0[pairs].numpy())
    print_loss(paper, x0)
    draw_bound(args.out, network, x0, labels)
    if args.demo:
        draw_demo(args.out / "demo.png", args.demo)


if __name__ == "__main__":
    main()
