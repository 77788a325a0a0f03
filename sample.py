# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=2.0", "Pillow>=11.3", "tqdm>=4.66", "onnxruntime>=1.31"]
# ///
"""Generate images with a model.onnx in numpy and ONNX Runtime: the loop, the network, the program.

    python sample.py --onnx model.onnx                           # 64 images in samples.png
    python sample.py --onnx model.onnx --steps 10                # a hundredth of the time
    python sample.py --onnx model.onnx -n 10000 --dir out        # one PNG file per image
    python sample.py --onnx model.onnx --class boot bag --guidance 2    # if it has classes

This file can be copied on its own. As a library it needs numpy and onnxruntime (for an NVIDIA GPU,
onnxruntime-gpu[cuda,cudnn]); the program also needs Pillow and tqdm:

    network = Network("model.onnx")
    x0 = sample(network, 16, steps=10)  # float32 in [-1, 1], (16, C, H, W)

Numbers in parentheses are the paper's equation numbers (arXiv:2006.11239). t is 0..T-1, as in
ddpm.py.
"""

import argparse
import json
import math
import os
import shutil
import signal
import sys
from collections import deque
from itertools import accumulate
from operator import mul
from pathlib import Path

import numpy as np

SAMPLERS = "ddpm", "ddim", "dpm-solver++"

# ------------------------------------------------------------------------------ the reverse process


def reverse(eps, draw_noise, betas, variance="large", steps=None, sampler=None, clip=True):
    """Yield (t, x_t, x0_hat) of the reverse process, from t = T-1 down.

    x_t is the input of the network and x0_hat the current estimate of the clean image; the last
    x0_hat is the sample. Both are arrays or tensors, shaped like the noise: all coefficients are
    Python floats, so float32 stays float32, on any device.

    eps(x_t, t): the noise in x_t, where t is an int.
    draw_noise(): returns x_T, and then each z. To start at an x_t, pass betas[: t + 1] and a
        function that returns x_t first.
    betas, variance: as for Diffusion in ddpm.py.
    steps: how many of the T steps to take; all if None. The visited t are evenly spaced, from T-1
        to T/steps - 1. With 2 to 49 steps, all samplers but "ddpm" go on to T/50 - 1, because the
        last x0_hat, a mean, lacks the details that depend on the remaining noise.
    sampler: "ddpm" is the paper's Algorithm 2, the default with all T steps. "dpm-solver++" is the
        second-order multistep solver of Lu et al. 2022 (arXiv:2211.01095), the default with fewer.
        "ddim" is DDIM without noise (Song et al. 2021, arXiv:2010.02502).
    clip: keep x0_hat in [-1, 1].

    Raises ValueError for an unknown variance or sampler, or steps out of range.
    """
    T = len(betas)
    steps = T if steps is None else steps
    sampler = sampler or ("ddpm" if steps == T else "dpm-solver++")
    if not 1 <= steps <= T:
        raise ValueError(f"steps must be 1..{T}, not {steps}")
    if sampler not in SAMPLERS or variance not in ("large", "small"):
        raise ValueError(f"unknown sampler {sampler!r} or variance {variance!r}")
    alphas_bar = [*accumulate((1 - float(beta) for beta in betas), mul)]
    last = max(1, T // (steps if sampler == "ddpm" else max(50, steps))) - 1
    levels = [T - 1 - k * (T - 1 - last) // max(1, steps - 1) for k in range(steps)]
    x, earlier = draw_noise(), None
    for t, s in zip(levels, [*levels[1:], None], strict=True):  # a step leads from t to s
        abar = alphas_bar[t]
        signal, spread = math.sqrt(abar), math.sqrt(1 - abar)
        x0 = (x - spread * eps(x, t)) / signal  # (15)
        x0 = x0.clip(-1, 1) if clip else x0
        yield t, x, x0
        if s is None:
            return
        abar_s = alphas_bar[s]
        if sampler == "ddpm":  # Algorithm 2: the posterior mean (7), and noise
            beta = 1 - abar / abar_s
            mean = math.sqrt(abar_s) * beta / (1 - abar) * x0
            mean = mean + math.sqrt(abar / abar_s) * (1 - abar_s) / (1 - abar) * x
            sigma2 = beta if variance == "large" else (1 - abar_s) / (1 - abar) * beta
            x = mean + math.sqrt(sigma2) * draw_noise()
        else:  # DDIM, to level s with the same noise
            if sampler == "dpm-solver++":  # extrapolate x0_hat in log SNR to the middle of the step
                log_snr, log_snr_s = (math.log(a / (1 - a)) for a in (abar, abar_s))
                estimate = log_snr, x0
                if earlier:
                    rate = (log_snr_s - log_snr) / 2 / (log_snr - earlier[0])
                    x0 = x0 + rate * (x0 - earlier[1])
                earlier = estimate
            x = math.sqrt(abar_s) * x0 + math.sqrt(1 - abar_s) * ((x - signal * x0) / spread)


def guided(network, y, w):
    """Return (1 + w) eps(x_t, t, y) - w eps(x_t, t), as a function of (x_t, t).

    This is classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598, eq. 6), for arrays and
    tensors. y: the classes, int64 (B,). w: 0 samples the class as it is, and larger values give
    images that are more typical of it. Other programs use the scale s = 1 + w.
    """

    def eps(x_t, t):
        given = network(x_t, t, y)
        return given if w == 0 else (1 + w) * given - w * network(x_t, t)

    return eps


def noise_of(seed, first, n, shape):
    """Return draw_noise() for the images first, first + 1, ...: standard normal, (n, *shape).

    The noise of image k depends only on (seed, k), not on the number of images.
    """
    streams = [np.random.default_rng((seed, first + k)) for k in range(n)]
    return lambda: np.stack([stream.standard_normal(shape, np.float32) for stream in streams])


def choose_classes(network, classes, guidance):
    """Return the names of the classes to generate. Raises ValueError like sample_progressive."""
    names = classes or network.classes
    if unknown := {*names} - {*network.classes}:
        raise ValueError(f"the network has the classes {network.classes}, not {min(unknown)!r}")
    if not math.isfinite(guidance) or (guidance and not names):
        raise ValueError(f"guidance must be finite, and 0 without classes, not {guidance}")
    return names


def sample_progressive(network, n, classes=None, guidance=0.0, seed=0, first=0, **options):
    """Return the generator `reverse` for a batch of n images from a Network, (n, C, H, W).

    classes: names, assigned to the images in turn; all if None. guidance: the w of `guided`.
    seed, first: the images have the numbers first, first + 1, ... of this seed. options: steps,
    sampler and clip of `reverse`.

    Raises ValueError for a name that is not a class, and for guidance that is not finite, or not
    0 without classes.
    """
    eps = network
    if names := choose_classes(network, classes, guidance):
        y = [network.classes.index(names[k % len(names)]) for k in range(first, first + n)]
        eps = guided(network, np.array(y), guidance)
    return network.reverse(eps, noise_of(seed, first, n, network.shape), **options)


def sample(network, n, *args, **options):
    """Return the last x0_hat of sample_progressive, with its arguments: (n, C, H, W)."""
    return last_x0(sample_progressive(network, n, *args, **options))


def last_x0(process):
    """Return the last x0_hat of a reverse process, which yields (t, x_t, x0_hat)."""
    return deque(process, maxlen=1).pop()[2]


# -------------------------------------------------------------------------------------- the network


def example(shape, T):
    """Return the test input (x_t, t) whose expected output, `thinned(eps)`, the metadata store."""
    x_t = math.sqrt(2) * np.sin(np.arange(math.prod(shape)))
    return x_t.reshape(1, *shape).astype(np.float32), T // 2


def thinned(eps):
    """Return up to 64 evenly spaced values of eps."""
    return eps.ravel()[:: -(-eps.size // 64)]


def open_session(path, device, options=None):
    """Return an InferenceSession. path, device, options: as for Network; path may also be bytes.

    If CUDA is wanted, but can't be used, ONNX Runtime prints why. Then "auto" falls back to the CPU
    and prints a line. Raises ValueError if the file can't be opened, or "cuda" can't be used.
    """
    import onnxruntime as ort

    if device not in ("auto", "cuda", "cpu"):
        raise ValueError(f'device must be "auto", "cuda" or "cpu", not {device!r}')
    cuda, providers = "CUDAExecutionProvider", ["CPUExecutionProvider"]
    wanted = device == "cuda" or (device == "auto" and shutil.which("nvidia-smi") is not None)
    if wanted and cuda in ort.get_available_providers():  # which onnxruntime-gpu has
        ort.preload_dlls()  # the libraries that pip installed
        providers.insert(0, (cuda, {"cudnn_conv_algo_search": "HEURISTIC"}))
    try:
        session = ort.InferenceSession(path, options, providers)
    except Exception as error:  # ONNX Runtime raises many kinds of errors
        raise ValueError(f"{path!s:.99} can't be opened: {error!s:.200}") from None
    if wanted and session.get_providers()[0] != cuda:
        why = "ONNX Runtime can't use CUDA. If the driver is 580 or newer, "
        why += 'pip uninstall -y onnxruntime; pip install "onnxruntime-gpu[cuda,cudnn]"'
        if device == "cuda":
            raise ValueError(why)
        print(why, file=sys.stderr)
    return session


class Network:
    """eps_theta of a model.onnx: it maps x_t, float32 (B, C, H, W), and t to eps, for any B.

    A call takes t as an int or int64 (B,), and with classes y, int64 (B,); None stands for "no
    class". One Network may be used from several threads.

    device: "auto" uses CUDA if it can, and prints a line if there is a card that it can't use;
    "cuda" requires CUDA, and "cpu" avoids it. On CUDA, eps of the `example` is compared with the
    answer in the file.
    options: onnxruntime.SessionOptions, for example the number of threads.

    Attributes: betas, float64 (T,), and variance come from the file; shape is (C, H, W) of an
    image; classes has the names of the classes, if any; and provider is the part of ONNX Runtime
    that computes.

    Raises ValueError if the file is missing or was not written by export.py, and if CUDA is
    required but not available, or if its eps is wrong.
    """

    def __init__(self, path, device="auto", options=None):
        self.session = open_session(path, device, options)
        self.provider = self.session.get_providers()[0]
        metadata = self.session.get_modelmeta().custom_metadata_map
        if missing := {"ddpm.betas", "ddpm.variance", "ddpm.image_shape"} - metadata.keys():
            raise ValueError(f"{path} was not written by export.py: it lacks {min(missing)}")
        self.betas = np.array(json.loads(metadata["ddpm.betas"]), np.float64)
        self.variance = metadata["ddpm.variance"]
        self.shape = tuple(json.loads(metadata["ddpm.image_shape"]))
        self.classes = json.loads(metadata.get("ddpm.classes", "[]"))
        answer = json.loads(metadata.get("ddpm.eps_of_example", "null"))  # minimal.py has none
        if answer and self.provider == "CUDAExecutionProvider":
            eps = thinned(self(*example(self.shape, len(self.betas))))
            if not np.linalg.norm(eps - answer) < 0.05 * np.linalg.norm(answer):
                raise ValueError(f"{path}: eps on CUDA is wrong; use --device cpu")

    def __call__(self, x_t, t, y=None):
        feeds = {"x_t": x_t, "t": np.full(len(x_t), t, np.int64)}
        if self.classes:
            feeds["y"] = np.full(len(x_t), len(self.classes) if y is None else y, np.int64)
        (eps,) = self.session.run(["eps"], feeds)
        return np.where(np.isfinite(eps), eps, np.float32(np.nan))  # the clip would hide infinity

    def reverse(self, eps, draw_noise, **options):
        """Return `reverse` with this network's schedule. eps: the network, `guided` or not."""
        return reverse(eps, draw_noise, self.betas, self.variance, **options)


# ------------------------------------------------------------------------------------------- images


def to_pixels(x):
    """Return an array with values in [-1, 1] as uint8 pixels, rounded."""
    return ((x.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)


def to_image(pixels):
    """Return uint8 pixels (C, H, W) as a Pillow image."""
    from PIL import Image

    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def grid(pixels, rows=None):
    """Return uint8 pixels (N, C, H, W) as one Pillow image; small images are enlarged.

    rows: image k is in row k % rows. If rows is None, above 32 or above the number of images, the
        grid is about square and filled row by row.
    """
    n, c, h, w = pixels.shape
    rows = rows if rows and rows <= min(n, 32) else None
    columns = math.ceil(n / rows if rows else math.sqrt(n))
    blank = (rows or math.ceil(n / columns)) * columns - n
    cells = np.pad(pixels, ((0, blank), (0, 0), (1, 1), (1, 1)), constant_values=255)
    cells = cells.reshape(*((columns, -1) if rows else (-1, columns)), c, h + 2, w + 2)
    cells = cells.swapaxes(0, 1) if rows else cells
    image = to_image(cells.transpose(2, 0, 3, 1, 4).reshape(c, -1, columns * (w + 2)))
    scale = max(1, round(512 / max(image.size)))
    return image.resize((image.width * scale, image.height * scale), resample=0)  # nearest


# -------------------------------------------------------------------------------------- the program


def flags(doc, onnx=True):
    """Return a parser with the flags of this program. doc: the documentation that --help shows.

    onnx: False leaves out --onnx, for a network from elsewhere.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    flag = parser.add_argument
    if onnx:
        flag("--onnx", default="model.onnx", help="a network from export.py [%(default)s]")
    flag("-n", type=int, help="number of images [64, or 8 of each class]")
    flag("--first", type=int, default=0, help="index of the first image [%(default)s]")
    flag("--out", type=Path, default="samples.png", help="a grid of up to 256 images [%(default)s]")
    flag("--dir", type=Path, help="a new or empty folder, for one PNG file per image")
    flag("--steps", type=int, help="steps of the reverse process [T, as in the paper]")
    flag("--sampler", choices=SAMPLERS, help="[ddpm with all T steps, dpm-solver++ with fewer]")
    flag("--batch", type=int, default=64, help="images per batch [%(default)s]")
    flag("--seed", type=int, default=0, help="the seed; (seed, k) determine image k [%(default)s]")
    flag("--class", dest="classes", nargs="+", metavar="NAME", help="classes to generate [all]")
    flag("--guidance", type=float, default=0.0, help="w: makes images more typical of a class [0]")
    flag("--device", default="auto", help="auto, cuda, cpu; in torch also cuda:1, mps, xpu [auto]")
    return parser


def open_onnx(args):
    """Return the Network of --onnx. Raises ValueError if it can't be opened."""
    if not os.path.exists(args.onnx):
        raise ValueError(f"{args.onnx} is not there; run export.py first")
    return Network(args.onnx, args.device)


def image_path(args, k):
    """Return the path of image k in --dir, where each class has a folder."""
    folder = args.classes[k % len(args.classes)] if args.classes else ""
    return args.dir / folder / f"{k:06d}.png"


def complete(args, network):
    """Set the defaults that depend on the network. Raises ValueError if a flag does not fit."""
    T = len(network.betas)
    args.classes = choose_classes(network, args.classes, args.guidance)
    default = min(8 * len(args.classes), 256) if len(args.classes) > 1 else 64
    args.n = default if args.n is None else args.n
    args.steps = T if args.steps is None else args.steps
    if not 1 <= args.steps <= T:
        raise ValueError(f"--steps must be 1..{T}, not {args.steps}")
    if min(args.n, args.batch) < 1 or min(args.first, args.seed) < 0:
        raise ValueError("-n and --batch must be at least 1, --first and --seed at least 0")
    if args.n > 256 and not args.dir:
        raise ValueError(f"-n {args.n} needs --dir, because --out shows at most 256 images")


def check_output(args):
    """Raise ValueError if --out or --dir can't be written, or if --dir has some of the images."""
    if args.out.suffix.lower() != ".png":
        raise ValueError(f"--out {args.out} must be a PNG file")
    if args.dir and args.out.resolve().is_relative_to(args.dir.resolve()):
        raise ValueError(f"--out {args.out} must not be in --dir")
    for path in filter(None, [args.out, args.dir and args.dir / "0.png"]):
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"{path} can't be written")
    if not args.dir:
        return
    for name in args.classes:  # of the folders in --dir
        if Path(f"/{name}").name != name or name == "..":
            raise ValueError(f"the class {name!r} can't be the name of a folder")
    if not args.first and args.dir.exists() and any(args.dir.iterdir()):
        raise ValueError(f"{args.dir} must be new or empty, unless --first is above 0")
    numbers = [int(path.stem) for path in args.dir.rglob("*.png") if path.stem.isdecimal()]
    if any(args.first <= k < args.first + args.n for k in numbers):
        raise ValueError(f"{args.dir} already has images with these numbers; to add others, use "
                         f"--first {max(numbers) + 1}")  # fmt: skip


def batches(network, args, stop):
    """Yield (first number, pixels) of each batch, until `stop` has a signal.

    Exits if a value is not finite.
    """
    from tqdm import tqdm

    end, count = args.first + args.n, -(-args.n // args.batch)
    options = {"desc": f"batches: {count}", "unit": "step", "mininterval": 1}
    with tqdm(total=count * args.steps, **options) as bar:
        for first in range(args.first, end, args.batch):
            process = sample_progressive(
                network, min(args.batch, end - first), args.classes, args.guidance, args.seed,
                first, steps=args.steps, sampler=args.sampler,
            )  # fmt: skip
            for _, _, x0_hat in process:
                if stop:
                    return
                bar.update()
                x0 = x0_hat
            x0 = x0 if isinstance(x0, np.ndarray) else x0.cpu().numpy()  # a tensor
            if not np.isfinite(x0).all():
                done = first - args.first
                sys.exit(f"after {done:,} images, the network's output is not finite")
            yield first, to_pixels(x0)


def save(image, path):
    """Save a Pillow image as a PNG file, which is put in place when it is whole."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(temporary, "PNG")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        sys.exit(f"{path} can't be written: {error}")


def save_grid(shown, args):
    """Save a grid of the images, uint8 (C, H, W) each, in --out."""
    names = args.classes
    save(grid(np.stack(shown), len(names) if len(names) > 1 else None), args.out)
    last = args.first + min(len(names), len(shown))
    rows = [names[k % len(names)] for k in range(args.first, last)]
    of = f" of {', '.join(rows[:10])}{', ...' if len(rows) > 10 else ''}" if rows else ""
    print(f"{args.out}: {len(shown)} images{of}", file=sys.stderr)


def receive_signals():
    """Return a list that receives the number of the first signal that asks the program to stop.

    A second Ctrl-C ends the program at once. An ignored signal, as under nohup, stays ignored.
    """
    received = []

    def receive(number, _):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for name in {"SIGINT", "SIGTERM", "SIGHUP"} & {*dir(signal)}:  # Windows lacks the last
        if signal.getsignal(number := getattr(signal, name)) != signal.SIG_IGN:
            signal.signal(number, receive)
    return received


def main(parser=None, open_network=open_onnx):
    """Save each finished batch in --dir, and the grid at the end, even after Ctrl-C.

    parser: of another program, from `flags`. open_network(args) returns its network, and raises
    OSError or ValueError for a mistake in args.
    """
    from PIL import Image  # noqa: F401, before the work, because it may be missing

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback until there are images
    parser = parser or flags(__doc__)
    args = parser.parse_args()
    try:
        network = open_network(args)
        complete(args, network)
        check_output(args)
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")
    unguided = args.classes and not args.guidance
    hint = "; --guidance 1 makes them clearer, but less varied" if unguided else ""
    print(f"{args.n} images in {args.steps} steps on {network.provider}{hint}", file=sys.stderr)
    stop, shown, done = receive_signals(), [], 0
    try:
        for first, pixels in batches(network, args, stop):
            for k, image in enumerate(pixels if args.dir else (), first):
                if (path := image_path(args, k)).exists():
                    sys.exit(f"{parser.prog}: another process has written {path}")
                save(to_image(image), path)
            shown.extend(pixels[: 256 - len(shown)])
            done += len(pixels)
    finally:  # whatever ended the loop
        if shown:
            save_grid(shown, args)
    if done < args.n:
        print(f"stopped after {done:,} of {args.n:,} images; for the rest, add --first "
              f"{args.first + done} -n {args.n - done}", file=sys.stderr)  # fmt: skip
        signal.raise_signal(stop[0])


if __name__ == "__main__":
    main()
