"""Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel 2020, arXiv:2006.11239) in one file.

It presents the method in this order:

    linear_betas   how much noise each of the T steps adds
    Diffusion      q, its posterior, the loss, the variational bound, the sampler
    UNet           eps_theta(x_t, t), the paper's network

    from ddpm import Diffusion, UNet, linear_betas

    diffusion, model = Diffusion(linear_betas()), UNet()
    diffusion.loss(model, x0).backward()  # gradient of Algorithm 1; x0: (B, 3, 32, 32) in [-1, 1]
    x0 = diffusion.sample(model.eval(), (16, 3, 32, 32))  # Algorithm 2

Numbers in parentheses are the paper's equation numbers. Images are float32 (B, C, H, W) in [-1, 1].
A model is any function (x_t, t) that returns the noise in x_t. What came after the paper, such as
few-step samplers and guidance, is in sample.py and extras/variants.py.

Time: the paper counts t = 1..T and calls the data x_0. Here t is an int64 tensor of shape (B,) with
values 0..T-1 that indexes the tables, so t = 0 is the paper's t = 1: an image with one step of
noise. The network receives the same 0..T-1, as in the authors' code.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ------------------------------------------------------------------------------- the noise schedule


def linear_betas(T=1000, beta_1=1e-4, beta_T=0.02):
    """Return the paper's schedule (section 4): T variances from beta_1 to beta_T. Float64, (T,).

    With a smaller T, larger betas are needed to leave as little of x_0 in x_T.
    """
    return torch.linspace(beta_1, beta_T, T, dtype=torch.float64)


# ---------------------------------------------------------------------------- the diffusion process


def look_up(table, t, x):
    """Return the entries of a table (T,) at t (B,), float32 (B, 1, ..., 1), to broadcast over x.

    The small table is sent to the device of t at each call, so that no copy becomes stale; on CUDA,
    the transfer may be asynchronous. The table becomes float32 before it is indexed, so that
    model.onnx has no float64.
    """
    table = table.to(t.device, torch.float32, non_blocking=t.is_cuda)
    return table[t].view(-1, *[1] * (x.ndim - 1))


class Bound(NamedTuple):
    """The terms (5) of the bound in bits per dimension, estimated from one x_t per image and t."""

    L_T: Tensor  # (B,) KL(q(x_T | x_0) || N(0, I)): how much of x_0 is left in x_T
    L_t: Tensor  # (B, T) column t is the paper's L_t, so column 0 is the discretised decoder L_0
    total: Tensor  # (B,) L_T plus the sum of L_t over t: the bound on -log2 p(x_0) per dimension
    mse: Tensor  # (B, T) mean squared error of x0_hat at each t, not in bits


class Diffusion:
    """The tables of a schedule, each float64 of shape (T,) on the CPU, and the paper's equations.

    The methods work on the device of their arguments, and on data of any shape (B, ...).

    betas: (T,) numbers in (0, 1).
    variance: sigma_t^2 of the reverse step (section 3.2). "large" is beta_t, optimal if
        x_0 ~ N(0, I); "small" is the posterior variance beta-tilde_t, optimal if x_0 is a single
        point. The authors' code uses "large" for CIFAR-10 and "small" for 256x256 images.

    Raises ValueError if betas or variance is invalid.
    """

    def __init__(self, betas, variance="large"):
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
        # 1 - betas < 1: no beta is lost to rounding
        if betas.ndim != 1 or not len(betas) or not ((betas < 1) & (1 - betas < 1)).all():
            raise ValueError("betas must be a 1-d list of numbers above 0 and below 1")
        if variance not in ("large", "small"):
            raise ValueError(f'variance must be "large" or "small", not {variance!r}')
        self.T, self.variance = len(betas), variance
        self.betas = betas  # of q(x_t | x_t-1) = N(sqrt(1 - beta_t) x_t-1, beta_t I) (2)
        self.alphas = alphas = 1 - betas
        self.alphas_bar = abar = alphas.cumprod(0)
        self.alphas_bar_prev = abar_prev = torch.cat([betas.new_ones(1), abar[:-1]])
        # q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I) (4)
        self.sqrt_alphas_bar = abar.sqrt()
        self.sqrt_one_minus_alphas_bar = (1 - abar).sqrt()
        # q(x_{t-1} | x_t, x_0): the coefficients of x_0 and x_t in its mean, and its variance (7)
        self.posterior_x0 = abar_prev.sqrt() * betas / (1 - abar)
        self.posterior_x_t = alphas.sqrt() * (1 - abar_prev) / (1 - abar)
        self.posterior_variance = (1 - abar_prev) / (1 - abar) * betas
        # sigma_t^2 of the reverse step. The decoder L_0 needs a positive first entry, for which the
        # posterior variance of the next step is used, as in the authors' code.
        self.sigma2 = (betas if variance == "large" else self.posterior_variance).clone()
        self.sigma2[0] = self.posterior_variance[1] if self.T > 1 else betas[0]
        self.sigma = self.sigma2.sqrt()

    # ----------------------------------------------------------------------- q, the forward process

    def q_sample(self, x0, t, noise):
        """Return x_t ~ q(x_t | x_0) (4), (B, C, H, W) like x0 and the noise."""
        signal, spread = self.sqrt_alphas_bar, self.sqrt_one_minus_alphas_bar
        return look_up(signal, t, noise) * x0 + look_up(spread, t, noise) * noise

    def predict_x0(self, x_t, t, eps):
        """Return x_0 by (15), which is (4) solved for x_0: the clean image if the noise is eps."""
        signal, spread = self.sqrt_alphas_bar, self.sqrt_one_minus_alphas_bar
        return (x_t - look_up(spread, t, x_t) * eps) / look_up(signal, t, x_t)

    def q_posterior_mean(self, x0, x_t, t):
        """Return the mean of q(x_{t-1} | x_t, x_0) (7), (B, C, H, W)."""
        return look_up(self.posterior_x0, t, x_t) * x0 + look_up(self.posterior_x_t, t, x_t) * x_t

    def q_posterior(self, x0, x_t, t):
        """Return mean (B, C, H, W) and variance (B, 1, 1, 1) of q(x_{t-1} | x_t, x_0) (6), (7)."""
        return self.q_posterior_mean(x0, x_t, t), look_up(self.posterior_variance, t, x_t)

    # ------------------------------------------------------------------------ training, Algorithm 1

    def draw_t(self, n, device=None):
        """Draw n values of t uniformly from 0..T-1. Int64 (n,)."""
        return torch.randint(self.T, (n,), device=device)

    def squared_error(self, model, x0, t, noise):
        """Return the squared error of the predicted noise, (B, C, H, W), at t (B,).

        Everything but the network is float32, even under autocast: in bfloat16, abar_t would round
        to 1 for the first ten steps, which leaves no noise.
        """
        x_t = self.q_sample(x0, t, noise)
        return (noise - model(x_t, t)).square()

    def loss(self, model, x0, t=None, noise=None):
        """Return L_simple (14), the mean squared error of the predicted noise, a scalar.

        It is the mean over the dimensions; (14) has the sum. t (B,) and noise (B, C, H, W)
        are drawn unless given.
        """
        t = self.draw_t(len(x0), x0.device) if t is None else t
        noise = torch.randn_like(x0) if noise is None else noise
        return self.squared_error(model, x0, t, noise).mean()

    def bound_weights(self):
        """Return the weight that (12) gives the squared error of eps at each t. Float64, (T,)."""
        return self.betas**2 / (2 * self.sigma2 * self.alphas * (1 - self.alphas_bar))

    # ------------------------------------------------------------------------ the variational bound

    @staticmethod
    def decoder_log_likelihood(x0, mean, sigma):
        """Return the log-probability (13) that N(mean, sigma^2) gives to the bin of each value x0.

        x0 are 8-bit values k / 127.5 - 1. Bins are 2/255 wide; the first and the last are open.
        Probabilities are at least 1e-12. The arguments broadcast; the result is float64 on
        the CPU, in nats. The integral is exact; the authors' code approximates it with a tanh.
        """
        x0, mean, sigma = x0.cpu().double(), mean.cpu().double(), sigma.cpu().double()
        cdf_above = torch.special.ndtr((x0 + 1 / 255 - mean) / sigma).where(x0 < 0.999, 1.0)
        cdf_below = torch.special.ndtr((x0 - 1 / 255 - mean) / sigma).where(x0 > -0.999, 0.0)
        return (cdf_above - cdf_below).clamp(min=1e-12).log()

    @torch.no_grad()
    def vlb(self, model, x0, generator=None):
        """Return the terms (5) of the variational bound (3) on -log p(x_0), in bits per dimension.

        x0: 8-bit images k / 127.5 - 1, (B, C, H, W). generator: a torch.Generator on x0's device.
        Takes T forward passes; call model.eval() first. x0_hat is clipped to [-1, 1], as in
        sampling. The result is a Bound, float64 on the CPU.
        """
        abar_T, mean_square = self.alphas_bar[-1].item(), x0.square().flatten(1).mean(1)
        # KL(q(x_T | x_0) || N(0, I)): means sqrt(abar_T) x_0 and 0, variances 1 - abar_T and 1
        L_T = (abar_T * mean_square.cpu().double() - abar_T - math.log1p(-abar_T)) / 2 / math.log(2)
        L_t, mse = [], []
        for i in range(self.T):
            t = torch.full((len(x0),), i, device=x0.device)
            noise = torch.randn(x0.shape, generator=generator, device=x0.device)
            x_t = self.q_sample(x0, t, noise)
            x0_hat = self.predict_x0(x_t, t, model(x_t, t)).clamp(-1, 1)
            mean, variance = self.q_posterior(x0, x_t, t)
            mean_hat = self.q_posterior_mean(x0_hat, x_t, t)
            sigma2 = look_up(self.sigma2, t, x0)
            if i == 0:
                term = -self.decoder_log_likelihood(x0, mean_hat, sigma2.sqrt()).to(x0)
            else:  # KL of two Gaussians: (8) with its constant
                ratio = variance / sigma2
                term = (ratio - 1 - ratio.log() + (mean - mean_hat) ** 2 / sigma2) / 2
            L_t.append(term.flatten(1).mean(1) / math.log(2))
            mse.append((x0_hat - x0).square().flatten(1).mean(1))
        L_t, mse = torch.stack(L_t, 1).cpu().double(), torch.stack(mse, 1).cpu().double()
        return Bound(L_T, L_t, L_T + L_t.sum(1), mse)  # (5)

    # ------------------------------------------------------------------------ sampling, Algorithm 2

    @torch.no_grad()
    def sample_progressive(
        self, model, shape, generator=None, draw_noise=None, x_T=None, device=None, clip=True
    ):
        """Yield (t, x_t, x0_hat) of Algorithm 2, from t = T-1 down.

        x_t is the input of the network and x0_hat the current estimate of the clean image; the last
        x0_hat is the sample. Call model.eval() first.

        shape: (B, C, H, W). device: where the noise is drawn; the CPU if None.
        generator: a torch.Generator on this device.
        draw_noise: replaces the generator; returns x_T (unless x_T is given), and then each z.
        x_T: where to start; pure noise if None. Diffusion(betas[: t + 1]) can start from an x_t.
        clip: keep x0_hat in [-1, 1]. Algorithm 2 does not clip; the authors' code does, because the
            error of x0_hat is the error of eps times sqrt((1 - abar_t) / abar_t), 157 at t = T-1.
        """
        if draw_noise is None:
            device = device if x_T is None else x_T.device
            draw_noise = partial(torch.randn, shape, generator=generator, device=device)
        x = draw_noise() if x_T is None else x_T
        for i in reversed(range(self.T)):
            t = torch.full((len(x),), i, device=x.device)
            x0 = self.predict_x0(x, t, model(x, t))  # (15)
            x0 = x0.clamp(-1, 1) if clip else x0
            yield i, x, x0
            mean = self.q_posterior_mean(x0, x, t)  # (7); without the clip, it is (11)
            z = draw_noise() if i > 0 else 0
            x = mean + self.sigma[i].item() * z

    def sample(self, model, shape, *args, **kwargs):
        """Return the last x0_hat of sample_progressive, with its arguments: (B, C, H, W)."""
        for _, _, x0_hat in self.sample_progressive(model, shape, *args, **kwargs):
            x0 = x0_hat
        return x0


# -------------------------------------------------------------------------------------- the network


def timestep_embedding(t, dim):
    """Return sines, then cosines, of t (B,) at dim/2 frequencies from 1 to 1/10000: (B, dim)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


class Attention(nn.Module):
    """x plus self-attention over its H*W positions, one head of all C channels."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x):
        h = self.norm(x).flatten(2).transpose(1, 2).unsqueeze(1)  # (B, 1 head, H*W, C)
        h = F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h))
        return x + self.out(h).squeeze(1).transpose(1, 2).reshape(x.shape)


class ResBlock(nn.Module):
    """norm, SiLU, conv, + time embedding; norm, SiLU, dropout, conv, + input; then attention."""

    def __init__(self, in_channels, out_channels, time_channels, groups, dropout, attention):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_proj = nn.Linear(time_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        self.attention = Attention(out_channels, groups) if attention else nn.Identity()

    def forward(self, x, temb):
        h = self.conv1(F.silu(self.norm1(x))) + self.time_proj(temb)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.attention(self.shortcut(x) + h)


class Downsample(nn.Module):
    """Halve H and W with a convolution of stride 2, padded right and below, as in TensorFlow."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double H and W: repeat each pixel, and apply a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """eps_theta(x_t, t): the U-Net of appendix B, the same network as in the authors' code.

    The defaults are the CIFAR-10 network with 35,746,307 parameters. image_size=256,
    channel_mults=(1, 1, 2, 2, 4, 4), dropout=0 is the 256x256 network with 113,673,219.

    image_size: height and width in pixels, a multiple of 2^(number of levels - 1).
    in_channels: 1 for greyscale images, 3 for colour.
    base_channels: width of the first level, a multiple of 4.
    channel_mults: width of each level divided by base_channels; each level halves the resolution.
    num_res_blocks: residual blocks per level on the way down; there is one more on the way up.
    attention_resolutions: sizes in pixels of the levels whose blocks end in attention; the middle
        always has attention.
    dropout: probability of dropping an activation in a residual block.
    norm_groups: groups in each norm; by default gcd(32, base_channels / 4), which is 32 at 128.
    num_classes: number of classes that forward accepts as y; 0 for none, as in the paper.

    Raises ValueError for sizes that do not fit together.
    """

    def __init__(
        self, image_size=32, in_channels=3, base_channels=128, channel_mults=(1, 2, 2, 2),
        num_res_blocks=2, attention_resolutions=(16,), dropout=0.1, norm_groups=None, num_classes=0,
    ):  # fmt: skip
        super().__init__()
        self.factor = 2 ** (len(channel_mults) - 1)
        if base_channels < 4 or base_channels % 4:
            raise ValueError(f"base_channels must be a multiple of 4, not {base_channels}")
        if image_size < self.factor or image_size % self.factor:
            raise ValueError(f"image_size must be a multiple of {self.factor}, not {image_size}")
        sizes = [image_size >> level for level in range(len(channel_mults))]
        if not set(attention_resolutions) <= set(sizes):
            given = [*attention_resolutions]
            raise ValueError(f"attention_resolutions {given} must be among {sizes}")
        groups = math.gcd(32, base_channels // 4) if norm_groups is None else norm_groups
        self.base_channels, self.num_classes = base_channels, num_classes
        time_channels = 4 * base_channels

        def res_block(in_channels, out_channels, attention):
            return ResBlock(in_channels, out_channels, time_channels, groups, dropout, attention)

        self.time_mlp = nn.Sequential(
            nn.Linear(base_channels, time_channels),
            nn.SiLU(),
            nn.Linear(time_channels, time_channels),
        )
        if num_classes:  # the last row means "no class"; all rows start at zero, without effect
            self.class_embedding = nn.Embedding(num_classes + 1, time_channels)
            nn.init.zeros_(self.class_embedding.weight)
        self.conv_in = nn.Conv2d(in_channels, base_channels, 3, padding=1)

        widths = [base_channels * mult for mult in channel_mults]
        levels = list(zip(widths, [size in attention_resolutions for size in sizes], strict=True))
        ch, skips = base_channels, [base_channels]  # skips: widths of the skip connections
        self.down = nn.ModuleList()  # every level but the last ends in a Downsample
        for width, attends in levels:
            layers = nn.ModuleList()
            for _ in range(num_res_blocks):
                layers.append(res_block(ch, width, attends))
                ch = width
                skips.append(ch)
            if len(self.down) < len(levels) - 1:
                layers.append(Downsample(ch))
                skips.append(ch)
            self.down.append(layers)

        self.middle = nn.ModuleList([res_block(ch, ch, True), res_block(ch, ch, False)])

        self.up = nn.ModuleList()  # every level ends in an Upsample, except for the last one
        for width, attends in reversed(levels):
            layers = nn.ModuleList()
            for _ in range(num_res_blocks + 1):
                layers.append(res_block(ch + skips.pop(), width, attends))
                ch = width
            layers.append(Upsample(ch) if skips else nn.Identity())  # no skips: the last level
            self.up.append(layers)

        self.norm_out = nn.GroupNorm(groups, ch, eps=1e-6)
        self.conv_out = nn.Conv2d(ch, in_channels, 3, padding=1)
        self._initialize()

    def _initialize(self):
        """Set Glorot-uniform weights, near 0 at the end of residual branches, and zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResBlock):
                nn.init.xavier_uniform_(module.conv2.weight, gain=1e-5)
            elif isinstance(module, Attention):
                nn.init.xavier_uniform_(module.out.weight, gain=1e-5)
        nn.init.xavier_uniform_(self.conv_out.weight, gain=1e-5)

    def forward(self, x_t, t, y=None):
        """Predict the noise in x_t (B, C, H, W) at t (B,), int64. The result is shaped like x_t.

        y: the classes (B,), int64, if there are any; num_classes, like None, means "no class".
        """
        if x_t.ndim != 4:
            raise ValueError(f"x_t must have the shape (B, C, H, W), not {tuple(x_t.shape)}")
        height, width = x_t.shape[2:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"the sides of {height}x{width} must be multiples of {self.factor}")
        temb = self.time_mlp(timestep_embedding(t, self.base_channels))
        if self.num_classes:
            y = torch.full_like(t, self.num_classes) if y is None else y
            temb = temb + self.class_embedding(y)
        temb = F.silu(temb)  # in the authors' code, each residual block does this
        h = self.conv_in(x_t)
        skips = [h]
        for level in self.down:
            for layer in level:
                h = layer(h, temb) if isinstance(layer, ResBlock) else layer(h)
                skips.append(h)
        for block in self.middle:
            h = block(h, temb)
        for *blocks, upsample in self.up:
            for block in blocks:
                h = block(torch.cat([h, skips.pop()], 1), temb)
            h = upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))
