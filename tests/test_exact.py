"""extras/exact.py against densities that autograd differentiates, and what follows for the demo.

The demo has 216 images of 192 values. With the exact network, its loss, samples and bound are known
without any training.
"""

import itertools
import math
import re
from functools import partial

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from ddpm import Diffusion, linear_betas
from docs import copies
from docs.points import only_first
from extras import variants
from extras.exact import exact_network, mean_squared_error
from images import demo_images, from_pixels
from test_ddpm import PAPER, VARIANCES, S, close, oracle, randn, seeded

DEMO = from_pixels(torch.from_numpy(demo_images()))


@pytest.mark.parametrize("std", [0, 0.3])
@pytest.mark.parametrize("t", [0, 100, 999])
def test_exact_noise_is_the_score_of_the_density(t, std):
    """E[eps | x_t] = -sqrt(1 - abar) grad log q(x_t), and autograd differentiates q."""
    images, x = randn(7, 2, 3, 3).double(), randn(5, 2, 3, 3, seed=1).double().requires_grad_()
    abar = PAPER.alphas_bar[t]
    deviation = (abar * std**2 + 1 - abar).sqrt()
    parts = Independent(Normal(abar.sqrt() * images.flatten(1), deviation), 1)
    log_q = MixtureSameFamily(Categorical(torch.ones(7)), parts).log_prob(x.flatten(1))
    (score,) = torch.autograd.grad(log_q.sum(), x)
    eps = exact_network(PAPER, images, std=std)(x.detach(), torch.full((5,), t))
    torch.testing.assert_close(eps.double(), -(1 - abar).sqrt() * score, rtol=1e-6, atol=1e-6)


def test_exact_network_takes_a_t_and_a_class_for_each_image():
    images, labels, x = randn(9, 1, 2, 2), torch.arange(9) % 3, randn(4, 1, 2, 2, seed=1)
    t, y = torch.tensor([5, 300, 700, 999]), torch.tensor([2, 0, 3, 1])  # 3 is "no class"
    eps = exact_network(PAPER, images, labels)(x, t, y)
    for k in range(4):
        own = images if y[k] == 3 else images[labels == y[k]]
        close(eps[k : k + 1], exact_network(PAPER, own)(x[k : k + 1], t[k : k + 1]))


def test_mean_squared_error_is_that_of_each_image():
    """It keeps no gradients, and computes where the images are, as the exact network does."""
    x0, t, scale = randn(300, 1, 2, 2, seed=1), torch.arange(300), torch.ones(1).requires_grad_()
    model = lambda x, t: scale * x / (1 + t.view(-1, 1, 1, 1))  # noqa: E731
    errors = mean_squared_error(PAPER, model, x0, t)
    expected = PAPER.squared_error(model, x0, t, randn(300, 1, 2, 2)).mean((1, 2, 3))
    torch.testing.assert_close(errors, expected.detach())
    assert not errors.requires_grad
    x0, t = x0.to("meta"), t.to("meta")
    assert mean_squared_error(PAPER, exact_network(PAPER, x0), x0, t).device == x0.device


def test_loss_of_the_exact_network_of_the_demo():
    network, x0 = exact_network(PAPER, DEMO), DEMO.repeat(40, 1, 1, 1)
    for t, expected in ((100, 0), (200, 2.4e-4), (300, 0.0038), (450, 0.0210), (600, 0.0081)):
        errors = mean_squared_error(PAPER, network, x0, torch.full((len(x0),), t))
        tolerance = 4 * errors.std().item() / len(x0) ** 0.5 + 5e-5
        assert errors.mean().item() == pytest.approx(expected, abs=tolerance), t


def how_many_differ(*args, **options):
    """Return how many demo images are among 128 samples, which must all be demo images."""
    samples = variants.sample(PAPER, exact_network(PAPER, DEMO), (128, 3, 8, 8), *args, **options)
    nearest = torch.cdist(samples.flatten(1), DEMO.flatten(1)).argmin(1)
    assert (samples - DEMO[nearest]).abs().max() < 48 / 127.5
    return nearest.unique().numel()


@pytest.mark.parametrize(
    "sampler, steps", [("ddpm", 20), ("ddim", 10), ("dpm-solver++", 10), ("dpm-solver++", 50)]
)
def test_few_steps_of_every_sampler_suffice_for_the_exact_network(sampler, steps):
    assert 80 < how_many_differ(steps, sampler, seeded()) < 110  # uniform draws: about 97


def test_without_z_the_samples_are_right_but_two():
    assert how_many_differ(draw_noise=only_first(randn(128, 3, 8, 8))) < 5


def test_example_of_the_lesson():
    """Sections 4, 7 and 13: the two points, at t = 200 and x_t = 0.15. Here, i is t - 1."""
    small, two, i, x_t = Diffusion(linear_betas(), "small"), torch.tensor([1.0, -1.0]), 199, 0.15
    abar, x = small.alphas_bar, torch.linspace(-6, 6, 1_200_001).double()
    beta, alpha, noise = (v[i].item() for v in (small.betas, small.alphas, (1 - abar).sqrt()))
    assert (abar[i].sqrt().item(), noise) == pytest.approx((0.812, 0.584), abs=5e-4)

    def log_q(x, i):  # of the two points with noise, up to a constant
        means = abar[i].sqrt() * two
        return (-((x[:, None] - means) ** 2) / (2 * (1 - abar[i]))).logsumexp(1)

    centre, width = x_t / alpha**0.5, (beta / alpha) ** 0.5  # of the bump q(x_t | x_{t-1})
    assert (centre, width) == pytest.approx((0.1503, 0.0639), abs=5e-5)
    places = torch.tensor([centre - width, centre, centre + width], dtype=torch.float64)
    low, at, high = log_q(places, i - 1).tolist()
    found = low - at, high - at, (high - low) / 2, (high + low) / 2 - at
    assert found == pytest.approx((-0.0202, 0.0288, 0.0245, 0.0043), abs=5e-5)
    weights = (log_q(x, i - 1) - (x - centre) ** 2 / (2 * width**2)).softmax(0)
    mean = (weights * x).sum().item()
    long = 1 - (abar[199] / abar[99]).item()  # the beta of one of ten steps
    found = (long / (1 - long)) ** 0.5, (1 - abar[99]).sqrt().item()
    assert found == pytest.approx((0.60, 0.32), abs=5e-3)

    at = torch.tensor([[[[x_t]]]]), torch.tensor([i])
    eps = exact_network(small, two.view(2, 1, 1, 1))(*at)
    x0_hat = small.predict_x0(*at, eps)
    step = small.q_posterior_mean(x0_hat, *at)
    assert (eps.item(), x0_hat.item()) == pytest.approx((-0.220, 0.343), abs=5e-4)
    assert (step.item(), mean) == pytest.approx((0.1518, 0.1518), abs=5e-5)
    weights = small.posterior_x0[i].item(), small.posterior_x_t[i].item()
    assert weights == pytest.approx((0.0097, 0.9901), abs=5e-5)
    for x0, its_eps, its_mean in (1, -1.13, 0.158), (-1, 1.65, 0.139):
        assert (x_t - abar[i].sqrt().item() * x0) / noise == pytest.approx(its_eps, abs=5e-3)
        assert weights[0] * x0 + weights[1] * x_t == pytest.approx(its_mean, abs=5e-4)

    z, snr = torch.linspace(-9, 9, 20_001).double(), abar / (1 - abar)
    density = (-(z**2) / 2).softmax(0)  # given x_0 = 1, u is SNR + sqrt(SNR) z
    mse = torch.stack([(density * (1 - (s + s.sqrt() * z).tanh())).sum() for s in snr])
    assert mse[[543, 136]].tolist() == pytest.approx([0.95, 0.05], abs=1e-3)
    rectangles = ((snr[:-1] - snr[1:]) * mse[1:]).sum().item() / 2 / math.log(2)
    assert rectangles == pytest.approx(1.007, abs=5e-4)


def test_jump_to_the_estimate_costs_width():
    """Check the table in docs/notes.md. The other spacing is all steps of a short chain."""
    page = (copies.HERE / "notes.md").read_text("utf-8")
    rows = re.findall(r"^\| s = (\S+), (\S+) \|(.*)\|$", page, re.M)
    assert len(rows) == 4
    x_T = torch.ones(1, 1, 1, 1)  # every step is linear here

    for s, name, cells in rows:
        for n, cell in zip((5, 10, 20, 50, 200), cells.split("|"), strict=True):
            abar = PAPER.alphas_bar[1000 // n - 1 :: 1000 // n]
            short = Diffusion(1 - abar / torch.cat([torch.ones(1), abar[:-1]]))
            found = []
            for d in PAPER, short:
                network = exact_network(d, torch.zeros(1, 1, 1, 1), std=float(s))
                sample = partial(variants.sample, d, network, x_T.shape, draw_noise=lambda: x_T)
                found.append(sample(n, name.lower(), clip=False).item() / float(s))
            assert [*map(float, re.findall(r"[\d.]+", cell))] == pytest.approx(found, abs=0.0051)
    for start, removed in (20, 0.11), (100, 0.60):  # for the last s, which is 0.15
        signal2 = PAPER.alphas_bar[start - 1] * float(s) ** 2
        kept = (signal2 / (signal2 + 1 - PAPER.alphas_bar[start - 1])).sqrt().item()
        assert 1 - kept == pytest.approx(removed, abs=0.005)


@pytest.mark.parametrize("steps", [1, 10, 999])
def test_best_variance_makes_the_bound_of_gaussian_data_independent_of_the_steps(steps):
    """Sum L_{t-1} of N(0, 1) between the same ends by the formula for two Gaussians, section 6."""
    abar = PAPER.alphas_bar[torch.linspace(0, 999, steps + 1).long()]
    betas = 1 - abar / torch.cat([torch.ones(1), abar[:-1]])
    d, t = Diffusion(betas), torch.arange(1, steps + 1)
    mse = 1 - d.alphas_bar[t]  # the conditional variance of x_0
    spread = d.posterior_variance[t] + d.posterior_x0[t] ** 2 * mse
    for factor in (1.0, 1.1, 0.9):
        sigma2 = factor * spread
        terms = (spread / sigma2 - 1 - (d.posterior_variance[t] / sigma2).log()) / 2
        bits = terms.sum().item() / math.log(2)
        assert (bits == pytest.approx(6.6438, abs=1e-4)) == (factor == 1)
        assert bits > 6.6437


@pytest.mark.parametrize("s, variance, steps, ratios", [
    (0.5, "large", [10], [1.19]), (0.5, "small", [10], [0.81]),
    (0.15, "large", [5, 10, 20, 50], [1.46, 1.60, 1.46, 1.19]),
])  # fmt: skip
def test_fixed_variance_alone_makes_long_steps_fail(s, variance, steps, ratios):
    """For data from N(0, s^2), compare the deviation of Algorithm 2's last x_t with the true one.

    Every step is linear, and image k receives one unit of noise, at draw k.
    """
    d = Diffusion(linear_betas(), variance)
    network = exact_network(d, torch.zeros(1, 1, 1, 1), std=s)
    for n, ratio in zip(steps, ratios, strict=True):
        noise = iter(torch.eye(n).view(n, n, 1, 1, 1))
        options = dict(draw_noise=partial(next, noise), clip=False)
        *_, (t, x_t, _) = variants.sample_progressive(d, network, None, n, "ddpm", **options)
        abar = d.alphas_bar[t].item()
        found = x_t.norm().item() / math.sqrt(abar * s**2 + 1 - abar)
        assert found == pytest.approx(ratio, abs=0.0051)
    abar_129, abar_20 = d.alphas_bar[[128, 19]].tolist()
    added = 1 - d.alphas_bar[199].item() / d.alphas_bar[99].item()  # in 10 steps, by the last
    assert (added, 1 - d.alphas_bar[99].item()) == pytest.approx((0.27, 0.10), abs=0.006)
    assert (added := 1 - abar_129 / abar_20) == pytest.approx(0.158, abs=5e-4)  # to t = 20
    assert added / (1 - abar_20) == pytest.approx(27, abs=0.5)


def test_ddim_on_the_same_nine_steps():
    """For data from N(0, 1/4), the deviation of x_100, relative to the right one."""
    d, x_t = Diffusion(linear_betas()), torch.ones(1, 1, 1, 1)  # one unit of noise
    network = exact_network(d, torch.zeros(1, 1, 1, 1), std=0.5)
    for t, s in itertools.pairwise(torch.arange(999, 98, -100)[:, None]):
        eps = network(x_t, t)
        x_t = d.q_sample(d.predict_x0(x_t, t, eps), s, eps)
    abar = d.alphas_bar[99].item()
    assert x_t.item() / math.sqrt(abar / 4 + 1 - abar) == pytest.approx(0.89, abs=0.005)


@pytest.mark.parametrize("variance", VARIANCES)
def test_bound_of_the_exact_network_is_the_oracles_and_the_number_of_the_image(variance):
    """The oracle knows which of the 216 images it is; sending the number takes log2(216) bits."""
    d, some = Diffusion(linear_betas(), variance), DEMO[::3]
    exact, of_oracle = (
        d.vlb(model, some, seeded()).total for model in (exact_network(d, DEMO), oracle(some))
    )
    assert (exact - of_oracle).mean().item() == pytest.approx(math.log2(216) / 192, rel=0.02)
    expected = {"large": 1.344, "small": 0.857}[variance]
    assert exact.mean().item() == pytest.approx(expected, abs=0.002)


def test_with_many_steps_only_the_ends_of_the_schedule_matter():
    """For Gaussian data, the terms for t > 1 tend to an integral over the SNR between the ends."""
    ends = PAPER.alphas_bar[[-1, 0]].logit()  # log SNR
    noisy, clean = (1 + S**2 * ends.exp()).log2() / 2
    for power in (1, 2):  # two schedules between the same ends
        excess = []
        for n in (1000, 10_000):
            log_snr = ends[1] - (ends[1] - ends[0]) * torch.linspace(0, 1, n).double() ** power
            abar = log_snr.sigmoid()
            d = Diffusion(1 - abar / torch.cat([torch.ones(1), abar[:-1]]), "small")
            left = S**2 * (1 - abar) / (abar * S**2 + 1 - abar)  # the error of the best network
            terms = d.posterior_x0**2 / (2 * d.posterior_variance) * left / math.log(2)
            excess.append((terms[1:].sum() - (clean - noisy)).item())
        assert 0 < excess[0] < 0.06
        assert excess[0] / excess[1] == pytest.approx(10, rel=0.05)


def test_bits_known_are_those_of_a_gaussian_channel():
    """For Gaussian data, x_t tells log2(1 + s^2 SNR) / 2 bits about each value."""
    s, abar = 0.5, PAPER.alphas_bar
    error = abar * s**2 / (abar * s**2 + 1 - abar)  # the error of the best network
    expected = (1 + s**2 * abar / (1 - abar)).log2() / 2
    bits = copies.bits_known(PAPER, error, 1)
    torch.testing.assert_close(bits[50:900], expected[50:900], rtol=0.01, atol=1e-5)
