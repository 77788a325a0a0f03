"""Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel 2020, arXiv:2006.11239) in one file.

It presents the method in this order:

    linear_betas, cosine_betas   how much noise each of the T steps adds
    Diffusion                    q, its posterior, the loss, the variational bound, the samplers
    UNet                         eps_theta(x_t, t), the paper's network
    guided                       classifier-free guidance, for a network with classes

    diffusion, model = Diffusion(linear_betas()), UNet()
    diffusion.loss(model, x0).backward()                 # Algorithm 1, one step
    x0 = diffusion.sample(model.eval(), (16, 3, 32, 32))  # Algorithm 2

Numbers in parentheses are the paper's equation numbers. Images are float32 (B, C, H, W) in [-1, 1].

Time: the paper counts t = 1..T and calls the data x_0. Here t is an int64 tensor of shape (B,) with
values 0..T-1 that indexes the tables, so t = 0 is the paper's t = 1: an image with one step of
noise. The network receives the same 0..T-1, as in the authors' code.
"""

import math
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ------------------------------------------------------------------------------- the noise schedule


def linear_betas(T=1000, beta_1=1e-4, beta_T=0.02):
    """Return the paper's schedule (section 4): T variances from beta_1 to beta_T. Float64, (T,).

    Change T and the betas together. To sample in fewer steps, pass `steps=` to the sampler.
    """
    return torch.linspace(beta_1, beta_T, T, dtype=torch.float64)


def cosine_betas(T=1000):
    """Return the schedule of Nichol and Dhariwal 2021 (arXiv:2102.09672, eq. 17). Float64, (T,)."""
    u = torch.arange(T + 1, dtype=torch.float64) / T
    alphas_bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - alphas_bar[1:] / alphas_bar[:-1]).clamp(max=0.999)


# ---------------------------------------------------------------------------- the diffusion process


def _at(table, t, x):
    """Look up a table (T,) at t (B,): float32 (B, 1, ..., 1), to broadcast over x (B, ...)."""
    is_cpu = t.device.type == "cpu"
    # Float32 before the look-up, so that model.onnx holds no float64:
    table = table.float() if is_cpu else _copy(table, t.device, table._version)
    return table[t].view(-1, *[1] * (x.ndim - 1))


@lru_cache(maxsize=256)
def _copy(table, device, version):
    """Return a float32 copy of a table, made once for each device and each edit of the table."""
    return table.to(device, torch.float32)


class Bound(NamedTuple):
    """The terms (5) of the bound in bits per dimension, estimated from one x_t per image and t."""

    L_T: Tensor  # (B,) KL(q(x_T | x_0) || N(0, I)): how much of x_0 is left in x_T
    L_t: Tensor  # (B, T) column t is the paper's L_t, so column 0 is the discretised decoder L_0
    total: Tensor  # (B,) L_T plus the sum of L_t over t: the bound on -log2 p(x_0) per dimension
    mse: Tensor  # (B, T) mean squared error of x0_hat at each t, not in bits


class Diffusion:
    """The tables of a schedule, each float64 of shape (T,) on the CPU, and the paper's equations.

    The methods work on the device of their arguments. tau, int64 (T,), holds the t at which the
    network is evaluated: 0..T-1, unless the chain is a shorter one from `respaced`.

    betas: (T,) numbers in (0, 1).
    variance: sigma_t^2 of the reverse step (section 3.2). "large" is beta_t, optimal if
        x_0 ~ N(0, I); "small" is the posterior variance beta-tilde_t, optimal if x_0 is a single
        point. The authors' code uses "large" for CIFAR-10 and "small" for 256x256 images.
    predicts: what the network returns. "eps" is the noise, the paper's choice. The paper also tries
        "mean", the mean of q(x_{t-1} | x_t, x_0), and "x0", the image. "v" is
        sqrt(abar_t) eps - sqrt(1 - abar_t) x_0, from Salimans and Ho 2022 (arXiv:2202.00512).

    Raises ValueError if betas, variance or predicts is invalid.
    """

    def __init__(self, betas, variance="large", predicts="eps"):
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
        if betas.ndim != 1 or not len(betas) or not ((betas < 1) & (1 - betas < 1)).all():
            raise ValueError("betas must be a 1-d list of numbers between 0 and 1")
        if variance not in ("large", "small"):
            raise ValueError(f'variance must be "large" or "small", not {variance!r}')
        if predicts not in ("eps", "mean", "x0", "v"):
            raise ValueError(f'predicts must be "eps", "mean", "x0" or "v", not {predicts!r}')
        self.T, self.tau = len(betas), torch.arange(len(betas))
        self.variance, self.predicts = variance, predicts
        self.betas = betas  # of q(x_t | x_t-1) = N(sqrt(1 - beta_t) x_t-1, beta_t I) (2)
        self.alphas = alphas = 1 - betas
        self.alphas_bar = abar = alphas.cumprod(0)
        self.alphas_bar_prev = abar_prev = torch.cat([betas.new_ones(1), abar[:-1]])
        # q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I) (4)
        self.sqrt_alphas_bar = abar.sqrt()
        self.sqrt_one_minus_alphas_bar = (1 - abar).sqrt()
        # q(x_{t-1} | x_t, x_0): the factors of x_0 and x_t in its mean, and its variance (7)
        self.posterior_x0 = abar_prev.sqrt() * betas / (1 - abar)
        self.posterior_x_t = alphas.sqrt() * (1 - abar_prev) / (1 - abar)
        self.posterior_variance = (1 - abar_prev) / (1 - abar) * betas
        # sigma_t^2 of the reverse step. Its first entry is that of the decoder L_0, which must be
        # positive: the posterior variance of the next step, as in the authors' code.
        self.sigma2 = (betas if variance == "large" else self.posterior_variance).clone()
        self.sigma2[0] = self.posterior_variance[1] if self.T > 1 else betas[0]
        self.sigma = self.sigma2.sqrt()
        # The noise in x_t is linear in the network's output: eps = a_t x_t + b_t output.
        self.a, self.b = {
            "eps": (torch.zeros_like(abar), torch.ones_like(abar)),
            "mean": ((1 - abar).sqrt() / betas, -(alphas * (1 - abar)).sqrt() / betas),  # (11)
            "x0": (1 / (1 - abar).sqrt(), -(abar / (1 - abar)).sqrt()),  # (15)
            "v": ((1 - abar).sqrt(), abar.sqrt()),
        }[predicts]
        # The weights of the squared error of eps in the loss. SNR = abar / (1 - abar).
        self.weights = {
            "simple": torch.ones_like(abar),  # (14)
            "vlb": betas**2 / (2 * self.sigma2 * alphas * (1 - abar)),  # (12)
            "min-snr": (5 * (1 - abar) / abar).clamp(max=1),
            "native": 1 / self.b**2,
        }

    # ----------------------------------------------------------------------- q, the forward process

    def q_sample(self, x0, t, noise):
        """Return x_t ~ q(x_t | x_0) (4), (B, C, H, W) as x0 and the noise."""
        signal, spread = self.sqrt_alphas_bar, self.sqrt_one_minus_alphas_bar
        return _at(signal, t, noise) * x0 + _at(spread, t, noise) * noise

    def predict_x0(self, x_t, t, eps):
        """Return x_0 by (15), which is (4) solved for x_0: the clean image if the noise is eps."""
        signal, spread = self.sqrt_alphas_bar, self.sqrt_one_minus_alphas_bar
        return (x_t - _at(spread, t, x_t) * eps) / _at(signal, t, x_t)

    def q_posterior(self, x0, x_t, t):
        """Return mean (B, C, H, W) and variance (B, 1, 1, 1) of q(x_{t-1} | x_t, x_0) (6), (7)."""
        mean = _at(self.posterior_x0, t, x_t) * x0 + _at(self.posterior_x_t, t, x_t) * x_t
        return mean, _at(self.posterior_variance, t, x_t)

    def predict_eps(self, model, x_t, t):
        """Return eps_theta(x_t, t), the noise in x_t, whatever the model predicts. (B, C, H, W)."""
        output = model(x_t, _at(self.tau, t, t).to(t)).float()
        if self.predicts == "eps":
            return output
        return _at(self.a, t, x_t) * x_t + _at(self.b, t, x_t) * output

    # ------------------------------------------------------------------------ training, Algorithm 1

    def loss(self, model, x0, t=None, noise=None, weighting="simple"):
        """Return L_simple (14), the mean squared error of the predicted noise, a scalar.

        It is the mean over the dimensions; (14) has the sum. t (B,) and noise (B, C, H, W)
        are drawn unless given. Everything but the network is float32, also under autocast: in
        bfloat16, abar_t would round to 1 for the first ten steps, which leaves no noise.

        weighting: "simple" is (14), whatever the model predicts. "vlb" keeps the weight that (12)
            gives each term: for t > 0, the loss is then L_t in nats per dimension, up to a
            constant; for t = 0, it uses the decoder's density, not its probability. "min-snr"
            (Hang et al. 2023, arXiv:2303.09556) gives the error of x0_hat the weight min(SNR, 5),
            whereas (14) gives it SNR. "native" is the squared error of what the model predicts.

        Raises ValueError for an unknown weighting.
        """
        if weighting not in self.weights:
            raise ValueError(f"weighting must be in {[*self.weights]}, not {weighting!r}")
        t = torch.randint(self.T, (len(x0),), device=x0.device) if t is None else t
        noise = torch.randn_like(x0) if noise is None else noise
        x_t = self.q_sample(x0, t, noise)
        error = (noise - self.predict_eps(model, x_t, t)).square()
        return (_at(self.weights[weighting], t, x0) * error).mean()

    # ------------------------------------------------------------------------ the variational bound

    @staticmethod
    def decoder_log_likelihood(x0, mean, sigma):
        """Return the log-probability (13) that N(mean, sigma^2) gives to the bin of each value x0.

        x0 are 8-bit values k / 127.5 - 1. Bins are 2/255 wide; the first and the last are open.
        Probabilities below 1e-12 count as 1e-12. The arguments broadcast; the result is float64 on
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
        # KL(q(x_T | x_0) || N(0, I)):
        L_T = (abar_T * mean_square.cpu().double() - abar_T - math.log1p(-abar_T)) / 2 / math.log(2)
        L_t, mse = [], []
        for i in range(self.T):
            t = torch.full((len(x0),), i, device=x0.device)
            noise = torch.randn(x0.shape, generator=generator, device=x0.device)
            x_t = self.q_sample(x0, t, noise)
            x0_hat = self.predict_x0(x_t, t, self.predict_eps(model, x_t, t)).clamp(-1, 1)
            mean, variance = self.q_posterior(x0, x_t, t)
            mean_hat, _ = self.q_posterior(x0_hat, x_t, t)
            sigma2 = _at(self.sigma2, t, x0)
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
        self, model, shape, steps=None, sampler=None, eta=None, generator=None, draw_noise=None,
        x_T=None, device=None, clip=True, known=None,
    ):  # fmt: skip
        """Yield (t, x_t, x0_hat) of the reverse process, from t = T-1 down.

        x_t is the input of the network and x0_hat the current estimate of the clean image; the last
        x0_hat is the sample. Call model.eval() first.

        shape: (B, C, H, W). steps: how many of the T steps to take; all if None.
        sampler: "ddpm" is Algorithm 2, the default with all T steps. "dpm" is DPM-Solver++(2M), the
            default with fewer. "ddim" is DDIM. They differ only in the step, a method below.
        eta: only for "ddim", which is selected if eta is given. 0, the default, is deterministic;
            1 equals "ddpm" with the "small" variance.
        device: of the noise; the CPU if None. generator: a torch.Generator on this device.
        draw_noise: replaces the generator; it returns the next z.
        x_T: where to start; pure noise if None. Diffusion(betas[: t + 1], ...) starts from an x_t.
        clip: keep x0_hat in [-1, 1]. Algorithm 2 does not clip; the authors' code does, because the
            error of x0_hat is the error of eps times sqrt((1 - abar_t) / abar_t), 157 at t = T-1.
        known: for inpainting, (image, mask), which broadcast to x_t. Where the mask is False, x_t
            is drawn from q(x_t | x_0) of the image (4) in each step, and x0_hat is the image.

        Raises ValueError for an unknown sampler, and for steps or eta out of range.
        """
        chain = self if steps is None else self.respaced(steps)
        if sampler is None:
            sampler = "ddim" if eta is not None else "dpm" if chain.T < self.T else "ddpm"
        if clip not in (True, False):
            raise ValueError(f"clip must be True or False, for [-1, 1] or no limit, not {clip!r}")
        if sampler not in ("ddpm", "ddim", "dpm"):
            raise ValueError(f'sampler must be "ddpm", "ddim" or "dpm", not {sampler!r}')
        if eta is not None and (sampler != "ddim" or not 0 <= eta <= 1):
            raise ValueError(
                f'eta must be from 0 to 1, and is only for "ddim"; it is {eta} for {sampler!r}'
            )
        ddim_step, dpm_step = chain.make_ddim_step(eta or 0), chain.make_dpm_step()
        step = {"ddpm": chain.ddpm_step, "ddim": ddim_step, "dpm": dpm_step}[sampler]
        is_random = sampler == "ddpm" or bool(eta)
        if draw_noise is None:
            device = device if x_T is None else x_T.device
            draw_noise = partial(torch.randn, shape, generator=generator, device=device)
        image, mask = known or (None, None)

        x = draw_noise() if x_T is None else x_T
        for i in reversed(range(chain.T)):
            t = torch.full((len(x),), i, device=x.device)
            if known:
                x = torch.where(mask, x, chain.q_sample(image, t, draw_noise()))
            eps = chain.predict_eps(model, x, t)
            x0 = chain.predict_x0(x, t, eps)
            x0 = x0.clamp(-1, 1) if clip else x0
            x0 = torch.where(mask, x0, image) if known else x0
            yield chain.tau[i].item(), x, x0
            if i == 0:  # the last mean is x0 itself (7), and z is 0
                return
            mean, sigma = step(x0, x, t)
            z = draw_noise() if is_random else 0
            x = mean + sigma * z

    def sample(self, *args, **kwargs):
        """Return the last x0_hat of sample_progressive, with its arguments: (B, C, H, W)."""
        for _, _, x0_hat in self.sample_progressive(*args, **kwargs):
            x0 = x0_hat
        return x0

    def ddpm_step(self, x0, x_t, t):
        """Return the mean (B, C, H, W) and sigma_t (B, 1, 1, 1) of p(x_{t-1} | x_t).

        x0 is the x0_hat of x_t. Unless it was clipped, the mean is (11).
        """
        mean, _ = self.q_posterior(x0, x_t, t)
        return mean, _at(self.sigma, t, x_t)

    # ------------------------------------------------------------------------ sampling, fewer steps

    def respaced(self, steps):
        """Return the chain through `steps` of the noise levels, a Diffusion for the same network.

        Its tau lists the visited t, as evenly spaced as integers allow, up to T-1. It is a DDPM
        with betas 1 - abar_t / abar_s, where s precedes t in tau. Raises ValueError if steps is not
        1..T.
        """
        if not 1 <= steps <= self.T:
            raise ValueError(f"steps must be 1..{self.T}, not {steps}")
        # "Trailing" steps end at t = T / steps - 1, whose x0_hat is the sample. With steps that go
        # on to t = 0, the distance in docs/beyond.md is larger in up to 20 steps, and equal in 50.
        visited = self.T * torch.arange(1, steps + 1) // steps - 1
        abar = self.alphas_bar[visited]
        betas = 1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])
        chain = type(self)(betas, self.variance, self.predicts)  # a subclass keeps its changes
        # What the network returns at an x_t does not depend on the chain that led there.
        chain.tau, chain.a, chain.b = self.tau[visited], self.a[visited], self.b[visited]
        chain.weights["native"] = self.weights["native"][visited]
        return chain

    def make_ddim_step(self, eta):
        """Return DDIM's step, like ddpm_step (Song et al. 2021, arXiv:2010.02502, eq. 12, 16)."""
        sigma2 = eta**2 * self.posterior_variance
        factor_x0, sigma = self.alphas_bar_prev.sqrt(), sigma2.sqrt()
        factor_eps = (1 - self.alphas_bar_prev - sigma2).sqrt()

        def step(x0, x_t, t):
            # The eps that fits x0, which may have been clipped:
            signal, spread = self.sqrt_alphas_bar, self.sqrt_one_minus_alphas_bar
            eps = (x_t - _at(signal, t, x_t) * x0) / _at(spread, t, x_t)
            mean = _at(factor_x0, t, x_t) * x0 + _at(factor_eps, t, x_t) * eps
            return mean, _at(sigma, t, x_t)

        return step

    def make_dpm_step(self):
        """Return the step of DPM-Solver++(2M), which is DDIM's step with an extrapolated x0_hat.

        Lu et al. 2022 (arXiv:2211.01095), algorithm 2. The line through the last two x0_hat is
        extended to the middle of the step in lambda = log sqrt(abar / (1 - abar)).
        """
        h = -self.alphas_bar.logit().diff() / 2  # from t to t-1, for t = 1..T-1
        ratio = torch.zeros_like(self.alphas_bar)
        ratio[1:-1] = h[:-1] / (2 * h[1:])
        ddim_step, x0_before = self.make_ddim_step(0), None

        def step(x0, x_t, t):
            nonlocal x0_before
            change = 0 if x0_before is None else x0 - x0_before
            x0_before = x0
            return ddim_step(x0 + _at(ratio, t, x0) * change, x_t, t)

        return step


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
    """norm, swish, conv, + time embedding; norm, swish, dropout, conv, + input; then attention."""

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
    """Halves H and W: a convolution of stride 2, padded right and below, as in TensorFlow."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x, temb):  # called like a ResBlock, without using the time embedding
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles H and W: repeats each pixel, then a convolution."""

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
    in_channels: 1 for grey images, 3 for colour.
    base_channels: width of the first level, a multiple of 4.
    channel_mults: width of each level divided by base_channels; each level halves the resolution.
    num_res_blocks: residual blocks per level on the way down; there is one more on the way up.
    attention_resolutions: sizes in pixels of the levels whose blocks end in attention; the middle
        always has attention.
    dropout: probability of dropping an activation in a residual block.
    norm_groups: of each group norm. By default gcd(32, base_channels / 4), the paper's 32 at 128.
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
            raise ValueError(f"attention_resolutions must be among {sizes}, the sizes of levels")
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
        if num_classes:  # the last row means "no class"; all start at zero, without effect
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

        self.up = nn.ModuleList()  # every level ends in an Upsample, the last in an Identity
        for width, attends in reversed(levels):
            layers = nn.ModuleList()
            for _ in range(num_res_blocks + 1):
                layers.append(res_block(ch + skips.pop(), width, attends))
                ch = width
            layers.append(Upsample(ch) if skips else nn.Identity())
            self.up.append(layers)

        self.norm_out = nn.GroupNorm(groups, ch, eps=1e-6)
        self.conv_out = nn.Conv2d(ch, in_channels, 3, padding=1)
        self._initialize()

    def hidden_weights(self):
        """Return the weights for Muon: all but those that read x_t or y, or return eps."""
        outer = "conv_in", "conv_out", "class_embedding"
        return [w for n, w in self.named_parameters() if w.ndim > 1 and not n.startswith(outer)]

    def float32_modules(self):
        """Return the names of the modules that must be exact to tell weak noise from images."""
        return ["time_mlp", "class_embedding", "conv_in", "down.0.0", "conv_out"]

    def _initialize(self):
        """Glorot-uniform weights, near 0 in the last layer of each residual branch; biases 0."""
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
            raise ValueError(f"{height}x{width}: both must be multiples of {self.factor}")
        temb = self.time_mlp(timestep_embedding(t, self.base_channels))
        if self.num_classes:
            y = torch.full_like(t, self.num_classes) if y is None else y
            temb = temb + self.class_embedding(y)
        temb = F.silu(temb)  # in the authors' code, each residual block does this
        h = self.conv_in(x_t)
        skips = [h]
        for level in self.down:
            for layer in level:
                h = layer(h, temb)
                skips.append(h)
        for block in self.middle:
            h = block(h, temb)
        for *blocks, upsample in self.up:
            for block in blocks:
                h = block(torch.cat([h, skips.pop()], 1), temb)
            h = upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


def guided(model, y, w):
    """Return (1 + w) model(x_t, t, y) - w model(x_t, t), as a function of (x_t, t).

    Classifier-free guidance of Ho and Salimans 2022 (arXiv:2207.12598, eq. 6). y: classes (B,).
    w: 0 samples the class as it is, and larger values sample what is more typical of it. Others
    use the scale s = 1 + w, such as diffusers' guidance_scale, so that s = 1 means no guidance.
    """
    # Whatever the model predicts, eps = a_t x_t + b_t output. Since the weights add up to 1, the
    # same combination of eps leaves a_t x_t unchanged.
    return lambda x_t, t: (1 + w) * model(x_t, t, y) - w * model(x_t, t)
