"""muon.py against the singular value decomposition and against torch's Adam and Muon."""

import copy

import torch
from conftest import SmallDiT

from ddpm import Diffusion, UNet, linear_betas
from support.muon import Muon, hidden_weights

LR = 1e-3


def one_step():
    """Return {name: (before, gradient, after Adam, after Muon)} of a step of a small U-Net."""
    torch.manual_seed(0)
    before = UNet(8, 3, 8, (1, 2), 1, (4,), dropout=0.0)
    for weight in before.parameters():  # the last layer of a branch starts at 0
        weight.data += 0.1 * torch.randn_like(weight)
    models = [before, copy.deepcopy(before), copy.deepcopy(before)]
    gradients = []
    for model, optimizer in zip(
        models[1:], (torch.optim.Adam(models[1].parameters(), LR), Muon(models[2], LR)), strict=True
    ):
        torch.manual_seed(1)
        Diffusion(linear_betas()).loss(model, torch.rand(8, 3, 8, 8) * 2 - 1).backward()
        gradients = gradients or [p.grad.clone() for p in model.parameters()]
        optimizer.step()
    names = [name for name, _ in before.named_parameters()]
    rows = zip(names, gradients, *(model.parameters() for model in models), strict=True)
    return {name: (w.detach(), g, a.detach(), m.detach()) for name, g, w, a, m in rows}


def is_hidden(name, weight):
    return weight.ndim > 1 and name not in ("conv_in.weight", "conv_out.weight")


def test_hidden_weights_are_those_between_the_first_and_the_last_layer():
    """Of the U-Net with classes, and of a transformer, whose layers have other names."""
    model = UNet(8, 3, 8, (1, 2), 1, (4,), num_classes=3)
    left_out = "conv_in.weight", "conv_out.weight", "class_embedding.weight"
    expected = [w for n, w in model.named_parameters() if w.ndim > 1 and n not in left_out]
    assert [id(w) for w in hidden_weights(model)] == [id(w) for w in expected]
    model = SmallDiT()
    expected = {*model.time.parameters(), *model.blocks.parameters()}
    assert {*hidden_weights(model)} == {w for w in expected if w.ndim > 1}
    Muon(model, LR)


def test_first_step_is_along_the_orthogonal_factor_of_the_gradient():
    """G = U S V^T becomes U S' V^T, where S' is about 1; its entries then have an rms of 0.2 lr."""
    spread = []
    for name, (before, gradient, _, after) in one_step().items():
        if not is_hidden(name, before):
            continue
        matrix = gradient.flatten(1)
        U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        step = (before - after).flatten(1).double() / (LR * 0.2 * max(matrix.shape) ** 0.5)
        large = S.gt(0.1 * S.max()).sum()  # five iterations need not reach the others
        inside = (U.mT @ step @ Vh.mT)[:large, :large]
        assert (inside.diagonal() - 1).abs().max() < 0.4, name
        assert (inside - inside.diagonal().diag()).abs().max() < 0.15, name
        spread.append((S[0] / S[large - 1]).item())
    assert len(spread) > 20 and max(spread) > 5  # of the gradients, for comparison


def test_the_other_parameters_take_the_steps_of_adam():
    compared = 0
    for name, (before, _, adam, muon) in one_step().items():
        if not is_hidden(name, before):
            torch.testing.assert_close(muon, adam, rtol=1e-5, atol=1e-7)
            assert not torch.equal(muon, before)
            compared += 1
    assert compared > 20


def test_steps_are_those_of_torch():
    """torch.optim.Muon, given each weight as a matrix, computes in bfloat16."""
    torch.manual_seed(0)
    model = UNet(8, 3, 8, (1, 2), 1, (4,), dropout=0.0)
    hidden = [p for name, p in model.named_parameters() if is_hidden(name, p)]
    matrices = [torch.nn.Parameter(p.detach().flatten(1).clone()) for p in hidden]
    ours = Muon(model, 1e-3)
    theirs = torch.optim.Muon(matrices, 1e-3, 0, ours.momentum, adjust_lr_fn="match_rms_adamw")
    for lr in (1e-3, 5e-4, 2e-3):
        before = [p.detach().flatten(1).clone() for p in hidden]
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for p, matrix in zip(hidden, matrices, strict=True):
            matrix.data.copy_(p.detach().flatten(1))
            matrix.grad = p.grad.flatten(1)
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        for p, matrix, start in zip(hidden, matrices, before, strict=True):
            step, expected = p.detach().flatten(1) - start, matrix.detach() - start
            assert (step - expected).norm() < 0.03 * expected.norm()
