"""Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel 2020, arXiv:2006.11239) in one file.

In the order of the lesson:

    linear_betas, cosine_betas   how much noise each of the T steps adds
    Diffusion                    q, the posterior, the losses, the bound, the samplers
    UNet                         eps_theta(x_t, t), the paper's network

    diffusion, model = Diffusion(linear_betas()), UNet()
    diffusion.loss(model, x0).backward()                 # Algorithm 1, one step
    x0 = diffusion.sample(model.eval(), (16, 3, 32, 32))  # Algorithm 2

Numbers in brackets are the paper's equations. Pictures are float32 in [-1, 1], shape (B, C, H, W).

Time. The paper counts t = 1..T and calls the data x_0. Here t is an int64 tensor of shape (B,) with
values 0..T-1, an index into the tables: t = 0 is the paper's t = 1, a picture with one step of
noise. So `alphas_bar[t]` never needs a "- 1", and the network is given the same 0..T-1, as in the
authors' code.
"""

import math
from collections import namedtuple

import torch
import torch.nn.functional as F
from torch import nn

# ------------------------------------------------------------------------------- the noise schedule


def linear_betas(T=1000, beta_1=1e-4, beta_T=0.02):
    """The paper's schedule (section 4): T variances from beta_1 to beta_T. Float64, shape (T,).

    T and the betas belong together: x_T must be as good as pure noise. With fewer steps keep T and
    sample with `steps=`, rather than train with a smaller T.
    """
    return torch.linspace(beta_1, beta_T, T, dtype=torch.float64)


def cosine_betas(T=1000):
    """The schedule of Nichol and Dhariwal 2021 (arXiv:2102.09672, eq. 17). Float64, shape (T,)."""
    u = torch.arange(T + 1, dtype=torch.float64) / T
    alphas_bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - alphas_bar[1:] / alphas_bar[:-1]).clamp(max=0.999)


# ------------------------------------------------------------------------------ forward and reverse


def _at(table, t):
    """Entries t (B,) of a float64 table (T,), as float32 (B, 1, 1, 1) to multiply pictures with."""
    return table.to(t.device)[t].float()[:, None, None, None]


def discretized_log_likelihood(x, mean, sigma):
    """(13), the decoder: log of the share of N(mean, sigma^2) in the bin of the 8-bit value x.

    Bins are 2/255 wide, the first and the last open; at least log 1e-12. The integral is exact,
    where the authors' code takes a tanh for it: the same to 0.0001 bits at the paper's error (0.95
    of 255), 0.1 less at an error of 2. Shapes that broadcast; float64 out.
    """
    x, mean, sigma = x.double(), mean.double(), sigma.double()
    above = torch.special.ndtr((x + 1 / 255 - mean) / sigma).where(x < 0.999, 1.0)
    below = torch.special.ndtr((x - 1 / 255 - mean) / sigma).where(x > -0.999, 0.0)
    return (above - below).clamp(min=1e-12).log()


Bound = namedtuple("Bound", "L_T L_t total mse")


class Diffusion:
    """The tables of a schedule, float64 and of shape (T,), and the paper's equations over them.

    betas: (T,) numbers in (0, 1). The tables stay on its device: `linear_betas().cuda()` saves a
        copy in each call.
    variance: sigma_t^2 of the reverse step (section 3.2), "large" for beta_t, the best choice if
        x_0 were N(0, I), or "small" for the posterior's beta-tilde_t, the best if x_0 were one
        point. The paper's CIFAR-10 pictures use "large", its 256x256 pictures "small".
    """

    def __init__(self, betas, variance="large"):
        betas = torch.as_tensor(betas, dtype=torch.float64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas < 1)).all():
            raise ValueError("betas must be a 1-d list of numbers between 0 and 1")
        if variance not in ("large", "small"):
            raise ValueError(f'variance must be "large" or "small", not {variance!r}')
        self.T = len(betas)
        self.variance = variance
        self.betas = betas  # of q(x_t | x_t-1) = N(sqrt(1 - beta_t) x_t-1, beta_t I) (2)
        self.alphas = 1 - betas
        self.alphas_bar = self.alphas.cumprod(0)
        self.alphas_bar_prev = torch.cat([betas.new_ones(1), self.alphas_bar[:-1]])
        self.posterior_variance = (1 - self.alphas_bar_prev) / (1 - self.alphas_bar) * betas  # (7)
        # sigma_t^2. The first is never used to sample, since the last step adds no noise. In the
        # bound it is the decoder's, where beta-tilde = 0 would not do: the authors take the next.
        self.sigma2 = (betas if variance == "large" else self.posterior_variance).clone()
        self.sigma2[0] = self.posterior_variance[1] if self.T > 1 else betas[0]

    # ----------------------------------------------------------------------- q, the forward process

    def q_sample(self, x0, t, noise):
        """x_t ~ q(x_t | x_0) (4): sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise. All (B, C, H, W)."""
        return _at(self.alphas_bar.sqrt(), t) * x0 + _at((1 - self.alphas_bar).sqrt(), t) * noise

    def predict_x0(self, x_t, t, eps):
        """(15): (4) solved for x_0, the picture that x_t would come from if its noise were eps."""
        return (x_t - _at((1 - self.alphas_bar).sqrt(), t) * eps) / _at(self.alphas_bar.sqrt(), t)

    def q_posterior(self, x0, x_t, t):
        """q(x_{t-1} | x_t, x_0) (6): its mean (B, C, H, W) and variance (B, 1, 1, 1), by (7)."""
        abar, abar_prev = self.alphas_bar, self.alphas_bar_prev
        mean = (
            _at(abar_prev.sqrt() * self.betas / (1 - abar), t) * x0
            + _at(self.alphas.sqrt() * (1 - abar_prev) / (1 - abar), t) * x_t
        )
        return mean, _at(self.posterior_variance, t)

    # ------------------------------------------------------------------------ training, Algorithm 1

    def loss(self, model, x0, t=None, noise=None, weighting="simple"):
        """L_simple (14): the mean squared error of the predicted noise. A scalar to minimise.

        model(x_t, t) -> eps. t (B,) and noise (B, C, H, W) are drawn unless given. Everything but
        the network is float32, also under autocast: in bfloat16, 1 - abar_t is 0 for the first
        ten steps. weighting="vlb" keeps the weights that (12) puts before each term and (14) drops,
        at t = 0 with the decoder's variance: the mean over t of L_t, in nats per dimension, but for
        what no network can change.
        """
        if t is None:
            t = torch.randint(self.T, (len(x0),), device=x0.device)
        if noise is None:
            noise = torch.randn_like(x0)
        eps = model(self.q_sample(x0, t, noise), t)
        error = (noise - eps.float()).square().mean((1, 2, 3))
        if weighting == "vlb":
            # (12):
            weights = self.betas**2 / (2 * self.sigma2 * self.alphas * (1 - self.alphas_bar))
            error = error * _at(weights, t).flatten()
        elif weighting != "simple":
            raise ValueError(f'weighting must be "simple" or "vlb", not {weighting!r}')
        return error.mean()

    @torch.no_grad()
    def vlb(self, model, x0, generator=None):
        """The variational bound (5) on -log p(x_0), each term in bits per dimension, at x0_hat
        clipped to [-1, 1]. T passes of the network; call model.eval() first.

        x0 (B, C, H, W), 8-bit pictures k / 127.5 - 1; generator on its device. Returns a Bound:
        L_T (B,), the part that nothing can learn; L_t (B, T), the paper's L_t in column t and so in
        column 0 the discretised decoder L_0; total (B,); mse (B, T), of x0_hat at each t.
        """
        abar_T = self.alphas_bar[-1].item()  # KL(q(x_T | x_0) || N(0, I)):
        L_T = (abar_T * x0.double() ** 2 - abar_T - math.log1p(-abar_T)) / 2
        L_t, mse = [], []
        for i in range(self.T):
            t = torch.full((len(x0),), i, device=x0.device)
            noise = torch.randn(x0.shape, generator=generator, device=x0.device)
            x_t = self.q_sample(x0, t, noise)
            x0_hat = self.predict_x0(x_t, t, model(x_t, t).float()).clamp(-1, 1)
            mean, variance = self.q_posterior(x0, x_t, t)
            mean_hat, _ = self.q_posterior(x0_hat, x_t, t)
            sigma2 = _at(self.sigma2, t)
            if i == 0:
                term = -discretized_log_likelihood(x0, mean_hat, sigma2.sqrt())
            else:  # KL of two Gaussians: (8), and what is constant in it
                ratio = variance / sigma2
                term = (ratio - 1 - ratio.log() + (mean - mean_hat) ** 2 / sigma2) / 2
            L_t.append(term.double().mean((1, 2, 3)) / math.log(2))
            mse.append((x0_hat - x0).double().square().mean((1, 2, 3)))
        L_T = L_T.mean((1, 2, 3)) / math.log(2)
        L_t, mse = torch.stack(L_t, 1), torch.stack(mse, 1)
        return Bound(L_T, L_t, L_T + L_t.sum(1), mse)  # (5)

    # ------------------------------------------------------------------------ sampling, Algorithm 2

    def respaced(self, steps):
        """A chain of fewer steps through the same noise levels: (Diffusion with T = steps, tau).

        tau (steps,) holds the t of the long chain at which the short one stops, the first and the
        last included. The short chain is a DDPM too, whose betas are 1 - abar_tau_i / abar_tau_i-1.
        """
        if not 1 <= steps <= self.T:
            raise ValueError(f"steps must be 1..{self.T}, not {steps}")
        tau = (self.T - 1 - torch.arange(steps) * (self.T - 1) // max(1, steps - 1)).flip(0)
        abar = self.alphas_bar.cpu()[tau]
        betas = 1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])
        return Diffusion(betas.to(self.betas.device), self.variance), tau.tolist()

    @torch.no_grad()
    def sample_progressive(
        self, model, shape, steps=None, eta=None, generator=None, noise=None, x_T=None,
        device=None, clip=True,
    ):  # fmt: skip
        """Algorithm 2 as a generator: yields (t, x_t, x0_hat) from t = T-1 down to t = 0.

        x_t is what the network saw, x0_hat the picture it expects behind it; the last x0_hat is
        the sample. Call model.eval() first.

        shape: (B, C, H, W). steps: how many of the T steps to take, all unless given.
        eta: None is the paper's ancestral step with the chosen variance; a number is DDIM's eta
            (Song et al. 2021, arXiv:2010.02502, eq. 12, 16), 0 deterministic, 1 "small" ancestral.
        generator: torch.Generator on `device`; or noise: a function that returns the next z.
        x_T: where to start, if not at pure noise. The chain of the first t + 1 betas is a DDPM too,
            so to go on from an x_t: Diffusion(betas[: t + 1], variance).sample(..., x_T=x_t).
        clip: keep x0_hat in [-1, 1]. Algorithm 2 does not, the authors' code does: at large t
            x0_hat is an error of eps divided by sqrt(abar_t) = 0.006, and pictures end at 1.
        """
        chain, tau = (self, range(self.T)) if steps is None else self.respaced(steps)
        device = device if x_T is None else x_T.device
        if noise is None:

            def noise():
                return torch.randn(shape, generator=generator, device=device)

        x = noise() if x_T is None else x_T
        for i in reversed(range(chain.T)):
            t = torch.full((shape[0],), i, device=x.device)
            eps = model(x, torch.full_like(t, tau[i])).float()
            x0 = chain.predict_x0(x, t, eps)
            if clip:
                x0 = x0.clamp(-1, 1)
            yield tau[i], x, x0
            if i == 0:  # no noise in the last step: its mean is x0_hat itself
                return
            if eta is None:
                mean, _ = chain.q_posterior(x0, x, t)  # (11), if x0 were not clipped
                sigma = _at(chain.sigma2.sqrt(), t)
            else:
                abar, abar_prev = chain.alphas_bar, chain.alphas_bar_prev
                sigma2 = eta**2 * chain.posterior_variance
                eps = (x - _at(abar.sqrt(), t) * x0) / _at((1 - abar).sqrt(), t)  # of the clipped
                mean = _at(abar_prev.sqrt(), t) * x0 + _at((1 - abar_prev - sigma2).sqrt(), t) * eps
                sigma = _at(sigma2.sqrt(), t)
            x = mean + sigma * noise()

    def sample(self, *args, **kwargs):
        """The picture at the end of `sample_progressive`, with its arguments: (B, C, H, W)."""
        for _, _, x0_hat in self.sample_progressive(*args, **kwargs):
            x0 = x0_hat
        return x0


# -------------------------------------------------------------------------------------- the network


def timestep_embedding(t, dim):
    """Sinusoids of t, (B,) -> (B, dim): sines, then cosines, at dim/2 frequencies 1 .. 1/10000."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


class ResBlock(nn.Module):
    """GN, swish, conv, + time, GN, swish, dropout, conv, + input; then attention where asked."""

    def __init__(self, in_channels, out_channels, time_channels, groups, dropout, attention):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        self.attention = Attention(out_channels, groups) if attention else nn.Identity()

    def forward(self, x, temb):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(temb)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.attention(self.shortcut(x) + h)


class Attention(nn.Module):
    """x + self-attention over the H*W positions, one head of all C channels."""

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


class Downsample(nn.Module):
    """Halves H and W: convolution of stride 2, padded right and below as TensorFlow's "same"."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles H and W: each pixel four times, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """eps_theta(x_t, t), the U-Net of appendix B, to the letter of the authors' code.

    The defaults are the CIFAR-10 network, 35,746,307 parameters; image_size=256, channel_mults=(1,
    1, 2, 2, 4, 4), dropout=0 the 256x256 one, 113,673,219.

    image_size: height and width in pixels, a multiple of 2^(number of levels - 1).
    in_channels: 1 grey, 3 colour. base_channels: width of the first level, a multiple of 4.
    channel_mults: width of each level over base_channels; between two levels the size halves.
    attention_resolutions: the sizes in pixels whose blocks end in attention; the middle always has.

    norm_groups: groups of each group norm, gcd(32, base_channels / 4) unless given: the paper's 32
        at its 128 channels, fewer in narrower networks, whose groups would else be single channels.
    """

    def __init__(
        self,
        image_size=32,
        in_channels=3,
        base_channels=128,
        channel_mults=(1, 2, 2, 2),
        num_res_blocks=2,
        attention_resolutions=(16,),
        dropout=0.1,
        norm_groups=None,
    ):
        super().__init__()
        self.factor = 2 ** (len(channel_mults) - 1)
        if base_channels < 4 or base_channels % 4:
            raise ValueError(f"base_channels must be a multiple of 4, not {base_channels}")
        if image_size < self.factor or image_size % self.factor:
            raise ValueError(f"image_size must be a multiple of {self.factor}, not {image_size}")
        groups = math.gcd(32, base_channels // 4) if norm_groups is None else norm_groups
        self.image_size, self.base_channels = image_size, base_channels
        time_channels = 4 * base_channels

        def res_block(in_channels, out_channels, attention):
            return ResBlock(in_channels, out_channels, time_channels, groups, dropout, attention)

        self.time = nn.Sequential(  # each block begins with a swish of this: done once, here
            nn.Linear(base_channels, time_channels),
            nn.SiLU(),
            nn.Linear(time_channels, time_channels),
            nn.SiLU(),
        )
        self.conv_in = nn.Conv2d(in_channels, base_channels, 3, padding=1)

        ch, size = base_channels, image_size
        skips = [ch]  # the width of each map that the way up is given
        self.down = nn.ModuleList()
        for level, mult in enumerate(channel_mults):
            if level > 0:
                self.down.append(Downsample(ch))
                size //= 2
                skips.append(ch)
            for _ in range(num_res_blocks):
                self.down.append(res_block(ch, base_channels * mult, size in attention_resolutions))
                ch = base_channels * mult
                skips.append(ch)

        self.middle = nn.ModuleList([res_block(ch, ch, True), res_block(ch, ch, False)])

        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mults))):
            for _ in range(num_res_blocks + 1):
                in_ch = ch + skips.pop()
                ch = base_channels * mult
                self.up.append(res_block(in_ch, ch, size in attention_resolutions))
            if level > 0:
                self.up.append(Upsample(ch))
                size *= 2

        self.norm_out = nn.GroupNorm(groups, ch, eps=1e-6)
        self.conv_out = nn.Conv2d(ch, in_channels, 3, padding=1)
        self._initialize()

    def _initialize(self):
        """Glorot-uniform, biases 0; the last layer of each residual branch and of all near 0."""
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

    def forward(self, x_t, t):
        """The noise in x_t (B, C, H, W), given t (B,) int64: the same shape. float32 in and out."""
        if x_t.shape[2] % self.factor or x_t.shape[3] % self.factor:
            raise ValueError(f"height and width must be multiples of {self.factor}: {x_t.shape}")
        temb = self.time(timestep_embedding(t, self.base_channels))
        h = self.conv_in(x_t)
        skips = [h]
        for block in self.down:
            h = block(h, temb) if isinstance(block, ResBlock) else block(h)
            skips.append(h)
        for block in self.middle:
            h = block(h, temb)
        for block in self.up:
            if isinstance(block, ResBlock):
                h = block(torch.cat([h, skips.pop()], 1), temb)
            else:
                h = block(h)
        return self.conv_out(F.silu(self.norm_out(h)))
