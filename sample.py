"""Sample images from model.onnx with ONNX Runtime, on CUDA or a CPU, without torch.

    python sample.py --onnx model.onnx                     # 64 images in samples.png
    python sample.py --onnx model.onnx --steps 10          # 100 times as fast
    python sample.py --onnx model.onnx -n 10000 --dir out  # one PNG per image
    python sample.py --onnx model.onnx --interpolate a.png b.png  # between two images
    python sample.py --onnx model.onnx --inpaint image.png mask.png  # redraw the white of the mask
    python sample.py --onnx model.onnx --class boot bag --guidance 2  # if it has classes

A machine that serves images needs this file, images.py, a model.onnx, numpy, Pillow, tqdm and
onnxruntime (or onnxruntime-gpu[cuda,cudnn]). The reverse process repeats that of ddpm.py in numpy.
"""

import argparse
import contextlib
import importlib.metadata
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from images import from_pixels, grid, read_image, save_animation, save_image, to_image, to_pixels

GRID = 256  # the largest number of images in one grid
FRAMES, STRIP = 50, 10  # how many of the steps the GIF and the strip show
SAMPLERS = "ddpm", "ddim", "dpm"
LAMBDAS = np.linspace(0, 1, 11, dtype=np.float32)  # the mixtures of an interpolation

# ------------------------------------------------------------------------------ the reverse process


def respaced(betas, steps):
    """Return a chain through some of the noise levels: its betas and its t, both (steps,)."""
    T = len(betas)
    if not 1 <= steps <= T:
        raise ValueError(f"steps must be 1..{T}, not {steps}")
    tau = T * np.arange(1, steps + 1) // steps - 1
    alphas_bar = (1 - betas).cumprod()[tau]
    return 1 - alphas_bar / np.append(1.0, alphas_bar[:-1]), tau


def sample_progressive(
    eps_model, draw_noise, betas, variance="large", steps=None, sampler=None, eta=None, x_T=None,
    known=None,
):  # fmt: skip
    """Yield (t, x_t, x0_hat) of the reverse process, from t = T-1 down.

    x_t is the input of the network and x0_hat, in [-1, 1], the current estimate of the clean image;
    the last x0_hat is the sample. All are float32 (B, C, H, W).

    eps_model(x_t, t) returns eps; t is int64 (B,). draw_noise() returns the next z.
    betas: float64 (T,). variance: sigma_t^2 is beta_t if "large", beta-tilde_t if "small".
    steps: how many of the T steps to take; all if None.
    sampler: "ddpm" is the paper's Algorithm 2, the default with all T steps; "dpm" is
        DPM-Solver++(2M), the default with fewer; "ddim" is DDIM.
    eta: for "ddim" alone, and selects it. 0, the default, is deterministic; 1 equals "ddpm" with
        "small" variance.
    x_T: where to start; pure noise if None. To continue from an x_t, pass betas[: t + 1] with it.
    known: for inpainting, (image, mask), which broadcast to x_t. Where the mask is False, x_t is
        drawn from q(x_t | x_0) of the image (4) in each step, and x0_hat is the image.

    Raises ValueError for an unknown variance or sampler, and for steps or eta out of range.
    """
    T = len(betas)
    betas, tau = respaced(betas, T if steps is None else steps)
    if sampler is None:
        sampler = "ddim" if eta is not None else "dpm" if len(betas) < T else "ddpm"
    if variance not in ("large", "small"):
        raise ValueError(f'variance must be "large" or "small", not {variance!r}')
    if sampler not in SAMPLERS:
        raise ValueError(f'sampler must be "ddpm", "ddim" or "dpm", not {sampler!r}')
    if eta is not None and (sampler != "ddim" or not 0 <= eta <= 1):
        raise ValueError(f'eta must be from 0 to 1, and is for "ddim" alone, not {eta}')
    alphas = 1 - betas
    alphas_bar = alphas.cumprod()
    alphas_bar_prev = np.append(1.0, alphas_bar[:-1])
    posterior_variance = (1 - alphas_bar_prev) / (1 - alphas_bar) * betas  # (7)
    sigma2 = betas if variance == "large" else posterior_variance
    log_snr = np.log(alphas_bar / (1 - alphas_bar)).tolist()
    x = draw_noise() if x_T is None else x_T
    x0_before = None
    tables = np.stack([betas, alphas, alphas_bar, alphas_bar_prev], 1).tolist()
    for i in reversed(range(len(betas))):
        beta, alpha, abar, abar_prev = tables[i]  # Python floats, which keep float32 arrays float32
        if known:
            image, mask = known
            x_t = math.sqrt(abar) * image + math.sqrt(1 - abar) * draw_noise()  # (4)
            x = np.where(mask, x, x_t)
        eps = eps_model(x, np.full(len(x), tau[i]))
        x0 = ((x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)).clip(-1, 1)  # (15)
        x0 = np.where(mask, x0, image) if known else x0
        yield int(tau[i]), x, x0
        if i == 0:  # the last step adds no noise, and its mean is x0_hat itself
            return
        if sampler == "ddpm":
            mean = (
                math.sqrt(abar_prev) * beta / (1 - abar) * x0
                + math.sqrt(alpha) * (1 - abar_prev) / (1 - abar) * x
            )  # (7)
            x = mean + math.sqrt(sigma2[i]) * draw_noise()
        else:
            x0_middle = x0  # "dpm" extrapolates it to the middle of the step in lambda
            if sampler == "dpm" and x0_before is not None:
                h, h_before = log_snr[i - 1] - log_snr[i], log_snr[i] - log_snr[i + 1]
                x0_middle = x0 + h / (2 * h_before) * (x0 - x0_before)
            x0_before = x0
            sigma = (eta or 0) * math.sqrt(posterior_variance[i])
            eps = (x - math.sqrt(abar) * x0_middle) / math.sqrt(1 - abar)  # that fits this x0
            x = math.sqrt(abar_prev) * x0_middle + math.sqrt(1 - abar_prev - sigma**2) * eps
            x = x + sigma * draw_noise() if eta else x


def interpolate(
    eps_model, draw_noise, x0, x0_b, t, betas, variance="large", steps=None, sampler=None, eta=None
):
    """Diffuse two images to x_t, mix them by each of LAMBDAS, and denoise the mixtures (figure 8).

    The result is that of sample_progressive, with a row for each lambda. All rows share the same
    noise, so that only lambda differs.

    draw_noise() returns the next z, (1, C, H, W). x0, x0_b: images in [-1, 1], (C, H, W).
    t: 0..T-1; the larger it is, the more the network has to invent.
    """
    abar = float((1 - betas).cumprod()[t])
    x_t, x_t_b = (math.sqrt(abar) * x + math.sqrt(1 - abar) * draw_noise() for x in (x0, x0_b))
    lam = LAMBDAS[:, None, None, None]
    mixed = (1 - lam) * x_t + lam * x_t_b
    steps = None if steps is None else min(steps, t + 1)
    betas = betas[: t + 1]
    return sample_progressive(eps_model, draw_noise, betas, variance, steps, sampler, eta, mixed)


def guided(network, y, w):
    """Return eps_model(x_t, t) of classifier-free guidance: (1 + w) eps given y, minus w eps.

    y: classes of the Network, int64 (B,). w: 0 is no guidance. Others count the scale s = 1 + w.
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

    The noise of image k depends on (seed, k) alone, so neither -n nor --batch changes an image.
    """
    streams = [np.random.default_rng((seed, first + k)) for k in range(shape[0])]
    return lambda: np.stack([s.standard_normal(shape[1:], dtype=np.float32) for s in streams])


# -------------------------------------------------------------------------------------- the network


def why_no_cuda():
    """Return a likely reason why ONNX Runtime can't use CUDA, or the commands that may help."""
    query = "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
    said = subprocess.run(query, capture_output=True, text=True).stdout if has_nvidia() else ""
    driver = said.partition(".")[0]
    if driver.isdigit() and int(driver) < 580:
        return f"onnxruntime-gpu needs CUDA 13 and a driver of 580 or newer; this one is {driver}"
    where, first = "Run these commands", "pip uninstall -y onnxruntime onnxruntime-gpu"
    if any(package.name == "nvidia-cudnn-cu12" for package in importlib.metadata.distributions()):
        where = "Beside a torch for CUDA 12, its cuDNN would be overwritten; use a new environment"
        first = "pip install numpy Pillow tqdm"
    return f'{where}:\n  {first}\n  pip install "onnxruntime-gpu[cuda,cudnn]"'


def has_nvidia():
    """Return whether NVIDIA's driver is installed."""
    return shutil.which("nvidia-smi") is not None


class Network:
    """eps_theta(x_t, t) from a model.onnx: float32 (B, C, H, W) and int64 (B,) to eps, for any B.

    device: "auto" prefers CUDA, "cuda" requires it, "cpu" avoids it.

    Attributes: betas, float64 (T,), and variance are those of the file, shape is (C, H, W) of an
    image, classes has the names of the classes, if any, and provider is the part of ONNX Runtime
    that computes. A third argument y, int64 (B,), has the class of each image; None stands for "no
    class", and a network without classes ignores it.

    Raises ValueError if the file is not one of export.py, or if CUDA is required and not there.
    """

    def __init__(self, path, device="auto"):
        try:
            import onnxruntime as ort
        except ModuleNotFoundError:
            raise ValueError("ONNX Runtime is missing: pip install onnxruntime") from None
        providers = ["CPUExecutionProvider"]
        if device != "cpu" and "CUDAExecutionProvider" in ort.get_available_providers():
            with contextlib.redirect_stdout(None):  # it prints what is missing
                ort.preload_dlls()  # the CUDA libraries that pip installed
            providers.insert(0, ("CUDAExecutionProvider", {"cudnn_conv_algo_search": "HEURISTIC"}))
        ort.set_default_logger_severity(4)  # the provider is checked below
        try:
            self.session = ort.InferenceSession(path, providers=providers)
        except Exception as error:  # ONNX Runtime raises many kinds
            raise ValueError(f"{path} can't be opened by ONNX Runtime: {error}") from None
        self.provider = self.session.get_providers()[0]  # silently the CPU if CUDA does not load
        if device == "cuda" and self.provider != "CUDAExecutionProvider":
            raise ValueError(f"ONNX Runtime can't use CUDA. {why_no_cuda()}")
        metadata = self.session.get_modelmeta().custom_metadata_map
        missing = {"ddpm.betas", "ddpm.variance", "ddpm.image_shape"} - metadata.keys()
        if missing:
            raise ValueError(f"{path} is not a file of export.py: it lacks {min(missing)}")
        self.betas = np.array(json.loads(metadata["ddpm.betas"]))
        self.variance = metadata["ddpm.variance"]
        self.shape = tuple(json.loads(metadata["ddpm.image_shape"]))
        self.classes = json.loads(metadata.get("ddpm.classes", "[]"))

    def __call__(self, x_t, t, y=None):
        feeds = {"x_t": x_t, "t": t}
        if self.classes:
            feeds["y"] = np.full(len(t), len(self.classes)) if y is None else y
        return self.session.run(["eps"], feeds)[0]


# -------------------------------------------------------------------------------------- the program


def image_file(name):
    """Return the name of a file that Pillow can write an image to, as an argparse type."""
    if Image.registered_extensions().get(Path(name).suffix.lower()) not in Image.SAVE:
        raise argparse.ArgumentTypeError(f"{name} must be an image file such as x.png")
    return name


def animation_file(name):
    """Return the name of a file that Pillow can write an animation to, as an argparse type."""
    if Image.registered_extensions().get(Path(name).suffix.lower()) not in Image.SAVE_ALL:
        raise argparse.ArgumentTypeError(f"{name} must be an animation such as x.gif")
    return name


def arguments():
    parser = argparse.ArgumentParser(
        usage="python sample.py --onnx model.onnx [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flag = parser.add_argument
    flag("--onnx", default="model.onnx", help="from export.py [%(default)s]")
    flag("-n", type=int, help="number of images [64, or 8 of each class]")
    flag("--out", default="samples.png", type=image_file, help="a grid of images [%(default)s]")
    flag("--dir", type=Path, help=f"a new folder, one PNG per image; needed if -n is above {GRID}")
    flag("--gif", type=animation_file, help="an animation of the reverse process, first batch only")
    flag("--strip", type=image_file, help="x_t and x0_hat along the chain, first four images only")
    flag("--inpaint", nargs=2, metavar=("IMAGE", "MASK"), help="redraw what is white in the mask")
    flag("--interpolate", nargs=2, metavar="FILE", help="two images, to draw 11 mixtures between")
    flag("--t", type=int, nargs="+", help="t at which to mix, one row each, 0..T-1 [T / 2]")
    flag("--steps", type=int, help="steps of the reverse process, 1..T [T, as in the paper]")
    flag("--sampler", choices=SAMPLERS, help="[ddpm, the paper's, with T steps, dpm with fewer]")
    flag("--eta", type=float, help="for ddim alone, and selects it: 0 to 1 [0, without noise]")
    flag("--batch", default=64, type=int, help="images drawn together [%(default)s]")
    flag("--seed", default=0, type=int, help="the same seed, the same images [%(default)s]")
    flag("--class", dest="classes", nargs="+", metavar="NAME", help="classes to draw [all]")
    flag("--guidance", type=float, help="w: makes images more typical of their class [0]")
    flag("--device", default="auto", choices=("auto", "cuda", "cpu"), help="[%(default)s]")
    args = parser.parse_args()
    if min(args.batch, 1 if args.n is None else args.n) < 1 or args.seed < 0:
        parser.error("-n and --batch must be at least 1, and --seed at least 0")
    if (args.n or 1) > GRID and not args.dir and not args.interpolate:
        parser.error(f"-n {args.n} needs --dir, because --out shows at most {GRID} images")
    if args.dir and args.dir.exists() and (not args.dir.is_dir() or any(args.dir.iterdir())):
        parser.error(f"--dir {args.dir} must be a new or empty folder")
    if args.inpaint and args.interpolate:
        parser.error("choose --inpaint or --interpolate")
    if args.eta is not None and not 0 <= args.eta <= 1:
        parser.error("--eta must be from 0 to 1")
    if args.eta is not None and args.sampler in ("ddpm", "dpm"):
        parser.error(f"--eta belongs to --sampler ddim, not to {args.sampler}")
    return args


def main():
    args = arguments()
    try:
        network = Network(args.onnx, args.device)
    except ValueError as error:
        sys.exit(f"sample.py: {error}")
    T = len(network.betas)
    args.steps = T if args.steps is None else args.steps
    args.t = args.t or [T // 2]
    if not 1 <= args.steps <= T or not all(0 <= t < T for t in args.t):
        sys.exit(f"sample.py: this model has T = {T}: --steps must be 1..{T}, --t 0..{T - 1}")
    if not network.classes and (args.classes or args.guidance is not None):
        sys.exit(f"sample.py: {args.onnx} has no classes")
    if unknown := sorted({*(args.classes or [])} - {*network.classes}):
        sys.exit(f"sample.py: no class {unknown[0]}; there are {', '.join(network.classes)}")
    if args.interpolate and len(args.classes or []) > 1:
        sys.exit("sample.py: --interpolate takes one class at most")
    name = network.provider.removesuffix("ExecutionProvider")
    print(f"{args.onnx} on {name}")
    if name == "CPU" and args.device == "auto" and has_nvidia():
        print(f"ONNX Runtime can't use the GPU of this machine. {why_no_cuda()}")
    (draw_interpolation if args.interpolate else draw_samples)(network, args)


def read(path, shape):
    """Return an image file as uint8 of this shape (C, H, W)."""
    try:
        return read_image(path, shape[-1], shape[0])
    except Exception as error:  # Pillow raises many kinds
        sys.exit(f"sample.py: {path} can't be read: {error}")


def draw_interpolation(network, args):
    """Save a grid with a row for each --t: the two images, and between them the mixtures."""
    model, ends = network, [read(path, network.shape) for path in args.interpolate]
    if args.classes:
        y = np.full(len(LAMBDAS), network.classes.index(args.classes[0]))
        model = guided(network, y, args.guidance or 0)
    rows = []
    for t in args.t:
        chain = interpolate(
            model, noise_of(args.seed, 0, (1, *network.shape)), *map(from_pixels, ends), t,
            network.betas, network.variance, args.steps, args.sampler, args.eta,
        )  # fmt: skip
        for _, _, x0 in tqdm(chain, f"t = {t}", min(args.steps, t + 1), unit="step", mininterval=1):
            mixtures = x0
        rows += [ends[0], *to_pixels(mixtures), ends[1]]
    save_image(args.out, grid(np.stack(rows), len(LAMBDAS) + 2))
    print(f"{args.out}: one image, mixtures for lambda = 0, 0.1, ... 1, the other image")


def draw_samples(network, args):
    """Save -n samples: the grid, and the folder, the GIF and the strip if asked for.

    With classes, they take turns: image k is of the class k % their number, and each has a row in
    the grid. Ctrl-C keeps the batches that are finished.
    """
    names = args.classes or network.classes or [""]
    n = args.n or (min(8 * len(names), GRID) if len(names) > 1 else 64)
    known, began, drawn = None, time.monotonic(), 0
    if args.inpaint:
        image, mask = args.inpaint
        mask = read(mask, (1, *network.shape[1:])) > 127
        known = from_pixels(read(image, network.shape)), mask
    shown, frames = [], []  # frames: (x_t, x0_hat) of the first batch at some of the steps
    kept = {-(-k * args.steps // FRAMES) for k in range(FRAMES)} | {args.steps - 1}
    if args.dir:
        for name in names:
            (args.dir / name).mkdir(parents=True, exist_ok=True)
    try:
        with tqdm(total=-(-n // args.batch) * args.steps, unit="step", mininterval=1) as bar:
            for first in range(0, n, args.batch):
                shape, model = (min(args.batch, n - first), *network.shape), network
                of_image = [names[k % len(names)] for k in range(first, first + shape[0])]
                if network.classes:
                    y = np.array([network.classes.index(name) for name in of_image])
                    model = guided(network, y, args.guidance or 0)
                chain = sample_progressive(
                    model, noise_of(args.seed, first, shape), network.betas, network.variance,
                    args.steps, args.sampler, args.eta, known=known,
                )  # fmt: skip
                for i, (_, x, x0) in enumerate(chain):
                    if first == 0 and i in kept and (args.gif or args.strip):
                        frames.append((to_pixels(x[:GRID]), to_pixels(x0[:GRID])))
                    bar.update()
                pixels = to_pixels(x0)
                for k, image in enumerate(pixels if args.dir else []):
                    path = args.dir / of_image[k] / f"{first + k:06d}.png"
                    to_image(image).save(path)
                shown.extend(pixels[: GRID - len(shown)])
                drawn += len(pixels)
    except KeyboardInterrupt:
        if not drawn:
            sys.exit("sample.py: stopped before an image was finished")
    save_image(args.out, grid(np.stack(shown), rows=len(names)))
    if args.gif:
        states = [x for x, _ in frames] + [frames[-1][1]]
        images = [grid(x, rows=len(names)) for x in states]
        save_animation(args.gif, images, each=3000 // len(frames))
    if args.strip:
        save_image(args.strip, strip(frames))
    seconds = time.monotonic() - began
    what = f"{drawn} images" if drawn <= GRID else f"the first {GRID} of {drawn:,} images"
    print(f"{args.out}: {what}, {seconds:.1f} s, {seconds / drawn:.2f} s each")
    if drawn < n:
        sys.exit(f"sample.py: stopped after {drawn:,} of {n:,} images")


def strip(frames):
    """Return [(x_t, x0_hat)], each uint8 (B, C, H, W), as one Pillow image.

    For each of the first four samples, it has a row of x_t above a row of x0_hat.
    """
    columns = min(STRIP, len(frames))
    chosen = [frames[i] for i in np.linspace(0, len(frames) - 1, columns).round().astype(int)]
    rows = np.stack([np.stack(pair) for pair in chosen], 2)  # (2, B, columns, C, H, W)
    rows = rows[:, :4].swapaxes(0, 1)
    return grid(rows.reshape(-1, *rows.shape[3:]), columns)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)  # raises KeyboardInterrupt
    main()
