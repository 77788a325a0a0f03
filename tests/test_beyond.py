"""beyond.py against closed forms; tests/test_samplers.py has the samplers."""

import math

import pytest
import torch
from closed_forms import PAPER, M, S, best_network, close, randn, seeded

import beyond
from beyond import as_eps, cosine_betas, guided, loss_weights, weighted_loss
from ddpm import Diffusion

OUTPUTS = "eps", "mean", "x0", "v"

# ------------------------------------------------------------- schedules, targets and their weights


def test_cosine_schedule_is_a_squared_cosine():
    abar = Diffusion(cosine_betas(1000)).alphas_bar
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    close(abar[:990], [f[t + 1] / f[0] for t in range(990)], 1e-12)
    assert cosine_betas().max() == 0.999


def output_of(eps, x_t, t, predicts):
    """Return the output, by the definitions, of a network for which the noise in x_t is eps."""
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
    native = weighted_loss(PAPER, eps, x0, t, noise, loss_weights(PAPER, "native", predicts))
    error = (0.1 * output_of(noise, x_t, t, predicts)).square().mean()
    torch.testing.assert_close(native.double(), error, rtol=1e-3, atol=0)
    simple = weighted_loss(PAPER, eps, x0, t, noise, loss_weights(PAPER, "simple", predicts))
    assert torch.equal(simple, PAPER.loss(eps, x0, t, noise))
    assert torch.equal(loss_weights(PAPER, "vlb", predicts), PAPER.bound_weights())
    assert torch.equal(*(loss_weights(PAPER, "min-snr", name) for name in ("eps", predicts)))


def test_min_snr_weights_are_those_of_hang_et_al():
    """The weight min(SNR, 5) of the error of x_0 is min(SNR, 5) / (SNR + 1) for the error of v."""
    weights = loss_weights(PAPER, "min-snr", "v")
    x0, noise = randn(1, 1, 4, 4), randn(1, 1, 4, 4, seed=1)
    for t in torch.tensor([[0], [50], [126], [140], [500], [999]]):
        snr = (PAPER.alphas_bar[t] / (1 - PAPER.alphas_bar[t])).item()
        x_t = PAPER.q_sample(x0, t, noise)
        x0_hat = PAPER.predict_x0(x_t, t, 0.9 * noise)
        loss = weighted_loss(PAPER, lambda x, t: 0.9 * noise, x0, t, noise, weights)
        expected = min(snr, 5) * (x0_hat - x0).square().mean()
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
        v = output_of(noise, x_t, t, "v")
        eps = as_eps(lambda x, t, v=v: 0.9 * v.float(), PAPER, "v")
        loss = weighted_loss(PAPER, eps, x0, t, noise, weights)
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
    for steps, sampler in ((None, "ddpm"), (50, "ddim"), (20, "sa-solver")):
        expected, *drawn = (
            beyond.sample(PAPER, eps, (64, 1, 1, 1), steps, sampler, generator=seeded())
            for eps in (best_network(), *networks)
        )
        for x in drawn:
            torch.testing.assert_close(x, expected, rtol=0, atol=1e-3)
    expected, *bounds = (PAPER.vlb(eps, x0, seeded()).total for eps in (best_network(), *networks))
    for bound in bounds:
        torch.testing.assert_close(bound, expected, rtol=1e-3, atol=0)


# ----------------------------------------------------------------------------------------- guidance

# Two classes in one dimension: class k has the share SHARES[k] and is N(MEANS[k], STDS[k]^2).
SHARES, MEANS, STDS = torch.tensor([[0.3, 0.7], [-0.4, 0.5], [0.2, 0.1]], dtype=torch.float64)


def log_joint(x, abar):
    """Return log p_t(x, y) for each class y, (..., 2)."""
    normal = torch.distributions.Normal(abar.sqrt() * MEANS, (abar * STDS**2 + 1 - abar).sqrt())
    return SHARES.log() + normal.log_prob(x[..., None])


def exact_eps_at(x, abar, y=None):
    """Return E[eps | x_t = x] in closed form, given the class y or without one. Shaped like x."""
    eps = (1 - abar).sqrt() * (x[..., None] - abar.sqrt() * MEANS) / (abar * STDS**2 + 1 - abar)
    weights = log_joint(x, abar).softmax(-1)
    if y is not None:
        weights = torch.nn.functional.one_hot(y, 2)[:, None, None, None]
    return (weights * eps).sum(-1)


def test_guidance_hands_on_another_condition_and_a_t_for_each_image():
    """It does so for every form of network: t is int64 (B,), and y is given or left out."""
    seen, y, scale = [], torch.tensor([0, 1, 0]), torch.tensor([1.0, 2.0, 3.0])

    def network(x_t, t, y=None, scale=None):
        seen.append((t.dtype, t.shape, y is None, scale is None))
        return x_t

    for w, calls in ((0, 1), (2, 2)):
        seen.clear()
        eps = guided(as_eps(network, PAPER, "v"), y, w)
        chain = beyond.sample_progressive(
            PAPER, lambda x, t, eps=eps: eps(x, t, scale=scale), (3, 1, 2, 2), 2
        )
        assert [t for t, _, _ in chain] == [999, 499]
        with_y = (torch.int64, (3,), False, False)
        assert seen == [with_y, (torch.int64, (3,), True, False)][:calls] * 2


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
