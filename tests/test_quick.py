"""quick.py against closed forms, torch's optimizers and extras/variants.py."""

import pytest
import torch

from ddpm import UNet
from extras.variants import as_eps
from quick import Muon, PatchUNet, VUNet, WeightedDiffusion, hidden_weights, orthogonalize
from run import Settings, build
from test_ddpm import PAPER, randn, small_unet

SMALL = dict(image_size=8, base_channels=8, channel_mults=(1, 2), num_res_blocks=1,
             attention_resolutions=(4,), dropout=0.0)  # fmt: skip
T = torch.tensor([0, 10, 500, 999])


@pytest.mark.parametrize("classes", [0, 3])
def test_network_predicts_v_and_returns_eps(classes):
    """Its weights are those of a UNet, so that either can open a checkpoint of the other."""
    unet = small_unet(num_classes=classes)
    network = VUNet(PAPER, **SMALL, num_classes=classes).eval()
    network.load_state_dict(unet.state_dict())
    y = [torch.tensor([0, 1, 2, 3])] if classes else []
    x_t, eps = randn(4, 3, 8, 8), as_eps(unet, PAPER, "v")
    with torch.no_grad():
        torch.testing.assert_close(network(x_t, T, *y), eps(x_t, T, *y))
        assert not torch.equal(network(x_t, T, *y), unet(x_t, T, *y))


def test_patches_are_the_pixels_of_a_smaller_unet():
    """Channel 4 c + 2 i + j of the smaller image has the pixels (2 k + i, 2 l + j) of channel c."""
    torch.manual_seed(0)
    network = PatchUNet(2, **SMALL | {"image_size": 16, "attention_resolutions": (8,)}).eval()
    small = UNet(**SMALL | {"in_channels": 12}).eval()
    small.load_state_dict(network.state_dict())
    x_t = randn(4, 3, 16, 16)
    corners = [(c, i, j) for c in range(3) for i in (0, 1) for j in (0, 1)]
    with torch.no_grad():
        expected = small(torch.stack([x_t[:, c, i::2, j::2] for c, i, j in corners], 1), T)
        eps = network(x_t, T)
    for k, (c, i, j) in enumerate(corners):
        torch.testing.assert_close(eps[:, c, i::2, j::2], expected[:, k])


def test_sizes_are_in_pixels_and_the_papers_unless_given():
    with torch.device("meta"):
        paper, network = UNet(), VUNet(PAPER, 1)
        assert VUNet(PAPER, 2, attention_resolutions=(32, 16, 8, 4)).patch_size == 2
    shapes = [{name: p.shape for name, p in m.named_parameters()} for m in (paper, network)]
    assert shapes[0] == shapes[1]
    for settings, message in (
        (dict(image_size=24), "image_size must be a multiple of 16, not 24"),
        (dict(attention_resolutions=(16, 5)), r"\[16, 5\] must be among \[32, 16, 8, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            PatchUNet(2, **settings)


def test_times_have_the_density():
    """One is in each n-th of it, so that a histogram of n differs from it by less than 1 / n."""
    snr = PAPER.alphas_bar / (1 - PAPER.alphas_bar)
    density = PAPER.alphas_bar.sqrt() * torch.minimum(torch.ones_like(snr), 5 / snr)
    n, shares = 10_000, (density / density.sum()).cumsum(0)
    t = WeightedDiffusion(PAPER.betas).draw_t(n)
    assert t.dtype == torch.int64 and t.min() >= 0 and t.max() < 1000
    assert (t.bincount(minlength=1000).cumsum(0) / n - shares).abs().max() < 1.5 / n
    assert len(WeightedDiffusion([0.5]).draw_t(3).unique()) == 1
    assert not torch.equal(*(WeightedDiffusion(PAPER.betas).draw_t(8) for _ in range(2)))


def test_loss_draws_times_and_noise_where_the_images_are():
    diffusion, x0 = WeightedDiffusion([0.5]), torch.zeros(4000, 1, 2, 2)
    assert diffusion.loss(lambda x, t: 0 * x, x0).item() == pytest.approx(2, rel=0.1)
    assert diffusion.loss(lambda x, t: x, x0.to("meta")).device.type == "meta"


def test_loss_is_the_squared_error_of_v():
    x0, noise, t = randn(4, 3, 8, 8), randn(4, 3, 8, 8, seed=1), T
    diffusion, unet = WeightedDiffusion(PAPER.betas), small_unet()
    signal, spread = (table[t].view(4, 1, 1, 1).float() for table in (
        PAPER.sqrt_alphas_bar, PAPER.sqrt_one_minus_alphas_bar))  # fmt: skip
    with torch.no_grad():
        v = unet(signal * x0 + spread * noise, t)
        loss = diffusion.loss(as_eps(unet, PAPER, "v"), x0, t, noise)
    expected = (v - (signal * noise - spread * x0)).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("parts", [(), ("v",), ("weights",), ("v", "weights", "muon")])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_parts_replace_network_and_loss(parts, patch_size):
    small = Settings(**SMALL | {"attention_resolutions": ()}, parts=parts, patch_size=patch_size)
    network, diffusion = build(small, (1, 8, 8), "ab")
    assert isinstance(network, VUNet) == ("v" in parts) and isinstance(network, UNet)
    assert isinstance(diffusion, WeightedDiffusion) == ("weights" in parts)
    assert diffusion.T == 1000 and network.num_classes == 2
    assert network(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])).shape == (2, 1, 8, 8)


def test_hidden_weights_are_those_between_the_first_and_the_last_layer():
    model = small_unet(num_classes=3)
    left_out = "conv_in.weight", "conv_out.weight", "class_embedding.weight"
    expected = [w for n, w in model.named_parameters() if w.ndim > 1 and n not in left_out]
    assert [id(w) for w in hidden_weights(model)] == [id(w) for w in expected]
    _, middle, _ = mlp = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))
    assert hidden_weights(mlp) == [middle.weight]


def test_singular_values_become_about_1_and_the_vectors_stay():
    U, _, Vh = torch.linalg.svd(randn(16, 24).double(), full_matrices=False)
    S = torch.logspace(-2, 0, 16, dtype=torch.float64)
    inside = U.mT @ orthogonalize(U * S @ Vh) @ Vh.mT
    assert inside.diagonal().min() > 0.68 and inside.diagonal().max() < 1.21
    torch.testing.assert_close(inside, inside.diagonal().diag(), rtol=0, atol=1e-6)
    assert not orthogonalize(torch.zeros(2, 3)).any()


def test_steps_are_those_of_torch():
    """torch.optim.Muon takes matrices and computes in bfloat16; the other steps are Adam's."""
    model = small_unet()
    hidden = [weight.data_ptr() for weight in hidden_weights(model)]
    matrices, others = [], []  # pairs of a parameter and its copy
    for p in model.parameters():
        pairs, copy = (matrices, p.flatten(1)) if p.data_ptr() in hidden else (others, p)
        pairs.append((p, torch.nn.Parameter(copy.detach().clone())))
    assert len(matrices) > 20 and len(others) > 20
    ours, copies = Muon(model, 2e-3), [copy for _, copy in matrices]
    assert ours.param_groups[0]["lr"] == 2e-3
    muon = torch.optim.Muon(copies, 1e-3, 0, 0.9, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.Adam([copy for _, copy in others], 1e-3)
    for lr in (1e-3, 5e-4, 2e-3):
        before = [p.detach().clone() for p, _ in matrices]
        for p, copy in matrices + others:
            p.grad = torch.randn_like(p)
            copy.data, copy.grad = p.detach().view_as(copy).clone(), p.grad.view_as(copy).clone()
        for optimizer in (ours, muon, adam):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        for (p, copy), start in zip(matrices, before, strict=True):
            step, expected = (weight.detach().flatten(1) - start.flatten(1) for weight in (p, copy))
            assert (step - expected).norm() < 0.03 * expected.norm()
        for p, copy in others:
            torch.testing.assert_close(p, copy, rtol=1e-5, atol=1e-7)
    before = [p.detach().clone() for p in model.parameters()]
    model.zero_grad()
    ours.step()  # weights without a gradient, as in an unused layer, stay
    assert all(map(torch.equal, before, model.parameters()))
