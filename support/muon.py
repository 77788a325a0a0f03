"""The optimizer of train.py --quick: Muon for the hidden weights, Adam for all other parameters.

    optimizer = Muon(model, lr=6e-3)   # in place of torch.optim.Adam(model.parameters(), lr=2e-3)

Adam divides the step of each entry of a weight by the size of that entry's gradients. Muon (Jordan
et al. 2024, kellerjordan.github.io/posts/muon) treats the weight as a matrix, and sets all singular
values of its averaged gradient to about 1. Directions with small gradients therefore learn as fast
as the others, and a short run gets further.
"""

from collections import defaultdict

import torch


def orthogonalize(G):
    """Return approximately U V^T for each matrix G = U S V^T of a stack (k, m, n).

    Each of the five iterations applies p(s) = 3.4445 s - 4.775 s^3 + 2.0315 s^5 to the singular
    values. Together they map every s from 0.002 to 1 to a value between 0.68 and 1.21.
    """
    X = G / (G.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=-4.775, alpha=2.0315)
        X = torch.baddbmm(X, B, X, beta=3.4445)
    return X


def hidden_weights(model):
    """Return the weights of the linear and convolutional layers between x_t and eps.

    The first convolution (without any, the first layer), which reads x_t, and the last module of
    the network, which returns eps, are left out.
    """
    kinds = torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    first = next((layer for layer in layers if isinstance(layer, kinds[1:])), layers[0])
    outer = {first, *[*model.children()][-1].modules()}
    return [layer.weight for layer in layers if layer not in outer]


class Muon(torch.optim.Adam):
    """Apply Muon to the hidden_weights of a model, and Adam to the other parameters.

    The weight of a convolution counts as a matrix (out, in * height * width). As in Liu et al. 2025
    (arXiv:2502.16982), steps have a root mean square of about 0.2 lr, which is typical of Adam, so
    both can share one learning rate.
    """

    def __init__(self, model, lr, momentum=0.9):
        super().__init__(model.parameters(), lr, fused=True)
        self.momentum = momentum
        equal = defaultdict(list)  # weights of equal shape are multiplied together, as a stack
        for weight in hidden_weights(model):
            equal[weight.flatten(1).shape].append(weight)
        self.stacks = list(equal.values())
        self.momenta = [w[0].new_zeros(len(w), *shape) for shape, w in equal.items()]

    @torch.no_grad()
    def step(self):
        """Take a step with the gradients of the parameters."""
        lr = self.param_groups[0]["lr"]
        for weights, average in zip(self.stacks, self.momenta, strict=True):
            gradient = torch.stack([weight.grad.flatten(1) for weight in weights])
            average.lerp_(gradient, 1 - self.momentum)
            steps = orthogonalize(gradient.lerp(average, self.momentum))
            steps *= -0.2 * lr * max(steps.shape[1:]) ** 0.5
            for weight, step in zip(weights, steps, strict=True):
                weight += step.view_as(weight)
                weight.grad = None  # so that Adam skips this weight
        super().step()

    def state_dict(self):
        return super().state_dict() | {"muon": self.momenta}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        for average, saved in zip(self.momenta, state["muon"], strict=True):
            average.copy_(saved)
