"""What came after the paper, as functions around ddpm.py and samplers.py.

    cosine_betas                another schedule
    as_eps                      networks that predict v, x_0 or the mean
    loss_weights, weighted_loss    other weights of the loss
    sample_progressive, sample  DDIM and SA-Solver in few steps; inpainting
    guided                      classifier-free guidance, for a network with classes

    eps = as_eps(model, diffusion, "v")                      # what the network returns
    eps = guided(eps, y, 2)                                  # if it has classes
    x0 = sample(diffusion, eps, (16, 3, 32, 32), steps=10)

As in ddpm.py, a model is any function (x_t, t), or (x_t, t, y) with classes, that returns a tensor
shaped like x_t, and t is an int64 tensor (B,) with values 0..T-1. Further keyword arguments, such
as another condition, reach the model.
"""

import math
from functools import partial

import torch

from ddpm import look_up
from samplers import choose_sampler, reverse

# ------------------------------------------------------------- schedules, targets and their weights


def cosine_betas(T=1000):
    """Return the schedule of Nichol and Dhariwal 2021 (arXiv:2102.09672, eq. 17). Float64, (T,)."""
    u = torch.arange(T + 1, dtype=torch.float64) / T
    alphas_bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - alphas_bar[1:] / alphas_bar[:-1]).clamp(max=0.999)


TARGETS = "eps", "mean", "x0", "v"  # what a network may predict


def eps_of_output(diffusion, predicts):
    """Return the tables a and b of eps = a_t x_t + b_t output, each float64 (T,).

    predicts: what the network returns. "eps" is the noise, the paper's choice. The paper also tries
        "mean", the mean of q(x_{t-1} | x_t, x_0), and "x0", the image. "v" is
        sqrt(abar_t) eps - sqrt(1 - abar_t) x_0, from Salimans and Ho 2022 (arXiv:2202.00512).

    Raises ValueError for an unknown target.
    """
    if predicts not in TARGETS:
        raise ValueError(f'predicts must be "eps", "mean", "x0" or "v", not {predicts!r}')
    abar, alphas, betas = diffusion.alphas_bar, diffusion.alphas, diffusion.betas
    return {
        "eps": (torch.zeros_like(abar), torch.ones_like(abar)),
        "mean": ((1 - abar).sqrt() / betas, -(alphas * (1 - abar)).sqrt() / betas),  # (11)
        "x0": (1 / (1 - abar).sqrt(), -(abar / (1 - abar)).sqrt()),  # (15)
        "v": ((1 - abar).sqrt(), abar.sqrt()),
    }[predicts]


def as_eps(model, diffusion, predicts, device=None):
    """Return eps(x_t, t, y=None), the noise in x_t, from a network that predicts something else.

    predicts: see eps_of_output. device: where the network computes; without it, each call on a
    device other than the CPU copies two tables. Raises ValueError for an unknown target.
    """
    a, b = (table.to(device, torch.float32) for table in eps_of_output(diffusion, predicts))

    def eps(x_t, t, y=None, **condition):
        y = () if y is None else (y,)
        output = model(x_t, t, *y, **condition)
        if predicts == "eps":
            return output
        return look_up(a, t, x_t) * x_t + look_up(b, t, x_t) * output

    return eps


WEIGHTINGS = "simple", "vlb", "min-snr", "native"


def loss_weights(diffusion, name, predicts="eps"):
    """Return the weights of the squared error of eps at each t, float64 (T,), for weighted_loss.

    name: "simple" is (14), whatever the network predicts. "vlb" keeps the weight that (12) gives
        each term. "min-snr" (Hang et al. 2023, arXiv:2303.09556) gives the error of x0_hat the
        weight min(SNR, 5), whereas (14) gives it SNR = abar_t / (1 - abar_t). "native" gives the
        squared error of what the network predicts the weight 1.

    Raises ValueError for an unknown name or target.
    """
    _, b = eps_of_output(diffusion, predicts)
    if name not in WEIGHTINGS:
        raise ValueError(f"the weights must be in {[*WEIGHTINGS]}, not {name!r}")
    return {
        "simple": torch.ones_like(b),
        "vlb": diffusion.bound_weights(),
        "min-snr": (5 * (1 - diffusion.alphas_bar) / diffusion.alphas_bar).clamp(max=1),
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
    diffusion, eps, shape, steps=None, sampler=None, eta=None, generator=None, draw_noise=None,
    x_T=None, device=None, clip=True, known=None,
):  # fmt: skip
    """Yield (t, x_t, x0_hat) of samplers.reverse in torch.

    Algorithm 2 with all T steps and nothing known is the loop of ddpm.py itself.

    eps: a network, such as that of as_eps, which takes (x_t, t). The other arguments are those of
    Diffusion.sample_progressive and of samplers.reverse, which also says what is refused.
    """
    T = diffusion.T
    steps = T if steps is None else steps
    sampler = choose_sampler(sampler, eta, steps, T)
    if draw_noise is None:
        device = device if x_T is None else x_T.device
        draw_noise = partial(torch.randn, shape, generator=generator, device=device)
    if sampler == "ddpm" and steps == T and known is None:
        yield from diffusion.sample_progressive(eps, shape, None, draw_noise, x_T, device, clip)
        return

    def eps_at(x_t, t):
        return eps(x_t, torch.full((len(x_t),), t, device=x_t.device))

    betas, variance = diffusion.betas.tolist(), diffusion.variance
    yield from reverse(eps_at, draw_noise, betas, variance, steps, sampler, eta, x_T, clip, known)


def sample(diffusion, eps, shape, *args, **kwargs):
    """Return the last x0_hat of sample_progressive, with its arguments: (B, C, H, W)."""
    for _, _, x0_hat in sample_progressive(diffusion, eps, shape, *args, **kwargs):
        x0 = x0_hat
    return x0


# ----------------------------------------------------------------------------------------- guidance


def guided(eps, y, w):
    """Return (1 + w) eps(x_t, t, y) - w eps(x_t, t), as a function of (x_t, t).

    This is classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598, eq. 6). y: classes
    (B,). w: 0 draws the class as it is, and larger values draw what is more typical of it. Other
    programs use the scale s = 1 + w (diffusers' guidance_scale), where s = 1 means no guidance.
    """

    def guided_eps(x_t, t, **condition):
        given = eps(x_t, t, y, **condition)
        return given if w == 0 else (1 + w) * given - w * eps(x_t, t, **condition)

    return guided_eps
