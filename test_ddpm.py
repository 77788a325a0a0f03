"""The proof that ddpm.py is the paper, and that the programs do what they say.

pytest                # under three minutes on two cores
pytest -m slow        # the built-in demo, trained in full and judged: some minutes
"""

import functools
import hashlib
import json
import math
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save_file

import export
import sample
import train
from ddpm import (
    Diffusion,
    UNet,
    cosine_betas,
    discretized_log_likelihood,
    linear_betas,
    timestep_embedding,
)

HERE = Path(__file__).parent
PAPER = Diffusion(linear_betas())
VARIANCES = ("large", "small")
TINY = "--image-size 8 --base-channels 8 --channel-mults 1 2 --num-res-blocks 1 --batch 8"
TINY = TINY.split()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-6):
    a, b = (torch.as_tensor(v, dtype=torch.float64) for v in (a, b))
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------- the schedule


def test_linear_schedule_has_the_papers_numbers():
    d = PAPER
    assert d.T == 1000 and d.betas.dtype == torch.float64
    close(d.betas[[0, -1]], [1e-4, 0.02], 1e-15)
    close(d.alphas_bar[[0, 1]], [0.9999, 0.9997800920720721], 1e-15)
    assert d.alphas_bar[999].item() == pytest.approx(4.035829765375676e-05, rel=1e-12)
    close(d.posterior_variance[[0, 1, 2]] * 1e5, [0, 5.45318766, 8.54891152], 1e-8)
    assert d.posterior_variance[999].item() == pytest.approx(0.01999998352656061, rel=1e-12)
    assert math.log(d.sigma2[0]) == pytest.approx(-9.81672513529567, rel=1e-10)  # the next one's
    assert (1 / d.alphas_bar[999]).sqrt().item() == pytest.approx(157.41046, rel=1e-7)


def test_posterior_coefficients_have_the_papers_numbers():
    one, zero = torch.ones(2, 1, 1, 1), torch.zeros(2, 1, 1, 1)
    t = torch.tensor([0, 999])
    of_x0, _ = PAPER.q_posterior(one, zero, t)
    of_xt, _ = PAPER.q_posterior(zero, one, t)
    assert of_x0.flatten().tolist() == pytest.approx([1, 1.28351487e-04], rel=1e-6)
    assert of_xt.flatten().tolist() == pytest.approx([0, 0.98994868], rel=1e-6)


def test_x_T_is_as_good_as_noise():
    for betas in (linear_betas(), cosine_betas()):
        assert Diffusion(betas).alphas_bar[-1].sqrt() < 0.01


def test_cosine_schedule_is_a_squared_cosine():
    abar = Diffusion(cosine_betas(1000)).alphas_bar
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    close(abar[:990], [f[t + 1] / f[0] for t in range(990)], 1e-12)
    assert cosine_betas().max() == 0.999


@pytest.mark.parametrize("betas", [[], [0.1, 1.0], [0.0, 0.1], [[0.1]], [0.1, float("nan")]])
def test_impossible_betas_are_refused(betas):
    with pytest.raises(ValueError, match="betas"):
        Diffusion(betas)


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match="variance"):
        Diffusion(linear_betas(), "medium")
    with pytest.raises(ValueError, match="weighting"):
        PAPER.loss(lambda x, t: x, torch.zeros(1, 1, 2, 2), weighting="none")
    with pytest.raises(ValueError, match="steps"):
        PAPER.respaced(0)


# ------------------------------------------------------------------------------ the forward process


def test_closed_form_is_the_iterated_step():
    """(4) against (2): x_t = sqrt(alpha_t) x_{t-1} + sqrt(beta_t) z, over all t, in moments."""
    mean, variance = 1.0, 0.0
    for t in range(PAPER.T):
        mean *= math.sqrt(1 - PAPER.betas[t])
        variance = (1 - PAPER.betas[t].item()) * variance + PAPER.betas[t].item()
        x0, noise = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
        at_t = torch.tensor([t])
        close(PAPER.q_sample(x0, at_t, 0 * noise).item(), mean)
        close(PAPER.q_sample(0 * x0, at_t, noise).item() ** 2, variance)


def test_closed_form_is_the_iterated_step_in_samples():
    g = torch.Generator().manual_seed(0)
    n, t = 200_000, 50
    x = torch.full((n,), 0.7, dtype=torch.float64)
    for s in range(t + 1):
        z = torch.randn(n, generator=g, dtype=torch.float64)
        x = (1 - PAPER.betas[s]).sqrt() * x + PAPER.betas[s].sqrt() * z
    x0, times = torch.full((n, 1, 1, 1), 0.7), torch.full((n,), t)
    y = PAPER.q_sample(x0, times, torch.randn(n, 1, 1, 1, generator=g)).flatten()
    for moment in (torch.mean, torch.std):
        assert abs(moment(x) - moment(y)) < 5 * y.std() / math.sqrt(n)


def test_predict_x0_undoes_q_sample():
    t = torch.tensor([0, 10, 500, 999])
    x0, noise = randn(4, 3, 4, 4).clamp(-1, 1), randn(4, 3, 4, 4, seed=1)
    x_t = PAPER.q_sample(x0, t, noise)
    torch.testing.assert_close(PAPER.predict_x0(x_t, t, noise), x0, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------ the posterior


def test_posterior_is_bayes_rule():
    """q(x_{t-1} | x_t, x_0) ~ q(x_t | x_{t-1}) q(x_{t-1} | x_0): two Gaussians in x_{t-1}."""
    t = torch.tensor([1, 2, 400, 999])
    x0, x_t = randn(4, 1, 2, 2), randn(4, 1, 2, 2, seed=1)
    mean, variance = PAPER.q_posterior(x0, x_t, t)
    for b, s in enumerate(t.tolist()):
        alpha, beta = PAPER.alphas[s], PAPER.betas[s]
        abar_prev = PAPER.alphas[:s].prod()
        likelihood, prior = alpha / beta, 1 / (1 - abar_prev)  # precisions
        assert variance[b].item() == pytest.approx(1 / (likelihood + prior).item(), rel=1e-6)
        weighted = likelihood * x_t[b] / alpha.sqrt() + prior * abar_prev.sqrt() * x0[b]
        close(mean[b], weighted / (likelihood + prior), 1e-5)


def test_algorithm_2_is_the_posterior_mean_of_the_unclipped_x0():
    t = torch.tensor([0, 1, 10, 500, 999])
    x_t, eps = randn(5, 3, 4, 4), randn(5, 3, 4, 4, seed=1)
    ours, _ = PAPER.q_posterior(PAPER.predict_x0(x_t, t, eps), x_t, t)
    beta, alpha, abar = (
        table[t].view(-1, 1, 1, 1) for table in (PAPER.betas, PAPER.alphas, PAPER.alphas_bar)
    )
    theirs = (x_t - beta / (1 - abar).sqrt() * eps) / alpha.sqrt()
    close(ours, theirs, 2e-5)


# ----------------------------------------------------------------------------------------- the loss


def test_loss_is_the_mean_squared_error_of_the_noise():
    x0, noise, t = randn(4, 3, 8, 8), randn(4, 3, 8, 8, seed=1), torch.tensor([0, 5, 500, 999])
    seen = []

    def model(x_t, t):
        seen.append((x_t, t))
        return 0.5 * x_t

    loss = PAPER.loss(model, x0, t, noise)
    x_t = PAPER.q_sample(x0, t, noise)
    assert torch.equal(seen[0][0], x_t) and torch.equal(seen[0][1], t)
    close(loss, ((noise - 0.5 * x_t) ** 2).mean())


def test_loss_draws_every_t_and_unit_noise():
    seen = []
    torch.manual_seed(0)
    d = Diffusion(linear_betas(4))
    x0 = torch.zeros(4000, 1, 2, 2)
    loss = d.loss(lambda x_t, t: seen.append((x_t, t)) or torch.zeros_like(x_t), x0)
    x_t, t = seen[0]
    assert set(t.tolist()) == {0, 1, 2, 3}  # the last one too
    assert loss.item() == pytest.approx(1, abs=0.05)  # E|eps|^2 per pixel
    assert x_t[t == 3].var() == pytest.approx(1 - d.alphas_bar[3].item(), rel=0.1)


def test_vlb_weights_have_the_papers_numbers():
    for t, weight in ((0, 0.50005), (1, 0.27269), (999, 0.010204)):
        x0, noise = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
        loss = PAPER.loss(lambda x, t: 0 * x, x0, torch.tensor([t]), noise, weighting="vlb")
        if t == 0:  # the first with sigma^2 = beta_1, where sigma2[0] is the decoder's
            loss = loss * PAPER.sigma2[0] / PAPER.betas[0]
        assert loss.item() == pytest.approx(weight, rel=1e-4)


def test_forward_process_stays_float32_under_autocast():
    """In bfloat16 1 - abar_t is 0 for t < 10: the network would be asked for noise not there."""
    x0, noise, t = torch.zeros(10, 1, 2, 2), torch.ones(10, 1, 2, 2), torch.arange(10)
    seen = []
    with torch.autocast("cpu", torch.bfloat16):
        loss = PAPER.loss(lambda x, t: seen.append(x) or x.bfloat16(), x0, t, noise)
    assert loss.dtype == seen[0].dtype == torch.float32
    close(seen[0][:, 0, 0, 0] ** 2, 1 - PAPER.alphas_bar[:10])


# ---------------------------------------------------------------------------------------- the bound


def eight_bits(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, generator=g).float() / 127.5 - 1


@pytest.mark.parametrize("variance", VARIANCES)
def test_bound_of_an_oracle_is_a_matter_of_the_schedule(variance):
    """If eps is the noise itself, the means agree, and each KL is that of two variances."""
    d, x0 = Diffusion(linear_betas(), variance), eight_bits(4, 3, 8, 8)
    bound = d.vlb(oracle(x0), x0)
    ratio = d.posterior_variance[1:] / d.sigma2[1:]
    terms = (ratio - 1 - ratio.log()) / 2 / math.log(2)
    torch.testing.assert_close(bound.L_t[:, 1:], terms.expand(4, -1), rtol=1e-3, atol=1e-6)
    assert (variance == "small") == (terms.sum() < 1e-9)
    inside = math.erf(1 / 255 / math.sqrt(2 * d.sigma2[0].item()))
    share = torch.where(x0.abs() < 0.999, inside, 0.5 + inside / 2)  # open at both ends
    torch.testing.assert_close(bound.L_t[:, 0], -share.double().log2().mean((1, 2, 3)),
                               rtol=1e-3, atol=0)  # fmt: skip
    assert (bound.mse < 1e-6).all()
    close(bound.total, bound.L_T + bound.L_t.sum(1))


def test_L_T_has_the_papers_numbers():
    for square, bits in ((0.25, 7.28e-6), (0.5, 1.456e-5), (1.0, 2.91e-5)):
        x0 = torch.full((1, 1, 2, 2), math.sqrt(square))
        bound = PAPER.vlb(lambda x, t: x, x0)
        assert bound.L_T.item() == pytest.approx(bits, rel=1e-3)


@pytest.mark.parametrize("variance", VARIANCES)
def test_bound_of_gaussian_data_is_the_closed_form(variance):
    """x_0 ~ N(0, s^2): the best eps is linear in x_t, and leaves the variance of x_0 given x_t."""
    d, s2 = Diffusion(linear_betas(), variance), 0.15**2
    abar = d.alphas_bar
    x0 = 0.15 * randn(64, 1, 16, 16)
    best = lambda x, t: ((1 - abar).sqrt() / (abar * s2 + 1 - abar))[t].view(-1, 1, 1, 1) * x  # noqa: E731
    bound = d.vlb(best, x0, torch.Generator().manual_seed(1))
    left = s2 * (1 - abar) / (abar * s2 + 1 - abar)
    ratio = d.posterior_variance / d.sigma2
    of_x0 = abar.div(d.alphas).sqrt() * d.betas / (1 - abar)  # in the posterior mean (7)
    terms = ((ratio - 1 - ratio.log() + of_x0**2 * left / d.sigma2) / 2 / math.log(2))[1:]
    n = x0.numel()
    torch.testing.assert_close(bound.mse.mean(0), left, rtol=6 * math.sqrt(2 / n), atol=0)
    torch.testing.assert_close(
        bound.L_t[:, 1:].mean(0), terms, rtol=6 * math.sqrt(2 / n), atol=1e-7
    )
    assert bound.L_t[:, 1:].sum(1).mean().item() == pytest.approx(terms.sum().item(), rel=0.01)
    # L_0: the error of x0_hat is N(0, left), the decoder's bin that of x_0: by quadrature
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    error, sigma = nodes * math.sqrt(left[0]), math.sqrt(d.sigma2[0])
    cdf = np.vectorize(lambda x: (1 + math.erf(x / math.sqrt(2))) / 2)
    share = cdf((1 / 255 - error) / sigma) - cdf((-1 / 255 - error) / sigma)
    L_0 = -(weights * np.log2(share.clip(1e-12))).sum() / weights.sum()
    assert bound.L_t[:, 0].mean().item() == pytest.approx(L_0, rel=0.02)
    # L_T: (abar s^2 - abar - log(1 - abar)) / 2
    abar_T = abar[-1].item()
    L_T = (abar_T * x0.square().mean().item() - abar_T - math.log1p(-abar_T)) / 2 / math.log(2)
    assert bound.L_T.mean().item() == pytest.approx(L_T, rel=1e-3)


def test_simple_loss_is_least_at_the_closed_form():
    """For Gaussian data, any other slope than the best one gives a larger L_simple, at each t."""
    s2, x0, noise = 0.25, 0.5 * randn(2000, 1, 4, 4), randn(2000, 1, 4, 4, seed=1)
    for t in (50, 300, 999):
        abar = PAPER.alphas_bar[t].item()
        slope, times = math.sqrt(1 - abar) / (abar * s2 + 1 - abar), torch.full((2000,), t)
        slopes = [0.9 * slope, slope, 1.1 * slope]
        losses = [PAPER.loss(lambda x, t, k=k: k * x, x0, times, noise) for k in slopes]
        assert losses[1] < losses[0] and losses[1] < losses[2]
        assert losses[1].item() == pytest.approx(
            abar * s2 / (abar * s2 + 1 - abar), rel=0.05, abs=1e-3
        )


def test_decoder_shares_out_all_the_mass():
    values = (torch.arange(256).double() / 127.5 - 1).view(-1, 1)
    mean, sigma = torch.tensor([[-1.2, -0.5, 0.001, 0.99]]), torch.tensor(0.01)
    mass = discretized_log_likelihood(values, mean, sigma).exp()
    close(mass.sum(0), torch.ones(4), 1e-9)
    assert mass.argmax(0).tolist() == [0, 64, 128, 254]


# ------------------------------------------------------------------------------------- the samplers


def oracle(x0, diffusion=PAPER):
    """The network that knows x_0: eps = (x_t - sqrt(abar_t) x_0) / sqrt(1 - abar_t)."""

    def model(x_t, t):
        abar = diffusion.alphas_bar[t].view(-1, 1, 1, 1)
        return ((x_t - abar.sqrt() * x0) / (1 - abar).sqrt()).float()

    return model


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("steps, eta", [(None, None), (7, None), (1, None), (20, 0.0), (20, 1.0)])
def test_sampling_with_an_oracle_returns_its_picture(variance, steps, eta):
    x0 = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(3)) * 2 - 1
    out = Diffusion(linear_betas(), variance).sample(oracle(x0), x0.shape, steps, eta)
    torch.testing.assert_close(out, x0, rtol=0, atol=1e-4)


def wobbly(x_t, t):
    """A stand-in for a network, in torch and numpy: nonlinear in x_t, different for each t."""
    return x_t / (0.5 + abs(x_t)) + float(t[0]) / 1000


def noises(n, shape):
    return iter(randn(n, *shape))


CHAINS = [(None, None), (1000, None), (50, None), (1, None), (50, 0.0), (50, 0.7), (20, 1.0)]


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("steps, eta", CHAINS)
def test_numpy_sampler_is_the_torch_sampler(variance, steps, eta):
    shape, betas = (2, 3, 4, 4), linear_betas()
    ours, theirs = noises(1000, shape), noises(1000, shape)
    torch_chain = Diffusion(betas, variance).sample_progressive(
        wobbly, shape, steps, eta, noise=lambda: next(ours)
    )
    numpy_chain = sample.sample_progressive(
        wobbly, lambda: next(theirs).numpy(), betas.numpy(), variance, steps, eta
    )
    n = 0
    for (t, x, x0), (t_, x_, x0_) in zip(torch_chain, numpy_chain, strict=True):
        assert t == t_ and x_.dtype == x0_.dtype == np.float32
        np.testing.assert_allclose(x_, x, rtol=0, atol=1e-5)
        np.testing.assert_allclose(x0_, x0, rtol=0, atol=1e-5)
        n += 1
    assert t == (999 if steps == 1 else 0)
    assert n == (steps or 1000)


@pytest.mark.parametrize("variance", VARIANCES)
def test_strided_chain_of_all_steps_is_the_plain_chain(variance):
    d = Diffusion(linear_betas(), variance)
    chain, tau = d.respaced(1000)
    assert tau == list(range(1000))
    for name in ("betas", "alphas_bar", "posterior_variance", "sigma2"):
        torch.testing.assert_close(getattr(chain, name), getattr(d, name), rtol=1e-9, atol=1e-15)


def test_strided_chain_passes_the_same_noise_levels():
    chain, tau = PAPER.respaced(10)
    assert tau == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    close(chain.alphas_bar, PAPER.alphas_bar[tau], 1e-14)
    for steps in range(1, 1001):
        tau = PAPER.respaced(steps)[1]
        assert tau[-1] == 999 and len(set(tau)) == steps and (steps == 1 or tau[0] == 0)
        assert tau == sample.respaced(linear_betas().numpy(), steps)[1].tolist()


def test_ddim_with_eta_1_is_the_small_ancestral_step():
    d, shape = Diffusion(linear_betas(), "small"), (2, 1, 4, 4)
    ours, theirs = noises(100, shape), noises(100, shape)
    a = d.sample(wobbly, shape, 100, noise=lambda: next(ours))
    b = d.sample(wobbly, shape, 100, eta=1.0, noise=lambda: next(theirs))
    torch.testing.assert_close(a, b, rtol=0, atol=2e-4)


# For x_0 ~ N(m, s^2) the best eps is known, and linear in x_t. Each step is then x <- a x + b +
# sigma z, so that mean and variance of the samples follow from a recursion over t: a proof of the
# sampler that needs no training, and no trust in any of its code.

S, M = 0.15, 0.3


def best_eps(x_t, t):
    abar = PAPER.alphas_bar[t].view(-1, 1, 1, 1)
    eps = (1 - abar).sqrt() / (abar * S**2 + 1 - abar) * (x_t.double() - abar.sqrt() * M)
    return eps.float()


def mean_and_deviation(variance, steps=1000, eta=None):
    """Of the samples at the end, by the printed Algorithm 2, or by (12) of the DDIM paper."""
    tau = [999 - i * 999 // max(1, steps - 1) for i in range(steps)]
    abars = [PAPER.alphas_bar[t].item() for t in tau] + [1.0]
    mean, var = 0.0, 1.0
    for abar, abar_prev in pairwise(abars):
        alpha = abar / abar_prev
        beta, slope = 1 - alpha, math.sqrt(1 - abar) / (abar * S**2 + 1 - abar)
        posterior = (1 - abar_prev) / (1 - abar) * beta
        if eta is None:
            sigma2 = beta if variance == "large" else posterior
            a = (1 - beta / math.sqrt(1 - abar) * slope) / math.sqrt(alpha)
            b = beta / math.sqrt(1 - abar) * slope * math.sqrt(abar) * M / math.sqrt(alpha)
        else:
            sigma2 = eta**2 * posterior
            of_x0, of_eps = math.sqrt(abar_prev / abar), math.sqrt(1 - abar_prev - sigma2)
            k = of_eps - of_x0 * math.sqrt(1 - abar)
            a, b = of_x0 + k * slope, -k * slope * math.sqrt(abar) * M
        mean, var = a * mean + b, a**2 * var + (sigma2 if abar_prev < 1 else 0)
    return mean, math.sqrt(var)


@pytest.mark.parametrize(
    "variance, eta, width", [("large", None, 1.006), ("small", None, 0.975), ("small", 0.0, 0.990)]
)
def test_price_of_discrete_steps(variance, eta, width):
    """Even the best network draws N(m, s^2) a little too wide or too narrow with T = 1000."""
    mean, deviation = mean_and_deviation(variance, eta=eta)
    assert deviation / S == pytest.approx(width, abs=5e-4)
    assert mean == pytest.approx(M, abs=1e-3)


RUNS = [(None, None), (100, None), (10, None), (1000, 0.0), (50, 0.0), (50, 0.5), (50, 1.0)]


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("steps, eta", RUNS)
def test_sampler_meets_the_recursion(variance, steps, eta):
    """Exactly: picture k is given a unit of noise at draw k alone, and the last picture none."""
    draws = iter(torch.eye((steps or 1000) + 1).view(-1, (steps or 1000) + 1, 1, 1, 1))
    x0 = Diffusion(linear_betas(), variance).sample(
        best_eps, ((steps or 1000) + 1, 1, 1, 1), steps, eta, noise=lambda: next(draws), clip=False
    )
    x0 = x0.double().flatten()
    mean, deviation = mean_and_deviation(variance, steps or 1000, eta)
    assert x0[-1].item() == pytest.approx(mean, rel=1e-4)
    assert (x0[:-1] - x0[-1]).norm().item() == pytest.approx(deviation, rel=1e-4)


@pytest.mark.parametrize(
    "variance, steps, eta",
    [("large", None, None), ("small", None, None), ("large", 50, None), ("small", 50, 0.0)],
)
def test_samples_meet_the_recursion(variance, steps, eta):
    """The same of drawn pictures, to the Monte-Carlo error."""
    x0 = Diffusion(linear_betas(), variance).sample(
        best_eps, (64, 1, 32, 32), steps, eta, torch.Generator().manual_seed(0)
    )
    mean, deviation = mean_and_deviation(variance, steps or 1000, eta)
    n = x0.numel()
    assert x0.mean().item() == pytest.approx(mean, abs=5 * deviation / math.sqrt(n))
    assert x0.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * n))


def test_chain_cut_at_t_is_the_beginning_of_the_chain():
    """So Diffusion(betas[: t + 1]) goes on from an x_t."""
    for variance in VARIANCES:
        whole, cut = (Diffusion(linear_betas()[:n], variance) for n in (1000, 301))
        for name in ("alphas_bar", "posterior_variance", "sigma2"):
            torch.testing.assert_close(
                getattr(cut, name), getattr(whole, name)[:301], rtol=0, atol=0
            )
    x_t = randn(2, 1, 4, 4)
    steps = list(cut.sample_progressive(wobbly, x_t.shape, x_T=x_t))
    assert [t for t, _, _ in steps] == list(range(300, -1, -1)) and torch.equal(steps[0][1], x_t)


@pytest.mark.parametrize(
    "t, steps, eta", [(300, None, None), (300, 20, None), (299, 20, 0.0), (0, 9, None)]
)
def test_interpolation_starts_at_the_t_of_its_noise(t, steps, eta):
    """q_sample to t, then the network at that t: two peers' networks see t - 1 first."""
    a, b = (torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(k)) * 2 - 1 for k in (0, 1))
    drawn = randn(400, 1, 3, 4, 4)
    z = iter(drawn.numpy())
    chain = list(sample.interpolate(wobbly, lambda: next(z), a.numpy(), b.numpy(), t,
                                    linear_betas().numpy(), "large", steps, eta))  # fmt: skip
    assert chain[0][0] == t and chain[-1][0] == 0
    assert len(chain) == (t + 1 if steps is None else min(steps, t + 1))
    at_t = torch.tensor([t])
    x_t = [PAPER.q_sample(x0[None], at_t, drawn[k]) for k, x0 in enumerate((a, b))]
    mixed = torch.cat([(1 - k / 10) * x_t[0] + k / 10 * x_t[1] for k in range(11)])
    np.testing.assert_allclose(chain[0][1], mixed, rtol=0, atol=1e-5)
    # and then it is the torch sampler's way back, with the same noise for every lambda
    rest = iter(drawn[2:])
    expected = Diffusion(linear_betas()[: t + 1]).sample(
        wobbly, mixed.shape, steps and min(steps, t + 1), eta, noise=lambda: next(rest), x_T=mixed
    )
    np.testing.assert_allclose(chain[-1][2], expected, rtol=0, atol=1e-4)


def test_sampler_clips_x0_and_adds_no_noise_at_the_end():
    steps = list(PAPER.sample_progressive(lambda x, t: -x, (1, 1, 2, 2), 10))
    assert all(x0.abs().max() <= 1 for _, _, x0 in steps)
    unclipped = list(PAPER.sample_progressive(lambda x, t: -x, (1, 1, 2, 2), 10, clip=False))
    assert unclipped[0][2].abs().max() > 1
    drawn = []
    PAPER.sample(wobbly, (1, 1, 2, 2), 10, noise=lambda: drawn.append(0) or randn(1, 1, 2, 2))
    assert len(drawn) == 10  # x_T and one for each step but the last


def test_generator_fixes_the_samples():
    g = lambda: torch.Generator().manual_seed(5)  # noqa: E731
    a, b = (PAPER.sample(wobbly, (1, 1, 4, 4), 5, generator=g()) for _ in range(2))
    assert torch.equal(a, b)


# -------------------------------------------------------------------------------------- the network


def parameters(**kwargs):
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(**kwargs).parameters())


def test_parameter_counts_of_the_paper():
    assert parameters() == 35_746_307
    assert parameters(image_size=256, channel_mults=(1, 1, 2, 2, 4, 4)) == 113_673_219


def small_unet(jitter=0.1, **kwargs):
    torch.manual_seed(0)
    settings = dict(image_size=8, base_channels=8, channel_mults=(1, 2), num_res_blocks=1,
                    attention_resolutions=(4,), dropout=0.5)  # fmt: skip
    model = UNet(**(settings | kwargs)).eval()
    with torch.no_grad():  # the near-zero layers would hide what the others do
        for p in model.parameters():
            p.add_(jitter * torch.randn_like(p))
    return model


SHAPES = {  # size, base, mults, attention, groups
    "CIFAR-10": (32, 128, (1, 2, 2, 2), 16, 32),
    "256x256, shrunken": (64, 32, (1, 1, 2, 2, 4, 4), 4, 8),
}


def diffusers_unet(size, base, mults, attention, groups, **kwargs):
    """Another implementation of the network, with weights of its own."""
    from diffusers import UNet2DModel

    here = [size >> level == attention for level in range(len(mults))]
    torch.manual_seed(1)
    return UNet2DModel(
        **dict(
            sample_size=size,
            down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in here],
            up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(here)],
            block_out_channels=[base * m for m in mults],
            layers_per_block=2,
            norm_num_groups=groups,
            norm_eps=1e-6,
            downsample_padding=0,
            freq_shift=1,
            flip_sin_to_cos=False,
            attention_head_dim=None,
        )
        | kwargs
    ).eval()


def assert_same_network(ours, theirs):
    size, channels = ours.image_size, ours.conv_in.in_channels
    x, t = randn(2, channels, size, size), torch.tensor([3, 900])
    with torch.no_grad():
        eps = ours(x, t)
        assert eps.std() > 0.1
        torch.testing.assert_close(eps, theirs(x, t).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_network_is_diffusers_network(shape):
    """An independent implementation, with our weights in it, loaded by name, computes the same."""
    size, base, mults, attention, _ = SHAPES[shape]
    ours = small_unet(image_size=size, base_channels=base, channel_mults=mults, num_res_blocks=2,
                      attention_resolutions=(attention,), jitter=0.02)  # fmt: skip
    theirs = diffusers_unet(*SHAPES[shape])
    names, state = export.diffusers_names(ours), ours.state_dict()
    theirs.load_state_dict({names[k]: v for k, v in state.items()})  # none missing, none left over
    assert_same_network(ours, theirs)


def test_timestep_embedding_is_sines_then_cosines():
    ours = timestep_embedding(torch.tensor([0, 7, 999]), 8)
    for row, t in zip(ours, (0, 7, 999), strict=True):
        angles = [t * 10000 ** (-i / 3) for i in range(4)]
        close(row, [math.sin(a) for a in angles] + [math.cos(a) for a in angles], 2e-5)


def test_attention_stands_where_the_paper_has_it():
    model = UNet(base_channels=4)
    down, middle, up = (
        ["a" if isinstance(m.attention, torch.nn.Module) and hasattr(m.attention, "q") else "-"
         for m in part if hasattr(m, "attention")]
        for part in (model.down, model.middle, model.up)
    )  # fmt: skip
    assert "".join(down) == "--aa----" and "".join(middle) == "a-"
    assert "".join(up) == "------aaa---"


def test_group_norms_are_the_papers():
    for base, groups in ((128, 32), (256, 32), (64, 16), (32, 8), (16, 4), (12, 1), (4, 1)):
        norms = [m for m in UNet(base_channels=base).modules() if isinstance(m, torch.nn.GroupNorm)]
        assert {m.num_groups for m in norms} == {groups} and {m.eps for m in norms} == {1e-6}
    norms = [m for m in UNet(norm_groups=2).modules() if isinstance(m, torch.nn.GroupNorm)]
    assert {m.num_groups for m in norms} == {2}


def test_stride_2_is_padded_right_and_below():
    model = small_unet()
    down = next(m for m in model.down if type(m).__name__ == "Downsample")
    x = randn(1, 8, 8, 8)
    y = down(x)
    assert y.shape == (1, 8, 4, 4)
    w, b = down.conv.weight, down.conv.bias
    close(y[0, :, 1, 2], (w * x[0, :, 2:5, 4:7]).sum((1, 2, 3)) + b, 1e-5)  # starts at 2 i, 2 j
    close(y[0, :, 3, 3], (w[:, :, :2, :2] * x[0, :, 6:, 6:]).sum((1, 2, 3)) + b, 1e-5)


def test_attention_is_softmax_of_scaled_products():
    attention = small_unet().middle[0].attention
    x = randn(1, 16, 2, 3)
    h = attention.norm(x)[0].reshape(16, 6).T
    q, k, v = attention.q(h), attention.k(h), attention.v(h)
    weights = torch.softmax(q @ k.T / math.sqrt(16), dim=1)
    close(attention(x), x + attention.out(weights @ v).T.reshape(1, 16, 2, 3), 1e-5)


def test_new_network_predicts_almost_nothing_and_glorot_elsewhere():
    torch.manual_seed(0)
    model = UNet(base_channels=32)
    assert model(randn(2, 3, 32, 32), torch.tensor([0, 999])).abs().max() < 1e-3
    w = model.down[0].conv1.weight  # uniform in +- sqrt(6 / (fan_in + fan_out))
    assert w.abs().max().item() == pytest.approx(math.sqrt(6 / (2 * 32 * 9)), rel=0.01)
    near_zero = [m for m in model.modules() if hasattr(m, "weight") and m.weight.abs().max() < 1e-4]
    blocks = sum(type(m).__name__ == "ResBlock" for m in model.modules())
    attentions = sum(type(m).__name__ == "Attention" for m in model.modules())
    assert len(near_zero) == blocks + attentions + 1
    assert all(not m.bias.any() for m in near_zero)


def test_dropout_is_off_in_eval_and_on_in_training():
    model, x, t = small_unet(), randn(2, 3, 8, 8), torch.tensor([3, 900])
    assert torch.equal(model(x, t), model(x, t))
    model.train()
    assert not torch.equal(model(x, t), model(x, t))


def test_time_and_every_parameter_matter():
    model, x = small_unet(), randn(2, 3, 8, 8)
    a, b = (model(x, torch.tensor([t, t])) for t in (10, 500))
    assert (a - b).abs().max() > 1e-3
    a.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("channels, base", [(1, 4), (1, 24), (3, 12), (3, 36)])
def test_grey_and_narrow_networks(channels, base):
    model = small_unet(in_channels=channels, base_channels=base)
    x = randn(3, channels, 8, 8)
    assert model(x, torch.zeros(3, dtype=torch.int64)).shape == x.shape


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="image_size must be a multiple of 8"):
        UNet(image_size=28)
    with pytest.raises(ValueError, match="base_channels must be a multiple of 4"):
        UNet(base_channels=30)
    with pytest.raises(ValueError, match="multiples of 2"):
        small_unet()(torch.zeros(1, 3, 8, 7), torch.tensor([0]))


# ----------------------------------------------------------------------------------------- training


def run_program(argv, cwd, output):
    """In a process forked from one that has torch already: what takes two seconds a program."""
    os.chdir(cwd)
    file = os.open(output, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


FORK = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
FORK.set_forkserver_preload(["torch._dynamo", "diffusers", "test_ddpm"])


def python(*args, cwd, code=0, timeout=170):
    """Run a program of the project as a user would; returns what it printed."""
    args = [str(a) for a in args]
    if args[0].endswith(".py") and FORK.get_start_method() == "forkserver":
        with tempfile.NamedTemporaryFile() as output:
            argv = [str(HERE / args[0]), *args[1:]]
            process = FORK.Process(target=run_program, args=(argv, cwd, output.name))
            process.start()
            process.join(timeout)
            if process.exitcode is None:
                process.kill()
            said, status = output.read().decode(), process.exitcode
    else:
        args[0] = str(HERE / args[0]) if args[0].endswith(".py") else args[0]
        done = subprocess.run(
            [sys.executable, *args], cwd=cwd, capture_output=True, text=True, timeout=timeout
        )
        said, status = done.stderr + done.stdout, done.returncode
    assert status == code, said
    assert "Traceback" not in said, said
    return said


def checkpoint(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def test_learning_rate_and_ema_ramp():
    assert [train.learning_rate(s, 2e-4, 4) for s in (0, 1, 3, 9)] == [5e-5, 1e-4, 2e-4, 2e-4]
    assert train.learning_rate(0, 1.0, 0) == 1.0
    falling = [train.learning_rate(s, 1.0, 2, 10) for s in (0, 1, 5, 9)]
    assert falling == pytest.approx([0.5, 0.9, 0.5, 0.1])
    assert train.ema_decay(0, 0.9999) == 0.1 and train.ema_decay(90, 0.9999) == 0.91
    assert train.ema_decay(10**6, 0.9999) == 0.9999


def test_ema_update_is_an_average_that_remembers_no_graph():
    averages, parameters = [torch.zeros(3)], [torch.nn.Parameter(torch.ones(3))]
    for step in range(2):
        train.update_ema(averages, parameters, step, 0.15)
    close(averages[0], torch.full((3,), 0.15 * 0.9 + 0.85))  # decays 0.1, then 0.15 (not 2 / 11)
    assert not averages[0].requires_grad


def test_randomness_is_of_seed_and_step():
    places = [
        (seed, step, *k) for seed in range(3) for step in range(1000) for k in ((), (1,), (2,))
    ]
    assert len({train.seed_of(*place) for place in places}) == 9000 and train.seed_of(
        0, 5
    ) == train.seed_of(0, 5)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder as people have them: twelve pictures, nested, of many modes, and some others."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "deep" / "er").mkdir(parents=True)
    random = np.random.default_rng(0)
    for k in range(8):
        pixels = random.integers(0, 256, (12, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    image = Image.new("RGB", (20, 10), "red")
    image.save(folder / "deep" / "LOUD.JPG")
    image.convert("CMYK").save(folder / "deep" / "er" / "print.jpeg")
    image.convert("P").save(folder / "deep" / "palette.gif")
    image.convert("L").save(folder / "deep" / "grey.webp")
    (folder / "deep" / "note.txt").write_text("not a picture")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:60])
    (folder / ".hidden.png").write_bytes((folder / "0.png").read_bytes())
    return folder


def test_folder_is_read_as_found(pictures, capsys):
    images = train.read_folder(pictures, 8)
    assert images.shape == (12, 3, 8, 8) and images.dtype == torch.uint8
    said = capsys.readouterr().out
    assert "left out 1 of 13" in said and "broken.png" in said
    assert train.read_folder(pictures, 8, channels=1).shape == (12, 1, 8, 8)
    assert torch.equal(images, train.read_folder(pictures, 8))


def test_grey_folder_is_one_channel(tmp_path):
    Image.new("L", (28, 28), 7).save(tmp_path / "a.png")
    Image.new("1", (28, 28), 1).save(tmp_path / "b.png")
    Image.new("F", (28, 28)).save(tmp_path / "c.tif")  # left out, and grey
    images = train.read_folder(tmp_path, 8)
    assert images.shape == (2, 1, 8, 8) and (images[0] == 7).all() and (images[1] == 255).all()


def read_saved(tmp_path, image, name="x.png", size=4, **kwargs):
    image.save(tmp_path / name, **kwargs)
    return train.read_picture(tmp_path / name, size)


def test_transparency_is_white(tmp_path):
    clear_red = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (read_saved(tmp_path, clear_red) == 255).all()
    assert (read_saved(tmp_path, Image.new("LA", (4, 4), (0, 0))) == 255).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0])
    assert (read_saved(tmp_path, palette, transparency=0) == 255).all()


def test_sixteen_bits_are_scaled_and_not_cut(tmp_path):
    ramp = np.linspace(0, 65535, 16).reshape(4, 4).astype(np.uint16)
    ours = read_saved(tmp_path, Image.fromarray(ramp))
    assert ours.shape == (1, 4, 4)
    np.testing.assert_array_equal(ours[0], (ramp / 257).round().astype(np.uint8))


def test_floating_point_pictures_are_left_out(tmp_path):
    with pytest.raises(ValueError, match="range is not known"):
        read_saved(tmp_path, Image.new("F", (4, 4), 1.0), "x.tif")


def test_pictures_are_turned_and_cut_to_the_centre(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    half = Image.new("L", (4, 4), 0)
    half.paste(255, (0, 0, 4, 2))
    ours = read_saved(tmp_path, half, exif=exif)[0]
    assert (ours[:2] == 0).all() and (ours[2:] == 255).all()
    wide = Image.new("L", (12, 4), 0)
    wide.paste(255, (4, 0, 8, 4))
    assert (read_saved(tmp_path, wide) == 255).all()


def test_awkward_files_are_read_or_left_out(tmp_path, capsys):
    """What people's folders hold, beside the pictures of the fixture above."""
    grey = Image.new("L", (5, 9), 100)
    grey.save(tmp_path / "SMALLER.PNG")
    grey.save(tmp_path / "really-a.png", "JPEG")  # a suffix that lies
    Image.fromarray(np.full((4, 4), 25700, np.int32)).save(tmp_path / "i.tiff")
    first, second = Image.new("L", (8, 8), 100), Image.new("L", (8, 8), 200)
    first.save(tmp_path / "animated.gif", save_all=True, append_images=[second])
    Image.new("1", (8, 8), 1).save(tmp_path / "z-one-bit.bmp")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "text.jpg").write_text("not a picture")
    bomb = bytearray((tmp_path / "SMALLER.PNG").read_bytes())
    bomb[16:24] = (60000).to_bytes(4, "big") * 2  # width and height, in the header
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(bomb)
    Image.new("F", (4, 4)).save(tmp_path / "f.tif")
    images = train.read_folder(tmp_path, 8)
    assert images[:, 0].float().mean((1, 2)).tolist() == [100, 100, 100, 100, 255]
    said = capsys.readouterr().out
    assert "left out 4 of 9" in said and "exceeds limit" in said and "cannot identify" in said


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links and pipes need rights there")
def test_links_are_followed_once_and_pipes_not_opened(tmp_path):
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    Image.new("L", (4, 4), 1).save(tmp_path / "data" / "a" / "1.png")
    Image.new("L", (4, 4), 2).save(tmp_path / "elsewhere" / "2.png")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "a" / "loop").symlink_to("..")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "data" / "pipe.png")
    images = train.read_folder(tmp_path / "data", 4)
    assert images[:, 0, 0, 0].tolist() == [1, 2]


def test_order_is_that_of_the_names(tmp_path):
    names = ["b/1.png", "a.png", "B.png", "a/z.png", "a/10.png", "a/9.png", "a-.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / name)
    found = [p.relative_to(tmp_path).as_posix() for p in train.picture_files(tmp_path)]
    assert found == sorted(names)


@pytest.mark.skipif(sys.platform != "linux", reason="where names are bytes")
def test_names_that_are_no_text_and_the_folder_of_the_run(tmp_path, capsys):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
    (tmp_path / os.fsdecode(b"\xfe.png")).write_bytes(b"broken")
    (tmp_path / "run").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "run" / "preview-0000001.png")
    (tmp_path / "older").mkdir()
    for name in ("checkpoint.pt", "log.csv", "preview-0000002.png"):
        shutil.copy(tmp_path / "run" / "preview-0000001.png", tmp_path / "older" / name)
    train.cache_folder(tmp_path, 4, None, tmp_path / "run")
    (path,) = (tmp_path / "run").glob(train.CACHE)
    assert path.stat().st_size == 4 * 4 and "left out 1 of 2" in capsys.readouterr().out


def test_a_mixed_folder_is_in_colour_unless_asked_otherwise(tmp_path):
    Image.new("L", (4, 4), 9).save(tmp_path / "a.png")
    Image.new("RGB", (4, 4), (0, 255, 0)).save(tmp_path / "b.png")
    images = train.read_folder(tmp_path, 4)
    assert images[:, :, 0, 0].tolist() == [[9, 9, 9], [0, 255, 0]]
    images = train.read_folder(tmp_path, 4, channels=1)
    assert images[:, :, 0, 0].tolist() == [[9], [150]]


def test_pictures_are_decoded_once(tmp_path, monkeypatch):
    """One memory-mapped file, used again until the folder changes, and never for another folder."""
    folder, cache = tmp_path / "data", tmp_path / "run"
    folder.mkdir()
    cache.mkdir()
    for k in range(3):
        Image.new("L", (4, 4), k).save(folder / f"{k}.png")
    decoded, decode = [], train.decode
    monkeypatch.setattr(train, "decode", lambda *args: decoded.append(1) or decode(*args))

    def read(folder=folder, channels=None):
        path = train.cache_folder(folder, 4, channels, cache)
        images, digest = train.open_cache(path, 4)
        return images[:, 0, 0, 0].tolist(), digest

    before = read()
    assert before[0] == [0, 1, 2] and read() == before and len(decoded) == 1
    (file,) = cache.iterdir()
    assert file.stat().st_size == 3 * 4 * 4  # uint8, and nothing else
    assert read(channels=3)[0] == [0, 1, 2] and len(decoded) == 2
    assert read() == before and len(decoded) == 2  # both are there
    shutil.copytree(folder, tmp_path / "copy")  # same names, sizes and times
    assert read(tmp_path / "copy") == before and len(decoded) == 3
    Image.new("L", (4, 4), 7).save(folder / "1.png")
    os.utime(folder / "1.png", ns=(1, 1))
    values, digest = read()
    assert values == [0, 7, 2] and digest != before[1] and len(decoded) == 4
    (folder / "2.png").unlink()
    assert read()[0] == [0, 7] and len(decoded) == 5
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:-1])  # damaged
    assert read()[0] == [0, 7] and len(decoded) == 6
    for place in ("here", "there"):  # the same relative name, the same files
        shutil.copytree(folder, tmp_path / place / "data")
        monkeypatch.chdir(tmp_path / place)
        assert read("data")[0] == [0, 7]
    assert len(decoded) == 8


def test_files_of_the_user_in_the_folder_of_the_run_stay(pictures, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("pictures-of-my-cats.zip", "pictures.txt"):
        (tmp_path / "run" / name).write_text("mine")
    (tmp_path / "run" / "pictures-2024").mkdir()
    flags = ["--data", pictures, *TINY, "--steps", 1]
    said = python("train.py", *flags, "--restart", cwd=tmp_path)  # no run is there to be moved
    assert "is now in" not in said
    python("train.py", *flags, "--image-size", 16, "--restart", cwd=tmp_path)
    moved = {p.name for p in (tmp_path / "run-1").iterdir()}
    assert {"pictures-of-my-cats.zip", "pictures.txt", "pictures-2024"} <= moved
    said = python("train.py", *flags, "--out", pictures, cwd=tmp_path, code=2)
    assert "--out must be a folder of its own" in said
    said = python("train.py", *flags, "--out", pictures.parent, cwd=tmp_path, code=2)
    assert "--out must be a folder of its own" in said


@pytest.mark.skipif(sys.platform != "linux", reason="where processes are forked")
def test_workers_keep_the_order_and_end_with_their_parent(tmp_path):
    numbers = list(range(1000))
    assert list(train.on_all_cores(lambda k: k * k, numbers)) == [k * k for k in numbers]
    assert any(train.on_all_cores(lambda k: k == 5, numbers))
    with pytest.raises(SystemExit, match="was killed"):
        list(train.on_all_cores(lambda k: os._exit(1) if k == 500 else k, numbers))
    code = "import os, time, train\nfor pid in train.on_all_cores(lambda _: time.sleep(0.001) or "
    code += "os.getpid(), list(range(100_000))): print(pid, flush=True)"
    run = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    workers = {int(run.stdout.readline()) for _ in range(100)}
    assert len(workers) == len(os.sched_getaffinity(0)) or len(workers) > 6
    run.kill()
    run.wait()

    def running(pid):
        try:
            return b"python" in Path(f"/proc/{pid}/cmdline").read_bytes()
        except FileNotFoundError:
            return False

    deadline = time.time() + 20
    while any(running(pid) for pid in workers) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(running(pid) for pid in workers) and run.stderr.read() == ""


def test_other_pictures_of_the_same_names_are_another_run(pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "a" / "data")
    flags = [*TINY, "--steps", 2, "--out", tmp_path / "run"]
    python("train.py", "--data", "data", *flags, cwd=tmp_path / "a")
    (tmp_path / "a" / "data").rename(tmp_path / "moved")  # the same pictures, elsewhere
    python("train.py", "--data", "moved", *flags, cwd=tmp_path)
    Image.new("RGB", (12, 9)).save(tmp_path / "moved" / "3.png")
    said = python("train.py", "--data", "moved", *flags, cwd=tmp_path, code=1)
    assert "holds another run: other pictures" in said and "--restart" in said


@pytest.fixture(scope="session")
def trained(tmp_path_factory, pictures):
    """The three commands on a tiny setting, in a folder of their own."""
    folder = tmp_path_factory.mktemp("work")
    said = [python("train.py", "--data", pictures, *TINY, "--steps", 12, cwd=folder)]
    said.append(python("export.py", cwd=folder))
    said.append(python("sample.py", "--onnx", "model.onnx", "-n", 5, "--steps", 20, cwd=folder))
    return folder, said


def test_three_commands_from_folder_to_pictures(trained):
    folder, (train_said, export_said, sample_said) = trained
    assert "only 12 pictures: the network will learn them by heart" in train_said
    assert train_said.rstrip().endswith("python export.py --checkpoint run/checkpoint.pt")
    assert export_said.rstrip().endswith("python sample.py --onnx model.onnx")
    assert "on the CPU" in sample_said or "on CUDA" in sample_said
    assert {p.name for p in folder.iterdir()} == {"run", "model.onnx", "samples.png"}
    assert {p.name.split("-")[0] for p in (folder / "run").iterdir()} == {
        "checkpoint.pt", "log.csv", "loss.png", "pictures", "preview"}  # fmt: skip
    picture = np.asarray(Image.open(folder / "samples.png"))
    assert picture.ndim == 3 and picture.std() > 10
    log = (folder / "run" / "log.csv").read_text().splitlines()
    assert log[0] == "step,loss,grad_norm,lr" and len(log) == 13
    assert log[1].startswith("1,") and log[-1].startswith("12,")


def test_checkpoint_describes_itself(trained):
    state = checkpoint(trained[0] / "run")
    assert set(state) == {"config", "step", "model", "ema", "optimizer"} and state["step"] == 12
    model = UNet(**state["config"]["model"])
    model.load_state_dict(state["model"])
    model.load_state_dict(state["ema"])
    d = Diffusion(**state["config"]["diffusion"])
    assert torch.equal(d.betas, linear_betas()) and d.variance == "large"


def test_resumed_run_is_the_uninterrupted_run(trained, pictures, tmp_path):
    """To the bit, on a CPU: stopped after 5 steps by a signal-free shorter run, then continued."""
    common = ["train.py", "--data", pictures, *TINY, "--warmup", 0]
    python(*common, "--steps", 12, "--out", "whole", cwd=tmp_path)
    python(*common, "--steps", 5, "--out", "parts", cwd=tmp_path)
    with open(tmp_path / "parts" / "log.csv", "a") as log:
        log.write("6,0,0,0\n")  # what a killed run may have logged after its checkpoint
    python(*common, "--steps", 12, "--out", "parts", cwd=tmp_path)
    whole, parts = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    for part in ("model", "ema"):
        assert all(torch.equal(whole[part][k], parts[part][k]) for k in whole[part])
    logs = [(tmp_path / name / "log.csv").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    again = python(*common, "--steps", 12, "--out", "parts", cwd=tmp_path)
    assert "done" in again and checkpoint(tmp_path / "parts")["step"] == 12


def test_ema_is_the_hand_calculation(pictures, tmp_path):
    """One step from the seeded start: ema = 0.1 start + 0.9 after, by the ramp."""
    python("train.py", "--data", pictures, *TINY, "--steps", 1, cwd=tmp_path)
    state = checkpoint(tmp_path / "run")
    torch.manual_seed(0)
    start = UNet(**state["config"]["model"]).state_dict()
    for name, value in state["ema"].items():
        close(value, 0.1 * start[name] + 0.9 * state["model"][name], 1e-7)
    assert any(not torch.equal(start[k], state["model"][k]) for k in start)


def test_compiled_training_is_the_plain_training(pictures, tmp_path, monkeypatch):
    """What CUDA does by itself, here with a backend that leaves the arithmetic as it is."""
    calls, compile = [], torch.compile

    def spied(network):
        calls.append(network)
        return compile(network, backend="eager")

    monkeypatch.setattr(torch, "compile", spied)
    assert not train.is_worth_compiling(torch.device("cpu"), 10**6)
    monkeypatch.setattr(train, "find_spec", lambda name: name == "triton")
    assert not train.is_worth_compiling(torch.device("cuda"), 4999)
    assert train.is_worth_compiling(torch.device("cuda"), 5000)
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    assert not train.is_worth_compiling(torch.device("cuda"), 5000)
    monkeypatch.setattr(train, "is_worth_compiling", lambda *_: True)
    weights = []
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    for name, flags in (("plain", ["--no-compile"]), ("compiled", [])):
        out = str(tmp_path / name)
        argv = ["train.py", "--data", str(pictures), *TINY, "--steps", "3", "--out", out, *flags]
        monkeypatch.setattr(sys, "argv", argv)
        train.main()
        assert len(calls) == len(weights)
        weights.append(checkpoint(tmp_path / name)["model"])
    for name, handler in handlers.items():
        signal.signal(name, handler)
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name])


@pytest.mark.parametrize("weighting, flips", [("simple", True), ("simple", False), ("vlb", True)])
def test_first_step_is_made_of_its_seed(weighting, flips, pictures, tmp_path):
    """The first loss of a run, L_simple or (12), against one made by hand from (seed, step)."""
    flags = ["--weighting", weighting, *([] if flips else ["--no-flip"])]
    python("train.py", "--data", pictures, *TINY, "--steps", 1, *flags, "--dropout", 0, "--no-amp",
           cwd=tmp_path)  # fmt: skip
    config = checkpoint(tmp_path / "run")["config"]
    assert config["train"]["weighting"] == weighting and config["train"]["flip"] == flips
    logged = float((tmp_path / "run" / "log.csv").read_text().splitlines()[1].split(",")[1])
    torch.manual_seed(0)
    model = UNet(**config["model"])
    torch.manual_seed(train.seed_of(0, 0))
    images = train.read_folder(pictures, 8)
    x0 = images[torch.randint(len(images), (8,))].float() / 127.5 - 1
    mirrored = torch.rand(8, 1, 1, 1) < 0.5
    assert mirrored.any() and not mirrored.all()
    if flips:
        x0 = torch.where(mirrored, x0.flip(3), x0)
    assert PAPER.loss(model, x0, weighting=weighting).item() == pytest.approx(logged, rel=1e-5)


def test_training_starts_from_the_weights_of_a_checkpoint(trained, pictures, tmp_path):
    """--init: no flag repeats the network's shape; the averaged weights are where it starts."""
    source = trained[0] / "run" / "checkpoint.pt"
    flags = ["--data", pictures, "--init", source, "--batch", 4, "--lr", 1e-12]
    python("train.py", *flags, "--steps", 1, cwd=tmp_path)
    state, start = checkpoint(tmp_path / "run"), checkpoint(trained[0] / "run")
    assert state["step"] == 1 and state["config"]["train"]["init"] == "run/checkpoint.pt"
    model = {"dropout": 0.1, **start["config"]["model"]}
    assert state["config"]["model"] == model
    for part in ("model", "ema"):
        for name, value in state[part].items():
            close(value, start["ema"][name], 1e-7)
    python("train.py", *flags, "--steps", 2, cwd=tmp_path)  # goes on, and doesn't start again
    assert checkpoint(tmp_path / "run")["step"] == 2
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"broken")
    python("train.py", *flags, "--steps", 1, "--restart", cwd=tmp_path)  # from the source again
    assert checkpoint(tmp_path / "run")["step"] == 1
    said = python("train.py", "--data", pictures, "--init", source, "--base-channels", 16,
                  "--out", "other", cwd=tmp_path, code=1)  # fmt: skip
    assert "of another shape than the flags ask" in said
    said = python("train.py", "--data", pictures, "--init", "none.pt", "--out", "new",
                  cwd=tmp_path, code=1)  # fmt: skip
    assert "there is no none.pt" in said


def test_eval_prints_the_bound_and_leaves_the_curve(trained, pictures, tmp_path):
    """The program against Diffusion.vlb, and the curve against the sums that define it."""
    state = checkpoint(trained[0] / "run")
    d = Diffusion(linear_betas(100, 1e-4, 0.2), "small")
    state["config"]["diffusion"] = {"betas": d.betas.tolist(), "variance": "small"}
    torch.save(state, tmp_path / "checkpoint.pt")
    said = python("train.py", "--data", pictures, "--eval", "checkpoint.pt", "--eval-images", 5,
                  "--batch", 3, "--seed", 2, cwd=tmp_path)  # fmt: skip
    assert "on 5 pictures" in said and "500/500" in said  # passes of the network: 5 x T
    network = UNet(**state["config"]["model"]).eval()
    network.load_state_dict(state["ema"])
    images = train.read_folder(pictures, 8, most=5).float() / 127.5 - 1
    images = images[torch.randperm(5, generator=torch.Generator().manual_seed(2))]
    bounds = [
        d.vlb(network, x0, torch.Generator().manual_seed(train.seed_of(2, k)))
        for k, x0 in enumerate(images.split(3))
    ]
    L_T, L_t, total, mse = (torch.cat(part).mean(0) for part in zip(*bounds, strict=True))

    def printed(name):
        line = next(line for line in said.splitlines() if name in line)
        return float(line.split(name)[1].split()[0])

    assert printed("  L_T ") == pytest.approx(L_T.item(), abs=1e-6)
    assert printed("L_1 + .. + L_T-1") == pytest.approx(L_t[1:].sum().item(), abs=1e-3)
    assert printed("  L_0 ") == pytest.approx(L_t[0].item(), abs=1e-3)
    assert printed("  total ") == pytest.approx(total.item(), abs=1e-3)
    rmse = 127.5 * mse.sqrt()
    assert printed("  RMSE ") == pytest.approx(rmse[0].item(), abs=1e-2)
    rows = (tmp_path / "rate-distortion.csv").read_text().split()
    assert rows[0] == "t,L_t,rate,rmse" and len(rows) == 101
    table = np.array([row.split(",") for row in rows[1:]], float)
    assert table[:, 0].tolist() == list(range(100))
    np.testing.assert_allclose(table[:, 1], L_t, rtol=1e-3, atol=1e-6)
    for t in (0, 1, 50, 99):  # what is known before the step at t: L_T and the terms above t
        assert table[t, 2] == pytest.approx(L_T.item() + L_t[t + 1 :].sum().item(), rel=1e-3)
        assert table[t, 3] == pytest.approx(rmse[t].item(), rel=1e-3)
    assert Image.open(tmp_path / "rate-distortion.png").size == (640, 440)


def test_eval_takes_pictures_from_the_whole_folder(tmp_path):
    for k in range(10):
        Image.new("L", (4, 4), k).save(tmp_path / f"{k}.png")
    assert train.read_folder(tmp_path, 4, most=5)[:, 0, 0, 0].tolist() == [0, 2, 4, 6, 8]
    assert len(train.read_folder(tmp_path, 4, most=50)) == 10


def test_eval_without_data_is_of_the_demo(trained):
    """The tiny network happens to have the demo's shape. A folder of a run stands for its file."""
    said = python("train.py", "--eval", "run", "--eval-images", 1, "--out", "b", cwd=trained[0])
    assert "on 1 pictures of the demo" in said
    assert {p.suffix for p in (trained[0] / "b").iterdir()} == {".csv", ".png"}


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--eval run --init run", "must be without --init"),
        ("--eval run --schedule cosine", "must be without --init and --schedule"),
        ("--eval run --eval-images 0", "must be at least 1"),
        ("--image-size 16", "only the demo, of 8x8"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, said, trained):
    assert said in python("train.py", *flags.split(), cwd=trained[0], code=2)


def test_broken_weights_are_not_called_good(trained, tmp_path):
    """One NaN: neither the comparison with torch nor the bound may pass it by."""
    state = checkpoint(trained[0] / "run")
    state["ema"]["conv_out.bias"][0] = float("nan")
    torch.save(state, tmp_path / "checkpoint.pt")
    said = python("export.py", "--checkpoint", "checkpoint.pt", cwd=tmp_path, code=1)
    assert "differs from torch's by nan" in said
    said = python("train.py", "--eval", ".", "--eval-images", 1, cwd=tmp_path, code=1)
    assert "is broken" in said
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_interrupted_eval_tells_of_what_it_has(trained, pictures, tmp_path):
    args = ["--eval", trained[0] / "run", "--data", pictures, "--batch", "1", "--out", tmp_path]
    default = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # nohup ignores it
    run = subprocess.Popen(
        [sys.executable, HERE / "train.py", *args], text=True, preexec_fn=default,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    progress = ""
    while "in the last batch" not in progress and run.poll() is None:
        progress += run.stderr.read(1)
    run.send_signal(signal.SIGINT)
    said, rest = run.communicate(timeout=60)
    assert run.returncode == 1 and "rate" in said and "stopped after" in rest
    assert "Traceback" not in rest and not list(tmp_path.iterdir())


@pytest.mark.parametrize("log", ["", "x", "y", "xy"])
def test_plot_draws_its_curves(log, tmp_path):
    x = [1, 2, 4, 8]
    y = {"": x, "x": [0, 1, 2, 3], "y": [1, 2, 8, 128], "xy": [1, 8, 64, 512]}[log]  # a line in all
    flat = [y[2]] * 4
    train.save_plot(tmp_path / "p.png", {"rises": (x, y), "flat": (x, flat)}, "x", "y", log)
    pixels = np.asarray(Image.open(tmp_path / "p.png")).astype(int)
    assert pixels.shape == (440, 640, 3)
    blue = np.nonzero(pixels[..., 2] - pixels[..., 0] > 100)
    rows, columns = (part[blue[0] > 60] for part in blue)  # below the names
    assert np.corrcoef(rows, columns)[0, 1] < -0.99  # a line that rises
    assert columns.min() < (110 if "x" in log else 175) and rows.max() > 300
    red = np.nonzero(pixels[..., 0] - pixels[..., 2] > 100)[0]
    assert np.ptp(red[red > 90]) < 5


def test_ticks_are_round_and_few():
    assert train.ticks(0, 1000, False) == [0, 200, 400, 600, 800, 1000]
    assert train.ticks(0, 0.31, False) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert train.ticks(0, 1, False) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert train.ticks(0.03, 1.1, True) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1])
    assert train.ticks(3e-5, 2e3, True) == pytest.approx([10.0**k for k in range(-4, 4)])


def test_training_leaves_its_loss_as_a_curve(tmp_path):
    log = tmp_path / "log.csv"
    rows = [f"{k + 1},{2.0 if k < 500 else 0.5},1,1" for k in range(1000)]
    log.write_text("\n".join(["step,loss,grad_norm,lr", *rows]) + "\n")
    train.save_loss_plot(log, tmp_path / "loss.png")
    pixels = np.asarray(Image.open(tmp_path / "loss.png")).astype(int)
    rows, columns = np.nonzero(pixels[..., 2] - pixels[..., 0] > 100)
    middle = (columns.min() + columns.max()) / 2
    assert rows[columns < middle - 5].max() < rows[columns > middle + 5].min()  # 2, then 0.5
    log.write_text("step,loss,grad_norm,lr\n1,0.9,1,1\n")
    train.save_loss_plot(log, tmp_path / "one.png")
    assert not (tmp_path / "one.png").exists()  # of a single step there is no curve


def test_another_run_is_not_overwritten(trained, pictures):
    folder, _ = trained
    before = (folder / "run" / "checkpoint.pt").read_bytes()
    other = ["--data", pictures, *TINY, "--steps", 20, "--base-channels", 12, "--seed", 3]
    said = python("train.py", *other, cwd=folder, code=1)
    assert "base_channels was 8, now 12" in said and "seed was 0, now 3" in said
    assert (folder / "run" / "checkpoint.pt").read_bytes() == before


def test_the_demo_is_called_by_its_name_and_differences_are_few(pictures, tmp_path):
    python("train.py", "--steps", 1, cwd=tmp_path)
    said = python("train.py", "--data", pictures, cwd=tmp_path, code=1).splitlines()[-1]
    assert "holds the demo: image_size was 8, now 32; " in said and " more. Use another" in said
    assert said.count(" was ") <= 4


def test_adam_of_a_cuda_checkpoint_goes_on_on_a_cpu(pictures, tmp_path):
    """There the weights are channels_last, and Adam's moments are saved so: values must stay."""
    common = ["train.py", "--data", pictures, *TINY, "--warmup", 0]
    for name in ("plain", "cuda"):
        python(*common, "--steps", 2, "--out", name, cwd=tmp_path)
    state = checkpoint(tmp_path / "cuda")
    for moments in state["optimizer"]["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            if moments[name].ndim == 4:
                moments[name] = moments[name].to(memory_format=torch.channels_last)
    torch.save(state, tmp_path / "cuda" / "checkpoint.pt")
    for name in ("plain", "cuda"):
        python(*common, "--steps", 4, "--out", name, cwd=tmp_path)
    a, b = checkpoint(tmp_path / "plain")["model"], checkpoint(tmp_path / "cuda")["model"]
    assert all(torch.equal(a[k], b[k]) for k in a)


def weights_of(folder):
    state = checkpoint(folder)
    digest = hashlib.sha256()
    for part in ("model", "ema"):
        for name, value in state[part].items():
            digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest(), state["step"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs processes that fork")
def test_killed_twenty_times_it_ends_in_the_same_weights(pictures, tmp_path):
    """kill -9 at random moments, with a checkpoint at each step: mostly amid writing one."""
    argv = [HERE / "train.py", "--data", pictures, *TINY, "--steps", 300, "--preview-every", 50]
    argv = [str(word) for word in argv]
    python("train.py", *argv[1:], "--out", "whole", cwd=tmp_path)
    argv += ["--out", "killed", "--save-minutes", "0"]
    random, steps = np.random.default_rng(0), []
    (tmp_path / "output").touch()
    for _ in range(20):
        process = FORK.Process(target=run_program, args=(argv, tmp_path, str(tmp_path / "output")))
        process.start()
        path, began = tmp_path / "killed" / "checkpoint.pt", time.time()
        while process.is_alive() and time.time() - began < 30:  # until it has got on a little
            if path.exists() and path.stat().st_mtime > began:
                break
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))
        process.kill()
        process.join()
        steps.append(checkpoint(tmp_path / "killed")["step"])
    assert steps == sorted(steps) and len(set(steps)) > 10 and steps[-1] < 300
    said = python("train.py", *argv[1:], cwd=tmp_path)
    assert "done" in said and weights_of(tmp_path / "killed") == weights_of(tmp_path / "whole")
    logs = [(tmp_path / name / "log.csv").read_text() for name in ("whole", "killed")]
    assert logs[0] == logs[1]
    assert not list((tmp_path / "killed").glob("*.tmp"))


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("as torch.save says it")])
def test_what_cannot_be_written_is_said_and_leaves_nothing(error, tmp_path):
    (tmp_path / "file").write_text("of before")

    def write(path):
        path.write_text("half")
        raise error

    with pytest.raises(SystemExit, match=f"is as it was: {error}"):
        train.save_whole(tmp_path / "file", write)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["of before"]


FULL_DISK = """
import os, resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit there")
def test_full_disk_leaves_the_checkpoint_whole(pictures, tmp_path):
    flags = ["--data", pictures, *TINY, "--no-amp"]
    python("train.py", *flags, "--steps", 3, cwd=tmp_path)
    before = weights_of(tmp_path / "run")
    said = python(
        "-c", FULL_DISK, 100_000, HERE / "train.py", *flags, "--steps", 6, cwd=tmp_path, code=1
    )
    assert "checkpoint.pt can't be written, and is as it was" in said
    assert weights_of(tmp_path / "run") == before
    assert not list((tmp_path / "run").glob("*.tmp"))
    python("train.py", *flags, "--steps", 6, cwd=tmp_path)  # there is room again
    assert weights_of(tmp_path / "run")[1] == 6


def test_restart_moves_the_old_run_aside(pictures, tmp_path):
    flags = ["--data", pictures, *TINY, "--steps", 2]
    python("train.py", *flags, cwd=tmp_path)
    before = weights_of(tmp_path / "run")
    for k in (1, 2):
        said = python("train.py", *flags, "--seed", k, "--restart", cwd=tmp_path)
        assert f"is now in run-{k}" in said
        assert checkpoint(tmp_path / "run")["config"]["train"]["seed"] == k
    assert weights_of(tmp_path / "run-1") == before


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_second_training_in_a_folder_is_refused(pictures, tmp_path):
    lock = train.lock(tmp_path / "run")
    flags = ["--data", pictures, *TINY, "--steps", 1]
    for more in ([], ["--restart"]):
        said = python("train.py", *flags, *more, cwd=tmp_path, code=1)
        assert "a training is running in run" in said
    os.close(lock)
    python("train.py", *flags, cwd=tmp_path)


def test_broken_checkpoint_is_not_written_over(trained, pictures, tmp_path):
    (tmp_path / "run").mkdir()
    whole = (trained[0] / "run" / "checkpoint.pt").read_bytes()
    flags = ["--data", pictures, *TINY, "--steps", 20]
    others = []
    for step, optimizer in ((-2, None), ("3", None), (12, {"state": {}})):
        state = checkpoint(trained[0] / "run")
        state["step"] = step
        state["optimizer"] |= optimizer or {}
        torch.save(state, tmp_path / "other.pt")
        others.append((tmp_path / "other.pt").read_bytes())
    for content in (b"", whole[:5000], whole[:-1], b"not a checkpoint", *others):
        (tmp_path / "run" / "checkpoint.pt").write_bytes(content)
        said = python("train.py", *flags, cwd=tmp_path, code=1)
        assert "is no checkpoint of train.py" in said
        assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == content


TORCHRUN = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node=2".split()]


def torchrun(*args, cwd, code=0):
    """Two processes on the CPU, which speak over gloo."""
    command = [str(word) for word in (*TORCHRUN, HERE / "train.py", *args)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=170)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr + done.stdout  # of a failure torchrun itself tells at length


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun there lacks libuv")
def test_two_processes_and_accumulation_give_the_same_weights(pictures, tmp_path):
    flags = ["--data", pictures, *TINY, "--dropout", 0, "--no-amp", "--warmup", 0]
    python("train.py", *flags, "--steps", 20, "--out", "one", cwd=tmp_path)
    python("train.py", *flags, "--steps", 20, "--out", "parts", "--accumulate", 3, cwd=tmp_path)
    python("train.py", *flags, "--steps", 9, "--out", "two", cwd=tmp_path)  # and on with another N
    said = torchrun(*flags, "--steps", 20, "--out", "two", "--accumulate", 2, cwd=tmp_path)
    assert said.count("steps    9 to 20") == said.count("done, two") == 1  # one of them speaks
    one = checkpoint(tmp_path / "one")
    for other in ("parts", "two"):
        state = checkpoint(tmp_path / other)
        for part in ("model", "ema"):
            for name, value in one[part].items():
                torch.testing.assert_close(state[part][name], value, rtol=1e-5, atol=1e-6)
        losses = [np.loadtxt(tmp_path / name / "log.csv", delimiter=",", skiprows=1)
                  for name in ("one", other)]  # fmt: skip
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    before = weights_of(tmp_path / "two")
    other = ["--lr", "1e30", "--steps", "40", "--restart", "--out", "one"]
    said = torchrun(*flags, *other, cwd=tmp_path, code=1)
    assert said.count("is not finite") == 1 and weights_of(tmp_path / "two") == before
    assert (tmp_path / "one-1" / "checkpoint.pt").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun there lacks libuv")
def test_two_processes_stop_together(pictures, tmp_path):
    run = subprocess.Popen(
        [*TORCHRUN, HERE / "train.py", "--data", pictures, *TINY, "--steps", "100000",
         "--preview-every", "5"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.time() + 60
    while time.time() < deadline and not list((tmp_path / "run").glob("preview*")):
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    said, _ = run.communicate(timeout=60)
    step = checkpoint(tmp_path / "run")["step"]
    assert f"stopped at step {step:,}" in said and "torchrun ..." in said
    assert (tmp_path / "run" / "log.csv").read_text().splitlines()[-1].startswith(f"{step},")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process without a signal")
def test_sigterm_saves_and_says_how_to_go_on(pictures, tmp_path):
    args = [sys.executable, HERE / "train.py", "--data", pictures, *TINY, "--steps", "100000"]
    run = subprocess.Popen(
        args, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.time() + 60
    log = tmp_path / "run" / "log.csv"
    while time.time() < deadline and not (log.exists() and log.stat().st_size):
        time.sleep(0.2)
    time.sleep(1)
    run.send_signal(signal.SIGTERM)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 0 and "to go on" in said
    step = checkpoint(tmp_path / "run")["step"]
    assert step > 0 and f"stopped at step {step:,}" in said
    assert (tmp_path / "run" / "log.csv").read_text().splitlines()[-1].startswith(f"{step},")


def test_loss_that_is_not_finite_stops_before_anything_is_written(pictures, tmp_path):
    said = python("train.py", "--data", pictures, *TINY, "--steps", 50, "--lr", 1e30, "--warmup", 0,
                  cwd=tmp_path, code=1)  # fmt: skip
    assert "is not finite" in said and "--lr" in said
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_missing_and_empty_folders_are_one_line(tmp_path):
    assert "no such folder" in python("train.py", "--data", "none", cwd=tmp_path, code=1)
    (tmp_path / "empty").mkdir()
    assert "no picture" in python("train.py", "--data", "empty", cwd=tmp_path, code=1)


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--image-size 28", "multiple of 8, since the U-Net halves it 3 times: 24 or 32"),
        ("--base-channels 30", "--base-channels must be a multiple of 4"),
        ("--batch 0", "start at 1"),
        ("--ema 1", "must be in [0, 1)"),
        ("--lr inf", "--lr above 0"),
        ("--lr nan", "--lr above 0"),
        ("--save-minutes nan", "--save-minutes must be"),
        ("--preview-every 0", "start at 1"),
        ("--warmup -1", "--warmup at least 0"),
        ("--seed 18446744073709551616", "--seed must be"),
        ("--attention-resolutions 7", "must be among [4, 8, 16, 32]"),
        ("--batch 4 --accumulate 5", "a picture for each GPU and each part"),
        ("--device cpu:²", "auto, cpu, cuda or cuda:1"),
        ("--device foo", "auto, cpu, cuda or cuda:1"),
    ],
)
def test_impossible_trainings_are_refused_before_pictures_are_read(flags, said, tmp_path):
    argv = ["train.py", "--data", "missing", *flags.split()]
    assert said in python(*argv, cwd=tmp_path, code=2)


def test_preview_grid_has_every_picture(tmp_path):
    x = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 1, 4, 4)
    train.save_grid(x, tmp_path / "grid.png")
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    scale = picture.shape[1] // 18
    tiles = picture[3 * scale :: 6 * scale, 3 * scale :: 6 * scale]
    assert tiles.tolist() == [[0, 64, 128], [191, 255, 255]]  # the sixth is left white
    pixels = sample.to_pixels(x.numpy())
    assert np.array_equal(np.asarray(sample.grid(pixels)), picture)  # both programs draw alike


# ------------------------------------------------------------------------------------------- export


def test_onnx_file_is_what_it_promises(trained):
    path = trained[0] / "model.onnx"
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert [(o.domain, o.version) for o in proto.opset_import if not o.domain] == [("", 20)]
    inputs = {i.name: i.type.tensor_type for i in proto.graph.input}
    assert set(inputs) == {"x_t", "t"} and [o.name for o in proto.graph.output] == ["eps"]
    assert inputs["x_t"].elem_type == onnx.TensorProto.FLOAT
    assert inputs["t"].elem_type == onnx.TensorProto.INT64
    for tensor in (inputs["x_t"], inputs["t"], proto.graph.output[0].type.tensor_type):
        assert tensor.shape.dim[0].dim_param == "batch"
    assert [d.dim_value for d in inputs["x_t"].shape.dim[1:]] == [3, 8, 8]
    assert not list(trained[0].glob("model.onnx?*"))  # no .data beside it


def test_onnx_file_has_no_node_that_cuda_leaves_to_the_cpu(trained):
    ops = {node.op_type for node in onnx.load(trained[0] / "model.onnx").graph.node}
    assert "LayerNormalization" in ops and "Softmax" in ops
    assert not ops & {"Shape", "Gather", "Slice", "GroupNormalization", "InstanceNormalization"}


def test_onnx_file_tells_nothing_of_the_machine(trained):
    content = (trained[0] / "model.onnx").read_bytes()
    for trace in (b"site-packages", str(HERE).encode(), b"ddpm.py", b"stack_trace"):
        assert trace not in content


def test_onnx_metadata_is_the_schedule(trained):
    metadata = {p.key: p.value for p in onnx.load(trained[0] / "model.onnx").metadata_props}
    assert json.loads(metadata["ddpm.betas"]) == linear_betas().tolist()
    assert metadata["ddpm.variance"] == "large" and metadata["ddpm.step"] == "12"
    assert json.loads(metadata["ddpm.image_shape"]) == [3, 8, 8] and metadata["ddpm.source"]


def eps_of(path, x, t):
    return export.on_cpu(path).run(["eps"], {"x_t": x.numpy(), "t": t.numpy()})[0]


def test_onnx_file_is_the_averaged_network(trained):
    folder, _ = trained
    state = checkpoint(folder / "run")
    network = UNet(**state["config"]["model"]).eval()
    x, t = randn(5, 3, 8, 8), torch.tensor([0, 1, 2, 500, 999])
    eps = eps_of(folder / "model.onnx", x, t)
    with torch.no_grad():
        network.load_state_dict(state["ema"])
        np.testing.assert_allclose(eps, network(x, t), rtol=0, atol=1e-5)
        network.load_state_dict(state["model"])
        assert np.abs(eps - network(x, t).numpy()).max() > 1e-4


def test_export_that_differs_from_torch_leaves_no_file(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "largest_difference", lambda *_: 1e-3)
    out = tmp_path / "model.onnx"
    source = str(trained[0] / "run" / "checkpoint.pt")
    argv = ["export.py", "--checkpoint", source, "--onnx", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match="differs"):
        export.main()
    assert not list(tmp_path.iterdir())


def test_export_finds_a_wrong_network(trained):
    """largest_difference is a measurement: other weights are told from the right ones."""
    folder, _ = trained
    state = checkpoint(folder / "run")
    network = UNet(**state["config"]["model"]).eval()
    network.load_state_dict(state["ema"])
    assert export.largest_difference(folder / "model.onnx", network, 1000) < 1e-5
    network.load_state_dict(state["model"])
    assert export.largest_difference(folder / "model.onnx", network, 1000) > 1e-4


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One network, which has learnt a little (at random weights 8 bits err more), as float32, as
    float16 and with 8-bit integers; and what export.py said of each."""
    folder = tmp_path_factory.mktemp("files")
    settings = dict(image_size=8, in_channels=3, base_channels=16, channel_mults=(1, 2),
                    num_res_blocks=1, attention_resolutions=(4,), dropout=0.0)  # fmt: skip
    torch.manual_seed(0)
    model, images = UNet(**settings), train.demo_pictures().float() / 127.5 - 1
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        PAPER.loss(model, images[torch.randint(len(images), (32,))]).backward()
        optimizer.step()
    model.eval()
    state = {
        "config": {
            "model": settings,
            "diffusion": {"betas": PAPER.betas.tolist(), "variance": "small"},
            "train": {"data": None},
        },
        "step": 7,
        "ema": model.state_dict(),
    }
    torch.save(state, folder / "checkpoint.pt")
    (folder / "pictures-x.u8").write_bytes(train.demo_pictures().numpy().tobytes())
    said = {}
    for kind, flags in (("float", []), ("half", ["--half"]), ("int8", ["--int8"])):
        flags += ["--checkpoint", "checkpoint.pt", "--onnx", f"{kind}.onnx"]
        said[kind] = python("export.py", *flags, cwd=folder)
    assert len(list(folder.iterdir())) == 5
    return folder, model, said


def errors_said(said):
    """The table that export.py prints: {t: error in %}."""
    rows = [line.split() for line in said.splitlines() if line.startswith("  t ") or "%" in line]
    return dict(zip(map(int, rows[-2][1:]), map(float, rows[-1][2:]), strict=True))


@pytest.mark.parametrize("kind", ["half", "int8"])
def test_files_with_fewer_bits_keep_the_contract(kind, files):
    folder, _, _ = files
    exact, narrow = onnx.load(folder / "float.onnx"), onnx.load(folder / f"{kind}.onnx")
    onnx.checker.check_model(narrow)
    for one, other in (
        (exact.graph.input, narrow.graph.input),
        (exact.graph.output, narrow.graph.output),
    ):
        assert [(v.name, v.type) for v in one] == [(v.name, v.type) for v in other]
    assert exact.metadata_props == narrow.metadata_props and len(narrow.metadata_props) == 5
    assert [n.op_type for n in narrow.graph.node].count("GroupNormalization") == 0
    for batch in (1, 2, 3):
        eps = eps_of(folder / f"{kind}.onnx", randn(batch, 3, 8, 8), torch.full((batch,), 500))
        assert eps.dtype == np.float32 and eps.shape == (batch, 3, 8, 8)


@pytest.mark.parametrize("kind, most", [("half", 0.003), ("int8", 0.02)])
def test_fewer_bits_err_as_little_as_promised(kind, most, files):
    """Against torch, at x_t other than those that export.py measured; and it said the same."""
    folder, model, said = files
    errors, demo = errors_said(said[kind]), train.demo_pictures().float() / 127.5 - 1
    assert set(errors) == {0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 999}
    for t, its_error in errors.items():
        times = torch.full((72,), t)
        x_t = PAPER.q_sample(demo[::3], times, randn(72, 3, 8, 8))
        with torch.no_grad():
            expected = model(x_t, times).numpy()
        eps = eps_of(folder / f"{kind}.onnx", x_t, times)
        error = np.sqrt(np.square(eps - expected).mean() / np.square(expected).mean())
        assert error < 1.2 * most and its_error < 100 * most
        assert abs(100 * error - its_error) < 0.5 * its_error + 0.02


def test_half_is_float16_but_where_that_costs_too_much(files):
    graph = onnx.load(files[0] / "half.onnx").graph
    types = {w.name.removeprefix("model."): w.data_type for w in graph.initializer}
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    single_ones = {name for name in types if name.endswith("weight") and types[name] == single}
    assert all(name.startswith(("conv_in.", "time.", "down.0.")) for name in single_ones), (
        single_ones
    )
    assert types["up.0.conv1.weight"] == half and types["conv_in.weight"] == single
    assert {"time.0.weight", "time.2.weight"} <= single_ones
    for node in graph.node:
        if node.op_type == "LayerNormalization":  # statistics in float32
            assert all(a.i == 1 for a in node.attribute if a.name == "stash_type")
    assert not {n.op_type for n in graph.node} & {"Shape", "Gather", "Slice"}


def test_integers_are_used_from_a_t_on_and_not_below(files):
    folder, model, said = files
    first = int(said["int8"].split("float32 below t = ")[1].split(",")[0])
    choice = next(n for n in onnx.load(folder / "int8.onnx").graph.node if n.op_type == "If")
    branches = {a.name: a.g for a in choice.attribute}
    float32, int8 = branches["then_branch"], branches["else_branch"]
    assert not any(n.op_type == "QuantizeLinear" for n in float32.node)
    made = {w.name: w for w in int8.initializer}
    quantized = {n.input[0] for n in int8.node if n.op_type == "DequantizeLinear"} & set(made)
    weights = {name for name in quantized if made[name].data_type == onnx.TensorProto.INT8}
    convolutions = [n for n in int8.node if n.op_type == "Conv"]
    kept = [n.input[1] for n in convolutions if n.input[1] in made]
    assert len(weights) >= 8 and kept  # the first, the last, the first block, the shortcuts
    for name in kept:
        assert name.startswith(("conv_in", "conv_out", "down.0.")) or "shortcut" in name
    assert {"conv_in.weight", "conv_out.weight", "down.0.conv1.weight"} <= set(kept)
    # a scale for each output channel
    name = next(name for name in weights if name.startswith("up.0.conv1."))
    scale = next(n.input[1] for n in int8.node if n.input and n.input[0] == name)
    assert list(made[scale].dims) == [32]

    x = randn(2, 3, 8, 8)
    for t, precise in (([first, first], False), ([first - 1, 999], True), ([0, 0], True)):
        t = torch.tensor(t)
        if t.min() < 0:
            continue
        with torch.no_grad():
            difference = np.abs(eps_of(folder / "int8.onnx", x, t) - model(x, t).numpy()).max()
        assert (difference < 1e-5) == precise


def test_integers_that_err_too_much_are_refused(files, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "NARROW_TOLERANCE", 1e-6)
    trained = export.load(files[0] / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"8-bit integers err by .*% of eps at t = 999"):
        export.write_onnx(trained, tmp_path / "model.onnx", export.write_int8)
    with pytest.raises(ValueError, match="float16 is not enough"):
        export.write_onnx(trained, tmp_path / "model.onnx", export.write_half)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind, most", [("half", 1), ("int8", 8)])
def test_fewer_bits_draw_the_same_pictures(kind, most, files):
    pictures = []
    for name in ("float", kind):
        flags = ["--onnx", f"{name}.onnx", "-n", 4, "--steps", 50, "--dir", f"of-{name}"]
        python("sample.py", *flags, cwd=files[0])
        paths = sorted((files[0] / f"of-{name}").iterdir())
        pictures.append(np.stack([np.asarray(Image.open(path), float) for path in paths]))
    difference = np.abs(pictures[0] - pictures[1]).mean()
    assert difference < most and (difference > 0 or kind == "half")


def test_export_without_a_whole_checkpoint_is_one_line(trained, tmp_path):
    assert "python train.py makes one" in python("export.py", cwd=tmp_path, code=1)
    said = python("export.py", "--onnx", "checkpoint.pt", cwd=tmp_path, code=2)
    assert "such as model.onnx" in said
    whole = (trained[0] / "run" / "checkpoint.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    for name in ("half.pt", "other.pt"):
        said = python("export.py", "--checkpoint", name, cwd=tmp_path, code=1)
        assert f"{name} is no checkpoint of train.py" in said
    assert not (tmp_path / "model.onnx").exists()


def save_published(folder, layout="pipeline", weights="safetensors", shape=None, change=None):
    """A DDPM of diffusers' own with random weights, saved by diffusers; returns its network."""
    from diffusers import DDPMPipeline, DDPMScheduler

    unet = diffusers_unet(*(shape or (8, 8, (1, 2), 4, 2)))
    scheduler = DDPMScheduler(variance_type="fixed_large")
    DDPMPipeline(unet, scheduler).save_pretrained(folder, safe_serialization=weights != "bin")
    if layout == "flat":
        for path in [*(folder / "unet").iterdir(), *(folder / "scheduler").iterdir()]:
            path.rename(folder / path.name)
        (folder / "unet").rmdir()
        (folder / "scheduler").rmdir()
    return unet


@pytest.mark.parametrize("layout", ["pipeline", "flat"])
@pytest.mark.parametrize("weights", ["safetensors", "bin"])
@pytest.mark.parametrize("names", ["new", "old"])
def test_published_weights_are_read_in_every_layout(layout, weights, names, tmp_path):
    theirs = save_published(tmp_path, layout, weights)
    unet = tmp_path / "unet" if layout == "pipeline" else tmp_path
    if names == "old":
        path = unet / f"diffusion_pytorch_model.{weights}"
        state = load(path.read_bytes()) if weights == "safetensors" else torch.load(path)
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for new, word in old.items():
            state = {k.replace(f".{new}.", f".{word}."): v for k, v in state.items()}
        assert any("proj_attn" in k for k in state)
        (save_file if weights == "safetensors" else torch.save)(state, path)
    trained = export.load(tmp_path)
    assert_same_network(trained.model, theirs)
    assert trained.diffusion.variance == "large" and trained.settings["norm_groups"] == 2
    assert torch.equal(trained.diffusion.betas, linear_betas())
    assert not trained.model.training


@pytest.mark.parametrize("shape", SHAPES)
def test_published_weights_compute_the_same_in_both_directions(shape, tmp_path):
    theirs = save_published(tmp_path / "in", shape=SHAPES[shape])
    trained = export.load(tmp_path / "in")
    assert_same_network(trained.model, theirs)
    export.to_diffusers(trained, tmp_path / "out")
    again = type(theirs).from_pretrained(tmp_path / "out" / "unet").eval()
    assert_same_network(trained.model, again)
    configs = [
        json.loads((tmp_path / d / "unet" / "config.json").read_text()) for d in ("in", "out")
    ]
    assert configs[0].pop("_diffusers_version") and configs[0] == configs[1]


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("betas", [linear_betas(40, 1e-3, 0.3), cosine_betas(40)])
def test_diffusers_pipeline_draws_what_ddpm_py_draws(variance, betas, tmp_path):
    """The whole of Algorithm 2 against another implementation, opened from what export.py wrote."""
    from diffusers import DDPMPipeline

    model = small_unet(dropout=0.0).to(memory_format=torch.channels_last)  # as CUDA saves them
    settings = dict(image_size=8, in_channels=3, base_channels=8, channel_mults=(1, 2),
                    num_res_blocks=1, attention_resolutions=(4,), dropout=0.0)  # fmt: skip
    ours = export.Trained(model, Diffusion(betas, variance), settings, 0, "a test")
    export.to_diffusers(ours, tmp_path)
    with pytest.raises(ValueError, match="is there already"):  # it may be another's
        export.to_diffusers(ours, tmp_path)
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(2, torch.Generator().manual_seed(0), 40, output_type="np").images
    x0 = ours.diffusion.sample(model, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    assert x0.std() > 0.1
    np.testing.assert_allclose(drawn, (x0.permute(0, 2, 3, 1) + 1) / 2, rtol=0, atol=1e-4)
    back = export.load(tmp_path)
    torch.testing.assert_close(back.diffusion.betas, betas, rtol=1e-15, atol=0)
    assert back.diffusion.variance == variance
    with torch.no_grad():
        x, t = randn(1, 3, 8, 8), torch.tensor([7])
        torch.testing.assert_close(back.model(x, t), model(x, t), rtol=1e-5, atol=1e-5)


def test_published_weights_to_pictures_and_back(trained, pictures, tmp_path):
    """As a user: a folder to model.onnx to pictures, fine-tuned, evaluated, and a folder again."""
    theirs = save_published(tmp_path / "published", layout="flat")
    said = python("export.py", "--diffusers", "published", cwd=tmp_path)
    assert "diffusers, published" in said
    x, t = randn(2, 3, 8, 8), torch.tensor([3, 900])
    eps = eps_of(tmp_path / "model.onnx", x, t)
    with torch.no_grad():
        np.testing.assert_allclose(eps, theirs(x, t).sample, rtol=0, atol=1e-5)
    python("sample.py", "--onnx", "model.onnx", "-n", 1, "--steps", 5, cwd=tmp_path)
    flags = ["--data", pictures, "--steps", 2, "--batch", 4]
    python("train.py", "--init", "published", *flags, cwd=tmp_path)
    state = checkpoint(tmp_path / "run")
    assert state["config"]["model"]["norm_groups"] == 2
    assert state["config"]["model"]["dropout"] == 0.1  # of the training, not of the weights
    shutil.rmtree(tmp_path / "published")  # a run that has begun does without
    python("train.py", "--init", "published", *flags[:2], "--steps", 3, *flags[4:], cwd=tmp_path)
    assert checkpoint(tmp_path / "run")["step"] == 3
    save_published(tmp_path / "published", layout="flat")
    python("export.py", "--to-diffusers", "mine", cwd=tmp_path)
    mine, state = export.load(tmp_path / "mine").model.state_dict(), checkpoint(tmp_path / "run")
    assert all(torch.equal(mine[k], state["ema"][k]) for k in mine)
    before = sorted(p.name for p in tmp_path.iterdir())
    said = python("export.py", "--to-diffusers", "published", cwd=tmp_path, code=1)
    assert "is there already" in said
    assert before == sorted(p.name for p in tmp_path.iterdir())
    said = python("train.py", "--data", pictures, "--eval", "published", "--eval-images", 1,
                  cwd=tmp_path)  # fmt: skip
    assert "on 1 pictures" in said and (tmp_path / "published" / "rate-distortion.csv").is_file()


OTHERS = [
    ("config.json", "_class_name", "UNet2DConditionModel"),
    ("config.json", "num_class_embeds", 10),
    ("config.json", "class_embed_type", "timestep"),
    ("config.json", "out_channels", 6),
    ("config.json", "in_channels", 4),
    ("config.json", "sample_size", None),
    ("config.json", "down_block_types", ["ResnetDownsampleBlock2D", "AttnDownBlock2D"]),
    ("config.json", "up_block_types", ["UpBlock2D", "UpBlock2D"]),
    ("config.json", "block_out_channels", [8, 12]),
    ("config.json", "attention_head_dim", 8),
    ("config.json", "freq_shift", 0),
    ("config.json", "flip_sin_to_cos", True),
    ("config.json", "downsample_padding", 1),
    ("config.json", "norm_eps", 1e-5),
    ("config.json", "act_fn", "gelu"),
    ("config.json", "resnet_time_scale_shift", "scale_shift"),
    ("config.json", "add_attention", False),
    ("config.json", "cross_attention_dim", 768),
    ("config.json", "sample_size", [8, 16]),
    ("config.json", "sample_size", [[8], [8]]),
    ("config.json", "norm_num_groups", "2"),
    ("scheduler_config.json", "_class_name", "FlowMatchEulerDiscreteScheduler"),
    ("scheduler_config.json", "beta_schedule", {}),
    ("scheduler_config.json", "prediction_type", "v_prediction"),
    ("scheduler_config.json", "variance_type", "learned_range"),
    ("scheduler_config.json", "beta_schedule", "sigmoid"),
    ("scheduler_config.json", "clip_sample", False),
    ("scheduler_config.json", "thresholding", True),
]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    save_published(folder, layout="flat")
    return folder


@pytest.fixture
def copy(published, tmp_path):
    for path in published.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("file, key, value", OTHERS)
def test_other_architectures_are_refused_by_the_name_of_the_key(file, key, value, copy):
    config = json.loads((copy / file).read_text())
    config[key] = value
    (copy / file).write_text(json.dumps(config))
    named = {"_class_name": value, "norm_num_groups": "TypeError"}.get(key, key)
    with pytest.raises(ValueError, match=f"{file}.*{named}") as refused:
        export.load(copy)
    assert "\n" not in str(refused.value)


def test_a_key_left_out_is_what_diffusers_takes_it_for(copy):
    config = json.loads((copy / "config.json").read_text())
    for key in ("attention_head_dim", "freq_shift"):  # there: 8 channels a head, and 0
        (copy / "config.json").write_text(json.dumps({k: config[k] for k in config if k != key}))
        with pytest.raises(ValueError, match=key):
            export.load(copy)
    few = "sample_size block_out_channels down_block_types up_block_types norm_num_groups norm_eps "
    few += "downsample_padding freq_shift flip_sin_to_cos attention_head_dim"
    (copy / "config.json").write_text(json.dumps({key: config[key] for key in few.split()}))
    (copy / "scheduler_config.json").write_text('{"_class_name": "DDPMScheduler"}')
    assert export.load(copy).diffusion.variance == "small"


def test_other_words_for_the_same_network_are_understood(copy, published):
    config = json.loads((copy / "config.json").read_text())
    config |= {"sample_size": [8, 8], "act_fn": "swish", "attention_head_dim": 16,
               "attn_norm_num_groups": 2, "time_embedding_dim": 32}  # fmt: skip
    (copy / "config.json").write_text(json.dumps(config))
    from diffusers import UNet2DModel

    assert_same_network(export.load(copy).model, UNet2DModel.from_pretrained(copy).eval())


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_schedules_of_diffusers(schedule, copy):
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(300, 2e-4, 0.03, schedule)
    theirs.save_pretrained(copy)
    torch.testing.assert_close(
        export.load(copy).diffusion.betas.float(), theirs.betas, rtol=1e-5, atol=1e-9
    )


class RunsCode:
    """What a pickle can do: call anything."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_weights_that_are_not_weights_are_one_line(copy):
    path = copy / "diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    state = load(path.read_bytes())

    def refusal():
        with pytest.raises(ValueError, match="diffusion_pytorch_model") as refused:
            export.load(copy)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    for cut in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert "SafetensorError" in refusal()
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "git lfs pull" in refusal()
    name = "mid_block.attentions.0.to_q.weight"
    save_file({k: v for k, v in state.items() if k != name}, path)
    assert f"1 tensors of the network in config.json are missing, 0 left over, such as {name}" in (
        refusal()
    )
    save_file(state | {"ema.decay": torch.zeros(1)}, path)
    assert "are missing, 1 left over, such as ema.decay" in refusal()
    save_file(state | {name: torch.zeros(3, 3)}, path)
    assert "size mismatch for middle.0.attention.q.weight" in refusal()
    save_file(state | {name: torch.zeros(16, 16, dtype=torch.int8)}, path)
    assert "more than weights" in refusal()
    path.unlink()
    path = path.with_suffix(".bin")
    assert "No such file" in refusal()
    torch.save({name: RunsCode(copy / "executed")}, path)
    assert "UnpicklingError" in refusal() and not (copy / "executed").exists()
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-100])
    assert "RuntimeError" in refusal()
    torch.save(state, path)
    assert export.load(copy)
    (copy / "scheduler_config.json").unlink()
    with pytest.raises(ValueError, match=r"scheduler_config.json: .*No such file"):
        export.load(copy)
    for text in ("{", "[1]", "[" * 100_000):
        (copy / "config.json").write_text(text)
        said = python("export.py", "--diffusers", copy, cwd=copy, code=1)
        assert said.startswith("export.py: ") and "config.json: " in said and said.count("\n") == 1


def damaged(path, n):
    """A file n times over: cut off, or with flipped bits, anywhere or near its ends; then whole."""
    whole, random = path.read_bytes(), np.random.default_rng(0)
    for k in range(n):
        content = bytearray(whole)
        if k % 3 == 0:
            del content[random.integers(len(whole)) :]
        else:
            span = len(whole) if k % 3 == 1 else min(5000, len(whole))
            first = (len(whole) - span) * random.integers(2)
            for _ in range(1 + random.integers(4)):
                content[first + random.integers(span)] ^= 1 << random.integers(8)
        path.write_bytes(content)
        yield k
    path.write_bytes(whole)


def test_damaged_files_are_refused_in_one_line(trained, copy):
    """Or read, if all the damage is in the value of a weight."""
    shutil.copy(trained[0] / "run" / "checkpoint.pt", copy / "here.pt")
    shutil.copy(trained[0] / "model.onnx", copy / "model.onnx")
    published = copy / "published"
    published.mkdir()
    for name in ("config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors"):
        (copy / name).rename(published / name)
    binary = copy / "binary"
    shutil.copytree(published, binary)
    weights = binary / "diffusion_pytorch_model.safetensors"
    torch.save(load(weights.read_bytes()), weights.with_suffix(".bin"))
    weights.unlink()
    refused = dict.fromkeys(("here.pt", "published", "binary", "model.onnx"), 0)
    cases = [
        (copy / "here.pt", copy / "here.pt", 90),
        (copy / "model.onnx", copy / "model.onnx", 90),
    ]
    cases += [
        (path, path.parent, 50) for folder in (published, binary) for path in folder.iterdir()
    ]
    for path, source, n in cases:
        for _ in damaged(path, n):
            try:
                if path.suffix == ".onnx":
                    sample.Network(path, 1, "cpu")
                else:
                    export.load(source)
            except (ValueError, SystemExit) as error:
                assert "\n" not in str(error) and str(error.args[0]) not in ("", "0")
                refused[source.name] += 1
    assert min(refused.values()) > 40


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit there")
def test_full_disk_leaves_pictures_and_models_whole(trained, tmp_path):
    for program, made, flags in (
        ("export.py", "model.onnx", ["--checkpoint", trained[0] / "run" / "checkpoint.pt"]),
        ("sample.py", "samples.png", ["--onnx", trained[0] / "model.onnx", "--steps", 2]),
    ):
        (tmp_path / made).write_text("of before")
        said = python("-c", FULL_DISK, 1000, HERE / program, *flags, cwd=tmp_path, code=1)
        assert f"{program}: " in said and "too large" in said
        assert (tmp_path / made).read_text() == "of before"
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", "samples.png"}


def test_checkpoint_that_runs_code_is_not_opened(tmp_path):
    torch.save({"config": RunsCode(tmp_path / "executed")}, tmp_path / "checkpoint.pt")
    assert "is no checkpoint" in python("export.py", "--checkpoint", "checkpoint.pt",
                                        cwd=tmp_path, code=1)  # fmt: skip
    assert not (tmp_path / "executed").exists()


# ----------------------------------------------------------------------------------------- sampling


NO_TORCH = """
import importlib.abc, runpy, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "onnxscript", "ddpm", "train", "export"):
            raise ImportError(f"{name} must not be imported here")
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_sampling_needs_no_torch(trained):
    args = "--onnx model.onnx -n 2 --steps 3 --out apart/s.png".split()
    python("-c", NO_TORCH, HERE / "sample.py", *args, cwd=trained[0])
    assert (trained[0] / "apart" / "s.png").is_file()
    with pytest.raises(AssertionError, match="must not be imported"):
        python("-c", NO_TORCH, HERE / "export.py", cwd=trained[0])


def draw(trained, tmp_path, *args):
    python("sample.py", "--onnx", trained[0] / "model.onnx", "--steps", 5, "--dir", "each", *args,
           cwd=tmp_path)  # fmt: skip
    return [np.asarray(Image.open(p)).astype(int) for p in sorted((tmp_path / "each").iterdir())]


def test_seed_fixes_each_picture_at_any_batch_and_n(trained, tmp_path):
    folders = [tmp_path / str(k) for k in range(4)]
    [folder.mkdir() for folder in folders]
    a = draw(trained, folders[0], "-n", 7, "--batch", 7)
    b = draw(trained, folders[1], "-n", 7, "--batch", 3)
    c = draw(trained, folders[2], "-n", 2)
    d = draw(trained, folders[3], "-n", 2, "--seed", 1)
    assert (len(a), len(b), len(c)) == (7, 7, 2)
    assert max(np.abs(x - y).max() for x, y in zip(a, b, strict=True)) <= 1  # rounding at most
    assert all(np.abs(x - y).max() <= 1 for x, y in zip(a, c, strict=False))
    assert all(np.abs(x - y).max() > 30 for x, y in zip(c, d, strict=True))
    assert np.abs(a[0] - a[1]).max() > 30
    again = draw(trained, folders[0], "-n", 7, "--batch", 7)
    assert all(np.array_equal(x, y) for x, y in zip(a, again, strict=True))


def test_sampling_program_runs_the_torch_sampler(trained, tmp_path):
    """From the seed to the pixels: sample.py against ddpm.py with the EMA weights."""
    pixels = draw(trained, tmp_path, "-n", 2)
    state = checkpoint(trained[0] / "run")
    network = UNet(**state["config"]["model"]).eval()
    network.load_state_dict(state["ema"])
    noise = sample.noise_of(0, 0, (2, 3, 8, 8))
    x0 = PAPER.sample(network, (2, 3, 8, 8), 5, noise=lambda: torch.from_numpy(noise()))
    expected = ((x0 + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    assert max(np.abs(p - e).max() for p, e in zip(pixels, expected, strict=True)) <= 1


def test_interpolation_between_two_pictures(trained, pictures, tmp_path):
    """The grid of the program: the pictures at its ends, and between them what ddpm.py makes."""
    files = [pictures / "0.png", pictures / "deep" / "LOUD.JPG"]
    python("sample.py", "--onnx", trained[0] / "model.onnx", "--interpolate", *files,
           "--t", 30, 600, "--steps", 40, "--out", "i.png", cwd=tmp_path)  # fmt: skip
    image = np.asarray(Image.open(tmp_path / "i.png")).astype(int)
    scale = image.shape[1] // (13 * 10)
    assert image.shape == (2 * 10 * scale, 13 * 10 * scale, 3)
    tiles = image[::scale, ::scale].reshape(2, 10, 13, 10, 3).swapaxes(1, 2)[:, :, 1:-1, 1:-1]
    ends = [train.read_picture(file, 8).transpose(1, 2, 0) for file in files]
    assert all(
        np.array_equal(row[k], end) for row in tiles for k, end in ((0, ends[0]), (12, ends[1]))
    )

    state = checkpoint(trained[0] / "run")
    network = UNet(**state["config"]["model"]).eval()
    network.load_state_dict(state["ema"])
    x0 = [torch.from_numpy(end.transpose(2, 0, 1)[None] / 127.5 - 1).float() for end in ends]
    for row, t in zip(tiles, (30, 600), strict=True):
        z = sample.noise_of(0, 0, (1, 3, 8, 8))
        x_t = [PAPER.q_sample(x, torch.tensor([t]), torch.from_numpy(z())) for x in x0]
        x_t = torch.cat([torch.lerp(x_t[0], x_t[1], k / 10) for k in range(11)])
        chain = Diffusion(linear_betas()[: t + 1])
        out = chain.sample(network, x_t.shape, min(40, t + 1), x_T=x_t,
                           noise=lambda z=z: torch.from_numpy(z()))  # fmt: skip
        expected = ((out + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
        assert np.abs(row[1:-1] - expected).max() <= 1


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--interpolate {0} {0} --t 1000", "--t must be 0..999"),
        ("--t 5", "--t must be given with --interpolate"),
        ("--interpolate {0} {0} --gif x.gif", "--interpolate must be without"),
        ("--interpolate {0} {0} --out {0}", "must be other files than those that are read"),
    ],
)
def test_impossible_interpolations_are_refused(flags, said, trained, pictures):
    argv = ["sample.py", "--onnx", "model.onnx", *flags.format(pictures / "0.png").split()]
    assert said in python(*argv, cwd=trained[0], code=2)


def test_sampling_reads_pictures_as_training_does(pictures, tmp_path):
    Image.new("RGBA", (9, 5), (255, 0, 0, 80)).save(tmp_path / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(pictures / "0.png").save(tmp_path / "turned.png", exif=exif)
    ramp = np.linspace(0, 65535, 25).reshape(5, 5).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    files = [p for p in pictures.rglob("*") if p.suffix.lower() in train.SUFFIXES]
    files = [p for p in files if p.name not in ("broken.png", ".hidden.png")]
    assert len(files) == 12
    for path in [*files, *tmp_path.iterdir()]:
        ours = sample.read_picture(path, (3, 8, 8))
        theirs = train.to_channels(train.read_picture(path, 8), 3)
        np.testing.assert_allclose(ours, theirs / 127.5 - 1, rtol=0, atol=1e-6)
    assert sample.read_picture(files[0], (1, 8, 8)).shape == (1, 8, 8)
    with pytest.raises(SystemExit, match="can't be read"):
        sample.read_picture(pictures / "broken.png", (3, 8, 8))


def test_gif_and_strip(trained, tmp_path):
    draw(trained, tmp_path, "-n", 3, "--gif", "a/x.gif", "--strip", "a/x.png", "--steps", 30)
    with Image.open(tmp_path / "a" / "x.gif") as gif:
        assert gif.n_frames == 31
    strip = np.asarray(Image.open(tmp_path / "a" / "x.png"))
    assert strip.shape[0] / strip.shape[1] == pytest.approx(6 / sample.STRIP)  # 3 pictures, 2 rows


def test_noise_is_standard_normal():
    noise = sample.noise_of(0, 0, (100, 1, 10, 10))
    first, second = noise(), noise()
    assert first.dtype == np.float32 and not np.array_equal(first, second)
    assert abs(first.mean()) < 0.05 and abs(first.std() - 1) < 0.05
    assert np.abs(np.corrcoef(first.reshape(100, -1)) - np.eye(100)).max() < 0.6


def test_noise_drawn_ahead_is_the_same_noise():
    one, other = sample.noise_of(3, 5, (2, 1, 4, 4)), sample.noise_of(3, 5, (2, 1, 4, 4))
    other = sample.ahead(other)
    for _ in range(5):
        assert np.array_equal(one(), other())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["float", "half"])
def test_all_of_the_network_runs_on_cuda(kind, files):
    ort.preload_dlls()
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session = ort.InferenceSession(
        files[0] / f"{kind}.onnx", options, [("CUDAExecutionProvider", {"use_tf32": "0"})]
    )
    assert session.get_providers()[0] == "CUDAExecutionProvider"
    x, t = randn(3, 3, 8, 8), torch.tensor([0, 500, 999])
    (eps,) = session.run(["eps"], {"x_t": x.numpy(), "t": t.numpy()})
    with torch.no_grad():
        assert np.abs(eps - files[1](x, t).numpy()).max() < (1e-4 if kind == "float" else 0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_asking_for_cuda_where_there_is_none_is_an_error_with_its_mend(trained):
    said = python("sample.py", "--device", "cuda", "--onnx", "model.onnx", cwd=trained[0], code=1)
    assert 'pip install "onnxruntime-gpu[cuda,cudnn]"' in said


def test_foreign_and_broken_models_are_one_line(trained, tmp_path):
    assert "export.py makes one" in python("sample.py", cwd=tmp_path, code=1)
    whole = (trained[0] / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(whole[: len(whole) // 2])
    assert "is no model" in python("sample.py", cwd=tmp_path, code=1)
    proto = onnx.load_from_string(whole)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "model.onnx")
    assert "lacks ddpm.betas" in python("sample.py", cwd=tmp_path, code=1)
    proto = onnx.load_from_string(whole)
    metadata = {p.key: p.value for p in proto.metadata_props}
    for key, value in (
        ("ddpm.betas", "[]"),
        ("ddpm.betas", "[2]"),
        ("ddpm.variance", "none"),
        ("ddpm.image_shape", "[3]"),
        ("ddpm.image_shape", "[3, 16, 8]"),
    ):
        onnx.helper.set_model_props(proto, metadata | {key: value})
        onnx.save(proto, tmp_path / "model.onnx")
        assert "is no model of export.py" in python("sample.py", cwd=tmp_path, code=1)
    onnx.helper.set_model_props(proto, metadata)
    bias = next(w for w in proto.graph.initializer if w.name == "conv_out.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(3, np.nan, np.float32), bias.name))
    onnx.save(proto, tmp_path / "model.onnx")
    assert "eps is not finite" in python("sample.py", cwd=tmp_path, code=1)


@pytest.mark.parametrize(
    "flags",
    ["-n 0", "--out nosuffix", "--out=", "--eta 2", "--steps 0", "--steps 1001", "--seed -1"],
)
def test_impossible_flags_are_refused(trained, flags):
    args = ["sample.py", "--onnx", "model.onnx", *flags.split()]
    assert "must be" in python(*args, cwd=trained[0], code=2)


@pytest.mark.parametrize(
    "program, default", [("train", "[800000]"), ("export", "[model.onnx]"), ("sample", "[64]")]
)
def test_help_has_an_example_and_the_defaults(program, default, tmp_path):
    said = python(f"{program}.py", "--help", cwd=tmp_path)
    assert f"    python {program}.py" in said and default in said
    assert said.splitlines()[0].startswith(f"usage: python {program}.py")


# ------------------------------------------------------------------------------------------- README


README = (HERE / "README.md").read_text()


def blocks(language):
    """The code blocks of the README."""
    return [part.split("\n", 1)[1] for part in README.split("```")[1::2]
            if part.split("\n")[0] == language]  # fmt: skip


def test_readme_quotes_the_code_as_it_is():
    sources = [
        [line.strip() for line in (HERE / name).read_text().splitlines()]
        for name in ("ddpm.py", "train.py")
    ]
    method = README.split("## The method")[1].split("\n## ")[0]
    quotes = [block for block in blocks("python") if block in method]
    assert len(quotes) >= 9
    for quote in quotes:
        for part in quote.strip().split("\n...\n"):
            lines = [line.strip() for line in part.splitlines()]
            assert any(
                lines == source[k : k + len(lines)]
                for source in sources
                for k in range(len(source))
            ), part


def test_readme_and_code_have_the_same_equation_numbers():
    """Each numbered equation is in the code, with its number, and the quote after it has it too."""
    numbers = re.findall(r"\\tag\{(\d+)\}", README)
    code = (HERE / "ddpm.py").read_text()
    assert sorted(map(int, numbers)) == [2, 4, 5, 6, 7, 8, 11, 12, 13, 14, 15]
    quoted = "".join(blocks("python"))
    for number in numbers:
        assert re.search(rf"\({number}\)", code) and re.search(rf"\({number}\)", quoted), number
    assert set(re.findall(r"[ (]\((\d\d?)\)", code)) <= set(numbers)


def test_readme_loop_is_the_sampler(trained, tmp_path, monkeypatch):
    """The loop to paste: the pictures of sample.py from the same noise; and of few lines."""
    (code,) = (block for block in blocks("python") if "InferenceSession" in block)
    assert len(code.splitlines()) <= 22
    shutil.copy(trained[0] / "model.onnx", tmp_path)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    random = np.random.default_rng(0)
    network = sample.Network("model.onnx", 16, "cpu")
    shape = network.shape
    chain = sample.sample_progressive(
        network, lambda: random.standard_normal(shape, np.float32), network.betas
    )
    for _, _, x0 in chain:
        last = x0
    pixels = sample.to_pixels(last).transpose(0, 3, 1, 2).astype(int)
    assert names["pixels"].shape == shape and names["pixels"].std() > 10
    assert np.abs(names["pixels"] - pixels).max() <= 1


def test_readme_names_flags_and_files_that_exist():
    helps = {
        name: python(name, "--help", cwd=HERE) for name in ("train.py", "export.py", "sample.py")
    }
    commands = [line for block in blocks("") for line in re.split(r"\n(?! )|&&", block)]
    seen = set()
    for command in commands:
        for name, its_help in helps.items():
            if name in command:
                seen.add(name)
                flags = re.findall(r"(?<= )--?[a-z][a-z-]*", command.split(name)[1])
                assert all(re.search(rf"{flag}\b", its_help) for flag in flags), command
    assert seen == set(helps)
    for flag in re.findall(r"`(--[a-z][a-z0-9-]*)", README):
        assert any(re.search(rf"{flag}\b", its_help) for its_help in helps.values()), flag
    for link in re.findall(r"(?:\]\(|src=\")([^)#\"]+)", README):
        assert link.startswith("https://") or (HERE / link).is_file(), link
    titles = re.findall(r"^#+ (.*)", README, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors


def test_figures_are_made_of_a_run(trained, pictures, tmp_path):
    flags = ["--run", trained[0] / "run", "--data", pictures, "--out", tmp_path / "docs"]
    python(HERE / "docs" / "make_figures.py", *flags, cwd=tmp_path)
    names = ["bound-by-t", "forward", "loss-by-t", "rate-distortion", "schedule", "steps", "strip"]
    made = sorted((tmp_path / "docs").iterdir())
    assert [p.name for p in made] == sorted([*(f"{name}.png" for name in names), "reverse.gif"])
    for path in made:
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 10
            assert image.width >= 400 or path.suffix == ".gif"
    with Image.open(tmp_path / "docs" / "reverse.gif") as gif:
        assert gif.n_frames == sample.FRAMES + 2 and gif.info["loop"] == 0
    assert all(f"docs/{path.name}" in README for path in made)


# --------------------------------------------------------------------------------------------- demo


def right_demo_pictures(folder):
    """How many of the PNGs in a folder are demo pictures, but for 48 of 255 in a pixel's colour."""
    allowed = train.demo_pictures().permute(0, 2, 3, 1).numpy().astype(int)
    pictures = [np.asarray(Image.open(path)).astype(int) for path in sorted(folder.iterdir())]
    return sum(np.abs(allowed - p).max((1, 2, 3)).min() <= 48 for p in pictures), len(pictures)


def test_demo_is_judged_as_it_should_be(tmp_path):
    pictures = train.demo_pictures().permute(0, 2, 3, 1).numpy()
    assert len(pictures) == len(np.unique(pictures, axis=0)) == 216
    moved = np.roll(pictures[0], 3, axis=0)
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for k, picture in enumerate([pictures[0], pictures[215], moved, noise, 0 * noise + 255]):
        Image.fromarray(picture).save(tmp_path / f"{k}.png")
    assert right_demo_pictures(tmp_path) == (2, 5)


@pytest.mark.slow
def test_demo_learns_to_draw_in_four_minutes(tmp_path):
    """The README's first command as it stands there: 90 % of 64 samples are right."""
    for program in (["train.py"], ["export.py"], ["sample.py", "--onnx", "model.onnx"]):
        python(
            *program, *(["--dir", "each"] if len(program) > 1 else []), cwd=tmp_path, timeout=1200
        )
    right, n = right_demo_pictures(tmp_path / "each")
    assert n == 64 and right >= 0.9 * n, f"{right} of {n}"
