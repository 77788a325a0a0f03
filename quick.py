"""What `train.py --quick` puts in place of the paper's network, loss and optimizer.

    diffusion = WeightedDiffusion(linear_betas())   # in place of Diffusion: another loss
    network = VUNet(diffusion, patch_size=2)        # in place of UNet: predicts v, on patches
    optimizer = Muon(network, lr=6e-3)              # in place of torch.optim.Adam

Once built, each has the interface of what it replaces, so that nothing else has to know about it:
the network returns eps. benchmarks/ladder.py can measure each of them.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ddpm import Diffusion, UNet, look_up

# ------------------------------------------------------------------------------------- the network


class PatchUNet(UNet):
    """A UNet that sees each patch of patch_size x patch_size pixels as one pixel.

    The idea is from Luhman and Luhman 2022 (arXiv:2207.04316). The other arguments are UNet's;
    sizes are in pixels, not in patches. Raises ValueError for sizes that do not fit together.
    """

    def __init__(
        self, patch_size=1, image_size=32, in_channels=3, channel_mults=(1, 2, 2, 2),
        attention_resolutions=(16,), **options,
    ):  # fmt: skip
        factor = patch_size * 2 ** (len(channel_mults) - 1)
        if image_size % factor:
            raise ValueError(f"image_size must be a multiple of {factor}, not {image_size}")
        sizes, given = [image_size >> k for k in range(len(channel_mults))], attention_resolutions
        if not {*given} <= {*sizes}:
            raise ValueError(f"attention_resolutions {[*given]} must be among {sizes}")
        options["attention_resolutions"] = [size // patch_size for size in given]
        options["channel_mults"] = channel_mults
        super().__init__(image_size // patch_size, in_channels * patch_size**2, **options)
        self.patch_size = patch_size

    def forward(self, x_t, t, y=None):
        """Predict the noise in x_t (B, C, H, W) at t (B,), given the classes y (B,), if any."""
        x_t = F.pixel_unshuffle(x_t, self.patch_size)  # (B, C * patch_size^2, ...)
        return F.pixel_shuffle(super().forward(x_t, t, y), self.patch_size)


class VUNet(PatchUNet):
    """A PatchUNet that predicts v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0, and returns eps.

    The target v is from Salimans and Ho 2022 (arXiv:2202.00512). diffusion: a Diffusion, for its
    schedule. args and options: the arguments of PatchUNet. With patch_size=1, it has the same
    parameters and checks as UNet.
    """

    def __init__(self, diffusion, *args, **options):
        super().__init__(*args, **options)
        for name in ("sqrt_alphas_bar", "sqrt_one_minus_alphas_bar"):  # not in the state_dict
            self.register_buffer(name, getattr(diffusion, name).float(), persistent=False)

    def forward(self, x_t, t, y=None):
        """Predict the noise in x_t (B, C, H, W) at t (B,), given the classes y (B,), if any."""
        signal = look_up(self.sqrt_alphas_bar, t, x_t)
        spread = look_up(self.sqrt_one_minus_alphas_bar, t, x_t)
        return spread * x_t + signal * super().forward(x_t, t, y)


# ---------------------------------------------------------------------------------------- the loss


class WeightedDiffusion(Diffusion):
    """A Diffusion whose loss is the squared error of v, with t drawn non-uniformly.

    The density is proportional to sqrt(abar_t) min(1, 5 / SNR_t), where SNR_t = abar_t /
    (1 - abar_t). So the loss has, on average, the weights min(1, 5 / SNR_t) / sqrt(abar_t) on the
    squared error of eps, up to a factor; the minimum is the weight "min-SNR" of Hang et al. 2023
    (arXiv:2303.09556). It suits a network that predicts v; with one that predicts eps, the loss at
    large t has rare, huge values.
    """

    def draw_t(self, n, device=None):
        """Draw n values of t, int64 (n,): one from each of n intervals of equal probability.

        Kingma et al. 2021 (arXiv:2107.00630) draw such values for a uniform density.
        """
        snr = self.alphas_bar / (1 - self.alphas_bar)
        shares = (self.sqrt_alphas_bar * (5 / snr).clamp(max=1)).cumsum(0)
        shares = (shares / shares[-1]).float()  # the distribution function, whose last value is 1
        u = (torch.arange(n, device=device) + torch.rand(n, device=device)) / n
        return torch.searchsorted(shares.to(u.device, non_blocking=u.is_cuda), u)

    def loss(self, model, x0, t=None, noise=None):
        """Return the mean squared error of v, a scalar: eps's squared error divided by abar_t."""
        t = self.draw_t(len(x0), x0.device) if t is None else t
        noise = torch.randn_like(x0) if noise is None else noise
        error = self.squared_error(model, x0, t, noise)
        return (error / look_up(self.alphas_bar, t, error)).mean()


# ----------------------------------------------------------------------------------- the optimizer


def orthogonalize(G):
    """Return approximately U V^T for a matrix G = U S V^T (m, n).

    Each of the five iterations applies p(s) = 3.4445 s - 4.775 s^3 + 2.0315 s^5 to the singular
    values. Together they map every s from 0.002 to 1 to a value between 0.68 and 1.21.
    """
    X = G / (G.norm() + 1e-7)
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (2.0315 * A @ A - 4.775 * A) @ X
    return X


def hidden_weights(model):
    """Return the weights of all linear and convolutional layers but the outer ones.

    The outer ones are the first convolution, which reads x_t, and the last module, which returns
    the output.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    first = next((layer for layer in layers if isinstance(layer, nn.Conv2d)), layers[0])
    outer = {first, *[*model.children()][-1].modules()}
    return [layer.weight for layer in layers if layer not in outer]


class Muon(torch.optim.Adam):
    """Apply Muon to the hidden_weights of a model, and Adam to the other parameters.

    Adam divides the step of each entry of a weight by the size of that entry's gradients. Muon
    (Jordan et al. 2024, kellerjordan.github.io/posts/muon) treats the weight as a matrix, and sets
    all singular values of its averaged gradient to about 1. The weight of a convolution counts as a
    matrix (out, in * height * width). As in Liu et al. 2025 (arXiv:2502.16982), steps have a root
    mean square of about 0.2 lr, which is typical of Adam, so both can share one learning rate.
    """

    def __init__(self, model, lr, momentum=0.9):
        super().__init__(model.parameters(), lr, fused=True)
        self.momentum, self.hidden = momentum, hidden_weights(model)
        for weight in self.hidden:  # under Adam's names, so that Adam saves and loads the averages
            self.state[weight] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(weight)}

    @torch.no_grad()
    def step(self):
        """Take a step with the gradients of the parameters."""
        lr = self.param_groups[0]["lr"]
        for weight in self.hidden:
            if weight.grad is None:  # an unused layer, which Adam skips, too
                continue
            average = self.state[weight]["exp_avg"].lerp_(weight.grad, 1 - self.momentum)
            step = orthogonalize(weight.grad.lerp(average, self.momentum).flatten(1))
            weight -= 0.2 * lr * max(step.shape) ** 0.5 * step.view_as(weight)
            weight.grad = None  # so that Adam skips this weight
        super().step()
