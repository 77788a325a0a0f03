"""The loop of sample.py against ddpm.py, diffusers, closed forms and the solution of its ODE."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from ddpm import Diffusion, linear_betas
from sample import SAMPLERS, reverse
from test_ddpm import PAPER, M, S, close, mean_and_deviation, randn, sample_moments, wobbly

BETAS = linear_betas().tolist()
SHAPE = 2, 3, 4, 4


def evenly_spaced(steps, end=20):
    """Return the visited t, from 999 to end - 1, or to 1000 / steps - 1 if it is less."""
    last = min(end, 1000 // steps) - 1
    return [math.ceil(t) for t in np.linspace(999, last, steps).round(6)]


def nonlinear(x_t, t):
    return wobbly(x_t, [t])


def chain(eps, noise, *args, **options):
    """Return [(t, x_t, x0_hat)], and check that the loop has drawn all of the noise."""
    noise = iter(noise)
    steps = list(reverse(eps, noise.__next__, *args, **options))
    assert not [*noise]
    return steps


def assert_same_chain(ours, theirs):
    """Compare each t, x_t and x0_hat, float32, in torch or numpy."""
    for (t, *values), (t_, *expected) in zip(ours, theirs, strict=True):
        values, expected = ([*map(torch.as_tensor, pair)] for pair in (values, expected))
        assert t == t_ and {v.dtype for v in values + expected} == {torch.float32}
        torch.testing.assert_close(values, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("start", [999, 300])
@pytest.mark.parametrize("variance", ["large", "small"])
def test_algorithm_2_is_the_loop_of_ddpm_py(variance, start):
    """Compare each x_t and x0_hat in torch and numpy, from pure noise or from an x_t."""
    betas, noise = BETAS[: start + 1], randn(start + 1, *SHAPE)
    draw_noise = iter(noise).__next__
    d = Diffusion(betas, variance)
    paper = list(d.sample_progressive(wobbly, SHAPE, draw_noise=draw_noise))
    assert_same_chain(chain(nonlinear, noise, betas, variance), paper)
    assert_same_chain(chain(nonlinear, noise.numpy(), betas, variance), paper)
    assert paper[0][0] == start and torch.equal(paper[0][1], noise[0])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_fewer_steps_in_torch_and_numpy(sampler):
    """They are the same for points and images, in float32 and with any kind of betas."""
    for shape in (5, 2), SHAPE:
        noise = randn(7 if sampler == "ddpm" else 1, *shape)
        options = dict(variance="small", steps=7, sampler=sampler)
        ours = chain(nonlinear, noise, linear_betas(50), **options)
        levels = [49, 42, 35, 28, 21, 14, 6] if sampler == "ddpm" else [49, 41, 33, 25, 17, 9, 0]
        assert [t for t, *_ in ours] == levels
        assert_same_chain(
            ours, chain(nonlinear, noise.numpy(), linear_betas(50).numpy(), **options)
        )


@pytest.mark.filterwarnings("ignore:__array__")
@pytest.mark.parametrize("sampler, order", [("ddim", 1), (None, 2)])  # None: DPM-Solver++
@pytest.mark.parametrize("steps", [1, 2, 10, 50, 200])
@pytest.mark.parametrize("clip", [True, False])
def test_ddim_and_dpm_solver_equal_diffusers(sampler, order, steps, clip):
    """Compare each x_t. DDIM is the solver of first order."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, solver_order=order, algorithm_type="dpmsolver++",
        thresholding=clip, sample_max_value=1.0, lower_order_final=False,
    )  # fmt: skip
    levels = evenly_spaced(steps)
    scheduler.set_timesteps(timesteps=levels)
    x = randn(*SHAPE)
    ours = chain(nonlinear, [x], BETAS, steps=steps, sampler=sampler, clip=clip)
    for t, (t_, x_t, _) in zip(levels, ours, strict=True):
        assert t == t_
        torch.testing.assert_close(x_t, x, rtol=1e-5, atol=1e-4)
        x = scheduler.step(nonlinear(x, t), t, x).prev_sample


@pytest.mark.parametrize("variance", ["large", "small"])
@pytest.mark.parametrize("steps", [1000, 100, 10])
def test_algorithm_2_with_fewer_steps_equals_the_recursion(variance, steps):
    def sample(eps, shape, draw_noise, clip):
        *_, (_, _, x0) = reverse(eps, draw_noise, BETAS, variance, steps, "ddpm", clip)
        return x0

    expected = pytest.approx(mean_and_deviation(variance, evenly_spaced(steps, 1000)), rel=1e-4)
    assert sample_moments(sample, steps) == expected


def last(eps, noise, *args):
    """Return the last x_t and x0_hat without the clip."""
    return chain(eps, [noise], *args, clip=False)[-1][1:]


@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("dpm-solver++", 2)])
def test_order_of_convergence(sampler, order):
    """Doubling the steps, if they are uniform in log SNR, divides the error by 2^order.

    For Gaussian data, the solution of the ODE is known: x_t keeps its distance from the mean,
    measured in standard deviations.
    """
    x_T, errors = randn(64, 1, 1, 1).double(), []
    for n in 80, 160, 320:
        abar = torch.linspace(4, -8, n + 1, dtype=torch.float64).sigmoid()
        betas = 1 - abar / torch.cat([torch.ones(1), abar[:-1]])
        widths, signal = (abar * S**2 + 1 - abar).sqrt(), abar.sqrt()

        def eps(x, t, abar=abar, widths=widths):
            return (1 - abar[t]).sqrt() / widths[t] ** 2 * (x - abar[t].sqrt() * M)

        exact = signal[0] * M + widths[0] / widths[-1] * (x_T - signal[-1] * M)
        x, _ = last(eps, x_T, betas, "large", n + 1, sampler)
        errors.append((x - exact).square().mean().sqrt().item())
    for rough, fine in pairwise(errors):
        assert math.log2(rough / fine) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("steps", [10, 100])
def test_ddim_is_euler_in_the_coordinates_of_flow_matching(steps):
    """The coordinate z = (1 - tau) x_0 + tau eps is a multiple of x_t; dz/dtau = eps - x_0."""
    levels, x_T = evenly_spaced(steps), randn(4, 1, 4, 4).double()
    signal, spread = PAPER.alphas_bar[levels].sqrt(), (1 - PAPER.alphas_bar[levels]).sqrt()
    scale, tau = signal + spread, (spread / (signal + spread)).tolist()
    z = x_T / scale[0]
    for i, t in enumerate(levels):
        noise = nonlinear(scale[i] * z, t)
        x0 = (z - tau[i] * noise) / (1 - tau[i])
        z = z + ([*tau, 0][i + 1] - tau[i]) * (noise - x0)
    close(last(nonlinear, x_T, BETAS, "large", steps, "ddim")[1], x0)


@pytest.mark.parametrize(
    "sampler, steps, expected",
    [("ddim", 1000, -0.672), ("ddim", 100, -0.676), ("dpm-solver++", 50, -0.671)],
)
def test_without_noise_quantiles_stay_quantiles(sampler, steps, expected):
    """One image of four is at -1: a sample is there if x_T is below its 25% quantile.

    This is -0.674 for N(0, 1), and -0.671 for q(x_T). The image at -1 is the nearest wherever
    x_T < 0, but the three images at +1 have more weight together.
    """

    def eps(x, t):
        abar = PAPER.alphas_bar[t].item()
        x0 = (math.sqrt(abar) / (1 - abar) * x + math.log(3) / 2).tanh()  # E[x_0 | x_t]
        return (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)

    x_T = torch.linspace(-0.8, 0.1, 901)
    _, x0 = last(eps, x_T, BETAS, "large", steps, sampler)
    close(x0.abs(), torch.ones(901), 0.05)
    assert not ((x0 < 0)[1:] > (x0 < 0)[:-1]).any()  # paths do not cross
    threshold = x_T[x0 < 0].max().item() + 0.0005  # the middle of two x_T
    assert threshold == pytest.approx(expected, abs=0.001)


@pytest.mark.parametrize(
    "name, value", [("steps", 0), ("steps", 1001), ("sampler", "dpm"), ("variance", "Large")]
)
def test_wrong_names_and_numbers_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}.* {value!r}"):
        next(reverse(nonlinear, None, BETAS, **{name: value}))
