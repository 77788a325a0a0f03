"""The proof that ddpm.py is the paper: each equation against a closed form or a second derivation.

pytest                # all tests, those of the programs in tests/ included
pytest test_ddpm.py   # the mathematics alone
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

import beyond
import ddpm_numpy
from beyond import as_eps, cosine_betas, guided, loss_weights, respaced
from ddpm import Diffusion, UNet, linear_betas, timestep_embedding

PAPER = Diffusion(linear_betas())
VARIANCES = ("large", "small")


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


def test_cosine_schedule_is_a_squared_cosine():
    abar = Diffusion(cosine_betas(1000)).alphas_bar
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    close(abar[:990], [f[t + 1] / f[0] for t in range(990)], 1e-12)
    assert cosine_betas().max() == 0.999


@pytest.mark.parametrize(
    "betas", [[], [0.1, 1.0], [0.0, 0.1], [[0.1]], [0.1, float("nan")], [1e-300]]
)
def test_impossible_betas_are_refused(betas):
    with pytest.raises(ValueError, match="betas"):
        Diffusion(betas)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="variance"):
        Diffusion(linear_betas(), "medium")
    for make in (lambda: as_eps(None, PAPER, "score"), lambda: loss_weights(PAPER, "vlb", "score")):
        with pytest.raises(ValueError, match="predicts"):
            make()
    with pytest.raises(ValueError, match="the weights must be in"):
        loss_weights(PAPER, "none")
    with pytest.raises(ValueError, match=r"x_t must have the shape .* not \(3, 8, 8\)"):
        PAPER.loss(small_unet(), torch.zeros(3, 8, 8))  # an image without its batch dimension
    with pytest.raises(ValueError, match="steps"):
        respaced(PAPER, None, 0)


def test_subclass_keeps_its_changes_on_a_shorter_chain():
    """As for a student who overrides a method: previews and samples with `steps` use it, too."""

    class Doubled(Diffusion):
        def predict_x0(self, x_t, t, eps):
            return 2 * super().predict_x0(x_t, t, eps)

    d, options = Doubled(linear_betas()), dict(x_T=randn(2, 3, 4, 4), steps=1, clip=False)
    model = lambda x, t: 0 * x  # noqa: E731
    doubled, plain = (beyond.sample(c, model, (2, 3, 4, 4), **options) for c in (d, PAPER))
    close(doubled, 2 * plain)


@pytest.mark.parametrize("shape", [(5, 2), (5, 3, 8)])
def test_points_and_sequences_need_no_more_dimensions(shape):
    """They give what images of the same values give."""
    image = (*shape, *[1] * (4 - len(shape)))
    x0, noise, t = randn(*shape).clamp(-1, 1), randn(*shape), torch.tensor([0, 9, 99, 500, 999])
    d, model = Diffusion(linear_betas(20, 0.01, 0.3)), lambda x, t: x.tanh()
    loss = PAPER.loss(model, x0, t, noise)
    close(loss, PAPER.loss(model, x0.view(image), t, noise.view(image)))
    for steps, sampler in ((None, "ddpm"), (5, "dpm"), (5, "ddim")):
        g = torch.Generator
        x0s = [
            beyond.sample(d, model, size, steps, sampler, generator=g().manual_seed(0))
            for size in (shape, image)
        ]
        assert x0s[0].shape == shape
        close(x0s[0], x0s[1].view(shape))
    bounds = [
        d.vlb(model, x.round(), torch.Generator().manual_seed(0)) for x in (x0, x0.view(image))
    ]
    for one, other in zip(*bounds, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_clip_is_the_same_in_the_bound_and_in_every_sampler(sampler):
    """x0_hat of a network that is far off: its error is that of the clipped one at every t."""
    d, x0 = Diffusion(linear_betas(20, 0.01, 0.3)), torch.zeros(1, 1, 2, 2)
    model = lambda x, t: 0 * x - 50  # noqa: E731
    assert (d.vlb(model, x0).mse == 1).all()
    chain = [
        x0_hat for _, _, x0_hat in beyond.sample_progressive(d, model, (1, 1, 2, 2), 7, sampler)
    ]
    assert all((x0_hat == 1).all() for x0_hat in chain)


# ------------------------------------------------------------------------------ the forward process


def test_closed_form_equals_the_iterated_step():
    """(4) against (2): the mean and variance of x_t = sqrt(alpha_t) x_{t-1} + sqrt(beta_t) z."""
    mean, variance = 1.0, 0.0
    for t in range(PAPER.T):
        mean *= math.sqrt(1 - PAPER.betas[t])
        variance = (1 - PAPER.betas[t].item()) * variance + PAPER.betas[t].item()
        x0, noise = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
        at_t = torch.tensor([t])
        close(PAPER.q_sample(x0, at_t, 0 * noise).item(), mean)
        close(PAPER.q_sample(0 * x0, at_t, noise).item() ** 2, variance)


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


@pytest.mark.parametrize("t", [1, 9, 99, 499])
def test_variance_of_the_reverse_step_lies_between_the_two_of_the_paper(t):
    """For the data +1 and -1: by integration, and by (7) with E[x_0 | x_t], which is a tanh."""
    alpha, beta, abar = PAPER.alphas[t], PAPER.betas[t], PAPER.alphas_bar[t]
    abar_prev, small = PAPER.alphas_bar_prev[t], PAPER.posterior_variance[t]
    before = torch.linspace(-5, 5, 2501, dtype=torch.float64)  # x_{t-1}
    x_t = before[:, None]

    def density(x, abar):
        """q(x_t), up to a constant."""
        first, second = ((-((x - m * abar.sqrt()) ** 2) / (2 - 2 * abar)).exp() for m in (1, -1))
        return first + second

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


def test_algorithm_2_takes_the_posterior_mean_of_the_unclipped_x0():
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
    assert set(t.tolist()) == {0, 1, 2, 3}  # including the last
    assert loss.item() == pytest.approx(1, abs=0.05)  # E|eps|^2 per pixel
    assert x_t[t == 3].var() == pytest.approx(1 - d.alphas_bar[3].item(), rel=0.1)


OUTPUTS = ["eps", "mean", "x0", "v"]


def output_of(eps, x_t, t, predicts):
    """What a network has to return so that the noise in x_t is eps, from the definitions."""
    beta, abar = (table[t].view(-1, 1, 1, 1) for table in (PAPER.betas, PAPER.alphas_bar))
    eps, x_t = eps.double(), x_t.double()
    x0 = (x_t - (1 - abar).sqrt() * eps) / abar.sqrt()
    mean = (x_t - beta / (1 - abar).sqrt() * eps) / (1 - beta).sqrt()  # (11)
    v = abar.sqrt() * eps - (1 - abar).sqrt() * x0
    return {"eps": eps, "mean": mean, "x0": x0, "v": v}[predicts]


@pytest.mark.parametrize("predicts", OUTPUTS)
def test_noise_is_found_from_each_output_of_a_network(predicts):
    x0, noise, t = randn(5, 1, 4, 4), randn(5, 1, 4, 4, seed=1), torch.tensor([0, 1, 9, 500, 999])
    d = PAPER
    x_t = d.q_sample(x0, t, noise)
    found = as_eps(lambda x, t: output_of(noise, x, t, predicts).float(), d, predicts)(x_t, t)
    torch.testing.assert_close(found, noise, rtol=0, atol=1e-4)
    if predicts == "mean":  # (11) is the mean of the posterior (6) of the x0 that eps gives
        posterior, _ = d.q_posterior(d.predict_x0(x_t, t, noise), x_t, t)
        close(output_of(noise, x_t, t, "mean"), posterior.double(), 1e-5)


@pytest.mark.parametrize("predicts", OUTPUTS)
def test_native_loss_is_the_error_of_the_output(predicts):
    x0, noise, t = randn(4, 1, 4, 4), randn(4, 1, 4, 4, seed=1), torch.tensor([0, 3, 500, 999])
    d = PAPER
    x_t = d.q_sample(x0, t, noise)
    guess = 0.9 * output_of(noise, x_t, t, predicts)
    errors = (guess - output_of(noise, x_t, t, predicts)).square().mean()
    eps = as_eps(lambda x, t: guess.float(), d, predicts)
    native = d.loss(eps, x0, t, noise, loss_weights(d, "native", predicts))
    torch.testing.assert_close(native.double(), errors, rtol=1e-3, atol=0)
    for name in ("simple", "vlb", "min-snr"):  # do not depend on the output
        weights = loss_weights(d, name, predicts)
        assert weights is None or torch.equal(weights, loss_weights(d, name))


def test_min_snr_weights_are_those_of_hang_et_al():
    """min(SNR, 5) for the error of x_0, which is min(SNR, 5) / (SNR + 1) for that of v."""
    weights = loss_weights(PAPER, "min-snr", "v")
    x0, noise = randn(1, 1, 4, 4), randn(1, 1, 4, 4, seed=1)
    for t in (0, 50, 126, 140, 500, 999):
        at = torch.tensor([t])
        snr = (PAPER.alphas_bar[t] / (1 - PAPER.alphas_bar[t])).item()
        x_t = PAPER.q_sample(x0, at, noise)
        x0_hat = PAPER.predict_x0(x_t, at, 0.9 * noise)
        expected = min(snr, 5) * (x0_hat - x0).square().mean()
        loss = PAPER.loss(lambda x, t: 0.9 * noise, x0, at, noise, weights)
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
        guess = 0.9 * output_of(noise, x_t, at, "v")
        error = (guess - output_of(noise, x_t, at, "v")).square().mean()
        eps = as_eps(lambda x, t, guess=guess: guess.float(), PAPER, "v")
        loss = PAPER.loss(eps, x0, at, noise, weights)
        close(loss / error * (snr + 1) / min(snr, 5), 1, 1e-3)


def test_vlb_weights_have_the_papers_numbers():
    for t, weight in ((0, 0.50005), (1, 0.27269), (999, 0.010204)):
        x0, noise = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
        loss = PAPER.loss(lambda x, t: 0 * x, x0, torch.tensor([t]), noise, PAPER.bound_weights())
        if t == 0:  # the paper's number has sigma^2 = beta_1; sigma2[0] is the decoder's
            loss = loss * PAPER.sigma2[0] / PAPER.betas[0]
        assert loss.item() == pytest.approx(weight, rel=1e-4)


def test_forward_process_stays_float32_under_autocast():
    """In bfloat16, 1 - abar_t is 0 for t < 10, so the target would be noise that x_t lacks."""
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
def test_bound_of_an_oracle_depends_on_the_schedule_alone(variance):
    """If eps is the true noise, the means agree, and each KL compares two variances."""
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


@pytest.mark.parametrize("variance", VARIANCES)
def test_bound_of_gaussian_data_is_the_closed_form(variance):
    """x_0 ~ N(0, s^2): the best eps is linear in x_t, its error the variance of x_0 given x_t."""
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
    # L_0 by quadrature: the error of x0_hat is N(0, left), and the bin is around x_0
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
    """For Gaussian data, L_simple is larger at any slope other than the best, at each t."""
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


def test_decoder_probabilities_sum_to_one():
    values = (torch.arange(256).double() / 127.5 - 1).view(-1, 1)
    mean, sigma = torch.tensor([[-1.2, -0.5, 0.001, 0.99]]), torch.tensor(0.01)
    mass = PAPER.decoder_log_likelihood(values, mean, sigma).exp()
    close(mass.sum(0), torch.ones(4), 1e-9)
    assert mass.argmax(0).tolist() == [0, 64, 128, 254]


# ------------------------------------------------------------------------------------- the samplers


def oracle(x0, diffusion=PAPER):
    """A network that knows x_0: eps = (x_t - sqrt(abar_t) x_0) / sqrt(1 - abar_t)."""

    def model(x_t, t):
        abar = diffusion.alphas_bar[t].view(-1, 1, 1, 1)
        return ((x_t - abar.sqrt() * x0) / (1 - abar).sqrt()).float()

    return model


SAMPLERS = "ddpm", "ddim", "dpm"


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [None, 1, 2, 7])
def test_sampling_with_an_oracle_returns_its_image(variance, sampler, steps):
    x0 = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(3)) * 2 - 1
    out = beyond.sample(Diffusion(linear_betas(), variance), oracle(x0), x0.shape, steps, sampler)
    torch.testing.assert_close(out, x0, rtol=0, atol=1e-4)


def wobbly(x_t, t):
    """A stand-in for a network, for torch and numpy: nonlinear in x_t, different for each t."""
    return x_t / (0.5 + abs(x_t)) + float(t[0]) / 1000


def noises(n, shape):
    return iter(randn(n, *shape))


# steps, sampler, eta
CHAINS = [(steps, sampler, None) for steps in (None, 1, 2, 50) for sampler in (None, *SAMPLERS)]
CHAINS += [(1000, None, None), (50, None, 0.0), (50, "ddim", 0.7), (20, None, 1.0)]


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("steps, sampler, eta", CHAINS)
def test_numpy_sampler_is_the_torch_sampler(variance, steps, sampler, eta):
    shape, betas = (2, 3, 4, 4), linear_betas()
    ours, theirs = noises(1000, shape), noises(1000, shape)
    torch_chain = beyond.sample_progressive(
        Diffusion(betas, variance),
        wobbly,
        shape,
        steps,
        sampler,
        eta,
        draw_noise=lambda: next(ours),
    )
    numpy_chain = ddpm_numpy.sample_progressive(
        wobbly, lambda: next(theirs).numpy(), betas.numpy(), variance, steps, sampler, eta
    )
    n = 0
    for (t, x, x0), (t_, x_, x0_) in zip(torch_chain, numpy_chain, strict=True):
        assert t == t_ and x_.dtype == x0_.dtype == np.float32
        np.testing.assert_allclose(x_, x, rtol=0, atol=2e-5)
        np.testing.assert_allclose(x0_, x0, rtol=0, atol=2e-5)
        n += 1
    assert n == (steps or 1000) and t == 1000 // n - 1
    assert len(list(ours)) == len(list(theirs))


@pytest.mark.parametrize("sampler, eta", [("ddpm", None), ("ddim", 0.7), ("dpm", None)])
@pytest.mark.parametrize("option", ["clip", "known", "x_T"])
def test_samplers_have_the_same_options(option, sampler, eta):
    """In torch and numpy, with the same noise; tests/test_page.py compares numpy and JavaScript."""
    shape = 2, 3, 4, 4
    mask = torch.eye(4).bool()
    value = {"clip": False, "known": (randn(3, 4, 4).clamp(-1, 1), mask), "x_T": randn(*shape)}
    value = value[option]
    array = value.numpy() if option == "x_T" else value
    array = tuple(part.numpy() for part in value) if option == "known" else array
    ours, theirs = noises(99, shape), noises(99, shape)
    d = Diffusion(linear_betas(50))
    kwargs = dict(steps=20, sampler=sampler, eta=eta)
    torch_chain = list(beyond.sample_progressive(d,
        wobbly, shape, draw_noise=lambda: next(ours), **kwargs, **{option: value}
    ))  # fmt: skip
    numpy_chain = ddpm_numpy.sample_progressive(
        wobbly, lambda: next(theirs).numpy(), linear_betas(50).numpy(), **kwargs, **{option: array}
    )
    for (_, x, x0), (_, x_, x0_) in zip(torch_chain, numpy_chain, strict=True):
        np.testing.assert_allclose(x_, x, rtol=0, atol=1e-4)
        np.testing.assert_allclose(x0_, x0, rtol=0, atol=1e-4)
        if option == "known":
            assert torch.equal(x0[..., ~mask], value[0][..., ~mask].expand(2, -1, -1))
    if option == "known" and sampler == "dpm":  # x_t is drawn from q(x_t | x_0) of the image
        _, *drawn = noises(21, shape)
        for noise, (t, x, _) in zip(drawn, torch_chain, strict=True):
            x_t = d.q_sample(value[0], torch.tensor([t]), noise)
            torch.testing.assert_close(x[..., ~mask], x_t[..., ~mask])
    assert len(list(ours)) == len(list(theirs))
    assert option != "clip" or torch.stack([x0 for *_, x0 in torch_chain]).abs().max() > 1


def test_default_sampler_is_the_papers_with_all_steps():
    def draw(steps, sampler=None, eta=None):
        noise = noises(50, (1, 1, 4, 4))
        return beyond.sample(
            d, wobbly, (1, 1, 4, 4), steps, sampler, eta, draw_noise=lambda: next(noise)
        )

    d = Diffusion(linear_betas(50))
    assert torch.equal(draw(None), draw(50, "ddpm")) and torch.equal(draw(50), draw(50, "ddpm"))
    assert torch.equal(draw(49), draw(49, "dpm")) and not torch.equal(draw(49), draw(49, "ddim"))
    assert torch.equal(draw(50, eta=0.5), draw(50, "ddim", 0.5))
    assert torch.equal(draw(50, "ddim"), draw(50, "ddim", 0.0))


@pytest.mark.parametrize("kwargs", [{"steps": 0}, {"steps": 1001}, {"eta": 1.5}, {"eta": math.nan},
                                    {"sampler": "DPM"}, {"sampler": "dpm", "eta": 0.5},
                                    {"variance": "Large"}])  # fmt: skip
def test_samplers_refuse_wrong_names_and_numbers(kwargs):
    word = list(kwargs)[-1]
    if word != "variance":  # an argument of Diffusion
        with pytest.raises(ValueError, match=word):
            beyond.sample(PAPER, wobbly, (1, 1, 4, 4), **kwargs)
    with pytest.raises(ValueError, match=word):
        next(ddpm_numpy.sample_progressive(wobbly, None, linear_betas().numpy(), **kwargs))


@pytest.mark.parametrize("variance", VARIANCES)
def test_shorter_chain_of_all_steps_is_the_plain_chain(variance):
    d = Diffusion(linear_betas(), variance)
    chain, _, tau = respaced(d, None, 1000)
    assert tau.tolist() == list(range(1000))
    for name in ("betas", "alphas_bar", "posterior_variance", "sigma2"):
        torch.testing.assert_close(getattr(chain, name), getattr(d, name), rtol=1e-9, atol=1e-15)


def test_shorter_chain_passes_the_same_noise_levels():
    chain, _, tau = respaced(PAPER, None, 10)
    assert tau.tolist() == [99, 199, 299, 399, 499, 599, 699, 799, 899, 999]
    close(chain.alphas_bar, PAPER.alphas_bar[tau], 1e-14)
    _, eps, _ = respaced(*respaced(PAPER, lambda x, t: t, 10)[:2], 5)
    assert eps(None, torch.arange(5)).tolist() == [199, 399, 599, 799, 999]
    for steps in range(1, 1001):
        tau = respaced(PAPER, None, steps)[2].tolist()
        assert tau[-1] == 999 and len(set(tau)) == steps and tau == sorted(tau)
        assert tau == ddpm_numpy.respaced(linear_betas().numpy(), steps)[1].tolist()


def test_ddim_with_eta_1_is_the_small_ancestral_step():
    d, shape = Diffusion(linear_betas(), "small"), (2, 1, 4, 4)
    ours, theirs = noises(100, shape), noises(100, shape)
    a = beyond.sample(d, wobbly, shape, 100, "ddpm", draw_noise=lambda: next(ours))
    b = beyond.sample(d, wobbly, shape, 100, "ddim", 1.0, draw_noise=lambda: next(theirs))
    torch.testing.assert_close(a, b, rtol=0, atol=2e-4)


@pytest.mark.filterwarnings("ignore:__array__")
@pytest.mark.parametrize("steps", [1, 2, 10, 20, 1000])
def test_samplers_equal_diffusers(steps):
    """In steps that divide T: where they do not, diffusers rounds to the nearest t."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    schedule = {"beta_start": 1e-4, "beta_end": 0.02, "timestep_spacing": "trailing"}
    clip = {"thresholding": True, "sample_max_value": 1.0}
    for sampler, scheduler, options in (
        ("dpm", DPMSolverMultistepScheduler(**schedule, **clip), {}),
        ("ddim", DDIMScheduler(**schedule), {"use_clipped_model_output": True}),
    ):
        x = x_T = randn(2, 3, 4, 4)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            x = scheduler.step(wobbly(x, t.expand(2)), t, x, **options).prev_sample
        ours = beyond.sample(PAPER, wobbly, x_T.shape, steps, sampler, x_T=x_T)
        torch.testing.assert_close(ours, x, rtol=0, atol=1e-4)


# For x_0 ~ N(m, s^2) the best eps is known and linear in x_t. Each step of a sampler is then
# x <- a x + b + sigma z, so the mean and variance of the samples follow from a recursion over t,
# which shares no code with the sampler and needs no training.

S, M = 0.15, 0.3


def best_eps(x_t, t):
    abar = PAPER.alphas_bar[t].view(-1, 1, 1, 1)
    eps = (1 - abar).sqrt() / (abar * S**2 + 1 - abar) * (x_t.double() - abar.sqrt() * M)
    return eps.float()


def mean_and_deviation(variance, steps=1000, eta=None):
    """Of the samples, by Algorithm 2 as printed, or by equation 12 of the DDIM paper."""
    tau = [k * 1000 // steps - 1 for k in range(steps, 0, -1)]
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


@pytest.mark.parametrize("variance, gap", [("large", 0.142), ("small", 0.731)])
def test_bound_is_above_the_exact_likelihood(variance, gap):
    """For Gaussian data and the best eps, p(x_0) is a Gaussian integrated over the bin of x_0.

    The gaps are those of these 65,536 values; 2.4 million have 0.131 and 0.718.
    """
    d = Diffusion(linear_betas(), variance)
    x0 = ((M + S * randn(256, 1, 16, 16) + 1) * 127.5).round() / 127.5 - 1
    bound = d.vlb(best_eps, x0, torch.Generator().manual_seed(1)).total.mean().item()
    mean, deviation = mean_and_deviation(variance)  # of x0_hat, to which the decoder adds sigma_1

    def bits(mean, variance):
        halves = torch.tensor([-1, 1]).view(2, 1, 1, 1, 1) / 255
        below, above = torch.special.ndtr((x0.double() + halves - mean) / variance**0.5)
        return -(above - below).log2().mean().item()

    exact = bits(mean, deviation**2 + d.sigma2[0])
    assert bits(M, S**2) <= exact < bound
    assert bound - exact == pytest.approx(gap, abs=0.01)


@pytest.mark.parametrize(
    "variance, eta, width", [("large", None, 1.006), ("small", None, 0.975), ("small", 0.0, 0.990)]
)
def test_discretization_error_of_the_samplers(variance, eta, width):
    """With T = 1000, even the best network gets the width of the samples slightly wrong."""
    mean, deviation = mean_and_deviation(variance, eta=eta)
    assert deviation / S == pytest.approx(width, abs=5e-4)
    assert mean == pytest.approx(M, abs=1e-3)


RUNS = [(1000, None), (100, None), (10, None), (1000, 0.0), (50, 0.0), (50, 0.5), (50, 1.0)]


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("steps, eta", RUNS)
def test_sampler_equals_the_recursion(variance, steps, eta):
    """Exactly: image k receives one unit of noise, at draw k, and the last image receives none."""
    draws = iter(torch.eye(steps + 1).view(-1, steps + 1, 1, 1, 1))
    x0 = beyond.sample(Diffusion(linear_betas(), variance),
        best_eps, (steps + 1, 1, 1, 1), steps, "ddpm" if eta is None else "ddim", eta,
        draw_noise=lambda: next(draws), clip=False,
    )  # fmt: skip
    x0 = x0.double().flatten()
    mean, deviation = mean_and_deviation(variance, steps, eta)
    assert x0[-1].item() == pytest.approx(mean, rel=1e-4)
    assert (x0[:-1] - x0[-1]).norm().item() == pytest.approx(deviation, rel=1e-4)


# Without noise, samplers solve an ODE. For x_0 ~ N(m, s^2), its exact solution keeps the
# standardised x_t constant, so the error of each sampler is known.


def ode_of(diffusion, m, s):
    """Return the best eps for N(m, s^2), and the exact solution at t from x_T, both float64."""

    def moments(abar):
        return abar.sqrt() * m, (abar * s**2 + 1 - abar).sqrt()

    def eps(x_t, t):
        abar = diffusion.alphas_bar[t].view(-1, 1, 1, 1)
        mean, deviation = moments(abar)
        return ((1 - abar).sqrt() / deviation**2 * (x_t.double() - mean)).float()

    def solution(x_T, abar):
        mean_T, deviation_T = moments(diffusion.alphas_bar[-1])
        mean, deviation = moments(abar)
        return mean + deviation / deviation_T * (x_T.double() - mean_T)

    return eps, solution


@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("dpm", 2)])
def test_order_of_the_sampler(sampler, order):
    """Double the steps, uniform in lambda, and the error of x_t halves or falls to a quarter."""
    errors, x_T = [], randn(64, 1, 1, 1)
    for n in (40, 80, 160):
        abar = torch.sigmoid(2 * torch.linspace(1, -2, n + 1, dtype=torch.float64))
        d = Diffusion(1 - abar / torch.cat([torch.ones(1), abar[:-1]]))
        eps, solution = ode_of(d, 0.3, 0.5)
        chain = list(
            beyond.sample_progressive(d, eps, x_T.shape, None, sampler, x_T=x_T, clip=False)
        )
        errors.append((chain[-1][1] - solution(x_T, abar[0])).square().mean().sqrt())
    for rough, fine in pairwise(errors):
        assert rough / fine == pytest.approx(2**order, rel=0.1)


def test_dpm_and_ddim_agree_in_all_steps():
    x_T = randn(64, 1, 1, 1)
    eps, _ = ode_of(PAPER, 0.3, 0.5)
    ddim, dpm = (
        beyond.sample(PAPER, eps, x_T.shape, None, s, x_T=x_T, clip=False) for s in ("ddim", "dpm")
    )
    torch.testing.assert_close(dpm, ddim, rtol=0, atol=0.006)


@pytest.mark.parametrize("predicts", OUTPUTS)
def test_shorter_chain_asks_the_same_network(predicts):
    """Its loss and its noise at t are those of the whole chain at tau[t]."""

    def model(x_t, t, y=None):
        return output_of(best_eps(x_t, t), x_t, t, predicts).float()

    whole, t = as_eps(model, PAPER, predicts), torch.tensor([0, 3, 6])
    chain, eps, tau = respaced(PAPER, whole, 7)
    x0, noise = randn(3, 1, 4, 4), randn(3, 1, 4, 4, seed=1)
    x_t = PAPER.q_sample(x0, tau[t], noise)
    close(chain.q_sample(x0, t, noise), x_t)
    close(eps(x_t, t), best_eps(x_t, tau[t]), 1e-4)
    assert torch.equal(eps(x_t, t, torch.arange(3)), eps(x_t, t))  # with classes, too
    close(chain.loss(eps, x0, t, noise), PAPER.loss(whole, x0, tau[t], noise), 1e-4)


@pytest.mark.parametrize("predicts", OUTPUTS[1:])
def test_samples_and_bound_do_not_depend_on_what_is_predicted(predicts):
    """The same eps in another form draws the same Gaussian, and has the same bound."""

    def model(x_t, t):
        return output_of(best_eps(x_t, t), x_t, t, predicts).float()

    eps, g = as_eps(model, PAPER, predicts), torch.Generator()
    for steps, sampler in ((None, "ddpm"), (100, "ddpm"), (50, "ddim"), (20, "dpm")):
        drawn = [
            beyond.sample(PAPER, net, (64, 1, 1, 1), steps, sampler, generator=g.manual_seed(0))
            for net in (best_eps, eps)
        ]
        torch.testing.assert_close(drawn[1], drawn[0], rtol=0, atol=1e-3)
    x0 = (M + S * randn(16, 1, 8, 8)).clamp(-1, 1)
    bounds = [PAPER.vlb(net, x0, torch.Generator().manual_seed(0)) for net in (best_eps, eps)]
    torch.testing.assert_close(bounds[1].total, bounds[0].total, rtol=1e-3, atol=0)


def test_truncated_chain_is_the_beginning_of_the_chain():
    """Hence Diffusion(betas[: t + 1]) continues from an x_t."""
    for variance in VARIANCES:
        whole, cut = (Diffusion(linear_betas()[:n], variance) for n in (1000, 301))
        for name in ("alphas_bar", "posterior_variance", "sigma2"):
            torch.testing.assert_close(
                getattr(cut, name), getattr(whole, name)[:301], rtol=0, atol=0
            )
    x_t = randn(2, 1, 4, 4)
    steps = list(beyond.sample_progressive(cut, wobbly, x_t.shape, x_T=x_t))
    assert [t for t, _, _ in steps] == list(range(300, -1, -1)) and torch.equal(steps[0][1], x_t)


@pytest.mark.parametrize(
    "t, steps, sampler", [(300, None, None), (300, 20, "ddpm"), (299, 20, None), (0, 9, None)]
)
def test_interpolation_starts_at_the_t_of_its_noise(t, steps, sampler):
    """Diffuse to t, then call the network at that t; two peers begin at t - 1."""
    a, b = (torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(k)) * 2 - 1 for k in (0, 1))
    drawn = randn(400, 1, 3, 4, 4)
    z = iter(drawn.numpy())
    betas, steps = linear_betas().numpy(), t + 1 if steps is None else min(steps, t + 1)
    draw_noise = lambda: next(z)  # noqa: E731
    x_t = ddpm_numpy.mix(a.numpy(), b.numpy(), t, betas, draw_noise)
    chain = list(ddpm_numpy.sample_progressive(
        wobbly, draw_noise, betas[: t + 1], "large", steps, sampler, x_T=x_t
    ))  # fmt: skip
    assert chain[0][0] == t and chain[-1][0] == (t + 1) // steps - 1 and len(chain) == steps
    at_t = torch.tensor([t])
    x_t = [PAPER.q_sample(x0[None], at_t, drawn[k]) for k, x0 in enumerate((a, b))]
    mixed = torch.cat([(1 - k / 10) * x_t[0] + k / 10 * x_t[1] for k in range(11)])
    np.testing.assert_allclose(chain[0][1], mixed, rtol=0, atol=1e-5)
    # From there it equals the torch sampler with the same noise for every lambda.
    rest = iter(drawn[2:])
    expected = beyond.sample(
        Diffusion(linear_betas()[: t + 1]),
        wobbly,
        mixed.shape,
        steps,
        sampler,
        draw_noise=lambda: next(rest),
        x_T=mixed,
    )
    np.testing.assert_allclose(chain[-1][2], expected, rtol=0, atol=1e-4)


def test_sampler_clips_x0_and_adds_no_noise_at_the_end():
    steps = list(beyond.sample_progressive(PAPER, lambda x, t: -x, (1, 1, 2, 2), 10))
    assert all(x0.abs().max() <= 1 for _, _, x0 in steps)
    unclipped = list(
        beyond.sample_progressive(PAPER, lambda x, t: -x, (1, 1, 2, 2), 10, clip=False)
    )
    assert unclipped[0][2].abs().max() > 1
    drawn = []
    beyond.sample(
        PAPER,
        wobbly,
        (1, 1, 2, 2),
        10,
        "ddpm",
        draw_noise=lambda: drawn.append(0) or randn(1, 1, 2, 2),
    )
    assert len(drawn) == 10  # x_T and one for each step but the last


def test_generator_fixes_the_samples():
    g = lambda: torch.Generator().manual_seed(5)  # noqa: E731
    a, b = (beyond.sample(PAPER, wobbly, (1, 1, 4, 4), 5, "ddpm", generator=g()) for _ in range(2))
    assert torch.equal(a, b)


# ------------------------------------------------------------------------------------- the guidance

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
        index = torch.full((9,), t)
        eps = guided(exact_model, torch.full((9,), y), w)(x, index)
        close(-eps / (1 - abar).sqrt(), score, 1e-9)


@pytest.mark.parametrize("sampler, error", [("ddim", 0.02), ("dpm", 0.002)])
def test_guided_samples_are_those_of_a_fine_solution(sampler, error):
    """The classical Runge-Kutta method solves dx/d sigma = eps, where x = x_t / sqrt(abar_t)."""
    x_T, y, w = randn(32, 1, 1, 1).double(), torch.arange(32) % 2, 2
    chain = list(beyond.sample_progressive(PAPER,
        guided(exact_model, y, w), x_T.shape, None, sampler, x_T=x_T, clip=False
    ))  # fmt: skip

    def slope(x, log_sigma):
        abar = torch.sigmoid(-2 * log_sigma)
        x_t = x * abar.sqrt()
        eps = (1 + w) * exact_eps_at(x_t, abar, y) - w * exact_eps_at(x_t, abar)
        return eps * log_sigma.exp()

    ends = -PAPER.alphas_bar[[-1, 0]].logit() / 2
    grid = torch.linspace(*ends.tolist(), 1001, dtype=torch.float64)
    x = x_T / PAPER.alphas_bar[-1].sqrt()
    h = grid[1] - grid[0]
    for u in grid[:-1]:
        k1 = slope(x, u)
        k2 = slope(x + h / 2 * k1, u + h / 2)
        k3 = slope(x + h / 2 * k2, u + h / 2)
        k4 = slope(x + h * k3, u + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    difference = chain[-1][1] - x * PAPER.alphas_bar[0].sqrt()
    assert difference.abs().max() < error
    assert (x[y == 0] < -0.3).all() and (x[y == 1] > 0.4).all()


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
    with torch.no_grad():  # layers that are near zero would hide the others
        for p in model.parameters():
            p.add_(jitter * torch.randn_like(p))
    return model


def test_timestep_embedding_is_sines_then_cosines():
    ours = timestep_embedding(torch.tensor([0, 7, 999]), 8)
    for row, t in zip(ours, (0, 7, 999), strict=True):
        angles = [t * 10000 ** (-i / 3) for i in range(4)]
        close(row, [math.sin(a) for a in angles] + [math.cos(a) for a in angles], 2e-5)


def test_attention_stands_where_the_paper_has_it():
    model = UNet(base_channels=4)
    down, middle, up = (
        [
            "a" if hasattr(m.attention, "q") else "-"
            for m in part.modules()
            if hasattr(m, "attention")
        ]
        for part in (model.down, model.middle, model.up)
    )
    assert "".join(down) == "--aa----" and "".join(middle) == "a-"
    assert "".join(up) == "------aaa---"


def test_group_norms_are_the_papers():
    for base, groups in ((128, 32), (256, 32), (64, 16), (32, 8), (16, 4), (12, 1), (4, 1)):
        with torch.device("meta"):
            modules = UNet(base_channels=base).modules()
        norms = [m for m in modules if isinstance(m, torch.nn.GroupNorm)]
        assert {m.num_groups for m in norms} == {groups} and {m.eps for m in norms} == {1e-6}
    norms = [m for m in UNet(norm_groups=2).modules() if isinstance(m, torch.nn.GroupNorm)]
    assert {m.num_groups for m in norms} == {2}


def test_stride_2_is_padded_right_and_below():
    model = small_unet()
    down = next(m for m in model.down.modules() if type(m).__name__ == "Downsample")
    x = randn(1, 8, 8, 8)
    y = down(x, None)
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


def test_initialization_is_glorot_and_near_zero_where_residual_branches_end():
    torch.manual_seed(0)
    model = UNet(base_channels=32)
    assert model(randn(2, 3, 32, 32), torch.tensor([0, 999])).abs().max() < 1e-3
    w = model.down[0][0].conv1.weight  # uniform in +- sqrt(6 / (fan_in + fan_out))
    assert w.abs().max().item() == pytest.approx(math.sqrt(6 / (2 * 32 * 9)), rel=0.01)
    near_zero = [m for m in model.modules() if hasattr(m, "weight") and m.weight.abs().max() < 1e-4]
    blocks = sum(type(m).__name__ == "ResBlock" for m in model.modules())
    attentions = sum(type(m).__name__ == "Attention" for m in model.modules())
    assert len(near_zero) == blocks + attentions + 1
    assert all(not m.bias.any() for m in near_zero)


def test_classes_are_a_row_each_beside_the_time_embedding():
    """They begin without effect; then each row counts for its class, the last for "no class"."""
    plain, model = small_unet(), small_unet(0, num_classes=3)
    model.load_state_dict(model.state_dict() | plain.state_dict())
    x, t = randn(4, 3, 8, 8), torch.tensor([0, 5, 500, 999])
    assert torch.equal(model(x, t, torch.tensor([0, 1, 2, 3])), plain(x, t))
    assert model.class_embedding.weight.shape == (4, 32)
    assert set(model.state_dict()) - set(plain.state_dict()) == {"class_embedding.weight"}
    for y in range(4):
        torch.nn.init.zeros_(model.class_embedding.weight)
        model.class_embedding.weight.data[y] = randn(32)
        moved = [not torch.equal(model(x, t, torch.full((4,), k)), plain(x, t)) for k in range(4)]
        assert moved == [k == y for k in range(4)]
        assert torch.equal(model(x, t), model(x, t, torch.full((4,), 3)))


def test_dropout_is_off_in_eval_and_on_in_training():
    model, x, t = small_unet(), randn(2, 3, 8, 8), torch.tensor([3, 900])
    assert torch.equal(model(x, t), model(x, t))
    model.train()
    assert not torch.equal(model(x, t), model(x, t))


def test_output_depends_on_the_time_and_on_every_parameter():
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
    with pytest.raises(ValueError, match=r"attention_resolutions must be among \[48, 24, 12, 6\]"):
        UNet(image_size=48)
    with pytest.raises(ValueError, match="multiples of 2"):
        small_unet()(torch.zeros(1, 3, 8, 7), torch.tensor([0]))
