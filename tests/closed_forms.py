"""Data, networks and samples that are known in closed form, and other helpers of the tests.

They need torch and ddpm.py alone.
"""

import math
from functools import partial
from itertools import pairwise

import torch

from ddpm import Diffusion, UNet, linear_betas

PAPER = Diffusion(linear_betas())
VARIANCES = ("large", "small")
M, S = 0.3, 0.15  # mean and deviation of the Gaussian data


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def close(a, b, tolerance=1e-6):
    a, b = (torch.as_tensor(v, dtype=torch.float64) for v in (a, b))
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def at(table, t):
    """Return the entries of a table at t, to broadcast over images."""
    return table[t].view(-1, 1, 1, 1)


def best_network(mean=M, deviation=S, diffusion=PAPER):
    """Return E[eps | x_t], which is linear in x_t, for x_0 ~ N(mean, deviation^2)."""

    def eps(x_t, t):
        abar = at(diffusion.alphas_bar, t)
        slope = (1 - abar).sqrt() / (abar * deviation**2 + 1 - abar)
        return (slope * (x_t.double() - abar.sqrt() * mean)).float()

    return eps


def oracle(x0):
    """Return a network that knows x_0, like best_network() for a Gaussian without width."""
    return best_network(x0, 0)


def wobbly(x_t, t):
    """A mock network for torch and numpy: it is nonlinear in x_t and different for each t."""
    return x_t / (0.5 + abs(x_t)) + float(t[0]) / 1000


def algorithm_2(abar, abar_prev, variance):
    """Return p, q and sigma^2 of the step as printed: x <- p x + q eps + sigma z."""
    alpha = abar / abar_prev
    beta = 1 - alpha
    sigma2 = beta if variance == "large" else (1 - abar_prev) / (1 - abar) * beta
    return 1 / math.sqrt(alpha), -beta / math.sqrt(1 - abar) / math.sqrt(alpha), sigma2


def mean_and_deviation(step, choice, steps=1000):
    """Return the mean and deviation of the samples of best_network(), by a recursion over t.

    The recursion shares no code with the sampler, and needs no training.
    """
    abars = [PAPER.alphas_bar[k * 1000 // steps - 1].item() for k in range(steps, 0, -1)]
    mean, variance = 0.0, 1.0
    for abar, abar_prev in pairwise([*abars, 1.0]):
        p, q, sigma2 = step(abar, abar_prev, choice)
        slope = math.sqrt(1 - abar) / (abar * S**2 + 1 - abar)  # eps = slope (x - sqrt(abar) M)
        mean = (p + q * slope) * mean - q * slope * math.sqrt(abar) * M
        variance = (p + q * slope) ** 2 * variance + (sigma2 if abar_prev < 1 else 0)
    return mean, math.sqrt(variance)


def sample_moments(sample, draws):
    """Return the exact mean and deviation of what a sampler draws with best_network().

    Image k receives one unit of noise, at draw k, and the last image receives none.
    """
    noise = iter(torch.eye(draws + 1).view(-1, draws + 1, 1, 1, 1))
    x0 = sample(best_network(), (draws + 1, 1, 1, 1), draw_noise=partial(next, noise), clip=False)
    x0 = x0.double().flatten()
    return x0[-1].item(), (x0[:-1] - x0[-1]).norm().item()


def small_unet(jitter=0.1, **kwargs):
    torch.manual_seed(0)
    settings = dict(image_size=8, base_channels=8, channel_mults=(1, 2), num_res_blocks=1,
                    attention_resolutions=(4,), dropout=0.5)  # fmt: skip
    model = UNet(**(settings | kwargs)).eval()
    with torch.no_grad():  # layers that are near zero would hide the others
        for p in model.parameters():
            p.add_(jitter * torch.randn_like(p))
    return model
