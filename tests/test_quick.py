"""quick.py against closed forms, torch's optimizers and extras/variants.py."""

import pytest
import torch

from ddpm import UNet
from extras.variants import as_eps
from quick import Muon, VUNet, hidden_weights, orthogonalize
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


@pytest.mark.parametrize("parts", [(), ("v",)])
def test_part_v_replaces_the_network(parts):
    small = Settings(**SMALL, parts=parts, betas=[0.1, 0.2])
    network, diffusion = build(small, (1, 8, 8), "ab")
    assert isinstance(network, VUNet) == ("v" in parts) and isinstance(network, UNet)
    assert diffusion.T == 2 and network.num_classes == 2
    assert network(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])).shape == (2, 1, 8, 8)


def test_hidden_weights_are_those_between_the_first_and_the_last_layer():
    model = small_unet(num_classes=3)
    left_out = "conv_in.weight", "conv_out.weight", "class_embedding.weight"
    expected = [w for n, w in model.named_parameters() if w.ndim > 1 and n not in left_out]
    assert [id(w) for w in hidden_weights(model)] == [id(w) for w in expected]


def test_singular_values_become_about_1_and_the_vectors_stay():
    U, _, Vh = torch.linalg.svd(randn(16, 24).double(), full_matrices=False)
    S = torch.logspace(-2, 0, 16, dtype=torch.float64)
    inside = U.mT @ orthogonalize(U * S @ Vh) @ Vh.mT
    assert inside.diagonal().min() > 0.68 and inside.diagonal().max() < 1.21
    torch.testing.assert_close(inside, inside.diagonal().diag(), rtol=0, atol=1e-6)


def test_steps_are_those_of_torch():
    """torch.optim.Muon takes matrices and computes in bfloat16; the other steps are Adam's."""
    model = small_unet()
    hidden = [weight.data_ptr() for weight in hidden_weights(model)]
    matrices, others = [], []  # pairs of a parameter and its copy
    for p in model.parameters():
        pairs, copy = (matrices, p.flatten(1)) if p.data_ptr() in hidden else (others, p)
        pairs.append((p, torch.nn.Parameter(copy.detach().clone())))
    assert len(matrices) > 20 and len(others) > 20
    ours, copies = Muon(model, 1e-3), [copy for _, copy in matrices]
    muon = torch.optim.Muon(copies, 1e-3, 0, ours.momentum, adjust_lr_fn="match_rms_adamw")
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
