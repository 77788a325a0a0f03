"""extras/variants.py against closed forms."""

import math
from functools import partial

import pytest
import torch

from ddpm import Diffusion
from extras import variants
from extras.variants import as_eps, cosine_betas, loss_weights, weighted_loss
from sample import guided, reverse
from test_ddpm import PAPER, close, randn, seeded, wobbly

# ------------------------------------------------------------- schedules, targets and their weights


def test_cosine_schedule_is_a_squared_cosine():
    abar = Diffusion(cosine_betas(1000)).alphas_bar
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    close(abar[:990], [f[t + 1] / f[0] for t in range(990)], 1e-12)
    assert cosine_betas().max() == 0.999 and len(cosine_betas()) == 1000


def output_of(eps, x_t, t, predicts):
    """Return the output, by the definitions, of a network for which the noise in x_t is eps."""
    beta, abar = (table[t].view(-1, 1, 1, 1) for table in (PAPER.betas, PAPER.alphas_bar))
    eps, x_t = eps.double(), x_t.double()
    x0 = (x_t - (1 - abar).sqrt() * eps) / abar.sqrt()
    mean = (x_t - beta / (1 - abar).sqrt() * eps) / (1 - beta).sqrt()  # (11)
    v = abar.sqrt() * eps - (1 - abar).sqrt() * x0
    return {"eps": eps, "mean": mean, "x0": x0, "v": v}[predicts]


@pytest.mark.parametrize("predicts", ["eps", "mean", "x0", "v"])
def test_noise_is_found_from_each_output_of_a_network(predicts):
    """The "native" loss is the squared error of the output; other losses do not depend on it."""
    x0, noise, t = randn(5, 1, 4, 4), randn(5, 1, 4, 4, seed=1), torch.tensor([0, 1, 9, 500, 999])
    x_t = PAPER.q_sample(x0, t, noise)

    def network(x_t, t, y=0, z=0):
        return output_of(noise + y + z, x_t, t, predicts).float()

    found = as_eps(network, PAPER, predicts)(x_t, t, 0.25, z=0.5)
    torch.testing.assert_close(found, noise + 0.75, rtol=0, atol=1e-4)
    eps = as_eps(lambda x_t, t: 0.9 * network(x_t, t), PAPER, predicts)
    native = weighted_loss(PAPER, eps, x0, t, noise, loss_weights(PAPER, "native", predicts))
    error = (0.1 * output_of(noise, x_t, t, predicts)).square().mean()
    torch.testing.assert_close(native.double(), error, rtol=1e-3, atol=0)
    simple = weighted_loss(PAPER, eps, x0, t, noise, loss_weights(PAPER, "simple", predicts))
    assert torch.equal(simple, PAPER.loss(eps, x0, t, noise))
    assert torch.equal(loss_weights(PAPER, "vlb", predicts), PAPER.bound_weights())
    assert torch.equal(loss_weights(PAPER, "native"), torch.ones(1000).double())


# -------------------------------------------------------------------------------------- fewer steps


class Doubled(Diffusion):
    def predict_x0(self, x_t, t, eps):
        return 2 * super().predict_x0(x_t, t, eps)


FEW = [(None, None), (60, "ddpm"), (20, None), (20, "ddpm"), (None, "ddim")]


@pytest.mark.parametrize("steps, sampler", FEW)
def test_few_steps_are_the_loop_of_sample_py_and_all_steps_that_of_ddpm_py(steps, sampler):
    """Changes to the Diffusion show in all steps only; no step needs a gradient."""
    d, noise, shape = Doubled(PAPER.betas[:60], "small"), randn(60, 2, 1, 4, 4), (2, 1, 4, 4)
    scale, network = torch.nn.Parameter(torch.ones(1)), lambda x, t: scale * wobbly(x, t)
    if steps == 20 or sampler == "ddim":
        at_int = lambda x, t: wobbly(x, torch.full((2,), t))  # noqa: E731
        draw_noise = partial(next, iter(noise))
        *_, (_, _, x0) = reverse(at_int, draw_noise, d.betas, "small", steps, sampler, False)
    else:
        x0 = d.sample(network, shape, draw_noise=partial(next, iter(noise)), clip=False)
    draw = partial(variants.sample, d, network, shape, steps, sampler)
    found = draw(draw_noise=partial(next, iter(noise)), clip=False)
    torch.testing.assert_close(found, x0, rtol=1e-4, atol=1e-5)
    assert not found.requires_grad


@pytest.mark.parametrize("steps, sampler", FEW)
def test_noise_is_drawn_where_it_is_needed(steps, sampler):
    """It comes from torch's generator or from the given one, on any device."""
    shape, network = (2, 1, 4, 4), lambda x, t: t.view(2, 1, 1, 1) + x
    draw = partial(variants.sample, Diffusion(PAPER.betas[:60]), network, shape, steps, sampler)
    torch.manual_seed(0)
    x0 = draw(draw_noise=partial(torch.randn, shape, generator=seeded()))
    assert torch.equal(draw(), x0) and torch.equal(draw(generator=seeded()), x0)
    assert x0.abs().max() == 1  # the estimates are clipped
    assert draw(device="meta").device.type == "meta"


# ----------------------------------------------------------------------------------------- guidance

# Two classes in one dimension: class k has the share SHARES[k] and is N(MEANS[k], STDS[k]^2).
SHARES, MEANS, STDS = torch.tensor([[0.3, 0.7], [-0.4, 0.5], [0.2, 0.1]], dtype=torch.float64)


def log_joint(x, abar):
    """Return log p_t(x, y) for each class y, (..., 2)."""
    normal = torch.distributions.Normal(abar.sqrt() * MEANS, (abar * STDS**2 + 1 - abar).sqrt())
    return SHARES.log() + normal.log_prob(x[..., None])


def exact_eps(x_t, t, y=None):
    """Return E[eps | x_t] in closed form, given the classes y or without them. Shaped like x_t."""
    x, abar = x_t.double(), PAPER.alphas_bar[t[0]]
    eps = (1 - abar).sqrt() * (x[..., None] - abar.sqrt() * MEANS) / (abar * STDS**2 + 1 - abar)
    weights = log_joint(x, abar).softmax(-1)
    if y is not None:
        weights = torch.nn.functional.one_hot(y, 2)[:, None, None, None]
    return (weights * eps).sum(-1)


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
        eps = guided(exact_eps, torch.full((9,), y), w)(x, torch.full((9,), t))
        close(-eps / (1 - abar).sqrt(), score, 1e-9)
