"""Test each equation of ddpm.py against a closed form or a second derivation.

    pytest test_ddpm.py

needs ddpm.py beside it, torch, numpy and pytest. First come data, networks and samples that are
known in closed form, then the tests, in the order of ddpm.py. Numbers in parentheses are the
paper's equation numbers.
"""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ddpm import Attention, Diffusion, ResBlock, UNet, linear_betas

PAPER = Diffusion(linear_betas())
VARIANCES = ("large", "small")
M, S = 0.3, 0.15  # mean and standard deviation of the Gaussian data


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


def best_network(mean=M, deviation=S):
    """Return E[eps | x_t], which is linear in x_t, for x_0 ~ N(mean, deviation^2)."""

    def eps(x_t, t):
        abar = at(PAPER.alphas_bar, t)
        slope = (1 - abar).sqrt() / (abar * deviation**2 + 1 - abar)
        return (slope * (x_t.double() - abar.sqrt() * mean)).float()

    return eps


def oracle(x0):
    """Return a network that knows x_0, like best_network() for a Gaussian without width."""
    return best_network(x0, 0)


def wobbly(x_t, t):
    """A mock network for torch and numpy: it is nonlinear in x_t and different for each t."""
    return x_t / (0.5 + abs(x_t)) + float(t[0]) / 1000


def mean_and_deviation(variance, levels=range(999, -1, -1)):
    """Return mean and standard deviation of the samples of best_network(), by a recursion over t.

    The step is Algorithm 2 as printed, x <- p x + q eps + sigma z. The recursion shares no code
    with the sampler.
    """
    abars = PAPER.alphas_bar[[*levels]].tolist()
    mean, deviation2 = 0.0, 1.0
    for abar, abar_prev in pairwise([*abars, 1.0]):
        alpha = abar / abar_prev
        p, q = 1 / math.sqrt(alpha), -(1 - alpha) / math.sqrt(1 - abar) / math.sqrt(alpha)
        small = (1 - abar_prev) / (1 - abar) * (1 - alpha)
        sigma2 = 1 - alpha if variance == "large" and abar_prev < 1 else small
        slope = math.sqrt(1 - abar) / (abar * S**2 + 1 - abar)  # eps = slope (x - sqrt(abar) M)
        mean = (p + q * slope) * mean - q * slope * math.sqrt(abar) * M
        deviation2 = (p + q * slope) ** 2 * deviation2 + sigma2
    return mean, math.sqrt(deviation2)


def sample_moments(sample, draws):
    """Return the exact mean and standard deviation of what a sampler draws with best_network().

    Image k receives one unit of noise, at draw k, and the last image receives none.
    """
    noise = iter(torch.eye(draws + 1).view(-1, draws + 1, 1, 1, 1))
    x0 = sample(best_network(), (draws + 1, 1, 1, 1), draw_noise=partial(next, noise), clip=False)
    x0 = x0.double().flatten()
    return x0[-1].item(), (x0[:-1] - x0[-1]).norm().item()


def small_unet(jitter=0.1, **kwargs):
    torch.manual_seed(0)
    settings = dict(image_size=8, base_channels=8, channel_mults=(1, 2), num_res_blocks=1,
                    attention_resolutions=(4,))  # fmt: skip
    model = UNet(**(settings | kwargs)).eval()
    with torch.no_grad():  # layers that are near zero would hide the others
        for p in model.parameters():
            p.add_(jitter * torch.randn_like(p))
    return model


def unet_without_values(**kwargs):
    with torch.device("meta"):
        return UNet(**kwargs)


def layers(model, kind):
    return [m for m in model.modules() if isinstance(m, kind)]


# ------------------------------------------------------------------------------- the noise schedule


def test_linear_schedule_has_the_papers_numbers():
    d = PAPER
    assert d.T == 1000 and d.betas.dtype == torch.float64
    close(d.betas[[0, -1]], [1e-4, 0.02], 1e-15)
    close(d.alphas_bar[[0, 1]], [0.9999, 0.9997800920720721], 1e-15)
    assert d.alphas_bar[999].item() == pytest.approx(4.035829765375676e-05, rel=1e-12)
    close(d.posterior_variance[[0, 1, 2]] * 1e5, [0, 5.45318766, 8.54891152], 1e-8)
    assert d.posterior_variance[999].item() == pytest.approx(0.01999998352656061, rel=1e-12)
    assert math.log(d.sigma2[0]) == pytest.approx(-9.81672513529567, rel=1e-10)  # the next one's
    close(d.sigma**2, d.sigma2, 1e-15)
    assert (1 / d.alphas_bar[999]).sqrt().item() == pytest.approx(157.41046, rel=1e-7)


@pytest.mark.parametrize("variance, middle", [("large", 0.3), ("small", 0.3 * 0.1 / 0.37)])
def test_short_schedules_are_possible(variance, middle):
    """Their betas are Python's numbers, which are float64."""
    assert Diffusion([0.1], variance).sigma2.tolist() == [0.1]
    close(Diffusion([0.1, 0.3], variance).sigma2, [0.3 * 0.1 / 0.37, middle], 1e-15)


def test_impossible_betas_and_variances_are_refused():
    for betas in ([], [0.1, 1.0], [0.0, 0.1], [[0.1]], [0.1, math.nan], [1e-300]):
        with pytest.raises(ValueError, match="betas"):
            Diffusion(betas)
    with pytest.raises(ValueError, match="variance"):
        Diffusion(linear_betas(), "medium")


# ----------------------------------------------------------------------- q, the forward process


def test_closed_form_equals_the_iterated_step():
    """Compare (4) with (2), x_t = sqrt(alpha_t) x_{t-1} + sqrt(beta_t) z; (15) inverts (4)."""
    means, variances = [1.0], [0.0]
    for beta in PAPER.betas.tolist():
        means.append(math.sqrt(1 - beta) * means[-1])
        variances.append((1 - beta) * variances[-1] + beta)
    t, ones = torch.arange(PAPER.T), torch.ones(PAPER.T, 1)
    close(PAPER.q_sample(ones, t, 0 * ones)[:, 0], means[1:])
    close(PAPER.q_sample(0 * ones, t, ones)[:, 0] ** 2, variances[1:])
    x0, noise = randn(PAPER.T, 8).clamp(-1, 1), randn(PAPER.T, 8, seed=1)
    x_t = PAPER.q_sample(x0, t, noise)
    torch.testing.assert_close(PAPER.predict_x0(x_t, t, noise), x0, rtol=0, atol=1e-4)


def test_posterior_is_bayes_rule():
    """q(x_{t-1} | x_t, x_0) ~ q(x_t | x_{t-1}) q(x_{t-1} | x_0), two Gaussians in x_{t-1}."""
    t = torch.tensor([1, 2, 400, 999])
    x0, x_t = randn(4, 1, 2, 2), randn(4, 1, 2, 2, seed=1)
    mean, variance = PAPER.q_posterior(x0, x_t, t)
    alpha, beta, abar_prev = at(PAPER.alphas, t), at(PAPER.betas, t), at(PAPER.alphas_bar, t - 1)
    likelihood, prior = alpha / beta, 1 / (1 - abar_prev)  # precisions
    close(variance * (likelihood + prior), torch.ones(4, 1, 1, 1), 5e-7)
    weighted = likelihood * x_t / alpha.sqrt() + prior * abar_prev.sqrt() * x0
    close(mean, weighted / (likelihood + prior), 1e-5)


def test_posterior_is_a_regression_on_the_noise():
    """Its mean is sqrt(abar_{t-1}) x_0 + k eps, and k^2 + beta-tilde_t = 1 - abar_{t-1}."""
    t, x0, eps = torch.tensor([1, 2, 400, 999]), randn(4, 1, 2, 2), randn(4, 1, 2, 2, seed=1)
    mean, variance = PAPER.q_posterior(x0, PAPER.q_sample(x0, t, eps), t)
    tables = PAPER.alphas, PAPER.alphas_bar, PAPER.alphas_bar_prev
    alpha, abar, abar_prev = (at(table, t) for table in tables)
    k = alpha.sqrt() * (1 - abar_prev) / (1 - abar).sqrt()
    close(mean, abar_prev.sqrt() * x0 + k * eps, 1e-5)
    close(k**2 + variance, 1 - abar_prev, 1e-6)


@pytest.mark.parametrize("t", [1, 9, 99, 499])
def test_variance_of_the_reverse_step_lies_between_the_two_of_the_paper(t):
    """For the data +1 and -1, integrate, and use (7), where E[x_0 | x_t] is a tanh."""
    alpha, beta, abar = PAPER.alphas[t], PAPER.betas[t], PAPER.alphas_bar[t]
    abar_prev, small = PAPER.alphas_bar_prev[t], PAPER.posterior_variance[t]
    before = torch.linspace(-5, 5, 1601, dtype=torch.float64)  # x_{t-1}
    x_t = before[:, None]

    def density(x, abar):
        """Return q(x_t), up to a constant."""
        return sum((-((x - m * abar.sqrt()) ** 2) / (2 - 2 * abar)).exp() for m in (1, -1))

    joint = (-((x_t - alpha.sqrt() * before) ** 2) / (2 * beta)).exp() * density(before, abar_prev)
    weights = joint / joint.sum(1, keepdim=True)
    mean = (weights * before).sum(1)
    variance = (weights * before**2).sum(1) - mean**2
    mean_x0 = (abar.sqrt() * before / (1 - abar)).tanh()
    closed = small + abar_prev * (beta / (1 - abar)) ** 2 * (1 - mean_x0**2)
    likely = (density(before, abar) > 1e-6) & (before.abs() < 4)  # not near the ends of the grid
    close(variance[likely] / beta, closed[likely] / beta, 1e-5)
    share = density(before, abar) / density(before, abar).sum()
    assert small * (1 - 1e-9) < (share * closed).sum() < beta


# ---------------------------------------------------------------------------- training, Algorithm 1


def test_loss_is_the_mean_squared_error_of_the_noise():
    x0, noise, t = randn(4, 3, 8, 8), randn(4, 3, 8, 8, seed=1), torch.tensor([0, 5, 500, 999])
    seen = []
    loss = PAPER.loss(lambda x_t, t: seen.append((x_t, t)) or 0.5 * x_t, x0, t, noise)
    x_t = PAPER.q_sample(x0, t, noise)
    assert torch.equal(seen[0][0], x_t) and torch.equal(seen[0][1], t)
    error = PAPER.squared_error(lambda x_t, t: 0.5 * x_t, x0, t, noise)
    close(error, (noise - 0.5 * x_t) ** 2)
    close(loss, error.mean())


def test_loss_draws_every_t_and_unit_noise():
    seen = []
    torch.manual_seed(0)
    d = Diffusion(linear_betas(4))
    loss = d.loss(lambda x_t, t: seen.append((x_t, t)) or 0 * x_t, torch.zeros(4000, 1, 2, 2))
    x_t, t = seen[0]
    assert set(t.tolist()) == {0, 1, 2, 3} == set(d.draw_t(99).tolist())  # including the last
    assert loss.item() == pytest.approx(1, abs=0.05)  # E|eps|^2 per pixel
    assert x_t[t == 3].var() == pytest.approx(1 - d.alphas_bar[3].item(), rel=0.1)


def test_simple_loss_is_least_at_the_closed_form():
    """For Gaussian data, L_simple is larger at any slope other than the best one, at each t."""
    x0, noise = 0.5 * randn(2000, 1, 4, 4), randn(2000, 1, 4, 4, seed=1)
    network = best_network(0, 0.5)
    for t in (50, 300, 999):
        abar, times = PAPER.alphas_bar[t].item(), torch.full((2000,), t)
        models = [lambda x, t, k=k: k * network(x, t) for k in (0.9, 1, 1.1)]
        less, best, more = (PAPER.loss(model, x0, times, noise).item() for model in models)
        assert best < less and best < more
        assert best == pytest.approx(abar / 4 / (abar / 4 + 1 - abar), rel=0.05, abs=1e-3)


def test_forward_process_stays_float32_under_autocast():
    """In bfloat16, 1 - abar_t is 0 for t < 10, so the target would be noise that x_t lacks."""
    x0, noise, t = torch.zeros(10, 1, 2, 2), torch.ones(10, 1, 2, 2), torch.arange(10)
    seen = []
    with torch.autocast("cpu", torch.bfloat16):
        loss = PAPER.loss(lambda x, t: seen.append(x) or x.bfloat16(), x0, t, noise)
    assert loss.dtype == seen[0].dtype == torch.float32
    close(seen[0][:, 0, 0, 0] ** 2, 1 - PAPER.alphas_bar[:10])


def test_vlb_weights_have_the_papers_numbers():
    weights, x0, noise = PAPER.bound_weights(), torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    weights[0] *= PAPER.sigma2[0] / PAPER.betas[0]  # sigma_1^2 = beta_1 in the paper's number
    for t, weight in ((0, 0.50005), (1, 0.27269), (999, 0.010204)):
        error = PAPER.squared_error(lambda x, t: 0 * x, x0, torch.tensor([t]), noise)
        assert (weights[t] * error).item() == pytest.approx(weight, rel=1e-4)


# ---------------------------------------------------------------------------- the variational bound


def test_decoder_probabilities_sum_to_one():
    values = (torch.arange(256).double() / 127.5 - 1).view(-1, 1)
    mean, sigma = torch.tensor([[-1.2, -0.5, 0.001, 0.99]]), torch.tensor(0.01)
    mass = PAPER.decoder_log_likelihood(values, mean, sigma).exp()
    close(mass.sum(0), torch.ones(4), 1e-9)
    assert mass.argmax(0).tolist() == [0, 64, 128, 254]
    least = PAPER.decoder_log_likelihood(values[:1], torch.ones(1), sigma)
    assert least.item() == pytest.approx(math.log(1e-12))
    above, below = (math.erfc((0.05 + k / 255) / 0.01 / math.sqrt(2)) for k in (1, -1))
    for k in range(3):  # in float32, Phi would round to 1; the argument with a dimension decides
        row = [v.view(1) if i == k else v for i, v in enumerate(torch.tensor([0, -0.05, 0.01]))]
        close(PAPER.decoder_log_likelihood(*row), [math.log((below - above) / 2)], 1e-6)


def test_bound_of_a_single_step_is_the_closed_form():
    """The network estimates 0.5 for each value of two images, so the mean of the decoder is 0.5."""
    d, x0 = Diffusion([0.1]), torch.tensor([[-1, 1], [0.2, 0.6]]).view(2, 1, 1, 2)
    bound = d.vlb(lambda x_t, t: (x_t - math.sqrt(0.9) * 0.5) / math.sqrt(0.1), x0)
    assert {part.dtype for part in bound} == {torch.float64}
    squares = x0.double().square().mean((1, 2, 3))
    close(bound.L_T, (0.9 * squares - 0.9 - math.log(0.1)) / 2 / math.log(2))
    bins = (-math.inf, -254), (254, math.inf), (50, 52), (152, 154)  # the ends are open
    cdf = [[math.erf((x / 255 - 0.5) / math.sqrt(0.2)) / 2 for x in ends] for ends in bins]
    bits = -torch.tensor([above - below for below, above in cdf]).double().log2().view(2, 2)
    close(bound.L_t, bits.mean(1, keepdim=True), 1e-5)
    close(bound.mse, [[(1.5**2 + 0.5**2) / 2], [(0.3**2 + 0.1**2) / 2]])


@pytest.mark.parametrize("variance", VARIANCES)
def test_bound_of_an_oracle_depends_on_the_schedule_alone(variance):
    """If eps is the true noise, the means agree, and each KL compares two variances."""
    d = Diffusion(linear_betas(), variance)
    x0 = torch.randint(256, (4, 3, 8, 8), generator=seeded()) / 127.5 - 1
    is_end = x0.abs() > 0.999
    bound = d.vlb(oracle(torch.where(is_end, 3 * x0, x0)), x0)  # x0_hat is clipped
    ratio = d.posterior_variance[1:] / d.sigma2[1:]
    terms = (ratio - 1 - ratio.log()) / 2 / math.log(2)
    torch.testing.assert_close(bound.L_t[:, 1:], terms.expand(4, -1), rtol=1e-3, atol=1e-6)
    assert (variance == "small") == (terms.sum() < 1e-9)
    inside = math.erf(1 / 255 / math.sqrt(2 * d.sigma2[0].item()))
    share = torch.where(is_end, 0.5 + inside / 2, inside)  # the bins at the ends are open
    L_0 = -share.double().log2().mean((1, 2, 3))
    torch.testing.assert_close(bound.L_t[:, 0], L_0, rtol=1e-3, atol=0)
    close(bound.total, bound.L_T + bound.L_t.sum(1))


@pytest.mark.parametrize("variance", VARIANCES)
def test_bound_of_gaussian_data_is_the_closed_form(variance):
    """The error of the best network is the variance of x_0 given x_t."""
    d, x0 = Diffusion(linear_betas(), variance), M + S * randn(64, 1, 16, 16)
    abar = d.alphas_bar
    bound = d.vlb(best_network(), x0, seeded(1))
    left = S**2 * (1 - abar) / (abar * S**2 + 1 - abar)
    ratio = d.posterior_variance / d.sigma2
    of_x0 = abar.div(d.alphas).sqrt() * d.betas / (1 - abar)  # in the posterior mean (7)
    terms = ((ratio - 1 - ratio.log() + of_x0**2 * left / d.sigma2) / 2 / math.log(2))[1:]
    L_t, error = bound.L_t.mean(0), 6 * math.sqrt(2 / x0.numel())
    torch.testing.assert_close(bound.mse.mean(0), left, rtol=error, atol=0)
    torch.testing.assert_close(L_t[1:], terms, rtol=error, atol=1e-7)
    assert L_t[1:].sum().item() == pytest.approx(terms.sum().item(), rel=0.01)
    # L_0 by quadrature: the error of x0_hat is N(0, left), and the bin is around x_0
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    error, sigma = nodes * math.sqrt(left[0]), math.sqrt(d.sigma2[0])
    cdf = np.vectorize(lambda x: (1 + math.erf(x / math.sqrt(2))) / 2)
    share = cdf((1 / 255 - error) / sigma) - cdf((-1 / 255 - error) / sigma)
    L_0 = -(weights * np.log2(share.clip(1e-12))).sum() / weights.sum()
    assert L_t[0].item() == pytest.approx(L_0, rel=0.02)
    # L_T: (abar x_0^2 - abar - log(1 - abar)) / 2
    abar_T = abar[-1].item()
    L_T = (abar_T * x0.square().mean().item() - abar_T - math.log1p(-abar_T)) / 2 / math.log(2)
    assert bound.L_T.mean().item() == pytest.approx(L_T, rel=1e-3)


def test_bound_is_an_area_under_the_squared_error_of_x0_hat():
    """With the small variance, L_{t-1} = (SNR_{t-1} - SNR_t) |x_0 - x0_hat|^2 / 2 for t > 1."""
    d = Diffusion(linear_betas(), "small")
    snr = d.alphas_bar / (1 - d.alphas_bar)
    widths = (snr[:-1] - snr[1:]) / 2
    of_error = (d.posterior_x0**2 / (2 * d.posterior_variance))[1:]  # by (7) and (8)
    torch.testing.assert_close(of_error, widths, rtol=1e-11, atol=0)
    bound = d.vlb(wobbly, randn(4, 3, 8, 8).clamp(-1, 1), seeded())
    terms = widths * bound.mse[:, 1:] / math.log(2)
    # In float32, x0_hat changes the mean (7) at large t by little more than the rounding.
    torch.testing.assert_close(bound.L_t[:, 1:], terms, rtol=1e-3, atol=0)
    torch.testing.assert_close(bound.L_t[:, 1:500], terms[:, :499], rtol=1e-5, atol=0)
    area = (widths * (1 - d.alphas_bar[1:])).sum().item() / math.log(2)  # the best for N(0, 1)
    assert area == pytest.approx(7.31, abs=0.005)


@pytest.mark.parametrize("variance, gap", [("large", 0.142), ("small", 0.731)])
def test_bound_is_above_the_exact_likelihood(variance, gap):
    """For Gaussian data and the best eps, p(x_0) is a Gaussian integrated over the bin of x_0.

    The gaps belong to these 65,536 values; with 2.4 million, they are 0.131 and 0.718.
    """
    d = Diffusion(linear_betas(), variance)
    x0 = ((M + S * randn(256, 1, 16, 16) + 1) * 127.5).round() / 127.5 - 1
    bound = d.vlb(best_network(), x0, seeded(1)).total.mean().item()
    # These are of x0_hat, to which the decoder adds sigma_1:
    mean, deviation = mean_and_deviation(variance)

    def bits(mean, variance):
        halves = torch.tensor([-1, 1]).view(2, 1, 1, 1, 1) / 255
        below, above = torch.special.ndtr((x0.double() + halves - mean) / variance**0.5)
        return -(above - below).log2().mean().item()

    exact = bits(mean, deviation**2 + d.sigma2[0])
    assert bits(M, S**2) <= exact < bound
    assert bound - exact == pytest.approx(gap, abs=0.01)


# ---------------------------------------------------------------------------- sampling, Algorithm 2


def test_algorithm_2_takes_the_posterior_mean_of_the_unclipped_x0():
    """The expected step uses (11), which is (7) with the x_0 of (15)."""
    t = torch.tensor([0, 1, 10, 500, 999])
    x_t, eps = randn(5, 3, 4, 4), randn(5, 3, 4, 4, seed=1)
    ours, _ = PAPER.q_posterior(PAPER.predict_x0(x_t, t, eps), x_t, t)
    beta, alpha, abar = (at(table, t) for table in (PAPER.betas, PAPER.alphas, PAPER.alphas_bar))
    close(ours, (x_t - beta / (1 - abar).sqrt() * eps) / alpha.sqrt(), 1e-5)


@pytest.mark.parametrize("variance, width", [("large", 1.006), ("small", 0.975)])
def test_sampler_equals_the_recursion(variance, width):
    """With T = 1000, even the best network gets the width of the samples slightly wrong."""
    expected = mean, deviation = mean_and_deviation(variance)
    sample = Diffusion(linear_betas(), variance).sample
    assert sample_moments(sample, 1000) == pytest.approx(expected, rel=1e-4)
    assert mean == pytest.approx(M, abs=1e-3) and deviation / S == pytest.approx(width, abs=5e-4)


def test_known_answers():
    """diffusers publishes them for the toy network x_t t / (t + 1), in its tests/schedulers."""
    d, n = Diffusion(linear_betas(), "small"), 4 * 3 * 8 * 8
    x_T = (torch.arange(n) / n).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)

    def toy(x, t):
        return x * at(torch.arange(1000) / torch.arange(1, 1001), t)

    def from_v(x, t):  # the toy network's output is v
        abar = at(d.alphas_bar.float(), t)
        return abar.sqrt() * toy(x, t) + (1 - abar).sqrt() * x

    for model, published in (toy, 258.9606), (from_v, 202.0296):
        torch.manual_seed(0)
        noise = partial(torch.randn, x_T.shape)
        x0 = d.sample(model, x_T.shape, x_T=x_T, draw_noise=noise)
        assert x0.abs().sum().item() == pytest.approx(published, abs=1e-2)
    close(d.posterior_variance[[487, 999]], [0.00979, 0.02], 1e-5)
    for t, s, published in (420, 400, 0.14771), (980, 960, 0.32460):  # of DDIM with eta = 1
        abar_t, abar_s = d.alphas_bar[t], d.alphas_bar[s]
        variance = Diffusion([1 - abar_s, 1 - abar_t / abar_s]).posterior_variance[1]
        assert variance.item() == pytest.approx(published, abs=1e-5)


def test_noise_is_drawn_for_x_T_and_for_each_step_but_the_last():
    """The generator draws it, or draw_noise in its place."""
    d, shape, generator = Diffusion(linear_betas(10)), (1, 1, 4, 4), seeded(5)
    noise = iter([torch.randn(shape, generator=generator) for _ in range(10)])
    x0 = d.sample(wobbly, shape, seeded(5))
    assert torch.equal(d.sample(wobbly, shape, draw_noise=partial(next, noise)), x0)
    assert not [*noise]
    assert d.sample(wobbly, shape, seeded(5), clip=False).abs().max() > 1 >= x0.abs().max()


def test_truncated_chain_is_the_beginning_of_the_chain():
    """Hence Diffusion(betas[: t + 1]) continues from an x_t."""
    for variance in VARIANCES:
        whole, cut = (Diffusion(linear_betas()[:n], variance) for n in (1000, 301))
        for name in ("alphas_bar", "posterior_variance", "sigma2"):
            assert torch.equal(getattr(cut, name), getattr(whole, name)[:301])
    x_t = randn(2, 1, 4, 4)
    steps = list(cut.sample_progressive(wobbly, x_t.shape, x_T=x_t))
    assert [t for t, _, _ in steps] == list(range(300, -1, -1)) and torch.equal(steps[0][1], x_t)


@pytest.mark.parametrize("shape", [(5, 2), (5, 3, 8)])
def test_points_and_sequences_need_no_more_dimensions(shape):
    """They give the same results as images with the same values."""
    image = (*shape, *[1] * (4 - len(shape)))
    x0, noise, t = randn(*shape).clamp(-1, 1), randn(*shape), torch.tensor([0, 9, 99, 500, 999])
    d, model = Diffusion(linear_betas(20, 0.01, 0.3)), lambda x, t: x.tanh()
    close(PAPER.loss(model, x0, t, noise), PAPER.loss(model, x0.view(image), t, noise.view(image)))
    x0s = [d.sample(model, size, seeded()) for size in (shape, image)]
    assert x0s[0].shape == shape
    close(x0s[0], x0s[1].view(shape))
    torch.testing.assert_close(*(d.vlb(model, x.round(), seeded()) for x in (x0, x0.view(image))))


# -------------------------------------------------------------------------------------- the network


def appendix_b(p, x, t, y, attends, blocks, groups, dropout):
    """Return eps of the paper's U-Net with the weights p, a state dict, without modules.

    attends: whether each level has attention. blocks: on each level on the way down.
    """

    def linear(name, h):
        return F.linear(h, p[f"{name}.weight"], p[f"{name}.bias"])

    def conv(name, h, padding=1, stride=1):
        return F.conv2d(h, p[f"{name}.weight"], p[f"{name}.bias"], stride, padding)

    def norm(name, h):
        return F.group_norm(h, groups, p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)

    def block(name, x, attend):
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", x)))
        h = h + linear(f"{name}.time_proj", F.silu(temb))[:, :, None, None]
        h = conv(f"{name}.conv2", dropout(F.silu(norm(f"{name}.norm2", h))))
        x = h + (conv(f"{name}.shortcut", x, 0) if f"{name}.shortcut.weight" in p else x)
        if not attend:
            return x
        h = norm(f"{name}.attention.norm", x).flatten(2).mT  # a row for each pixel
        q, k, v = (linear(f"{name}.attention.{part}", h) for part in "qkv")
        h = (q @ k.mT / q.shape[2] ** 0.5).softmax(2) @ v
        return x + linear(f"{name}.attention.out", h).mT.reshape(x.shape)

    angles = t[:, None] * 10000 ** -torch.linspace(0, 1, len(p["conv_in.weight"]) // 2)
    temb = linear("time_mlp.0", torch.cat([angles.sin(), angles.cos()], 1))
    temb = linear("time_mlp.2", F.silu(temb))
    if "class_embedding.weight" in p:
        temb = temb + p["class_embedding.weight"][y]
    skips, last = [conv("conv_in", x)], len(attends) - 1
    for level, attend in enumerate(attends):
        for k in range(blocks):
            skips.append(block(f"down.{level}.{k}", skips[-1], attend))
        if level < last:  # padded right and below, as in TensorFlow
            h = F.pad(skips[-1], (0, 1, 0, 1))
            skips.append(conv(f"down.{level}.{blocks}.conv", h, 0, 2))
    h = block("middle.1", block("middle.0", skips[-1], True), False)
    for level, attend in enumerate(reversed(attends)):
        for k in range(blocks + 1):
            h = block(f"up.{level}.{k}", torch.cat([h, skips.pop()], 1), attend)
        if level < last:
            h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
            h = conv(f"up.{level}.{blocks + 1}.conv", h)
    return conv("conv_out", F.silu(norm("norm_out", h)))


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("classes", [0, 3])
def test_network_is_appendix_b(classes, float64, monkeypatch):
    """Compare every operation in its order, with three levels, attention at two, and dropout."""
    settings = dict(image_size=16, in_channels=2, channel_mults=(1, 2, 3), num_res_blocks=2,
                    attention_resolutions=(8, 4), dropout=0.2, norm_groups=4,
                    num_classes=classes)  # fmt: skip
    model = small_unet(**settings).train()
    t, y = torch.tensor([0, 7, 999]), torch.tensor([0, 1, 3]) if classes else None
    x, seen = torch.randn(3, 2, 16, 8), []

    def dropout(h, p=0.2, training=True, inplace=False):
        seen.append(training)
        return h * (torch.arange(h.numel()) % 5 > 0).view_as(h) / (1 - p)

    monkeypatch.setattr(F, "dropout", dropout)
    expected = appendix_b(model.state_dict(), x, t, y, (False, True, True), 2, 4, dropout)
    eps = model(x, t, *[y] * bool(classes))
    torch.testing.assert_close(eps, expected, rtol=1e-12, atol=1e-12)
    assert eps.shape == x.shape and all(seen) and eps.std() > 0.1
    model.eval()(x[:1], t[:1])
    assert not any(seen[-17:]) and len(seen) == 3 * 17


def test_parameter_counts_of_the_paper():
    def parameters(**kwargs):
        return sum(p.numel() for p in unet_without_values(**kwargs).parameters())

    assert parameters() == 35_746_307
    assert parameters(image_size=256, channel_mults=(1, 1, 2, 2, 4, 4)) == 113_673_219
    assert {m.p for m in layers(unet_without_values(), torch.nn.Dropout)} == {0.1}


def test_attention_stands_where_the_paper_has_it():
    attends = [isinstance(b.attention, Attention) for b in layers(unet_without_values(), ResBlock)]
    assert [k for k, attend in enumerate(attends) if attend] == [2, 3, 8, 16, 17, 18]


def test_group_norms_are_the_papers():
    for base, groups in ((128, 32), (256, 32), (64, 16), (32, 8), (16, 4), (12, 1), (4, 1)):
        norms = layers(unet_without_values(base_channels=base), torch.nn.GroupNorm)
        assert {(m.num_groups, m.eps) for m in norms} == {(groups, 1e-6)}


def test_initialization_is_glorot_and_near_zero_where_residual_branches_end():
    torch.manual_seed(0)
    model = UNet(base_channels=32)
    assert model(randn(2, 3, 32, 32), torch.tensor([0, 999])).abs().max() < 1e-3
    w = model.down[0][0].conv1.weight  # uniform in +- sqrt(6 / (fan_in + fan_out))
    assert w.abs().max().item() == pytest.approx(math.sqrt(6 / (2 * 32 * 9)), rel=0.01)
    near_zero = [m for m in model.modules() if hasattr(m, "weight") and m.weight.abs().max() < 1e-4]
    assert len(near_zero) == len(layers(model, ResBlock | Attention)) + 1
    for w in (m.weight for m in near_zero):
        fans = sum(w.shape[:2]) * w[0, 0].numel()
        assert w.abs().max().item() == pytest.approx(1e-5 * math.sqrt(6 / fans), rel=0.02)
    assert all(not m.bias.any() for m in layers(model, torch.nn.Conv2d | torch.nn.Linear))


def test_classes_are_a_row_each_beside_the_time_embedding():
    """At first, no row has an effect. The last row belongs to "no class"."""
    x, t, model = randn(4, 3, 8, 8), torch.tensor([0, 5, 500, 999]), small_unet(num_classes=3)
    assert torch.equal(model(x, t), model(x, t, torch.full((4,), 3)))
    assert torch.equal(small_unet(0, num_classes=3).class_embedding.weight, torch.zeros(4, 32))


def test_everything_is_computed_on_the_device_of_the_arguments(monkeypatch):
    """The "meta" device holds no values. No gradient is kept where none is needed."""
    zeros = partial(torch.zeros_like, device="cpu")
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: zeros(x, requires_grad=x.requires_grad))
    with torch.device("meta"):
        d, x0, model = Diffusion([0.1, 0.2]), torch.ones(2, 3, 32, 32), UNet(num_classes=2)
    loss, bound = d.loss(model, x0), d.vlb(model, x0)
    assert loss.device == x0.device and loss.requires_grad
    assert {(part.device.type, part.requires_grad) for part in bound} == {("cpu", False)}
    for start in {"device": "meta"}, {"x_T": x0}:
        sample = d.sample(model, x0.shape, **start)
        assert sample.device == x0.device and not sample.requires_grad


def test_sizes_that_fit_are_accepted_and_others_named():
    """The smallest image has a pixel for each step down; every level may have attention."""
    unet_without_values(image_size=8, attention_resolutions=(8, 4, 2, 1))
    for settings, message in (
        (dict(image_size=28), "image_size must be a multiple of 8"),
        (dict(image_size=0), "image_size must be a multiple of 8"),
        (dict(base_channels=30), "base_channels must be a multiple of 4"),
        (dict(base_channels=0), "base_channels must be a multiple of 4"),
        (dict(image_size=48), r"attention_resolutions \[16\] must be among \[48, 24, 12, 6\]"),
    ):
        with pytest.raises(ValueError, match=message):
            UNet(**settings)
    for shape, message in (
        ((1, 3, 8, 7), "multiples of 2"),
        ((1, 3, 7, 8), "multiples of 2"),
        ((3, 8, 8), r"x_t must have the shape .* not \(3, 8, 8\)"),  # without the batch dimension
    ):
        with pytest.raises(ValueError, match=message):
            PAPER.loss(small_unet(), torch.zeros(shape))
