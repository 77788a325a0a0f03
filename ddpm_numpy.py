"""The reverse process of ddpm.py in numpy, and a network that ONNX Runtime runs: no torch.

    network = Network("model.onnx")                    # a file written by export.py
    x0 = sample(network, 16, steps=10)                 # float32 in [-1, 1], (16, C, H, W)
    x0 = sample(network, 16, ["boot", "bag"], guidance=2, steps=10)    # if it has classes

A service needs this file, a model.onnx, numpy and onnxruntime (or onnxruntime-gpu[cuda,cudnn]). One
Network may be used from several threads.

Numbers in parentheses are the paper's equation numbers (arXiv:2006.11239). t is 0..T-1, as in
ddpm.py.
"""

import hashlib
import json
import math
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

SAMPLERS = "ddpm", "ddim", "sa-solver"
LAMBDAS = np.linspace(0, 1, 11, dtype=np.float32)  # the mixtures of an interpolation
MAX_ERROR = 0.05  # of eps on a GPU, relative to the eps that export.py has computed on a CPU

# ------------------------------------------------------------------------------ the reverse process


def respaced(betas, steps):
    """Return a chain through some of the noise levels: its betas and its tau, both (steps,)."""
    T = len(betas)
    if not 1 <= steps <= T:
        raise ValueError(f"steps must be 1..{T}, not {steps}")
    tau = T * np.arange(1, steps + 1) // steps - 1
    alphas_bar = (1 - betas).cumprod()[tau]
    return 1 - alphas_bar / np.append(1.0, alphas_bar[:-1]), tau


def sample_progressive(
    eps_model, draw_noise, betas, variance="large", steps=None, sampler=None, eta=None, x_T=None,
    clip=True, known=None,
):  # fmt: skip
    """Yield (t, x_t, x0_hat) of the reverse process, from t = T-1 down.

    x_t is the input of the network and x0_hat the current estimate of the clean image; the last
    x0_hat is the sample. All are float32 (B, C, H, W).

    eps_model(x_t, t) returns eps; t is int64 (B,). draw_noise() returns the next z.
    betas: float64 (T,). variance: sigma_t^2 is beta_t if "large", beta-tilde_t if "small".
    steps: how many of the T steps to take; all if None.
    sampler: "ddpm" is the paper's Algorithm 2, the default with all T steps; "sa-solver" is
        SA-Solver without noise, the default with fewer; "ddim" is DDIM.
    eta: only for "ddim", which is selected if eta is given. 0, the default, is deterministic; 1
        equals "ddpm" with the "small" variance.
    x_T: where to start; pure noise if None. To continue from an x_t, pass betas[: t + 1] with it.
    clip: keep x0_hat in [-1, 1].
    known: for inpainting, (image, mask), which broadcast to x_t. Where the mask is False, x_t is
        drawn from q(x_t | x_0) of the image (4) in each step, and x0_hat is the image.

    Raises ValueError for an unknown variance or sampler, and for steps or eta out of range.
    """
    T = len(betas)
    betas, tau = respaced(betas, T if steps is None else steps)
    if sampler is None:
        sampler = "ddim" if eta is not None else "sa-solver" if len(betas) < T else "ddpm"
    if variance not in ("large", "small"):
        raise ValueError(f'variance must be "large" or "small", not {variance!r}')
    if sampler not in SAMPLERS:
        raise ValueError(f"the sampler must be in {[*SAMPLERS]}, not {sampler!r}")
    if eta is not None and (sampler != "ddim" or not 0 <= eta <= 1):
        raise ValueError(
            f'eta must be from 0 to 1, and is only for "ddim"; it is {eta} for {sampler!r}'
        )
    alphas = 1 - betas
    alphas_bar = alphas.cumprod()
    alphas_bar_prev = np.append(1.0, alphas_bar[:-1])
    posterior_variance = (1 - alphas_bar_prev) / (1 - alphas_bar) * betas  # (7)
    sigma2 = betas if variance == "large" else posterior_variance
    if sampler != "ddpm":
        sigma2 = (eta or 0) ** 2 * posterior_variance
    posterior_x0 = np.sqrt(alphas_bar_prev) * betas / (1 - alphas_bar)
    posterior_x_t = np.sqrt(alphas) * (1 - alphas_bar_prev) / (1 - alphas_bar)
    columns = alphas_bar, alphas_bar_prev, posterior_x0, posterior_x_t, np.sqrt(sigma2)
    tables = np.stack(columns, 1).tolist()  # Python floats, which keep float32 arrays float32

    x, step = draw_noise() if x_T is None else x_T, sa_solver_step(alphas_bar)
    for i in reversed(range(len(betas))):
        abar, abar_prev, factor_x0, factor_x_t, sigma = tables[i]
        if known:
            image, mask = known
            x_t = math.sqrt(abar) * image + math.sqrt(1 - abar) * draw_noise()  # (4)
            x = np.where(mask, x, x_t)
        eps = eps_model(x, np.full(len(x), tau[i]))
        x0 = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)  # (15)
        x0 = x0.clip(-1, 1) if clip else x0
        x0 = np.where(mask, x0, image) if known else x0
        yield int(tau[i]), x, x0
        if i == 0:  # the last step adds no noise, and its mean is x0_hat itself
            return
        if sampler == "ddpm":
            mean = factor_x0 * x0 + factor_x_t * x  # (7)
        elif sampler == "ddim":
            eps = (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)  # the noise that fits x0
            mean = math.sqrt(abar_prev) * x0 + math.sqrt(1 - abar_prev - sigma**2) * eps
        else:
            mean = step(x0, x, i)
        x = mean + sigma * draw_noise() if sigma else mean


def node_weights(nodes, start, end):
    """Return the weights c of: integral from start to end of e^(s - end) x0(s) ds = sum c_k x0_k.

    x0(s) is the polynomial through the points (nodes[k], x0_k). All are floats.
    """
    nodes, h = [node - end for node in nodes], end - start
    moments = [-math.expm1(-h)]  # the integrals of e^u u^k from -h to 0
    for k in range(1, len(nodes)):
        moments.append(-math.exp(-h) * (-h) ** k - k * moments[-1])
    weights = []
    for node in nodes:
        powers = [1.0]  # the coefficients of Lagrange's polynomial, which is 1 at this node
        for other in nodes:
            if other != node:  # multiply it by (u - other) / (node - other)
                pairs = zip([0.0, *powers], [*powers, 0.0], strict=True)
                powers = [(lower - other * same) / (node - other) for lower, same in pairs]
        weights.append(sum(m * power for m, power in zip(moments, powers, strict=True)))
    return weights


def sa_solver_step(abar, order=3):
    """Return step(x0_hat, x_t, t), which returns x_{t-1}: that of beyond.py, for numpy."""
    lam = (np.log(abar / (1 - abar)) / 2).tolist()
    signal, spread = np.sqrt(abar).tolist(), np.sqrt(1 - abar).tolist()
    nodes, estimates, begin = [], [], None  # the latest first; where the last step began

    def solve(x, before, after):
        """Return x at the level `after`, from x at the level `before`."""
        weights = node_weights(nodes, lam[before], lam[after])
        x = spread[after] / spread[before] * x
        for weight, x0 in zip(weights, estimates, strict=True):
            x = x + signal[after] * weight * x0
        return x

    def step(x0, x_t, t):
        nonlocal begin
        nodes.insert(0, lam[t])
        estimates.insert(0, x0)
        del nodes[order:], estimates[order:]
        begin = x_t if begin is None else solve(begin, t + 1, t)
        return solve(begin, t, t - 1)

    return step


def mix(x0, x0_b, t, betas, draw_noise):
    """Diffuse two images to x_t and mix them by each of LAMBDAS (figure 8): (11, C, H, W).

    x0, x0_b: in [-1, 1], (C, H, W). t: 0..T-1; the larger it is, the more the network invents when
    it continues with betas[: t + 1]. draw_noise() returns the next z, (1, C, H, W).
    """
    abar = float((1 - betas).cumprod()[t])
    x_t, x_t_b = (math.sqrt(abar) * x + math.sqrt(1 - abar) * draw_noise() for x in (x0, x0_b))
    lam = LAMBDAS[:, None, None, None]
    return (1 - lam) * x_t + lam * x_t_b


def guided(network, y, w):
    """Return eps_model(x_t, t) of classifier-free guidance: (1 + w) eps given y, minus w eps.

    Unlike in beyond.py, one call of the Network computes both. y: its classes, int64 (B,). w: 0 is
    no guidance. Others use the scale s = 1 + w.
    """
    none = np.full_like(y, len(network.classes))

    def eps_model(x_t, t):
        if w == 0:
            return network(x_t, t, y)
        both = network(np.tile(x_t, (2, 1, 1, 1)), np.tile(t, 2), np.append(y, none))
        eps_y, eps = np.split(both, 2)
        return (1 + w) * eps_y - w * eps

    return eps_model


def noise_of(seed, first, shape):
    """Return a draw_noise() for images first, first + 1, ...: standard normal, (B, C, H, W).

    The noise of image k depends on (seed, k) alone, so the number of images changes none of them.
    A thread draws the next noise while the network computes.
    """
    streams = [np.random.default_rng((seed, first + k)) for k in range(shape[0])]
    thread = ThreadPoolExecutor(1)

    def draw():
        return np.stack([s.standard_normal(shape[1:], dtype=np.float32) for s in streams])

    def draw_noise():
        nonlocal ahead
        noise, ahead = ahead.result(), thread.submit(draw)
        return noise

    ahead = thread.submit(draw)
    return draw_noise


def sample(network, n, classes=None, guidance=0, steps=10, seed=0, first=0, **options):
    """Return n images that a Network draws together: float32 in [-1, 1], (n, C, H, W).

    classes: names, which the images take in turn; all classes if None. guidance: the w of `guided`.
    steps: 1..T. seed, first: the images are those with the numbers first, first + 1, ... of this
    seed. options: those of sample_progressive.

    Raises ValueError for an unknown class, for guidance without classes, and wherever
    sample_progressive does.
    """
    y = network.labels(classes, first + n)
    if guidance and y is None:
        raise ValueError("guidance needs a network with classes")
    y, draw_noise = None if y is None else y[first:], noise_of(seed, first, (n, *network.shape))
    for _, _, x0_hat in network.reverse(y, guidance, draw_noise, steps=steps, **options):
        x0 = x0_hat
    return x0


# -------------------------------------------------------------------------------------- the network


def open_session(path, device, options):
    """Return an onnxruntime.InferenceSession. The arguments and errors are those of Network."""
    try:
        import onnxruntime as ort
    except ModuleNotFoundError:
        raise ValueError("ONNX Runtime is missing: pip install onnxruntime") from None
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder, not the model.onnx that export.py writes; for a "
                         f"run, first: python export.py --checkpoint {path}")  # fmt: skip
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist; python export.py writes it")
    if device not in ("auto", "cuda", "cpu"):
        raise ValueError(f'device must be "auto", "cuda" or "cpu", not {device!r}')
    providers = ["CPUExecutionProvider"]
    has_cuda = "CUDAExecutionProvider" in ort.get_available_providers()
    # Without NVIDIA's driver, ONNX Runtime would print an error.
    if has_cuda and (device == "cuda" or (device == "auto" and shutil.which("nvidia-smi"))):
        ort.preload_dlls()  # the CUDA libraries that pip installed; it prints what is missing
        providers.insert(0, ("CUDAExecutionProvider", {"cudnn_conv_algo_search": "HEURISTIC"}))
    try:
        session = ort.InferenceSession(path, options, providers=providers)
    except Exception as error:  # ONNX Runtime raises many kinds
        if device == "auto" and len(providers) > 1:  # the card may be full, for example
            print(f"{path}: CUDA fails: {str(error)!a}; using the CPU instead", file=sys.stderr)
            return open_session(path, "cpu", options)
        raise ValueError(f"{path} can't be opened by ONNX Runtime: {str(error)!a}") from None
    return session


def example(shape, T):
    """Return the input (x_t, t) whose eps is in a file's metadata; the page uses the same input."""
    x_t = math.sqrt(2) * np.sin(np.arange(math.prod(shape)))
    return x_t.reshape(1, *shape).astype(np.float32), np.full(1, T // 2)


def error_of(eps, values):
    """Return the relative rms difference between eps, at evenly spaced places, and the values."""
    difference = eps.ravel()[:: -(-eps.size // 64)] - values
    return float(np.sqrt(np.square(difference).mean() / np.square(values).mean()))


class Network:
    """eps_theta(x_t, t) from a model.onnx: float32 (B, C, H, W) and int64 (B,) to eps, for any B.

    device: "auto" prefers CUDA, "cuda" requires it, "cpu" avoids it. CUDA must be able to compute
    eps of the `example`, and agree with the eps in the file; otherwise, "auto" prints why it does
    not, and uses the CPU.
    options: onnxruntime.SessionOptions, for example the number of threads.

    Attributes: betas, float64 (T,), and variance are those of the file, shape is (C, H, W) of an
    image, classes has the names of the classes, if any, and provider is the part of ONNX Runtime
    that computes. A third argument y, int64 (B,), has the class of each image; None stands for "no
    class", and a network without classes ignores it.

    Raises ValueError if the file is missing or was not written by export.py, if CUDA is required
    but not available or wrong, and if y is not what the network expects.
    """

    def __init__(self, path, device="auto", options=None):
        self.path, self.session = path, open_session(path, device, options)
        metadata = self.session.get_modelmeta().custom_metadata_map
        missing = {"ddpm.betas", "ddpm.variance", "ddpm.image_shape"} - metadata.keys()
        if missing:
            raise ValueError(f"{path} was not written by export.py: it lacks {min(missing)}")
        from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

        try:  # the metadata, and a first call, which is invalid if they do not fit the network
            self.betas = np.array(json.loads(metadata["ddpm.betas"]), np.float64)
            self.variance = metadata["ddpm.variance"]
            self.shape = tuple(map(int, json.loads(metadata["ddpm.image_shape"])))
            self.classes = [*map(str, json.loads(metadata.get("ddpm.classes", "[]")))]
            is_schedule = self.betas.ndim == 1 and ((self.betas > 0) & (self.betas < 1)).all()
            if not is_schedule or not len(self.betas) or self.variance not in ("large", "small"):
                raise ValueError("they have no schedule")
            if len({*self.classes}) < len(self.classes):
                raise ValueError(f"the classes are {self.classes}")
            values = np.array(json.loads(metadata.get("ddpm.eps_of_example", "[]")), np.float64)
            fault = self.fault_of_provider(values)
            if fault and device == "auto":
                print(f"{path}: CUDA {fault}; using the CPU instead", file=sys.stderr)
                self.session, fault = open_session(path, "cpu", options), None
            if not fault:
                self(np.zeros((1, *self.shape), np.float32), np.zeros(1, np.int64))
        except (TypeError, ValueError, InvalidArgument) as error:
            why = ascii(str(error).partition("\n")[0])
            raise ValueError(f"{path} has metadata that do not fit: {why}") from None
        if fault:
            raise ValueError(f"{path}: CUDA {fault}; see Accelerators in docs/guide.md")
        self.provider = self.session.get_providers()[0]  # the CPU if CUDA does not load
        if device == "cuda" and self.provider != "CUDAExecutionProvider":
            raise ValueError("ONNX Runtime can't use CUDA; see Accelerators in docs/guide.md")

    def fault_of_provider(self, values):
        """Return what is wrong with eps of the `example`; None if it is right, or from the CPU.

        values: those of the file, (<= 64,), which earlier versions of export.py did not write.
        """
        if self.session.get_providers()[0] == "CPUExecutionProvider":
            return None
        try:
            eps = self(*example(self.shape, len(self.betas)))
        except Exception as error:  # ONNX Runtime raises many kinds
            why = str(error).partition("\n")[0]
            return f"fails: {why!a}"
        error = error_of(eps, values) if len(values) else 0.0
        return None if error < MAX_ERROR else f"computes an eps that is wrong by {error:.0%}"

    def __call__(self, x_t, t, y=None):
        feeds, K = {"x_t": x_t, "t": t}, len(self.classes)
        if K:
            feeds["y"] = np.full(len(t), K) if y is None else y
            if feeds["y"].shape != t.shape or not ((feeds["y"] >= 0) & (feeds["y"] <= K)).all():
                raise ValueError(f"y must have the shape {t.shape} and values 0..{K}, not {y}")
        return self.session.run(["eps"], feeds)[0]

    def reverse(self, y, guidance, draw_noise, betas=None, **options):
        """Return sample_progressive of this network, with its own betas if None.

        y: the class of each image, int64 (B,), or None. guidance: the w of `guided`.
        """
        model = self if y is None else guided(self, y, guidance)
        betas = self.betas if betas is None else betas
        return sample_progressive(model, draw_noise, betas, self.variance, **options)

    def digest(self):
        """Return a hash of the file, as a string."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def labels(self, names, n):
        """Return the classes of n images that take these names in turn, int64 (n,).

        names: a list, or one name; all classes if None. The result is None for a network without
        classes. Raises ValueError for a name that is not one of the classes.
        """
        names = [names] if isinstance(names, str) else [*(names or [])]
        unknown = sorted({*names} - {*self.classes})
        if unknown and not self.classes:
            raise ValueError("the network has no classes")
        if unknown:
            raise ValueError(f"no class {unknown[0]}; the classes are {', '.join(self.classes)}")
        index = [self.classes.index(name) for name in names or self.classes]
        return np.resize(index, n) if index else None
