"""samplers.py against closed forms, the loop of ddpm.py, diffusers, and its earlier results.

tests/test_page.py compares it with the page's JavaScript.
"""

import itertools
import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from closed_forms import (
    PAPER,
    VARIANCES,
    M,
    S,
    algorithm_2,
    close,
    mean_and_deviation,
    oracle,
    randn,
    sample_moments,
    seeded,
    wobbly,
)

import beyond
import ddpm_numpy
from ddpm import Diffusion, linear_betas
from exact import exact_network
from samplers import SAMPLERS, Chain, ddim_step, node_weights, reverse, sa_solver_step

PAPER_BETAS = linear_betas().tolist()

# ---------------------------------------------------------------------------------------- the chain


def test_chain_has_the_tables_of_a_diffusion_through_its_levels():
    """With all steps, these are the paper's; sigma is compared where a sampler adds noise."""
    for variance, steps in itertools.product(VARIANCES, (1, 10, 1000)):
        chain = Chain(PAPER_BETAS, variance, steps)
        d = Diffusion(chain.betas, variance)
        close(d.alphas_bar, PAPER.alphas_bar[chain.tau], 1e-14)
        for name in vars(chain).keys() - {"tau"}:
            assert getattr(chain, name)[1:] == pytest.approx(getattr(d, name)[1:].tolist(), 1e-9)
        assert len({id(table) for table in vars(chain).values()}) == len(vars(chain))
    assert Chain(PAPER_BETAS, "large", 10).tau == list(range(99, 1000, 100))
    for steps in range(1, 1001):
        tau = Chain(PAPER_BETAS, "large", steps).tau
        assert tau[-1] == 999 and len(set(tau)) == steps and tau == sorted(tau)


# ----------------------------------------------------------------------- the loop, in two libraries

# (steps, sampler, eta, variance, whether a part is known) and x0_hat, as of commit 07889c4, where
# torch and numpy had a loop each
STORED = [
    (None, None, None, "large", False, [0.08191, 0.56321, 0.38111, -0.07354]),
    (None, None, None, "small", False, [0.07018, 0.5769, 0.40947, -0.05899]),
    (7, "ddpm", None, "large", False, [0.40697, 0.69068, 0.03839, -0.42523]),
    (7, "ddpm", None, "small", False, [0.38306, 0.82718, 0.17774, -0.38127]),
    (7, "ddim", 0.0, "large", False, [-0.01005, 0.93311, 1.04015, 0.06044]),
    (7, "ddim", 0.7, "large", False, [0.2811, 0.95107, 0.48307, -0.2469]),
    (7, None, None, "large", False, [-0.00942, 0.93621, 1.04303, 0.06419]),
    (20, None, None, "small", False, [-0.00833, 0.93764, 1.04433, 0.06744]),
    (7, "ddpm", None, "large", True, [0.2456, -0.5, 0.37186, -0.22787]),
    (7, "sa-solver", None, "large", True, [-0.00942, -0.5, 1.04303, 0.06419]),
]


def chain_of(library, d, shape, noise, x_T=None, known=None, **options):
    """Return [(t, x_t, x0_hat)] of wobbly in torch or numpy, as tensors. noise: an iterator."""
    if library == "torch":
        return list(beyond.sample_progressive(
            d, wobbly, shape, draw_noise=partial(next, noise), x_T=x_T, known=known, **options
        ))  # fmt: skip
    chain = ddpm_numpy.sample_progressive(
        wobbly, lambda: next(noise).numpy(), d.betas.numpy(), d.variance, **options,
        x_T=None if x_T is None else x_T.numpy(), known=known and [part.numpy() for part in known],
    )  # fmt: skip
    return [(t, torch.from_numpy(x), torch.from_numpy(x0)) for t, x, x0 in chain]


@pytest.mark.parametrize("steps, sampler, eta, variance, is_known, expected", STORED)
@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_samples_are_those_of_before(library, steps, sampler, eta, variance, is_known, expected):
    image, mask = torch.tensor([[[0.5, -0.5], [0.25, 0.75]]]), torch.tensor([[True, False]] * 2)
    mask[1, 1] = True
    waves = (1.4 * torch.sin(torch.arange(4.0) + 7 * k).view(1, 1, 2, 2) for k in range(100))
    d = Diffusion(linear_betas(50), variance)
    known = (image, mask) if is_known else None
    *_, (_, _, x0) = chain_of(library, d, (1, 1, 2, 2), waves, None, known, steps=steps,
                              sampler=sampler, eta=eta, clip=False)  # fmt: skip
    close(x0.flatten(), expected, 2e-5)


def both(d, shape, x_T=None, known=None, **options):
    """Return the chain in torch; check that numpy has the same, with as many draws of noise."""
    ours, theirs = iter(randn(2 * d.T, *shape)), iter(randn(2 * d.T, *shape))
    chain = chain_of("torch", d, shape, ours, x_T, known, **options)
    other = chain_of("numpy", d, shape, theirs, x_T, known, **options)
    for (t, x, x0), (t_, x_, x0_) in zip(chain, other, strict=True):
        assert t == t_ and x.dtype == x0.dtype == x_.dtype == x0_.dtype == torch.float32
        torch.testing.assert_close(x_, x, rtol=0, atol=2e-5)
        torch.testing.assert_close(x0_, x0, rtol=0, atol=2e-5)
    assert len([*ours]) == len([*theirs])
    steps = options["steps"] or d.T
    assert len(chain) == steps and chain[-1][0] == d.T // steps - 1
    return chain


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("x_T", [None, randn(2, 3, 4, 4, seed=1)])
def test_algorithm_2_is_the_loop_of_ddpm_py(variance, x_T):
    """Check numpy. In torch, it is that loop itself, so that changes to the loop take effect."""

    class Doubled(Diffusion):
        def predict_x0(self, x_t, t, eps):
            return 2 * super().predict_x0(x_t, t, eps)

    d, shape, noise = Diffusion(linear_betas(), variance), (2, 3, 4, 4), randn(1000, 2, 3, 4, 4)
    ours, theirs = iter(noise), iter(noise)
    paper = d.sample(wobbly, shape, draw_noise=partial(next, ours), x_T=x_T)
    *_, (_, _, x0) = chain_of("numpy", d, shape, theirs, x_T)
    torch.testing.assert_close(x0, paper, rtol=0, atol=2e-5)
    assert len([*ours]) == len([*theirs]) == (x_T is not None)
    doubled, everywhere = Doubled(linear_betas(), variance), (randn(3, 4, 4), torch.ones(4, 4) > 0)
    for steps in (None, 1000):
        *_, (_, _, x0) = chain_of("torch", d, shape, iter(noise), x_T, steps=steps)
        assert torch.equal(x0, paper)
        *_, (_, _, x0) = chain_of("torch", doubled, shape, iter(noise), x_T, steps=steps)
        assert (x0 - paper).abs().max() > 0.1
    for known, steps in ((everywhere, None), (None, 999)):
        plain, same = (chain_of("torch", x, shape, iter(randn(2000, *shape)), x_T, known,
                                steps=steps, sampler="ddpm") for x in (d, doubled))  # fmt: skip
        assert torch.equal(plain[-1][2], same[-1][2])


@pytest.mark.parametrize("sampler, eta", [("ddpm", None), ("ddim", 0.7), ("sa-solver", None)])
def test_samplers_have_the_same_options(sampler, eta):
    """This holds in torch and numpy, also for points."""
    d, shape, x_T = Diffusion(linear_betas(50)), (2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    check = partial(both, d, steps=20, sampler=sampler, eta=eta)
    for points in ((5, 2), (5, 3, 8)):
        check(points)
    assert torch.stack([x0 for *_, x0 in check(shape, clip=False)]).abs().max() > 1
    assert torch.equal(check(shape, x_T=x_T)[0][1], x_T)
    image, mask = randn(3, 4, 4).clamp(-1, 1), torch.eye(4).bool()
    chain = check(shape, known=(image, mask))
    for _, _, x0 in chain:
        assert torch.equal(x0[..., ~mask], image[..., ~mask].expand(2, -1, -1))
    if sampler == "sa-solver":  # x_t is drawn from q(x_t | x_0) of the image
        for noise, (t, x, _) in zip(randn(100, *shape)[1:21], chain, strict=True):
            x_t = d.q_sample(image, torch.tensor([t]), noise)
            torch.testing.assert_close(x[..., ~mask], x_t[..., ~mask])


@pytest.mark.parametrize("betas", [linear_betas(9), linear_betas(9).numpy(), [0.1] * 9])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_float32_stays_float32(sampler, betas):
    """This holds for all kinds of betas, in both libraries."""
    x = randn(2, 3)
    for noise in (x, x.numpy()):
        chain = reverse(lambda x_t, t: 0 * x_t, lambda n=noise: n, betas, "small", 5, sampler)
        assert {values.dtype for _, *pair in chain for values in pair} == {noise.dtype}


@pytest.mark.parametrize("steps", [None, 5])
def test_estimates_of_a_network_in_training_need_no_gradient(steps):
    network = torch.nn.Linear(3, 3)
    chain = beyond.sample_progressive(PAPER, lambda x, t: network(x), (2, 3), steps)
    _, x, x0 = next(chain)
    assert not x0.requires_grad and torch.is_grad_enabled() and network(x).requires_grad


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_batches_that_are_drawn_in_turn_do_not_mix(sampler):
    d = Diffusion(linear_betas(50))
    options = {"steps": 7, "sampler": sampler, "shape": (2, 3), "eps": wobbly}
    chains = [beyond.sample_progressive(d, generator=seeded(k), **options) for k in range(2)]
    *_, ((_, _, first), (_, _, second)) = zip(*chains, strict=True)
    assert torch.equal(first, beyond.sample(d, generator=seeded(0), **options))
    assert torch.equal(second, beyond.sample(d, generator=seeded(1), **options))


# ------------------------------------------------------------------------------------- the samplers


@pytest.mark.parametrize("t, steps, sampler", [(300, None, None), (300, 20, "ddpm"),
                                               (299, 20, None), (0, 1, None)])  # fmt: skip
def test_interpolation_starts_at_the_t_of_its_noise(t, steps, sampler):
    """It diffuses to t, then calls the network at that t; two peers begin at t - 1."""
    x0, noise, betas = randn(2, 3, 4, 4).clamp(-1, 1), randn(3, 4, 4, seed=1), linear_betas()
    x_t = ddpm_numpy.mix(*x0.numpy(), t, betas.numpy(), lambda: noise[None].numpy())
    a_t, b_t = PAPER.q_sample(x0, torch.tensor([t, t]), noise.expand(2, 3, 4, 4))[:, None]
    mixed = torch.cat([(1 - k / 10) * a_t + k / 10 * b_t for k in range(11)])
    np.testing.assert_allclose(x_t, mixed, rtol=0, atol=1e-5)
    # The chain from there has the same noise for every mixture.
    d = Diffusion(betas[: t + 1])
    assert both(d, (1, 3, 4, 4), mixed, steps=steps, sampler=sampler)[0][0] == t


def draw(d, *options):
    """Return a sample, with the same noise in each call."""
    noise = iter(randn(d.T, 2, 1, 4, 4))
    return beyond.sample(d, wobbly, (2, 1, 4, 4), *options, draw_noise=partial(next, noise))


def test_default_sampler_is_the_papers_with_all_steps():
    """With fewer, it is "sa-solver"; an eta selects "ddim", where 0 is the default."""
    d = Diffusion(linear_betas(50))
    assert torch.equal(draw(d, None), draw(d, 50, "ddpm"))
    solver, ddim = draw(d, 49, "sa-solver"), draw(d, 49, "ddim")
    assert torch.equal(draw(d, 49), solver) and not torch.equal(solver, ddim)
    assert torch.equal(draw(d, 49, "ddim", 0.0), ddim)
    assert torch.equal(draw(d, 50, None, 0.5), draw(d, 50, "ddim", 0.5))


def test_ddim_with_eta_1_is_the_small_ancestral_step():
    d = Diffusion(linear_betas(), "small")
    ancestral, ddim = draw(d, 100, "ddpm"), draw(d, 100, "ddim", 1.0)
    torch.testing.assert_close(ancestral, ddim, rtol=0, atol=2e-4)


def test_wrong_names_and_numbers_are_refused():
    in_numpy = partial(ddpm_numpy.sample_progressive, wobbly, None, PAPER_BETAS)
    for options in (dict(steps=0), dict(steps=1001), dict(eta=1.5), dict(eta=math.nan),
                    dict(sampler="dpm"), dict(sampler="sa-solver", eta=0.5)):  # fmt: skip
        word = [*options][-1]
        with pytest.raises(ValueError, match=word):
            beyond.sample(PAPER, wobbly, (1, 1, 4, 4), **options)
        with pytest.raises(ValueError, match=word):
            next(in_numpy(**options))
    with pytest.raises(ValueError, match="variance"):
        next(in_numpy(variance="Large"))
    for mask in (np.ones((4, 4)), torch.ones(4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="the mask must be of type bool, not "):
            next(in_numpy(known=(None, mask)))


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [None, 1, 2, 7])
def test_every_sampler_returns_the_image_of_an_oracle(variance, sampler, steps):
    """The image is clipped to [-1, 1], as x0_hat is in each step."""
    d, x0 = Diffusion(linear_betas(), variance), 2 * randn(2, 3, 4, 4)
    chain = beyond.sample_progressive(d, oracle(x0), x0.shape, steps, sampler, generator=seeded())
    for _, _, x0_hat in chain:
        torch.testing.assert_close(x0_hat, x0.clamp(-1, 1), rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:__array__")
@pytest.mark.parametrize("steps", [1, 2, 10, 20, 200])
def test_samplers_equal_diffusers(steps):
    """Compare each x_t. The steps divide T, because diffusers otherwise rounds to the nearest t.

    In its first steps, diffusers changes the second-order coefficients of SA-Solver, but not their
    sum. So here x0_hat is constant until its third order is reached.
    """
    from diffusers import DDIMScheduler, SASolverScheduler

    schedule = {"beta_start": 1e-4, "beta_end": 0.02, "timestep_spacing": "trailing"}
    clip = {"thresholding": True, "sample_max_value": 1.0}
    orders = {"predictor_order": 3, "corrector_order": 3, "lower_order_final": False}
    solver = SASolverScheduler(**schedule, **clip, **orders, tau_func=lambda t: 0)
    third, x_T = 1000 - 2 * (1000 // steps), randn(2, 3, 4, 4)
    constant = oracle(torch.full((2, 3, 4, 4), 0.5))

    def at_first_constant(x, t):
        return constant(x, t) if t[0] > third else wobbly(x, t)

    for sampler, eps, scheduler, options in (
        ("ddim", wobbly, DDIMScheduler(**schedule), {"use_clipped_model_output": True}),
        ("sa-solver", at_first_constant, solver, {}),
    ):
        x = x_T
        scheduler.set_timesteps(steps)
        ours = beyond.sample_progressive(PAPER, eps, x_T.shape, steps, sampler, x_T=x_T)
        for t, (t_, x_t, _) in zip(scheduler.timesteps, ours, strict=True):
            assert t == t_
            torch.testing.assert_close(x_t, x, rtol=0, atol=1e-4)
            x = scheduler.step(eps(x, t.expand(2)), t, x, **options).prev_sample


def ddim_as_printed(abar, abar_prev, eta):
    """Return p, q and sigma^2 of equation 12 of the DDIM paper: x <- p x + q eps + sigma z."""
    sigma2 = eta**2 * (1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)
    of_x0 = math.sqrt(abar_prev / abar)
    return of_x0, math.sqrt(1 - abar_prev - sigma2) - of_x0 * math.sqrt(1 - abar), sigma2


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("steps, eta", [(1000, None), (100, None), (10, None), (1000, 0.0),
                                        (50, 0.0), (50, 0.5), (50, 1.0)])  # fmt: skip
def test_fewer_steps_equal_the_recursion(variance, steps, eta):
    """With all steps, too, DDIM gets the width of the samples slightly wrong."""
    of_ddim = "ddim", ddim_as_printed, eta
    name, step, choice = ("ddpm", algorithm_2, variance) if eta is None else of_ddim
    expected = mean, deviation = mean_and_deviation(step, choice, steps)
    d = Diffusion(linear_betas(), variance)
    sample = partial(beyond.sample, d, steps=steps, sampler=name, eta=eta)
    assert sample_moments(sample, steps) == pytest.approx(expected, rel=1e-4)
    if (steps, eta) == (1000, 0):
        assert mean == pytest.approx(M, abs=1e-3)
        assert deviation / S == pytest.approx(0.990, abs=5e-4)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_weights_of_the_nodes_are_the_integral_of_the_polynomial(count):
    """Check steps of many lengths, with nodes before the step, and with one at its end."""
    points, masses = np.polynomial.legendre.leggauss(40)
    for h in (0.01, 0.3, 3.0):
        for latest in (0, 1):  # in steps: the start or, for the correction, the end of the step
            nodes = -0.7 + h * (latest - np.arange(count) ** 1.1)
            start, end = -0.7, -0.7 + h
            s = start + h * (points + 1) / 2
            weights = node_weights(nodes.tolist(), start, end)
            for k, weight in enumerate(weights):
                others = np.delete(nodes, k)
                lagrange = np.prod((s[:, None] - others) / (nodes[k] - others), axis=1)
                integral = h / 2 * (masses * np.exp(s - end) * lagrange).sum()
                assert weight == pytest.approx(integral, rel=1e-8)


def solution_of(step, x0_hat, x, T):
    """Return the x_t at t = 0 of steps without noise from x at T-1, for x0_hat(x, t)."""
    for t in reversed(range(1, T)):
        x = step(x0_hat(x, t), x, t, None)
    return x


def test_sa_solver_with_one_node_is_ddim():
    chain = Chain(PAPER_BETAS, "large", 10)
    steps = ddim_step(chain), sa_solver_step(chain, order=1, correct=False)
    x_T = randn(4, 3, 8, 8).double()
    ddim, one = (solution_of(step, lambda x, t: x.sin() + t, x_T, 10) for step in steps)
    close(one, ddim, 1e-12)


def error_of(make_step, abar, deviation):
    """Return the rms error of x_t at t = 0, for the data N(M, deviation^2) and the levels abar.

    Without noise, a sampler solves an ODE, in which the standardised x_t stays constant.
    """
    betas = 1 - abar / torch.cat([torch.ones(1), abar[:-1]])
    x_T, signal = randn(64, 1, 1, 1).double(), abar.sqrt()
    widths = (abar * deviation**2 + 1 - abar).sqrt()  # the standard deviation of x_t
    exact = signal[0] * M + widths[0] / widths[-1] * (x_T - signal[-1] * M)

    def x0_hat(x, t):  # E[x_0 | x_t]
        return M + signal[t] * deviation**2 / widths[t] ** 2 * (x - signal[t] * M)

    x = solution_of(make_step(Chain(betas, "large", len(betas))), x0_hat, x_T, len(betas))
    return (x - exact).square().mean().sqrt().item()


@pytest.mark.parametrize("order, correct", [(1, False), (2, False), (3, False), (3, True)])
def test_order_of_sa_solver(order, correct):
    """Doubling the steps scales the error by 2^-order if they are uniform in lambda.

    If the steps are uniform in t, the last ones do not become shorter in lambda. For every order,
    the error is then about inversely proportional to the number of steps.
    """
    step = partial(sa_solver_step, order=order, correct=correct)
    lambdas = (torch.linspace(1, -4, n + 1, dtype=torch.float64) for n in (80, 160, 320))
    errors = [error_of(step, torch.sigmoid(2 * lam), 0.15) for lam in lambdas]
    for rough, fine in pairwise(errors):
        assert math.log2(rough / fine) == pytest.approx(order, abs=0.3)
    # The first step has one node. Where the estimate changes, only the corrector makes up for it:
    lambdas = (torch.linspace(2, -1, n + 1, dtype=torch.float64) for n in (160, 320))
    rough, fine = (error_of(step, torch.sigmoid(2 * lam), 0.5) for lam in lambdas)
    expected = order if correct else min(order, 2)
    assert math.log2(rough / fine) == pytest.approx(expected, abs=0.3)
    chains = (Chain(PAPER_BETAS, "large", n) for n in (20, 200))
    rough, fine = (error_of(step, torch.tensor(c.alphas_bar).double(), 0.5) for c in chains)
    assert math.log10(rough / fine) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("steps", [10, 100])
def test_ddim_is_euler_in_the_coordinates_of_flow_matching(steps, clip):
    """The coordinate z = (1 - tau) x_0 + tau eps is a multiple of x_t; u = eps_hat - x0_hat."""
    chain, x_T = Chain(PAPER_BETAS, "large", steps), randn(4, 1, 4, 4).double()
    abar = torch.tensor(chain.alphas_bar, dtype=torch.float64)
    signal, spread = abar.sqrt(), (1 - abar).sqrt()
    scale, tau = signal + spread, spread / (signal + spread)
    # If u is wrong, x0_hat = z - tau u is off by tau times as much: its weight in the loss of u.
    snr = abar / (1 - abar)
    close(1 / tau**2, (1 + snr.sqrt()) ** 2, 1e-12)
    z = x_T / scale[-1]
    for i in reversed(range(steps)):
        noise = wobbly(scale[i] * z, torch.full((4,), chain.tau[i]))
        x0 = (z - tau[i] * noise) / (1 - tau[i])
        x0 = x0.clamp(-1, 1) if clip else x0
        noise = (z - (1 - tau[i]) * x0) / tau[i]
        z = z + (tau[i - 1] - tau[i]) * (noise - x0)
    close(beyond.sample(PAPER, wobbly, x_T.shape, steps, "ddim", x_T=x_T, clip=clip), x0)


@pytest.mark.parametrize(
    "steps, sampler, expected",
    [(1000, "ddim", -0.672), (100, "ddim", -0.676), (50, "sa-solver", -0.671)],
)
def test_without_noise_quantiles_stay_quantiles(steps, sampler, expected):
    """One image of four is at -1: a sample is there if x_T is below its 25% quantile.

    This is -0.674 for N(0, 1), and -0.671 for q(x_T). The image at -1 is the nearest wherever
    x_T < 0, but the three images at +1 have more weight together.
    """
    x_T, images = torch.linspace(-0.8, 0.1, 901), torch.tensor([-1.0, 1.0, 1.0, 1.0])
    x_T = x_T.view(-1, 1, 1, 1)
    network = exact_network(PAPER, images.view(4, 1, 1, 1))
    x0 = beyond.sample(PAPER, network, x_T.shape, steps, sampler, x_T=x_T).flatten()
    close(x0.abs(), torch.ones(901), 0.05)
    is_lone = x0 < 0
    assert not (is_lone[1:] > is_lone[:-1]).any()  # paths do not cross
    threshold = x_T.flatten()[is_lone].max().item() + 0.0005  # the middle of two x_T
    assert threshold == pytest.approx(expected, abs=0.001)
