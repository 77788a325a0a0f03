"""Draw images with the network of a model.onnx, in numpy and ONNX Runtime: no torch.

    network = Network("model.onnx")                    # a file written by export.py
    x0 = sample(network, 16, steps=10)                 # float32 in [-1, 1], (16, C, H, W)
    x0 = sample(network, 16, ["boot", "bag"], guidance=2, steps=10)    # if it has classes

A service needs this file, samplers.py, a model.onnx, numpy and onnxruntime (for an NVIDIA GPU,
onnxruntime-gpu[cuda,cudnn]). One Network may be used from several threads. t is 0..T-1, as in
ddpm.py.
"""

import hashlib
import json
import math
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from ctypes.util import find_library
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from samplers import reverse

LAMBDAS = np.linspace(0, 1, 11, dtype=np.float32)  # the mixtures of an interpolation
MAX_ERROR = 0.05  # of eps on a GPU, relative to the eps that export.py computed on a CPU

# ------------------------------------------------------------------------------ the reverse process


def sample_progressive(eps_model, *args, **options):
    """Yield (t, x_t, x0_hat) of samplers.reverse, with its arguments, as float32 (B, C, H, W).

    eps_model(x_t, t) returns eps, as there, but t is an int64 array (B,).
    """
    return reverse(lambda x_t, t: eps_model(x_t, np.full(len(x_t), t)), *args, **options)


def mix(x0, x0_b, t, betas, draw_noise):
    """Mix two images by each of LAMBDAS, and diffuse the mixtures to x_t: (11, C, H, W).

    All mixtures have the same noise. In the paper's figure 8, each image has its own noise. The
    noise of the middle mixture then has 71% of the right standard deviation, and the network blurs
    the image.

    x0, x0_b: in [-1, 1], (C, H, W). t: 0..T-1; the larger it is, the more the network invents when
    it continues with betas[: t + 1]. draw_noise() returns the next z, (1, C, H, W).
    """
    abar, lam = float((1 - betas).cumprod()[t]), LAMBDAS[:, None, None, None]
    return math.sqrt(abar) * ((1 - lam) * x0 + lam * x0_b) + math.sqrt(1 - abar) * draw_noise()


def guided(network, y, w):
    """Return eps_model(x_t, t) of classifier-free guidance: (1 + w) eps given y, minus w eps.

    Unlike in beyond.py, one call of the Network computes both. y: the classes of the images, int64
    (B,). w: 0 means no guidance; other programs use the scale s = 1 + w.
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

    The noise of image k depends on (seed, k) alone, and not on the number of images.
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


def class_labels(classes, names, n, guidance=0):
    """Return the classes of n images that take these names in turn, int64 (n,), or None.

    classes: the names of all classes; without any, the result is None. names: a list, or one name;
    all classes if None. Raises ValueError for a name that is not one of the classes, and for
    guidance that is not finite, or without classes.
    """
    if not math.isfinite(guidance):
        raise ValueError(f"guidance must be a finite number, not {guidance}")
    names = [names] if isinstance(names, str) else [*(names or [])]
    if unknown := sorted({*names} - {*classes}):
        those = f"no class {unknown[0]}; the classes are {', '.join(classes)}"
        raise ValueError(those if classes else "the network has no classes")
    if guidance and not classes:
        raise ValueError("guidance needs a network with classes")
    index = [classes.index(name) for name in names or classes]
    return np.resize(index, n) if index else None


def sample(network, n, classes=None, guidance=0, steps=10, seed=0, first=0, **options):
    """Return n images that a Network draws together: float32 in [-1, 1], (n, C, H, W).

    classes: names, which the images take in turn; all classes if None. guidance: the w of `guided`.
    steps: 1..T. seed, first: the images have the numbers first, first + 1, ... of this seed.
    options: those of samplers.reverse.

    Raises ValueError for an unknown class, for guidance without classes, and wherever
    samplers.reverse does.
    """
    y = class_labels(network.classes, classes, first + n, guidance)
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
    if Path(path).is_dir() or Path(path).suffix == ".pt":
        raise ValueError(f"{path} is not a file that export.py writes; if it is a run, first: "
                         f"python export.py --checkpoint {path}")  # fmt: skip
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist; python export.py writes it")
    if device not in ("auto", "cuda", "cpu"):
        raise ValueError(f'device must be "auto", "cuda" or "cpu", not {device!r}')
    providers, fault = ["CPUExecutionProvider"], None
    if device == "cuda" or (device == "auto" and shutil.which("nvidia-smi")):
        has_libraries = sys.platform != "linux" or find_spec("nvidia") or find_library("cublasLt")
        if "CUDAExecutionProvider" not in ort.get_available_providers():
            fault = "ONNX Runtime can't use CUDA; see Accelerators in docs/guide.md"
        elif device == "auto" and not has_libraries:  # ONNX Runtime would print errors
            fault = "CUDA's libraries are missing: pip install -r requirements-cuda.txt"
        else:
            ort.preload_dlls()  # those that pip installed
            cuda = "CUDAExecutionProvider", {"cudnn_conv_algo_search": "HEURISTIC"}
            providers.insert(0, cuda)
    if fault and device == "cuda":
        raise ValueError(fault)
    if fault:
        print(f"{fault}; using the CPU instead", file=sys.stderr)
    try:
        return ort.InferenceSession(path, options, providers=providers)
    except Exception as error:  # ONNX Runtime raises many kinds
        why = ascii(str(error))
    if device == "auto" and len(providers) > 1:  # the card may be full, for example
        session = open_session(path, "cpu", options)
        print(f"{path}: CUDA fails: {why}; using the CPU instead", file=sys.stderr)
        return session
    raise ValueError(f"{path} can't be opened by ONNX Runtime: {why}")


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
    image, classes has the names of the classes, if any, step is the training step, 0 if unknown,
    and provider is the part of ONNX Runtime that computes. A third argument y, int64 (B,), has the
    class of each image; None stands for "no class", and a network without classes ignores it.

    Raises ValueError if the file is missing or was not written by export.py, if CUDA is required
    but not available or wrong, and if y is not what the network expects.
    """

    def __init__(self, path, device="auto", options=None):
        self.path, self.session = path, open_session(path, device, options)
        metadata = self.session.get_modelmeta().custom_metadata_map
        missing = {"ddpm.betas", "ddpm.variance", "ddpm.image_shape"} - metadata.keys()
        if missing:
            raise ValueError(f"{path} was not written by export.py: it lacks {min(missing)}")
        inputs = {i.name: i.shape for i in self.session.get_inputs()}
        try:
            self.betas = np.array(json.loads(metadata["ddpm.betas"]), np.float64)
            self.variance = metadata["ddpm.variance"]
            self.shape = tuple(map(int, json.loads(metadata["ddpm.image_shape"])))
            self.classes = [*map(str, json.loads(metadata.get("ddpm.classes", "[]")))]
            self.step = int(metadata.get("ddpm.step", 0))
            answer = np.array(json.loads(metadata.get("ddpm.eps_of_example", "[]")), np.float64)
            is_schedule = self.betas.ndim == 1 and ((self.betas > 0) & (self.betas < 1)).all()
            if not is_schedule or not len(self.betas) or self.variance not in ("large", "small"):
                raise ValueError("they have no schedule")
            if math.prod(self.shape) > 2**26:
                raise ValueError(f"the images are {self.shape}")
            if inputs["x_t"][1:] != [*self.shape] or ("y" in inputs) != bool(self.classes):
                raise ValueError(f"the inputs are {inputs}")
            if len({*self.classes}) < len(self.classes):
                raise ValueError(f"the classes are {self.classes}")
        except (TypeError, ValueError) as error:
            why = ascii(str(error).partition("\n")[0])
            raise ValueError(f"{path} has metadata that do not fit: {why}") from None
        if fault := self.fault_of_provider(answer):
            if device != "auto":
                raise ValueError(f"{path}: CUDA {fault}; see Accelerators in docs/guide.md")
            print(f"{path}: CUDA {fault}; using the CPU instead", file=sys.stderr)
            self.session = open_session(path, "cpu", options)
        self.provider = self.session.get_providers()[0]  # the CPU if CUDA does not load
        if device == "cuda" and self.provider != "CUDAExecutionProvider":
            raise ValueError("ONNX Runtime can't use CUDA; see Accelerators in docs/guide.md")

    def fault_of_provider(self, values):
        """Return what is wrong with the eps of the `example`; None if it is right or from the CPU.

        values: up to 64 eps of the file; without any, it suffices that eps can be computed.
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

    def reverse(self, y, guidance, draw_noise, start=None, **options):
        """Return sample_progressive of this network, with its own schedule.

        y: the class of each image, int64 (B,), or None. guidance: the w of `guided`. start: the t
        of the x_T in the options; T-1 if None.
        """
        model = self if y is None else guided(self, y, guidance)
        betas = self.betas if start is None else self.betas[: start + 1]
        return sample_progressive(model, draw_noise, betas, self.variance, **options)

    def digest(self):
        """Return a hash of the file, as a string."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
