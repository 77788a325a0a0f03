"""muon.py against the singular value decomposition and against torch's Adam and Muon."""

import torch
from closed_forms import randn
from conftest import SMALL, SmallDiT

from ddpm import UNet
from support.muon import Muon, hidden_weights, orthogonalize


def test_hidden_weights_are_those_between_the_first_and_the_last_layer():
    """Check the U-Net with classes, and a transformer, whose layers have other names."""
    model = UNet(**SMALL, num_classes=3)
    left_out = "conv_in.weight", "conv_out.weight", "class_embedding.weight"
    expected = [w for n, w in model.named_parameters() if w.ndim > 1 and n not in left_out]
    assert [id(w) for w in hidden_weights(model)] == [id(w) for w in expected]
    model = SmallDiT()
    expected = {*model.time.parameters(), *model.blocks.parameters()}
    assert {*hidden_weights(model)} == {w for w in expected if w.ndim > 1}
    Muon(model, 1e-3)


def test_singular_values_become_about_1_and_the_vectors_stay():
    U, _, Vh = torch.linalg.svd(randn(3, 16, 24).double(), full_matrices=False)
    S = torch.logspace(-2, 0, 16, dtype=torch.float64)
    inside = U.mT @ orthogonalize(U * S @ Vh) @ Vh.mT
    values = inside.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.68 and values.max() < 1.21
    torch.testing.assert_close(inside, values.diag_embed(), rtol=0, atol=1e-6)


def test_steps_are_those_of_torch():
    """torch.optim.Muon takes matrices and computes in bfloat16; the other steps are Adam's."""
    torch.manual_seed(0)
    model = UNet(**SMALL)
    hidden = [weight.data_ptr() for weight in hidden_weights(model)]
    matrices, others = [], []  # pairs of a parameter and its copy
    for p in model.parameters():
        if p.data_ptr() in hidden:
            matrices.append((p, torch.nn.Parameter(p.detach().flatten(1).clone())))
        else:
            others.append((p, torch.nn.Parameter(p.detach().clone())))
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
