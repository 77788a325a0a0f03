"""beyond.py against closed forms, diffusers, and ddpm_numpy.py with the same noise."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import PAPER, VARIANCES, close, oracle, randn, seeded

import beyond
import ddpm_numpy
from beyond import as_eps, cosine_betas, guided, loss_weights, respaced
from ddpm import Diffusion, linear_betas
from exact import exact_network
from test_ddpm import M, S, algorithm_2, best_network, mean_and_deviation, sample_moments, wobbly

OUTPUTS = "eps", "mean", "x0", "v"
SAMPLERS = "ddpm", "ddim", "sa-solver"

# ------------------------------------------------------------- schedules, targets and their weights


def test_cosine_schedule_is_a_squared_cosine():
    abar = Diffusion(cosine_betas(1000)).alphas_bar
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    close(abar[:990], [f[t + 1] / f[0] for t in range(990)], 1e-12)
    assert cosine_betas().max() == 0.999


def output_of(eps, x_t, t, predicts):
    """Return what a network has to return so that the noise in x_t is eps, by the definitions."""
    beta, abar = (table[t].view(-1, 1, 1, 1) for table in (PAPER.betas, PAPER.alphas_bar))
    eps, x_t = eps.double(), x_t.double()
    x0 = (x_t - (1 - abar).sqrt() * eps) / abar.sqrt()
    mean = (x_t - beta / (1 - abar).sqrt() * eps) / (1 - beta).sqrt()  # (11)
    v = abar.sqrt() * eps - (1 - abar).sqrt() * x0
    return {"eps": eps, "mean": mean, "x0": x0, "v": v}[predicts]


def network_of(eps, predicts):
    """Return a network that knows the noise eps(x_t, t) + y, but predicts something else."""
    return lambda x_t, t, y=0: output_of(eps(x_t, t) + y, x_t, t, predicts).float()


@pytest.mark.parametrize("predicts", OUTPUTS)
def test_noise_is_found_from_each_output_of_a_network(predicts):
    """The "native" loss is the squared error of the output; other losses do not depend on it."""
    x0, noise, t = randn(5, 1, 4, 4), randn(5, 1, 4, 4, seed=1), torch.tensor([0, 1, 9, 500, 999])
    x_t = PAPER.q_sample(x0, t, noise)
    network = network_of(lambda x_t, t: noise, predicts)
    found = as_eps(network, PAPER, predicts)(x_t, t)
    torch.testing.assert_close(found, noise, rtol=0, atol=1e-4)
    eps = as_eps(lambda x_t, t: 0.9 * network(x_t, t), PAPER, predicts)
    native = PAPER.loss(eps, x0, t, noise, loss_weights(PAPER, "native", predicts))
    error = (0.1 * output_of(noise, x_t, t, predicts)).square().mean()
    torch.testing.assert_close(native.double(), error, rtol=1e-3, atol=0)
    assert loss_weights(PAPER, "simple", predicts) is None
    assert torch.equal(loss_weights(PAPER, "vlb", predicts), PAPER.bound_weights())
    assert torch.equal(*(loss_weights(PAPER, "min-snr", name) for name in ("eps", predicts)))


def test_min_snr_weights_are_those_of_hang_et_al():
    """min(SNR, 5) for the error of x_0, which is min(SNR, 5) / (SNR + 1) for that of v."""
    weights = loss_weights(PAPER, "min-snr", "v")
    x0, noise = randn(1, 1, 4, 4), randn(1, 1, 4, 4, seed=1)
    for t in torch.tensor([[0], [50], [126], [140], [500], [999]]):
        snr = (PAPER.alphas_bar[t] / (1 - PAPER.alphas_bar[t])).item()
        x_t = PAPER.q_sample(x0, t, noise)
        x0_hat = PAPER.predict_x0(x_t, t, 0.9 * noise)
        loss = PAPER.loss(lambda x, t: 0.9 * noise, x0, t, noise, weights)
        expected = min(snr, 5) * (x0_hat - x0).square().mean()
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
        v = output_of(noise, x_t, t, "v")
        eps = as_eps(lambda x, t, v=v: 0.9 * v.float(), PAPER, "v")
        loss = PAPER.loss(eps, x0, t, noise, weights)
        expected = min(snr, 5) / (snr + 1) * (0.1 * v).square().mean()
        torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=0)


def test_unknown_targets_and_weights_are_refused():
    for make in (lambda: as_eps(None, PAPER, "score"), lambda: loss_weights(PAPER, "vlb", "score")):
        with pytest.raises(ValueError, match="predicts"):
            make()
    with pytest.raises(ValueError, match="the weights must be in"):
        loss_weights(PAPER, "none")


def test_samples_and_bound_do_not_depend_on_what_is_predicted():
    """The same eps in another form draws the same Gaussian, and has the same bound."""
    x0 = (M + S * randn(16, 1, 8, 8)).clamp(-1, 1)
    networks = [as_eps(network_of(best_network(), p), PAPER, p) for p in OUTPUTS[1:]]
    for steps, sampler in ((None, "ddpm"), (100, "ddpm"), (50, "ddim"), (20, "sa-solver")):
        expected, *drawn = (
            beyond.sample(PAPER, eps, (64, 1, 1, 1), steps, sampler, generator=seeded())
            for eps in (best_network(), *networks)
        )
        for x in drawn:
            torch.testing.assert_close(x, expected, rtol=0, atol=1e-3)
    expected, *bounds = (PAPER.vlb(eps, x0, seeded()).total for eps in (best_network(), *networks))
    for bound in bounds:
        torch.testing.assert_close(bound, expected, rtol=1e-3, atol=0)


# -------------------------------------------------------------------------------------- fewer steps


def test_shorter_chain_passes_the_same_noise_levels():
    """With all steps, it is the plain chain, for both variances."""
    chain, _, tau = respaced(PAPER, None, 10)
    assert tau.tolist() == [99, 199, 299, 399, 499, 599, 699, 799, 899, 999]
    close(chain.alphas_bar, PAPER.alphas_bar[tau], 1e-14)
    _, eps, _ = respaced(*respaced(PAPER, lambda x, t: t, 10)[:2], 5)
    assert eps(None, torch.arange(5)).tolist() == [199, 399, 599, 799, 999]
    for steps in range(1, 1001):
        tau = respaced(PAPER, None, steps)[2].tolist()
        assert tau[-1] == 999 and len(set(tau)) == steps and tau == sorted(tau)
        assert tau == ddpm_numpy.respaced(linear_betas().numpy(), steps)[1].tolist()
    for d in (PAPER, Diffusion(linear_betas(), "small")):
        chain, _, _ = respaced(d, None, 1000)
        for name in ("betas", "alphas_bar", "posterior_variance", "sigma2"):
            table, plain = getattr(chain, name), getattr(d, name)
            torch.testing.assert_close(table, plain, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("predicts", OUTPUTS)
def test_shorter_chain_asks_the_same_network(predicts):
    """Its loss and its noise at t are those of the whole chain at tau[t]."""
    whole = as_eps(network_of(best_network(), predicts), PAPER, predicts)
    t = torch.tensor([0, 3, 6])
    chain, eps, tau = respaced(PAPER, whole, 7)
    x0, noise = randn(3, 1, 4, 4), randn(3, 1, 4, 4, seed=1)
    x_t = PAPER.q_sample(x0, tau[t], noise)
    close(chain.q_sample(x0, t, noise), x_t)
    close(eps(x_t, t), best_network()(x_t, tau[t]), 1e-4)
    with_class = eps(x_t, t, torch.tensor([1]))
    close(with_class, best_network()(x_t, tau[t]) + 1, 1e-4)
    close(chain.loss(eps, x0, t, noise), PAPER.loss(whole, x0, tau[t], noise), 1e-4)


def test_subclass_keeps_its_changes_on_a_shorter_chain():
    """As for a student who overrides a method: previews and samples with `steps` use it, too."""

    class Doubled(Diffusion):
        def predict_x0(self, x_t, t, eps):
            return 2 * super().predict_x0(x_t, t, eps)

    sample = partial(beyond.sample, eps=lambda x, t: 0 * x, shape=(2, 3, 4, 4),
                     x_T=randn(2, 3, 4, 4), steps=1, clip=False)  # fmt: skip
    close(sample(Doubled(linear_betas())), 2 * sample(PAPER))


# ------------------------------------------------------------------------------------- the samplers


def check_numpy(d, shape, x_T=None, known=None, **options):
    """Compare the samplers of torch and numpy, given the same noise; return the chain."""
    ours, theirs = iter(randn(d.T, *shape)), iter(randn(d.T, *shape).numpy())
    chain = list(beyond.sample_progressive(
        d, wobbly, shape, draw_noise=partial(next, ours), x_T=x_T, known=known, **options
    ))  # fmt: skip
    numpy_chain = ddpm_numpy.sample_progressive(
        wobbly, partial(next, theirs), d.betas.numpy(), d.variance, **options,
        x_T=None if x_T is None else x_T.numpy(), known=known and [part.numpy() for part in known],
    )  # fmt: skip
    for (t, x, x0), (t_, x_, x0_) in zip(chain, numpy_chain, strict=True):
        assert t == t_ and x_.dtype == x0_.dtype == np.float32
        np.testing.assert_allclose(x_, x, rtol=0, atol=2e-5)
        np.testing.assert_allclose(x0_, x0, rtol=0, atol=2e-5)
    assert len([*ours]) == len([*theirs])
    steps = options["steps"] or d.T
    assert len(chain) == steps and chain[-1][0] == d.T // steps - 1
    return chain


# steps, sampler, eta
CHAINS = [(steps, sampler, None) for steps in (None, 1, 2, 50) for sampler in (None, *SAMPLERS)]
CHAINS += [(1000, None, None), (50, None, 0.0), (50, "ddim", 0.7), (20, None, 1.0)]


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("steps, sampler, eta", CHAINS)
def test_numpy_sampler_is_the_torch_sampler(variance, steps, sampler, eta):
    d = Diffusion(linear_betas(), variance)
    check_numpy(d, (2, 3, 4, 4), steps=steps, sampler=sampler, eta=eta)


@pytest.mark.parametrize("sampler, eta", [("ddpm", None), ("ddim", 0.7), ("sa-solver", None)])
def test_samplers_have_the_same_options(sampler, eta):
    """In torch and numpy, also for points; tests/test_page.py compares numpy and JavaScript."""
    d, shape, x_T = Diffusion(linear_betas(50)), (2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    check = partial(check_numpy, d, steps=20, sampler=sampler, eta=eta)
    for points in ((5, 2), (5, 3, 8)):
        check(points)
    assert torch.stack([x0 for *_, x0 in check(shape, clip=False)]).abs().max() > 1
    assert torch.equal(check(shape, x_T=x_T)[0][1], x_T)
    image, mask = randn(3, 4, 4).clamp(-1, 1), torch.eye(4).bool()
    chain = check(shape, known=(image, mask))
    for _, _, x0 in chain:
        assert torch.equal(x0[..., ~mask], image[..., ~mask].expand(2, -1, -1))
    if sampler == "sa-solver":  # x_t is drawn from q(x_t | x_0) of the image
        for noise, (t, x, _) in zip(randn(50, *shape)[1:21], chain, strict=True):
            x_t = d.q_sample(image, torch.tensor([t]), noise)
            torch.testing.assert_close(x[..., ~mask], x_t[..., ~mask])


@pytest.mark.parametrize("t, steps, sampler", [(300, None, None), (300, 20, "ddpm"),
                                               (299, 20, None), (0, 1, None)])  # fmt: skip
def test_interpolation_starts_at_the_t_of_its_noise(t, steps, sampler):
    """Diffuse to t, then call the network at that t; two peers begin at t - 1."""
    x0, noise, betas = randn(2, 3, 4, 4).clamp(-1, 1), randn(2, 3, 4, 4, seed=1), linear_betas()
    z = iter(noise[:, None].numpy())
    x_t = ddpm_numpy.mix(*x0.numpy(), t, betas.numpy(), partial(next, z))
    a_t, b_t = PAPER.q_sample(x0, torch.tensor([t, t]), noise)[:, None]
    mixed = torch.cat([(1 - k / 10) * a_t + k / 10 * b_t for k in range(11)])
    np.testing.assert_allclose(x_t, mixed, rtol=0, atol=1e-5)
    # The chain from there has the same noise for every mixture.
    d = Diffusion(betas[: t + 1])
    assert check_numpy(d, (1, 3, 4, 4), mixed, steps=steps, sampler=sampler)[0][0] == t


def draw(d, *options):
    """Return a sample, with the same noise in each call."""
    noise = iter(randn(d.T, 2, 1, 4, 4))
    return beyond.sample(d, wobbly, (2, 1, 4, 4), *options, draw_noise=partial(next, noise))


def test_default_sampler_is_the_papers_with_all_steps():
    """With fewer, it is "sa-solver"; an eta selects "ddim", where 0 is the default."""
    d, noise = Diffusion(linear_betas(50)), iter(randn(50, 2, 1, 4, 4))
    paper = draw(d, 50, "ddpm")
    close(paper, d.sample(wobbly, (2, 1, 4, 4), draw_noise=partial(next, noise)))
    assert torch.equal(draw(d, None), paper) and torch.equal(draw(d, 50), paper)
    solver, ddim = draw(d, 49, "sa-solver"), draw(d, 49, "ddim")
    assert torch.equal(draw(d, 49), solver) and not torch.equal(solver, ddim)
    assert torch.equal(draw(d, 49, "ddim", 0.0), ddim)
    assert torch.equal(draw(d, 50, None, 0.5), draw(d, 50, "ddim", 0.5))


def test_ddim_with_eta_1_is_the_small_ancestral_step():
    d = Diffusion(linear_betas(), "small")
    ancestral, ddim = draw(d, 100, "ddpm"), draw(d, 100, "ddim", 1.0)
    torch.testing.assert_close(ancestral, ddim, rtol=0, atol=2e-4)


def test_samplers_refuse_wrong_names_and_numbers():
    in_numpy = partial(ddpm_numpy.sample_progressive, wobbly, None, linear_betas().numpy())
    for options in (dict(steps=0), dict(steps=1001), dict(eta=1.5), dict(eta=math.nan),
                    dict(sampler="dpm"), dict(sampler="sa-solver", eta=0.5)):  # fmt: skip
        word = [*options][-1]
        with pytest.raises(ValueError, match=word):
            beyond.sample(PAPER, wobbly, (1, 1, 4, 4), **options)
        with pytest.raises(ValueError, match=word):
            next(in_numpy(**options))
    with pytest.raises(ValueError, match="variance"):
        next(in_numpy(variance="Large"))


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [None, 1, 2, 7])
def test_every_sampler_returns_the_image_of_an_oracle(variance, sampler, steps):
    """Clipped to [-1, 1], as x0_hat is in each step."""
    d, x0 = Diffusion(linear_betas(), variance), 2 * randn(2, 3, 4, 4)
    chain = beyond.sample_progressive(d, oracle(x0), x0.shape, steps, sampler, generator=seeded())
    for _, _, x0_hat in chain:
        torch.testing.assert_close(x0_hat, x0.clamp(-1, 1), rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:__array__")
@pytest.mark.parametrize("steps", [1, 2, 10, 20, 200])
def test_samplers_equal_diffusers(steps):
    """Each x_t, in steps that divide T: where they do not, diffusers rounds to the nearest t.

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


def ddim_step(abar, abar_prev, eta):
    """Return p, q and sigma^2 of equation 12 of the DDIM paper: x <- p x + q eps + sigma z."""
    sigma2 = eta**2 * (1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)
    of_x0 = math.sqrt(abar_prev / abar)
    return of_x0, math.sqrt(1 - abar_prev - sigma2) - of_x0 * math.sqrt(1 - abar), sigma2


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("steps, eta", [(1000, None), (100, None), (10, None), (1000, 0.0),
                                        (50, 0.0), (50, 0.5), (50, 1.0)])  # fmt: skip
def test_fewer_steps_equal_the_recursion(variance, steps, eta):
    """With all steps, too, DDIM gets the width of the samples slightly wrong."""
    of_ddim = "ddim", ddim_step, eta
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
    """For steps of all lengths, with nodes before the step, and with one at its end."""
    points, masses = np.polynomial.legendre.leggauss(40)
    for h in (0.01, 0.3, 3.0):
        for latest in (0, 1):  # in steps: the start or, for the correction, the end of the step
            nodes = -0.7 + h * (latest - np.arange(count) ** 1.1)
            start, end = -0.7, -0.7 + h
            s = start + h * (points + 1) / 2
            weights = beyond.node_weights(nodes.tolist(), start, end)
            assert weights == pytest.approx(ddpm_numpy.node_weights(nodes.tolist(), start, end))
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
    chain, _, _ = respaced(PAPER, None, 10)
    steps = beyond.ddim_step(chain), beyond.sa_solver_step(chain, order=1, correct=False)
    x_T = randn(4, 3, 8, 8).double()
    ddim, one = (solution_of(step, lambda x, t: x.sin() + t, x_T, 10) for step in steps)
    close(one, ddim, 1e-12)


def error_of(make_step, abar, deviation):
    """Return the rms error of x_t at t = 0, for the data N(M, deviation^2) and the levels abar.

    Without noise, a sampler solves an ODE, in which the standardised x_t stays constant.
    """
    chain = Diffusion(1 - abar / torch.cat([torch.ones(1), abar[:-1]]))
    x_T, signal = randn(64, 1, 1, 1).double(), abar.sqrt()
    widths = (abar * deviation**2 + 1 - abar).sqrt()  # the standard deviation of x_t
    exact = signal[0] * M + widths[0] / widths[-1] * (x_T - signal[-1] * M)

    def x0_hat(x, t):  # E[x_0 | x_t]
        return M + signal[t] * deviation**2 / widths[t] ** 2 * (x - signal[t] * M)

    x = solution_of(make_step(chain), x0_hat, x_T, chain.T)
    return (x - exact).square().mean().sqrt().item()


@pytest.mark.parametrize("order, correct", [(1, False), (2, False), (3, False), (3, True)])
def test_order_of_sa_solver(order, correct):
    """Double the steps, and the error falls to 2^-order of itself if they are uniform in lambda.

    With those that are uniform in t, the last ones do not become shorter in lambda, and the error
    of every order is about inversely proportional to the number of steps.
    """
    step = partial(beyond.sa_solver_step, order=order, correct=correct)
    lambdas = (torch.linspace(1, -4, n + 1, dtype=torch.float64) for n in (80, 160, 320))
    errors = [error_of(step, torch.sigmoid(2 * lam), 0.15) for lam in lambdas]
    for rough, fine in pairwise(errors):
        assert math.log2(rough / fine) == pytest.approx(order, abs=0.3)
    chains = (respaced(PAPER, None, n)[0] for n in (20, 200))
    rough, fine = (error_of(step, chain.alphas_bar, 0.5) for chain in chains)
    assert math.log10(rough / fine) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("steps", [10, 100])
def test_ddim_is_euler_in_the_coordinates_of_flow_matching(steps, clip):
    """In z = (1 - tau) x_0 + tau eps, a multiple of x_t, with the velocity eps_hat - x0_hat."""
    (chain, eps, _), x_T = respaced(PAPER, wobbly, steps), randn(4, 1, 4, 4).double()
    signal, spread = chain.sqrt_alphas_bar, chain.sqrt_one_minus_alphas_bar
    scale, tau = signal + spread, spread / (signal + spread)
    # If u is wrong, x0_hat = z - tau u is off by tau times as much: its weight in the loss of u.
    snr = chain.alphas_bar / (1 - chain.alphas_bar)
    close(1 / tau**2, (1 + snr.sqrt()) ** 2, 1e-12)
    z = x_T / scale[-1]
    for i in reversed(range(steps)):
        noise = eps(scale[i] * z, torch.full((4,), i))
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
    """One image of four is at -1: a sample is there if x_T is below its 25 % quantile.

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


# ----------------------------------------------------------------------------------------- guidance

# Two classes in one dimension: class k has the share SHARES[k] and is N(MEANS[k], STDS[k]^2).
SHARES, MEANS, STDS = torch.tensor([[0.3, 0.7], [-0.4, 0.5], [0.2, 0.1]], dtype=torch.float64)


def log_joint(x, abar):
    """log p_t(x, y) for each class y, (..., 2)."""
    normal = torch.distributions.Normal(abar.sqrt() * MEANS, (abar * STDS**2 + 1 - abar).sqrt())
    return SHARES.log() + normal.log_prob(x[..., None])


def exact_eps_at(x, abar, y=None):
    """E[eps | x_t = x], given the class y or without one, in closed form. Shaped like x."""
    eps = (1 - abar).sqrt() * (x[..., None] - abar.sqrt() * MEANS) / (abar * STDS**2 + 1 - abar)
    weights = log_joint(x, abar).softmax(-1)
    if y is not None:
        weights = torch.nn.functional.one_hot(y, 2)[:, None, None, None]
    return (weights * eps).sum(-1)


def exact_model(x_t, t, y=None):
    return exact_eps_at(x_t.double(), PAPER.alphas_bar[t[0]], y)


@pytest.mark.parametrize("w", [0, 2])
@pytest.mark.parametrize("t", [0, 100, 500])
def test_guidance_is_the_score_of_the_class_raised_to_a_power(t, w):
    """-eps / sqrt(1 - abar) is the gradient of log p_t(x) + (1 + w) log p_t(y | x)."""
    abar = PAPER.alphas_bar[t]
    x = (abar.sqrt() * torch.linspace(-1, 1, 9)).double().view(9, 1, 1, 1).requires_grad_()
    for y in (0, 1):
        joint = log_joint(x, abar)
        density = joint.logsumexp(-1) + (1 + w) * joint.log_softmax(-1)[..., y]
        (score,) = torch.autograd.grad(density.sum(), x)
        eps = guided(exact_model, torch.full((9,), y), w)(x, torch.full((9,), t))
        close(-eps / (1 - abar).sqrt(), score, 1e-9)


def test_guided_samples_are_those_of_a_fine_solution():
    """The classical Runge-Kutta method solves dx/d sigma = eps, where x = x_t / sqrt(abar_t)."""
    x_T, y, w = randn(32, 1, 1, 1).double(), torch.arange(32) % 2, 2

    def slope(x, log_sigma):
        abar = torch.sigmoid(-2 * log_sigma)
        x_t = x * abar.sqrt()
        eps = (1 + w) * exact_eps_at(x_t, abar, y) - w * exact_eps_at(x_t, abar)
        return eps * log_sigma.exp()

    ends = -PAPER.alphas_bar[[-1, 0]].logit() / 2
    grid = torch.linspace(*ends.tolist(), 201, dtype=torch.float64)
    x, h = x_T / PAPER.alphas_bar[-1].sqrt(), grid[1] - grid[0]
    for u in grid[:-1]:
        k1 = slope(x, u)
        k2 = slope(x + h / 2 * k1, u + h / 2)
        k3 = slope(x + h / 2 * k2, u + h / 2)
        k4 = slope(x + h * k3, u + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    assert (x[y == 0] < -0.3).all() and (x[y == 1] > 0.4).all()
    for sampler, error in (("ddim", 0.02), ("sa-solver", 0.002)):
        *_, (_, x_t, _) = beyond.sample_progressive(
            PAPER, guided(exact_model, y, w), x_T.shape, None, sampler, x_T=x_T, clip=False
        )
        assert (x_t - x * PAPER.alphas_bar[0].sqrt()).abs().max() < error
