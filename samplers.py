"""The reverse process in few steps, once for torch and numpy: Algorithm 2, DDIM and SA-Solver.

    for t, x_t, x0_hat in reverse(eps, draw_noise, betas, steps=10):
        ...                                    # the last x0_hat is the sample

Only the standard library is needed. All coefficients are Python floats, so float32 arrays and
tensors stay float32, on any device. beyond.py (torch) and ddpm_numpy.py provide eps and the noise.

Numbers in parentheses are the paper's equation numbers (arXiv:2006.11239). t is 0..T-1, as in
ddpm.py.
"""

import math
from itertools import accumulate
from operator import mul


class Chain:
    """A DDPM through `steps` of the T noise levels: lists of floats, named as in Diffusion.

    tau lists the visited t, as evenly spaced as integers allow, up to T-1. The noise added between
    two of them has the variance 1 - abar_t / abar_s, where s precedes t in tau.
    """

    def __init__(self, betas, variance, steps):
        if variance not in ("large", "small"):
            raise ValueError(f'variance must be "large" or "small", not {variance!r}')
        # "Trailing" steps: the last one is at t = T / steps - 1, and its x0_hat is the sample.
        self.tau = [len(betas) * k // steps - 1 for k in range(1, steps + 1)]
        every = [*accumulate((1 - float(beta) for beta in betas), mul)]
        self.alphas_bar = [every[t] for t in self.tau]
        self.alphas_bar_prev = [1.0, *self.alphas_bar[:-1]]
        levels = [*zip(self.alphas_bar, self.alphas_bar_prev, strict=True)]
        self.betas = [1 - a / prev for a, prev in levels]
        self.sqrt_alphas_bar = [math.sqrt(a) for a in self.alphas_bar]
        self.sqrt_one_minus_alphas_bar = [math.sqrt(1 - a) for a in self.alphas_bar]
        # q(x_{t-1} | x_t, x_0): the coefficients of x_0 and x_t in its mean, and its variance (7)
        self.posterior_x0 = [math.sqrt(prev) * (1 - a / prev) / (1 - a) for a, prev in levels]
        self.posterior_x_t = [math.sqrt(a / prev) * (1 - prev) / (1 - a) for a, prev in levels]
        self.posterior_variance = [(1 - prev) / (1 - a) * (1 - a / prev) for a, prev in levels]
        sigma2 = self.betas if variance == "large" else self.posterior_variance
        self.sigma = [math.sqrt(value) for value in sigma2]  # no sampler adds noise at t = 0


# A sampler is a function of a chain that returns step(x0_hat, x_t, t, draw_noise), which returns
# x_{t-1}. t = 1..steps-1 counts the levels of the chain. A step may remember earlier calls.


def ddpm_step(chain):
    """Return the step of Algorithm 2."""

    def step(x0, x_t, t, draw_noise):
        mean = chain.posterior_x0[t] * x0 + chain.posterior_x_t[t] * x_t  # (7)
        return mean + chain.sigma[t] * draw_noise()

    return step


def ddim_step(chain, eta=0.0):
    """Return DDIM's step (Song et al. 2021, arXiv:2010.02502, eq. 12 and 16)."""
    signal, spread = chain.sqrt_alphas_bar, chain.sqrt_one_minus_alphas_bar

    def step(x0, x_t, t, draw_noise):
        eps = (x_t - signal[t] * x0) / spread[t]  # the noise that fits x0, which may be clipped
        sigma2 = eta**2 * chain.posterior_variance[t]
        mean = signal[t - 1] * x0 + math.sqrt(1 - chain.alphas_bar[t - 1] - sigma2) * eps
        return mean + math.sqrt(sigma2) * draw_noise() if eta else mean

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
    lam = [math.log(abar / (1 - abar)) / 2 for abar in chain.alphas_bar]
    signal, spread = chain.sqrt_alphas_bar, chain.sqrt_one_minus_alphas_bar
    nodes, estimates, begin = [], [], None  # latest first; where the last step began

    def solve(x, before, after):
        """Return x at the level `after`, from x at the level `before`."""
        weights = node_weights(nodes, lam[before], lam[after])
        x = spread[after] / spread[before] * x
        for weight, x0 in zip(weights, estimates, strict=True):
            x = x + signal[after] * weight * x0
        return x

    def step(x0, x_t, t, draw_noise):
        nonlocal begin
        nodes.insert(0, lam[t])
        estimates.insert(0, x0)
        del nodes[order:], estimates[order:]
        begin = x_t if begin is None or not correct else solve(begin, t + 1, t)
        return solve(begin, t, t - 1)

    return step


SAMPLERS = {"ddpm": ddpm_step, "ddim": ddim_step, "sa-solver": sa_solver_step}


def choose_sampler(sampler, eta, steps, T):
    """Return the name of the sampler that `reverse` uses; raise ValueError if none fits."""
    if not 1 <= steps <= T:
        raise ValueError(f"steps must be 1..{T}, not {steps}")
    if sampler is None:
        sampler = "ddim" if eta is not None else "sa-solver" if steps < T else "ddpm"
    if sampler not in SAMPLERS:
        raise ValueError(f"the sampler must be in {[*SAMPLERS]}, not {sampler!r}")
    if eta is not None and (sampler != "ddim" or not 0 <= eta <= 1):
        said = 'eta must be from 0 to 1, and is only for "ddim"'
        raise ValueError(f"{said}; it is {eta} for {sampler!r}")
    return sampler


def reverse(
    eps, draw_noise, betas, variance="large", steps=None, sampler=None, eta=None, x_T=None,
    clip=True, known=None,
):  # fmt: skip
    """Yield (t, x_t, x0_hat) of the reverse process, from t = T-1 down.

    x_t is the input of the network and x0_hat the current estimate of the clean image; the last
    x0_hat is the sample. Both are arrays or tensors, shaped like the noise.

    eps(x_t, t): the noise in x_t, where t is an int.
    draw_noise(): returns x_T (unless x_T is given), and then each z.
    betas, variance: as for Diffusion; a subclass of Diffusion has no effect here.
    steps: how many of the T steps to take; all if None.
    sampler: "ddpm" is the paper's Algorithm 2, the default with all T steps. "sa-solver" is
        SA-Solver without noise, the default with fewer. "ddim" is DDIM.
    eta: only for "ddim", which is selected if eta is given. 0, the default, is deterministic; 1
        equals "ddpm" with the "small" variance.
    x_T: where to start; pure noise if None. To continue from an x_t, pass betas[: t + 1] with it.
    clip: keep x0_hat in [-1, 1].
    known: for inpainting, (image, mask), which broadcast to x_t. Where the mask, of type bool, is
        False, x_t is drawn from q(x_t | x_0) of the image in each step, and x0_hat is the image.

    Raises ValueError for an unknown variance or sampler, steps or eta out of range, or a mask that
    is not of type bool.
    """
    steps = len(betas) if steps is None else steps
    name, chain = choose_sampler(sampler, eta, steps, len(betas)), Chain(betas, variance, steps)
    step = SAMPLERS[name](chain) if eta is None else ddim_step(chain, eta)
    image, mask = known or (None, None)
    if known and "bool" not in str(mask.dtype):
        raise ValueError(f"the mask must be of type bool, not {mask.dtype}")
    signal, spread = chain.sqrt_alphas_bar, chain.sqrt_one_minus_alphas_bar
    x = draw_noise() if x_T is None else x_T
    for i in reversed(range(steps)):
        if known:
            x = mask * x + ~mask * (signal[i] * image + spread[i] * draw_noise())  # (4)
        x0 = (x - spread[i] * eps(x, chain.tau[i])) / signal[i]  # (15)
        x0 = x0.clip(-1, 1) if clip else x0
        x0 = mask * x0 + ~mask * image if known else x0
        yield chain.tau[i], x, x0
        if i > 0:
            x = step(x0, x, i, draw_noise)
