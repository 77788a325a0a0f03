"""Generate images with a model.onnx in numpy and ONNX Runtime: the loop, the network, the program.

    python sample.py --onnx model.onnx                           # 64 images in samples.png
    python sample.py --onnx model.onnx --steps 10                # a hundredth of the time
    python sample.py --onnx model.onnx -n 10000 --dir out        # one PNG file per image
    python sample.py --onnx model.onnx --class boot bag --guidance 2    # if it has classes
    python sample.py --checkpoint run                            # in torch, without an export

This file can be copied on its own. As a library it needs numpy and onnxruntime (for an NVIDIA GPU,
onnxruntime-gpu[cuda,cudnn]); the program also needs Pillow and tqdm:

    network = Network("model.onnx")
    x0 = sample(network, 16, steps=10)  # float32 in [-1, 1], (16, C, H, W)

Numbers in parentheses are the paper's equation numbers (arXiv:2006.11239). t is 0..T-1, as in
ddpm.py.
"""

import argparse
import contextlib
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
from importlib.util import find_spec
from itertools import accumulate
from operator import mul
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports without a traceback

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
    steps: how many of the T steps to take, evenly spaced; all if None.
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
    levels = [T * k // steps - 1 for k in range(steps, 0, -1)]  # T-1 first; the last is T/steps - 1
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
            continue
        target = x0
        if sampler == "dpm-solver++":  # extrapolate x0_hat in log SNR to the middle of the step
            log_snr, log_snr_s = (math.log(a / (1 - a)) for a in (abar, abar_s))
            if earlier:
                rate = (log_snr_s - log_snr) / 2 / (log_snr - earlier[0])
                target = x0 + rate * (x0 - earlier[1])
            earlier = log_snr, x0
        x = math.sqrt(abar_s) * target + math.sqrt(1 - abar_s) * ((x - signal * target) / spread)


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


def class_names(network, classes=None, guidance=0.0):
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

    Raises ValueError for a name that is not a class, and for guidance that is not finite or lacks
    classes.
    """
    eps = network
    if names := class_names(network, classes, guidance):
        y = [network.classes.index(names[k % len(names)]) for k in range(first, first + n)]
        eps = guided(network, np.array(y), guidance)
    return network.reverse(eps, noise_of(seed, first, n, network.shape), **options)


def sample(network, n, *args, **options):
    """Return the last x0_hat of sample_progressive, with its arguments: (n, C, H, W)."""
    for _, _, x0_hat in sample_progressive(network, n, *args, **options):
        x0 = x0_hat
    return x0


# -------------------------------------------------------------------------------------- the network


def example(shape, T):
    """Return the test input (x_t, t) whose expected output, `spread(eps)`, the metadata store."""
    x_t = math.sqrt(2) * np.sin(np.arange(math.prod(shape)))
    return x_t.reshape(1, *shape).astype(np.float32), T // 2


def spread(eps):
    """Return up to 64 evenly spaced values of eps."""
    return eps.ravel()[:: -(-eps.size // 64)]


def open_session(path, device, options=None):
    """Return an InferenceSession, on CUDA or the CPU, and why CUDA can't be used, or ""."""
    import onnxruntime as ort

    cuda, fault = "CUDAExecutionProvider", ""
    if device == "cuda" or (device == "auto" and shutil.which("nvidia-smi")):
        fault = "this package is for CPUs: pip uninstall -y onnxruntime onnxruntime-gpu"
        if cuda in ort.get_available_providers():
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                ort.preload_dlls()  # the libraries that pip installed; it prints what is missing
            fault = "".join(re.findall("^Failed to load .*", printed.getvalue(), re.M)[:1])
        if not fault:
            providers = [(cuda, {"cudnn_conv_algo_search": "HEURISTIC"}), "CPUExecutionProvider"]
            try:
                session = ort.InferenceSession(path, options, providers, enable_fallback=0)
                if session.get_providers()[0] == cuda:
                    return session, ""
                fault = "there is no driver"
            except RuntimeError as error:  # CUDA's; faults of the file have types of their own
                fault = str(error).partition("CUDA failure ")[2].partition(" ;")[0] or str(error)
    return ort.InferenceSession(path, options, ["CPUExecutionProvider"]), fault


class Network:
    """eps_theta(x_t, t) from a model.onnx: float32 (B, C, H, W), and t, to eps, for any B.

    A call takes t as an int or int64 (B,), and with classes y, int64 (B,); None stands for "no
    class". One Network may be used from several threads.

    device: "auto" prefers CUDA, and says so in a line if there is a card that it can't use, "cuda"
    requires it, "cpu" avoids it. On CUDA, eps of the `example` is compared with the answer in the
    file.
    options: onnxruntime.SessionOptions, for example the number of threads.

    Attributes: betas, float64 (T,), and variance come from the file, shape is (C, H, W) of an
    image, classes has the names of the classes, if any, and provider is the part of ONNX Runtime
    that computes.

    Raises ValueError if the file is missing or was not written by export.py, and if CUDA is
    required but not available, or wrong.
    """

    def __init__(self, path, device="auto", options=None):
        if device not in ("auto", "cuda", "cpu"):
            raise ValueError(f'device must be "auto", "cuda" or "cpu", not {device!r}')
        try:
            self.session, fault = open_session(path, device, options)
        except Exception as error:  # ONNX Runtime raises many kinds of errors
            raise ValueError(f"{path!s:.99} can't be opened: {error!s:.200}") from None
        if fault:
            fault = f"ONNX Runtime can't use CUDA: {fault:.200}. It needs an x86-64 processor, "
            fault += 'driver 580 or newer, and: pip install "onnxruntime-gpu[cuda,cudnn]"'
            if device == "cuda":
                raise ValueError(fault)
            print(fault, file=sys.stderr)
        self.provider = self.session.get_providers()[0]
        metadata = self.session.get_modelmeta().custom_metadata_map
        if missing := {"ddpm.betas", "ddpm.variance", "ddpm.image_shape"} - metadata.keys():
            raise ValueError(f"{path} was not written by export.py: it lacks {min(missing)}")
        self.betas = np.array(json.loads(metadata["ddpm.betas"]), np.float64)
        self.variance = metadata["ddpm.variance"]
        self.shape = tuple(json.loads(metadata["ddpm.image_shape"]))
        self.classes = json.loads(metadata.get("ddpm.classes", "[]"))
        if self.provider == "CUDAExecutionProvider":
            eps = spread(self(*example(self.shape, len(self.betas))))
            answer = json.loads(metadata.get("ddpm.eps_of_example", "null"))  # minimal.py has none
            if answer and not np.linalg.norm(eps - answer) < 0.05 * np.linalg.norm(answer):
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

    rows: at most 32; image k is in row k % rows. Without it, with more, or with fewer images, the
        grid is about square, row by row.
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


def in_range(kind, low, high=math.inf):
    """Return an argparse type for an int or a float that is at least `low` and below `high`."""

    def number(text):
        if not low <= kind(text) < high:
            raise argparse.ArgumentTypeError(f"{text} is out of range")
        return kind(text)

    return number


def arguments():
    """Return the arguments of the command line. Exits if they do not fit."""
    parser = argparse.ArgumentParser(
        usage="python sample.py --onnx model.onnx [options]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    flag = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--onnx", default="model.onnx", help="network from export.py [%(default)s]")
    run = default_run()
    source.add_argument("--checkpoint", nargs="?", const=run, help="a run, in torch [run or demo]")
    flag("-n", type=in_range(int, 1), help="number of images [64, or 8 of each class]")
    flag(
        "--first", type=in_range(int, 0), default=0, help="number of the first image [%(default)s]"
    )
    flag("--out", default="samples.png", help="a PNG file with up to 256 images [%(default)s]")
    flag("--dir", type=Path, help="a new or empty folder, for one PNG file per image")
    flag("--steps", type=in_range(int, 1), help="steps of the reverse process [T, as in the paper]")
    flag("--sampler", choices=SAMPLERS, help="[ddpm with all T steps, dpm-solver++ with fewer]")
    flag("--batch", type=in_range(int, 1), default=64, help="images per batch [%(default)s]")
    flag("--seed", type=in_range(int, 0), default=0, help="image k depends only on (seed, k) [0]")
    flag("--class", dest="classes", nargs="+", metavar="NAME", help="classes to generate [all]")
    flag("--guidance", type=float, default=0.0, help="w: makes images more typical of a class [0]")
    flag("--device", default="auto", help="auto, cuda, cpu; in torch also cuda:1, mps, xpu [auto]")
    args = parser.parse_args()
    if not args.out.lower().endswith(".png"):
        parser.error(f"--out {args.out} must be a PNG file")
    if not args.dir and (args.n or 1) > 256:
        parser.error(f"-n {args.n} needs --dir, because --out shows at most 256 images")
    check_output(args.out, args.checkpoint or args.onnx)
    if args.dir:
        check_output(args.dir / "0.png")
    return args


def default_run():
    """Return the folder that a program opens without a path: run if it is there, or demo."""
    return "run" if os.path.exists("run/checkpoint.pt") else "demo"


def open_network(args):
    """Return the network that the flags name. Exits if it can't be opened."""
    if not args.checkpoint and not os.path.exists(args.onnx):
        sys.exit(f"sample.py: {args.onnx} is not there; run export.py first")
    if not args.checkpoint:
        try:
            return Network(args.onnx, args.device)
        except ValueError as error:
            sys.exit(f"sample.py: {error}")
    if not find_spec("torch") or not Path(__file__).with_name("extras").is_dir():
        sys.exit("sample.py: --checkpoint needs torch, and the other files of the repository")
    from extras.torch_network import TorchNetwork

    return TorchNetwork(args.checkpoint, args.device)


def complete(args, network):
    """Set the defaults that depend on the network. Exits if an argument does not fit it."""
    T = len(network.betas)
    try:
        args.classes = class_names(network, args.classes, args.guidance)
    except ValueError as error:
        sys.exit(f"sample.py: {error}")
    for name in args.classes:  # of the folders in --dir
        if not name.isprintable() or Path(f"/{name}").name != name or name == "..":
            sys.exit(f"sample.py: the class {name!r} can't be the name of a folder")
    args.steps = args.steps or T
    args.sampler = args.sampler or ("ddpm" if args.steps == T else "dpm-solver++")
    args.n = args.n or (min(8 * len(args.classes), 256) if len(args.classes) > 1 else 64)
    if args.steps > T:
        sys.exit(f"sample.py: --steps must be 1..{T}, not {args.steps}")
    if args.dir:  # new, or with only earlier images
        found = [path for path in args.dir.rglob("[!.]*") if path.is_file()]
        found = [path.name for path in found if path.resolve() != Path(args.out).resolve()]
        ours = [name for name in found if re.fullmatch(r"\d{6,}\.png", name)]
        numbers = [int(name[:-4]) for name in ours]
        if foreign := {*found} - {*ours}:
            sys.exit(f"sample.py: {args.dir} must be new or empty; it has {min(foreign)}")
        if any(args.first <= k < args.first + args.n for k in numbers):
            again = f"to continue, add --first {max(numbers) + 1}"
            sys.exit(f"sample.py: {args.dir} must be new or empty; {again}")


def draw(network, args, stop):
    """Yield (first number, pixels) of each batch, until a signal or a value that is not finite."""
    from tqdm import tqdm

    options = {"steps": args.steps, "sampler": args.sampler}
    end, batches = args.first + args.n, -(-args.n // args.batch)
    with tqdm(total=batches * args.steps, unit="step", mininterval=1) as bar:
        for first in range(args.first, end, args.batch):
            how = min(args.batch, end - first), args.classes, args.guidance, args.seed, first
            for _, _, x0_hat in sample_progressive(network, *how, **options):
                bar.update()
                if stop.number:
                    return
                x0 = x0_hat
            x0 = x0 if isinstance(x0, np.ndarray) else x0.cpu().numpy()
            if not np.isfinite(x0).all():
                return
            yield first, to_pixels(x0)


def main():
    """Save each finished batch in --dir, and the grid at the end, even after Ctrl-C."""
    guard_output()
    args = arguments()
    network = open_network(args)
    complete(args, network)
    print(f"{args.checkpoint or args.onnx} on {network.provider}: {args.n} images, {args.steps} "
          f"steps of {args.sampler}")  # fmt: skip
    names = args.classes
    stop, shown, done = StopRequest(), [], 0
    for first, pixels in draw(network, args, stop):
        for k, image in enumerate(pixels if args.dir else (), first):
            folder = args.dir / names[k % len(names)] if names else args.dir
            save(to_image(image), folder / f"{k:06d}.png")
        shown.extend(pixels[: 256 - len(shown)])
        done += len(pixels)
    if done:
        save(grid(np.stack(shown), len(names)), args.out)
        shift = args.first % max(1, len(names))
        rows = [*names[shift:], *names[:shift]][:done]
        rows = ", ".join(rows[:10]) + ", ..." * (len(rows) > 10)
        print(f"{args.out}: {len(shown)} images{' of ' * bool(names)}{rows}")
    if done < args.n and not stop.number:
        sys.exit(f"sample.py: after {done:,} images, the network's output is not finite")
    if done < args.n:
        print(f"stopped after {done:,} of {args.n:,} images; for the rest, add --first "
              f"{args.first + done} -n {args.n - done}", file=sys.stderr)  # fmt: skip
        stop.end()


# ------------------------------------------------------------ files, output and signals of programs


def save(image, path):
    """Save a Pillow image as a PNG file, which is put in place when it is whole."""
    temporary = Path(path).with_name(f".{Path(path).name}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        image.save(temporary, "PNG")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        sys.exit(f"{path} can't be written: {error}")


def check_output(path, *inputs):
    """Exit with one line if no file can be written at `path`, or if it is one of the inputs."""
    folder = next(folder for folder in Path(path).absolute().parents if os.path.exists(folder))
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        sys.exit(f"{path} can't be written: {folder} is not a folder, or is write-protected")
    if os.path.isdir(path) or (os.path.exists(path) and not os.access(path, os.W_OK)):
        sys.exit(f"{path} can't be written: it is a folder, or is write-protected")
    if os.path.realpath(path) in map(os.path.realpath, inputs):
        sys.exit(f"{path} can't be written: the program reads it")


class Output(io.FileIO):
    """Standard output or error, which drops what can't be written."""

    def write(self, data):
        with contextlib.suppress(OSError):
            if (written := super().write(data)) is not None:  # None: it is full, and does not block
                return written
        return len(data)


def guard_output():
    """Let print survive a pipe whose reader has ended, and characters the encoding lacks.

    Ctrl-C then ends the program without a traceback, until a StopRequest receives it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for name in "stdout", "stderr":
        if getattr(sys, name) is None:  # it was closed before the program began
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
            continue
        stream = getattr(sys, name)
        buffer = getattr(stream, "buffer", None)
        if type(getattr(buffer, "raw", buffer)) is io.FileIO:  # not Jupyter's or a Windows console
            file = io.BufferedWriter(Output(stream.fileno(), "w", closefd=False))
            options = {"errors": "backslashreplace", "line_buffering": True}
            setattr(sys, name, io.TextIOWrapper(file, stream.encoding, **options))


class StopRequest:
    """Record in `number` the first signal that asks the program to stop; it is 0 until then.

    The signals are Ctrl-C, SIGTERM, SIGHUP (the terminal was closed) and SIGPIPE (the reader of a
    pipe has ended). One that is ignored already, as under nohup, stays ignored.
    """

    def __init__(self):
        self.number, self.before = 0, {}
        is_main = threading.current_thread() is threading.main_thread()  # only it gets signals
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGPIPE") if is_main else ():
            number = getattr(signal, name, None)  # Windows lacks two of them
            if number and (name == "SIGPIPE" or signal.getsignal(number) != signal.SIG_IGN):
                self.before[number] = signal.signal(number, self.receive)

    def receive(self, number, _):
        """Note the first signal, and let a second Ctrl-C end the program at once."""
        self.number = self.number or number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def end(self):
        """End the program as the signal does by default, so that a shell loop ends, too."""
        signal.signal(self.number, signal.SIG_DFL)
        signal.raise_signal(self.number)


if __name__ == "__main__":
    main()
