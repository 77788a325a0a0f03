"""Later methods for ddpm.py: schedules, targets, weights of the loss, and few-step samplers.

    eps = as_eps(model, diffusion, "v")      # from a network that predicts v
    eps = guided(eps, y, 2)                  # of sample.py, if it has classes
    x0 = sample(diffusion, eps, (16, 3, 32, 32), steps=10)

As in ddpm.py, t is an int64 tensor (B,) with values 0..T-1, and a model is a function (x_t, t), or
(x_t, t, y) with classes, that returns a tensor shaped like x_t.
"""

import math
from functools import partial

import torch

from ddpm import look_up
from sample import last_x0, reverse

# ------------------------------------------------------------- schedules, targets and their weights


def cosine_betas(T=1000):
    """Return the schedule of Nichol and Dhariwal 2021 (arXiv:2102.09672, eq. 17). Float64, (T,)."""
    u = torch.arange(T + 1, dtype=torch.float64) / T
    alphas_bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - alphas_bar[1:] / alphas_bar[:-1]).clamp(max=0.999)


def eps_of_output(diffusion, predicts):
    """Return the tables a and b of eps = a_t x_t + b_t output, each float64 (T,).

    predicts: what the network returns. "eps" is the noise, the paper's choice. The paper also tries
        "mean", the mean of q(x_{t-1} | x_t, x_0), and "x0", the image. "v" is
        sqrt(abar_t) eps - sqrt(1 - abar_t) x_0, from Salimans and Ho 2022 (arXiv:2202.00512).
    """
    abar, alphas, betas = diffusion.alphas_bar, diffusion.alphas, diffusion.betas
    return {
        "eps": (torch.zeros_like(abar), torch.ones_like(abar)),
        "mean": ((1 - abar).sqrt() / betas, -(alphas * (1 - abar)).sqrt() / betas),  # (11)
        "x0": (1 / (1 - abar).sqrt(), -(abar / (1 - abar)).sqrt()),  # (15)
        "v": ((1 - abar).sqrt(), abar.sqrt()),
    }[predicts]


def as_eps(model, diffusion, predicts):
    """Return eps(x_t, t, ...), the noise in x_t, from a network that predicts something else.

    predicts: see eps_of_output. Arguments after t reach the network.
    """
    a, b = eps_of_output(diffusion, predicts)

    def eps(x_t, t, *args, **kwargs):
        output = model(x_t, t, *args, **kwargs)
        return look_up(a, t, x_t) * x_t + look_up(b, t, x_t) * output

    return eps


def loss_weights(diffusion, name, predicts="eps"):
    """Return the weights of the squared error of eps at each t, float64 (T,), for weighted_loss.

    name: "simple" is (14), whatever the network predicts. "vlb" keeps the weight that (12) gives
        each term. "native" gives weight 1 to the squared error of the network's output.
    """
    _, b = eps_of_output(diffusion, predicts)
    return {
        "simple": torch.ones_like(b),
        "vlb": diffusion.bound_weights(),
        "native": 1 / b**2,
    }[name]


def weighted_loss(diffusion, model, x0, t, noise, weights):
    """Return the mean of the squared errors of eps, each times the weight of its t, a scalar.

    weights: (T,). With bound_weights(), the loss is, for t > 0, L_t in nats per dimension, up to a
    constant; for t = 0, it uses the decoder's density, not its probability.
    """
    error = diffusion.squared_error(model, x0, t, noise)
    return (look_up(weights, t, error) * error).mean()


# -------------------------------------------------------------------------------------- fewer steps


@torch.no_grad()
def sample_progressive(
    diffusion, eps, shape=None, steps=None, sampler=None, generator=None, device=None,
    draw_noise=None, clip=True,
):  # fmt: skip
    """Yield (t, x_t, x0_hat) of sample.reverse in torch, each (B, C, H, W) on the noise's device.

    Algorithm 2 with all T steps is the loop of ddpm.py itself. shape, generator, device: of the
    noise, unless draw_noise() returns it. Raises ValueError where sample.reverse does.
    """
    if draw_noise is None:
        draw_noise = partial(torch.randn, shape, generator=generator, device=device)
    if steps in (None, diffusion.T) and sampler in (None, "ddpm"):
        yield from diffusion.sample_progressive(eps, shape, draw_noise=draw_noise, clip=clip)
        return

    def eps_at(x_t, t):
        return eps(x_t, torch.full((len(x_t),), t, device=x_t.device))

    betas, variance = diffusion.betas.tolist(), diffusion.variance
    yield from reverse(eps_at, draw_noise, betas, variance, steps, sampler, clip)


def sample(diffusion, eps, shape, *args, **options):
    """Return the last x0_hat of sample_progressive, with its arguments: (B, C, H, W)."""
    return last_x0(sample_progressive(diffusion, eps, shape, *args, **options))
