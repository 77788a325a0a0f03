"""What came after the paper, as functions around ddpm.py. Only that file and torch are needed.

    cosine_betas                another schedule
    as_eps, loss_weights        networks that predict v, x_0 or the mean; weights of the loss
    respaced                    a shorter chain for the same network
    sample_progressive, sample  DDIM and SA-Solver in few steps; inpainting
    guided                      classifier-free guidance, for a network with classes

    eps = as_eps(model, diffusion, "v")                      # what the network returns
    eps = guided(eps, y, 2)                                  # if it has classes
    x0 = sample(diffusion, eps, (16, 3, 32, 32), steps=10)

As in ddpm.py, a model is any function (x_t, t), or (x_t, t, y) with classes, that returns a tensor
shaped like x_t, and t is an int64 tensor (B,) with values 0..T-1.
"""

import math
from functools import partial

import torch

from ddpm import look_up

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


def as_eps(model, diffusion, predicts):
    """Return eps(x_t, t, y=None), the noise in x_t, from a network that predicts something else.

    predicts: see eps_of_output. Raises ValueError for an unknown target.
    """
    a, b = (table.float() for table in eps_of_output(diffusion, predicts))

    def eps(x_t, t, y=None):
        output = model(x_t, t) if y is None else model(x_t, t, y)
        if predicts == "eps":
            return output
        return look_up(a, t, x_t) * x_t + look_up(b, t, x_t) * output

    return eps


WEIGHTINGS = "simple", "vlb", "min-snr", "native"


def loss_weights(diffusion, name, predicts="eps"):
    """Return the weights (T,) of the squared error of eps for Diffusion.loss, or None if all are 1.

    name: "simple" is (14), whatever the network predicts. "vlb" keeps the weight that (12) gives
        each term. "min-snr" (Hang et al. 2023, arXiv:2303.09556) gives the error of x0_hat the
        weight min(SNR, 5), whereas (14) gives it SNR = abar_t / (1 - abar_t). "native" gives the
        squared error of what the network predicts.

    Raises ValueError for an unknown name or target.
    """
    _, b = eps_of_output(diffusion, predicts)
    if name not in WEIGHTINGS:
        raise ValueError(f"the weights must be in {[*WEIGHTINGS]}, not {name!r}")
    return {
        "simple": None,
        "vlb": diffusion.bound_weights(),
        "min-snr": (5 * (1 - diffusion.alphas_bar) / diffusion.alphas_bar).clamp(max=1),
        "native": 1 / b**2,
    }[name]


# -------------------------------------------------------------------------------------- fewer steps


def respaced(diffusion, model, steps):
    """Return (chain, eps, tau): a Diffusion through `steps` of the noise levels, and its network.

    tau, int64 (steps,), lists the visited t, as evenly spaced as integers allow, up to T-1. The
    chain is a DDPM with betas 1 - abar_t / abar_s, where s precedes t in tau. eps is the model,
    asked at tau: chain.sample(eps, shape) and chain.vlb(eps, x0) are right as they stand. The chain
    is of the same class as the diffusion. Raises ValueError if steps is not 1..T.
    """
    T = diffusion.T
    if not 1 <= steps <= T:
        raise ValueError(f"steps must be 1..{T}, not {steps}")
    # "Trailing" steps end at t = T / steps - 1, whose x0_hat is the sample. With steps that go on
    # to t = 0, the samples of DPM-Solver++ were worse in up to 20 steps, and equally good in 50.
    tau = T * torch.arange(1, steps + 1) // steps - 1
    abar = diffusion.alphas_bar[tau]
    betas = 1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])

    def eps(x_t, t, *y, **named):  # y, if the model takes classes
        return model(x_t, tau.to(t.device, non_blocking=t.is_cuda)[t], *y, **named)

    return type(diffusion)(betas, diffusion.variance), eps, tau


def ddpm_step(chain):
    """Return the step of Algorithm 2: step(x0_hat, x_t, t, z) returns x_{t-1}, and z() draws noise.

    Each sampler is such a step. It may keep what it has seen. t is the int that all images share,
    so the factors are plain numbers.
    """
    factor_x0, factor_x_t = chain.posterior_x0.tolist(), chain.posterior_x_t.tolist()
    sigma = chain.sigma.tolist()

    def step(x0, x_t, t, z):
        return factor_x0[t] * x0 + factor_x_t[t] * x_t + sigma[t] * z()  # (7)

    return step


def ddim_step(chain, eta=0.0):
    """Return DDIM's step (Song et al. 2021, arXiv:2010.02502, eq. 12 and 16)."""
    signal, spread = chain.sqrt_alphas_bar.tolist(), chain.sqrt_one_minus_alphas_bar.tolist()
    sigma2 = eta**2 * chain.posterior_variance
    factor_x0, sigma = chain.alphas_bar_prev.sqrt().tolist(), sigma2.sqrt().tolist()
    factor_eps = (1 - chain.alphas_bar_prev - sigma2).sqrt().tolist()

    def step(x0, x_t, t, z):
        eps = (x_t - signal[t] * x0) / spread[t]  # the noise that fits x0, which may be clipped
        mean = factor_x0[t] * x0 + factor_eps[t] * eps
        return mean + sigma[t] * z() if eta else mean

    return step


def node_weights(nodes, start, end):
    """Return the weights c of: integral from start to end of e^(s - end) x0(s) ds = sum c_k x0_k.

    x0(s) is the polynomial through the points (nodes[k], x0_k). All are floats.
    """
    nodes, h = [node - end for node in nodes], end - start
    moments = [-math.expm1(-h)]  # the integrals of e^u u^k from -h to 0
    for k in range(1, len(nodes)):
        moments.append(-math.exp(-h) * (-h) ** k - k * moments[-1])
    weights = []
    for node in nodes:
        powers = [1.0]  # the coefficients of Lagrange's polynomial, which is 1 at this node
        for other in nodes:
            if other != node:  # multiply it by (u - other) / (node - other)
                pairs = zip([0.0, *powers], [*powers, 0.0], strict=True)
                powers = [(lower - other * same) / (node - other) for lower, same in pairs]
        weights.append(sum(m * power for m, power in zip(moments, powers, strict=True)))
    return weights


def sa_solver_step(chain, order=3, correct=True):
    """Return the step of SA-Solver without noise (Xue et al. 2023, arXiv:2309.05019).

    The exact step is an integral of x0_hat over lambda = log sqrt(abar / (1 - abar)), in which the
    polynomial through the last `order` estimates takes the place of x0_hat. If `correct`, the same
    step is taken again once the network has given the estimate at its end, with this estimate as a
    node; it costs no extra call. Order 1 without the correction is DDIM.
    """
    lam = (chain.alphas_bar.logit() / 2).tolist()
    signal, spread = chain.sqrt_alphas_bar.tolist(), chain.sqrt_one_minus_alphas_bar.tolist()
    nodes, estimates, begin = [], [], None  # the latest first; where the last step began

    def solve(x, before, after):
        """Return x at the level `after`, from x at the level `before`."""
        weights = node_weights(nodes, lam[before], lam[after])
        x = spread[after] / spread[before] * x
        for weight, x0 in zip(weights, estimates, strict=True):
            x = x + signal[after] * weight * x0
        return x

    def step(x0, x_t, t, z):
        nonlocal begin
        nodes.insert(0, lam[t])
        estimates.insert(0, x0)
        del nodes[order:], estimates[order:]
        begin = x_t if begin is None or not correct else solve(begin, t + 1, t)
        return solve(begin, t, t - 1)

    return step


SAMPLERS = "ddpm", "ddim", "sa-solver"


@torch.no_grad()
def sample_progressive(
    diffusion, eps, shape, steps=None, sampler=None, eta=None, generator=None, draw_noise=None,
    x_T=None, device=None, clip=True, known=None,
):  # fmt: skip
    """Yield (t, x_t, x0_hat) of the reverse process in few steps, like Diffusion's method.

    eps: a network, such as that of as_eps, which takes (x_t, t). The arguments that are not listed
    here are those of Diffusion.sample_progressive.

    steps: how many of the T steps to take; all if None.
    sampler: "ddpm" is Algorithm 2, the default with all T steps. "sa-solver" is SA-Solver without
        noise, the default with fewer. "ddim" is DDIM.
    eta: only for "ddim", which is selected if eta is given. 0, the default, is deterministic; 1
        equals "ddpm" with the "small" variance.
    known: for inpainting, (image, mask), which broadcast to x_t. Where the mask is False, x_t is
        drawn from q(x_t | x_0) of the image (4) in each step, and x0_hat is the image.

    Raises ValueError for an unknown sampler, and for steps or eta out of range.
    """
    chain, eps, tau = respaced(diffusion, eps, diffusion.T if steps is None else steps)
    if sampler is None:
        sampler = "ddim" if eta is not None else "sa-solver" if chain.T < diffusion.T else "ddpm"
    if sampler not in SAMPLERS:
        raise ValueError(f"the sampler must be in {[*SAMPLERS]}, not {sampler!r}")
    if eta is not None and (sampler != "ddim" or not 0 <= eta <= 1):
        raise ValueError(
            f'eta must be from 0 to 1, and is only for "ddim"; it is {eta} for {sampler!r}'
        )
    if draw_noise is None:
        device = device if x_T is None else x_T.device
        draw_noise = partial(torch.randn, shape, generator=generator, device=device)
    if sampler == "ddpm" and not known:  # the loop of ddpm.py
        algorithm_2 = chain.sample_progressive(eps, shape, None, draw_noise, x_T, device, clip)
        yield from ((tau[i].item(), x, x0) for i, x, x0 in algorithm_2)
        return
    ddim = partial(ddim_step, eta=eta or 0.0)
    step = {"ddpm": ddpm_step, "ddim": ddim, "sa-solver": sa_solver_step}[sampler](chain)
    image, mask = known or (None, None)

    x = draw_noise() if x_T is None else x_T
    for i in reversed(range(chain.T)):
        t = torch.full((len(x),), i, device=x.device)
        if known:
            x = torch.where(mask, x, chain.q_sample(image, t, draw_noise()))
        x0 = chain.predict_x0(x, t, eps(x, t))
        x0 = x0.clamp(-1, 1) if clip else x0
        x0 = torch.where(mask, x0, image) if known else x0
        yield tau[i].item(), x, x0
        if i > 0:
            x = step(x0, x, i, draw_noise)


def sample(diffusion, eps, shape, *args, **kwargs):
    """Return the last x0_hat of sample_progressive, with its arguments: (B, C, H, W)."""
    for _, _, x0_hat in sample_progressive(diffusion, eps, shape, *args, **kwargs):
        x0 = x0_hat
    return x0


# ----------------------------------------------------------------------------------------- guidance


def guided(eps, y, w):
    """Return (1 + w) eps(x_t, t, y) - w eps(x_t, t), as a function of (x_t, t).

    Classifier-free guidance of Ho and Salimans 2022 (arXiv:2207.12598, eq. 6). y: classes (B,).
    w: 0 samples the class as it is, and larger values sample what is more typical of it. Others use
    the scale s = 1 + w (diffusers' guidance_scale), for which s = 1 means no guidance.
    """
    if w == 0:
        return lambda x_t, t: eps(x_t, t, y)
    return lambda x_t, t: (1 + w) * eps(x_t, t, y) - w * eps(x_t, t)
