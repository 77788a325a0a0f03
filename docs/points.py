"""DDPM on points in the plane: the class of ddpm.py with a small MLP, in two minutes on a CPU.

    python docs/points.py        # trains six networks, draws field.png, guidance.png and points.png

A point is an image of shape (2, 1, 1). This is the place to break things: change a line of main()
or of ddpm.py, run the program again, and compare the shares and the figures.
"""

import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

HERE = Path(__file__).parent
FIGURES = HERE / "figures"
sys.path.insert(0, str(HERE.parent))

from ddpm import Diffusion, linear_betas, timestep_embedding  # noqa: E402
from extras.exact import exact_network  # noqa: E402
from extras.variants import (  # noqa: E402
    as_eps,
    loss_weights,
    sample,
    sample_progressive,
    weighted_loss,
)
from sample import guided  # noqa: E402

# The mixture of Gaussians, (3, 2, 1, 1) and a number:
MEANS = torch.tensor([[-0.6, -0.5], [0.0, 0.6], [0.6, -0.2]])[..., None, None]
STD = 0.1
N = 1000  # points in each panel


def mixture(n):
    """Return n points of three Gaussians: (n, 2, 1, 1)."""
    return MEANS[torch.randint(len(MEANS), (n,))] + STD * torch.randn(n, 2, 1, 1)


def moons(n, upper=None):
    """Return n points on two interlocking half circles: (n, 2, 1, 1). upper: bool (n,)."""
    angle, upper = torch.pi * torch.rand(n), torch.rand(n) < 0.5 if upper is None else upper
    x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
    return (0.6 * torch.stack([x, y], 1) + 0.03 * torch.randn(n, 2))[..., None, None]


def labelled_moons(n):
    """Return n points of the moons, and their classes (n,): 1 for the upper moon."""
    y = torch.randint(2, (n,))
    return moons(n, y == 1), y


class MLP(nn.Module):
    """eps_theta(x_t, t) or eps_theta(x_t, t, y) for points: (B, 2, 1, 1) and (B,) to (B, 2, 1, 1).

    y: classes (B,), as in UNet.
    """

    def __init__(self, width=128, num_classes=0):
        super().__init__()
        self.num_classes = num_classes
        if num_classes:
            self.classes = nn.Embedding(
                num_classes + 1, width, _weight=torch.zeros(num_classes + 1, width)
            )
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.point = nn.Linear(2, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, 2)

    def forward(self, x_t, t, y=None):
        temb, h = self.time(timestep_embedding(t, 64)), self.point(4 * x_t.flatten(1))
        if self.num_classes:
            temb = temb + self.classes(torch.full_like(t, self.num_classes) if y is None else y)
        for layer in self.layers:
            h = h + layer(F.silu(h + temb))
        return self.out(F.silu(h))[..., None, None]


def fit(
    diffusion, data, weighting="simple", predicts="eps", drawn=False, steps=3000, batch=256,
    drop=0.1, lr=2e-3, width=128,
):  # fmt: skip
    """Run Algorithm 1 with Adam and a learning rate that falls to 0; return eps(x_t, t, y=None).

    weighting, predicts: see extras/variants.py. drawn: draw t in proportion to the weights, and
    weight all draws equally, which has the same expected loss, up to a factor.
    drop: the share of the labels of labelled_moons that is replaced by "no class", as in train.py.
    """
    torch.manual_seed(0)
    model = MLP(width, num_classes=2 if data is labelled_moons else 0)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    model_eps = as_eps(model, diffusion, predicts)
    weights = density = loss_weights(diffusion, weighting, predicts)
    if drawn:
        weights = torch.ones_like(density)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    for _ in range(steps):
        eps, x0 = model_eps, data(batch)
        if model.num_classes:
            x0, y = x0
            eps = partial(model_eps, y=y.masked_fill(torch.rand(batch) < drop, 2))
        optimizer.zero_grad()
        t, noise = torch.randint(diffusion.T, (batch,)), torch.randn_like(x0)
        if drawn:
            t = density.multinomial(batch, replacement=True)
        weighted_loss(diffusion, eps, x0, t, noise, weights).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    return model_eps


def only_first(x_T):
    """Return draw_noise() of a sampler without z: first x_T, and then zeros."""
    noises = iter([x_T])
    return lambda: next(noises, torch.zeros_like(x_T))


def share_off(points, data):
    """Return the share of points that are farther than 0.05 from every point of the data."""
    return (torch.cdist(points.flatten(1), data.flatten(1)).amin(1) > 0.05).float().mean().item()


def draw_field(path, diffusion, model):
    """Save the exact and the learnt eps of the mixture at three t, with x_t in the background.

    The sign of eps is reversed. Both panels of a column have the same scale.
    """
    ticks, times = torch.linspace(-1.4, 1.4, 9), (50, 120, 500)
    grid = torch.cartesian_prod(ticks, ticks)[..., None, None]
    figure = Figure(figsize=(9, 6.2), layout="constrained")
    for column, time in zip(figure.subplots(2, 3).T, times, strict=True):
        i = time - 1  # the index in the code counts from 0
        x_t = diffusion.q_sample(mixture(N), torch.full((N,), i), torch.randn(N, 2, 1, 1))
        t = torch.full((len(grid),), i)
        with torch.no_grad():
            learnt = model(grid, t)
        exact = exact_network(diffusion, MEANS, std=STD)(grid, t)
        scale = 8 * exact.abs().max().item()
        for axes, name, eps in zip(column, ("exact", "learnt"), (exact, learnt), strict=True):
            axes.scatter(*x_t.flatten(1).T, 2, "0.7")
            axes.quiver(*grid.flatten(1).T, *-eps.flatten(1).T, scale=scale, width=0.005)
            axes.set(aspect="equal", xlim=(-1.7, 1.7), ylim=(-1.7, 1.7))
            axes.set_title(f"{name}, t = {time}", fontsize=10)
    figure.savefig(path, dpi=100)


def draw_guidance(path, diffusion, model):
    """Save the direction of guidance at one t, and guided samples of both moons.

    Prints how many samples are off their own moon, and the root of the trace of their covariance.
    """
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    field, *panels = figure.subplots(1, 4, width_ratios=(1.5, 1, 1, 1))
    ticks, i = torch.linspace(-1.1, 1.1, 10), 199
    grid = torch.cartesian_prod(ticks, ticks)[..., None, None]
    t, upper = torch.full((len(grid),), i), torch.ones(len(grid), dtype=torch.int64)
    with torch.no_grad():
        arrows = (model(grid, t) - model(grid, t, upper)).flatten(1)
    x0, y = labelled_moons(N)
    x_t = diffusion.q_sample(x0, torch.full((N,), i), torch.randn(N, 2, 1, 1)).flatten(1)
    for k, colour in ((1, "tab:orange"), (0, "tab:blue")):
        field.scatter(*x_t[y == k].T, 2, color=colour, alpha=0.3)
    field.quiver(*grid.flatten(1).T, *arrows.T, scale=9, width=0.008)
    field.set_title(f"difference for the upper moon, t = {i + 1}", fontsize=10)
    y = torch.arange(N) % 2
    for axes, w in zip(panels, (0, 1, 4), strict=True):
        torch.manual_seed(1)
        points = diffusion.sample(guided(model, y, w), (N, 2, 1, 1))
        for k, colour in ((1, "tab:orange"), (0, "tab:blue")):
            own = points[y == k]
            off = share_off(own, moons(N, torch.full((N,), k == 1)))
            print(f"moons: class {k}, w = {w}          {off:6.1%} off their moon, deviation "
                  f"{own.flatten(1).std(0).square().sum().sqrt():.3f}")  # fmt: skip
            axes.scatter(*own.flatten(1).T, 1, color=colour)
        axes.set_title(f"samples, w = {w}", fontsize=10)
    for axes in (field, *panels):
        axes.set(aspect="equal", xlim=(-1.2, 1.2), ylim=(-1.2, 1.2))
    figure.savefig(path, dpi=100)


def main():
    paper = Diffusion(linear_betas())

    def draw(eps, **kwargs):
        """Draw N samples by Algorithm 2, or as the arguments of variants.sample say."""
        torch.manual_seed(1)
        return sample(paper, eps, (N, 2, 1, 1), **kwargs)

    draw_guidance(FIGURES / "guidance.png", paper, fit(paper, labelled_moons))
    angles, panels = torch.arange(8) * torch.pi / 4, []
    circle = 1.8 * torch.stack([angles.cos(), angles.sin()], 1)[..., None, None]
    for name, data in (("mixture", mixture), ("moons", moons)):
        model = fit(paper, data)
        if data is mixture:
            draw_field(FIGURES / "field.png", paper, model)
        chain = sample_progressive(
            paper, model, circle.shape, 200, "ddim", draw_noise=lambda: circle
        )
        paths = [x_t for _, x_t, _ in chain]
        panels += [
            (f"{name}: data", data(N)),
            (f"{name}: paths of DDIM", torch.stack(paths)),
            (f"{name}: Algorithm 2", draw(model)),
            (f"{name}: DDIM, 50 steps", draw(model, steps=50, sampler="ddim")),
        ]
    panels += [
        ("moons: without z", draw(model, draw_noise=only_first(torch.randn(N, 2, 1, 1)))),
        ("moons: mean as target", draw(fit(paper, moons, "native", "mean"))),
        ("moons: loss (12)", draw(fit(paper, moons, "vlb"))),
        ("moons: (12), t by weight", draw(fit(paper, moons, "vlb", drawn=True))),
    ]

    figure = Figure(figsize=(10, 7.8), layout="constrained")
    for k, axes in enumerate(figure.subplots(3, 4).flat):
        title, points = panels[k]
        if points.ndim == 5:  # paths, from noise to data
            axes.scatter(*panels[k - 1][1].flatten(1).T, 1, "0.8")  # the data
            for x, y in points.flatten(2).permute(1, 2, 0):
                axes.scatter(x, y, 2, range(len(x)), cmap="viridis_r")  # light at T, dark at 0
            limits = -2.1, 2.1
        else:
            data = mixture if title.startswith("mixture") else moons
            print(f"{title:30} {share_off(points, data(N)):6.1%} off the data")
            axes.scatter(*points.flatten(1).T, 1)
            limits = -1.2, 1.2
        axes.set(aspect="equal", xlim=limits, ylim=limits)
        axes.set_title(title, fontsize=10)
    figure.savefig(FIGURES / "points.png", dpi=85)


if __name__ == "__main__":
    main()
