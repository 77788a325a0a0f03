"""Sample pictures from model.onnx with ONNX Runtime, on CUDA or a CPU. Nothing here needs torch.

    python sample.py --onnx model.onnx                     # 64 pictures, samples.png
    python sample.py --onnx model.onnx --steps 50 --eta 0  # 20 times faster, by DDIM
    python sample.py --onnx model.onnx -n 10000 --dir out  # a PNG each
    python sample.py --onnx model.onnx --interpolate a.png b.png  # what lies between two pictures

This file and a model.onnx are all that a machine needs which serves pictures, with numpy, Pillow,
tqdm and onnxruntime (or onnxruntime-gpu[cuda,cudnn]). The reverse process below is that of ddpm.py,
line by line, in numpy.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
from PIL import Image, ImageOps
from tqdm import tqdm

MEND = 'pip uninstall -y onnxruntime onnxruntime-gpu; pip install "onnxruntime-gpu[cuda,cudnn]"'
GRID = 256  # the most pictures in one grid
FRAMES, STRIP = 50, 10  # of the steps, how many the GIF shows, and the strip
LAMBDAS = np.linspace(0, 1, 11, dtype=np.float32)  # of an interpolation

# ------------------------------------------------------------------------------ the reverse process


def respaced(betas, steps):
    """A chain of fewer steps through the same noise levels: its betas (steps,), and their t."""
    T = len(betas)
    tau = (T - 1 - np.arange(steps) * (T - 1) // max(1, steps - 1))[::-1]
    alphas_bar = (1 - betas).cumprod()[tau]
    return 1 - alphas_bar / np.append(1.0, alphas_bar[:-1]), tau


def sample_progressive(eps_model, noise, betas, variance="large", steps=None, eta=None, x_T=None):
    """Algorithm 2 of the paper: yields (t, x_t, x0_hat) from t = T-1 down to t = 0.

    x_t is what the network saw, x0_hat the picture it expects behind it, in [-1, 1]; the last
    x0_hat is the sample.

    eps_model(x_t, t) -> eps, t (B,) int64. noise() -> the next z, float32 (B, C, H, W).
    betas: (T,) float64. variance: sigma_t^2 is beta_t if "large", beta-tilde_t if "small".
    steps: how many of the T to take. eta: None is the paper's step, a number DDIM's eta.
    x_T: where to start, if not at pure noise. To go on from an x_t, give betas[: t + 1] and that.
    """
    betas, tau = respaced(betas, len(betas) if steps is None else steps)
    alphas = 1 - betas
    alphas_bar = alphas.cumprod()
    alphas_bar_prev = np.append(1.0, alphas_bar[:-1])
    posterior_variance = (1 - alphas_bar_prev) / (1 - alphas_bar) * betas  # (7)
    sigma2 = betas if variance == "large" else posterior_variance
    x = noise() if x_T is None else x_T
    for i in reversed(range(len(betas))):
        # Python floats, so that float32 pictures stay float32
        beta, alpha, abar, abar_prev = (
            float(table[i]) for table in (betas, alphas, alphas_bar, alphas_bar_prev)
        )
        eps = eps_model(x, np.full(len(x), tau[i]))
        x0 = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)  # (4)
        x0 = x0.clip(-1, 1)
        yield int(tau[i]), x, x0
        if i == 0:  # no noise in the last step: its mean is x0_hat itself
            return
        if eta is None:
            mean = (
                math.sqrt(abar_prev) * beta / (1 - abar) * x0
                + math.sqrt(alpha) * (1 - abar_prev) / (1 - abar) * x
            )  # (7)
            sigma = math.sqrt(sigma2[i])
        else:
            sigma = eta * math.sqrt(posterior_variance[i])
            eps = (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)  # of the clipped x0
            mean = math.sqrt(abar_prev) * x0 + math.sqrt(1 - abar_prev - sigma**2) * eps
        x = mean + sigma * noise()


def interpolate(eps_model, noise, x0, x0_b, t, betas, variance="large", steps=None, eta=None):
    """Figure 8: what lies between two pictures, mixed at x_t and brought back from there.

    Yields what sample_progressive does, with a row for each of LAMBDAS. The noise of x_t and that
    of the way back are the same for all of them, so that lambda is all that changes.

    noise() -> the next z, (1, C, H, W). x0, x0_b: pictures in [-1, 1], (C, H, W). t: 0..T-1, how
    much is left to be invented; the network's first t is this one.
    """
    abar = float((1 - betas).cumprod()[t])
    x_t, x_t_b = (math.sqrt(abar) * x + math.sqrt(1 - abar) * noise() for x in (x0, x0_b))  # (4)
    lam = LAMBDAS[:, None, None, None]
    mixed = (1 - lam) * x_t + lam * x_t_b
    steps = None if steps is None else min(steps, t + 1)
    return sample_progressive(eps_model, noise, betas[: t + 1], variance, steps, eta, x_T=mixed)


def noise_of(seed, first, shape):
    """A noise() for pictures first, first + 1, ...: shape (B, C, H, W) at each call.

    The noise of picture k comes from (seed, k) alone, so neither -n nor --batch changes a picture.
    """
    streams = [np.random.default_rng((seed, first + k)) for k in range(shape[0])]
    return lambda: np.stack([s.standard_normal(shape[1:], dtype=np.float32) for s in streams])


def ahead(noise):
    """The same noise(), each z drawn in a thread while the network works on the one before."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(noise)

    def next_one():
        nonlocal future
        z, future = future.result(), pool.submit(noise)
        return z

    return next_one


# -------------------------------------------------------------------------------------- the network


class Network:
    """eps = network(x_t, t) of a model.onnx, for a fixed batch; x_t (batch, C, H, W), t (batch,).

    `.betas` (T,), `.variance` and `.shape` (batch, C, H, W) are the file's.

    The array it returns is good until the next call, which may write over it.

    device: "auto" prefers CUDA, "cuda" insists on it, "cpu". Afterwards `.device` is "cuda" or
    "cpu", whichever it really runs on; ONNX Runtime itself falls back in silence.
    """

    def __init__(self, path, batch, device="auto"):
        self.batch = batch
        ort.set_default_logger_severity(4)  # that a provider can't load is said below, in one line
        self.device = "cpu"
        if device != "cpu" and "CUDAExecutionProvider" in ort.get_available_providers():
            with contextlib.redirect_stdout(None):  # it prints where it fails
                ort.preload_dlls()  # finds the CUDA libraries that pip installed
            options = {"cudnn_conv_algo_search": "HEURISTIC"}
            self._open(path, ["CUDAExecutionProvider"], [options])
            if self.session.get_providers()[0] == "CUDAExecutionProvider":
                self.device = "cuda"
                try:  # without cuDNN the session opens, but no convolution runs
                    self._bind()
                    self(np.zeros(self.shape, np.float32), np.zeros(batch, np.int64))
                except Exception as error:
                    self.device, why = "cpu", str(error).splitlines()[0]
                    if "allocat" in why or "out of memory" in why:
                        sys.exit(f"sample.py: use a smaller --batch: {why}")
                    print(f"sample.py: CUDA fails: {why}", file=sys.stderr)
        if device != "cpu" and self.device == "cpu":
            message = f"sample.py: ONNX Runtime can't use CUDA here. If there is a GPU:\n  {MEND}"
            if device == "cuda":
                sys.exit(message)
            if shutil.which("nvidia-smi"):
                print(message, file=sys.stderr)
        if self.device == "cpu":
            self._open(path, ["CPUExecutionProvider"], None)
            self._bind()

    def _open(self, path, providers, options):
        """Open the file and read what it says of itself. If it is another's, one line says why."""
        try:
            with contextlib.redirect_stdout(None):  # it prints where it fails
                self.session = ort.InferenceSession(path, None, providers, options)
            metadata = self.session.get_modelmeta().custom_metadata_map
            missing = {"ddpm.betas", "ddpm.variance", "ddpm.image_shape"} - set(metadata)
            if missing:
                raise ValueError(f"it lacks {', '.join(sorted(missing))}, which export.py writes")
            self.betas = np.array(json.loads(metadata["ddpm.betas"]), float)
            self.variance = metadata["ddpm.variance"]
            self.shape = (self.batch, *json.loads(metadata["ddpm.image_shape"]))
            if not len(self.betas) or not ((self.betas > 0) & (self.betas < 1)).all():
                raise ValueError("its betas are not between 0 and 1")
            if self.variance not in ("large", "small") or self.shape[1:2] not in ((1,), (3,)):
                raise ValueError("its variance or the shape of its pictures is not one of train.py")
            if providers == ["CPUExecutionProvider"]:  # on CUDA, the first run follows by itself
                x = np.zeros((1, *self.shape[1:]), np.float32)
                (eps,) = self.session.run(["eps"], {"x_t": x, "t": np.zeros(1, np.int64)})
                if eps.shape != x.shape or not np.isfinite(eps).all():
                    raise ValueError("eps is not finite, or not of the shape of x_t")
        except Exception as error:
            why = str(error).split("\n")[0]
            sys.exit(f"sample.py: {path} is no model of export.py: {why}")

    def _bind(self):
        """Inputs and output at fixed places on the device, used again at every step."""
        place = self.device, 0
        self._x = ort.OrtValue.ortvalue_from_shape_and_type(self.shape, np.float32, *place)
        self._t = ort.OrtValue.ortvalue_from_shape_and_type((self.batch,), np.int64, *place)
        self._eps = ort.OrtValue.ortvalue_from_shape_and_type(self.shape, np.float32, *place)
        self._binding = self.session.io_binding()
        self._binding.bind_ortvalue_input("x_t", self._x)
        self._binding.bind_ortvalue_input("t", self._t)
        self._binding.bind_ortvalue_output("eps", self._eps)

    def __call__(self, x, t):
        self._x.update_inplace(np.ascontiguousarray(x))
        self._t.update_inplace(t)
        self.session.run_with_iobinding(self._binding)
        return self._eps.numpy()


# ----------------------------------------------------------------------------------------- pictures


def to_pixels(x):
    """Pictures in [-1, 1], (B, C, H, W), as uint8 (B, H, W, C), rounded."""
    return ((x.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1)


def to_image(pixels):
    """uint8 (H, W, C) as a Pillow image, grey or colour."""
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)


def read_picture(path, shape):
    """A picture file as the training sees it: float32 (C, H, W) in [-1, 1], on white, cropped."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits: Pillow would cut, not scale
                image = Image.fromarray(
                    (np.asarray(image) / 257).clip(0, 255).round().astype(np.uint8)
                )
            image = image.convert("RGBA")
    except Exception as error:
        sys.exit(f"sample.py: {path} can't be read: {error}")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if shape[0] == 1 else "RGB")
    image = ImageOps.fit(image, shape[:0:-1], Image.Resampling.LANCZOS)
    return np.atleast_3d(np.asarray(image, np.float32)).transpose(2, 0, 1) / 127.5 - 1


def grid(pixels, columns=None):
    """uint8 (B, H, W, C) as one image, in rows of `columns`; small pictures enlarged."""
    columns = columns or math.ceil(math.sqrt(len(pixels)))
    pixels = np.pad(
        pixels, ((0, -len(pixels) % columns), (1, 1), (1, 1), (0, 0)), constant_values=255
    )
    _, h, w, c = pixels.shape
    pixels = pixels.reshape(-1, columns, h, w, c).transpose(0, 2, 1, 3, 4)
    image = to_image(pixels.reshape(-1, columns * w, c))
    return ImageOps.scale(image, max(1, round(512 / image.width)), Image.Resampling.NEAREST)


def save_image(path, image, **kwargs):
    """Save in one step: a file that exists is replaced by a whole one or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    image.save(temporary, **kwargs)
    os.replace(temporary, path)


def main():
    parser = argparse.ArgumentParser(
        usage="python sample.py --onnx model.onnx [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def flag(*names, default=None, help="", **kwargs):
        parser.add_argument(*names, default=default, help=help, **kwargs)

    flag("--onnx", default="model.onnx", help="what export.py wrote [model.onnx]")
    flag("-n", default=64, type=int, help="number of pictures [64]")
    flag("--out", default="samples.png", help=f"the grid, of the first {GRID} [samples.png]")
    flag("--dir", help="folder for each picture as a PNG of its own")
    flag("--gif", help="file for the reverse process as an animation, of the first batch")
    flag("--strip", help="file for x_t and x0_hat along the way, of the first four pictures")
    flag(
        "--interpolate",
        nargs=2,
        metavar="FILE",
        help="two pictures; --out shows both, and between them 11 mixtures of their x_t",
    )
    flag("--t", type=int, nargs="+", help="where to mix, a row each, 0 to T-1 [T / 2]")
    flag("--steps", type=int, help="steps of the reverse process, 1..T [T, as in the paper]")
    flag("--eta", type=float, help="DDIM with this eta, 0 to 1 [the paper's step]")
    flag("--batch", default=64, type=int, help="pictures at once [64]")
    flag("--seed", default=0, type=int, help="the same seed, the same pictures [0]")
    flag("--device", default="auto", choices=("auto", "cuda", "cpu"), help="[auto]")
    args = parser.parse_args()
    if args.n < 1 or args.batch < 1 or args.seed < 0:
        parser.error("-n and --batch must be at least 1, --seed at least 0")
    pictures = [name for name in (args.out, args.gif, args.strip) if name is not None]
    if not all(Path(name).suffix.lower() in Image.registered_extensions() for name in pictures):
        parser.error("--out, --gif and --strip must be files such as x.png or x.gif")
    if args.interpolate and (args.dir or args.gif or args.strip):
        parser.error("--interpolate must be without --dir, --gif and --strip: it makes --out only")
    inputs = {Path(name).resolve() for name in (args.onnx, *(args.interpolate or []))}
    if inputs & {Path(name).resolve() for name in pictures}:
        parser.error("--out, --gif and --strip must be other files than those that are read")
    if args.t and not args.interpolate:
        parser.error("--t must be given with --interpolate")
    if args.eta is not None and not 0 <= args.eta <= 1:
        parser.error("--eta must be between 0 and 1")
    if not Path(args.onnx).is_file():
        sys.exit(f"sample.py: there is no {args.onnx}; python export.py makes one")

    batch = len(LAMBDAS) if args.interpolate else min(args.batch, args.n)
    network = Network(args.onnx, batch, args.device)
    betas, variance = network.betas, network.variance
    steps = len(betas) if args.steps is None else args.steps
    if not 1 <= steps <= len(betas):
        parser.error(f"--steps must be 1..{len(betas)}")
    where = args.t or [len(betas) // 2]
    if not all(0 <= t < len(betas) for t in where):
        parser.error(f"--t must be 0..{len(betas) - 1}")
    print(f"{args.onnx} on {'CUDA' if network.device == 'cuda' else 'the CPU'}", end="")
    print("" if args.interpolate else f", {steps} steps")

    if args.interpolate:
        a, b = (read_picture(path, network.shape[1:]) for path in args.interpolate)
        rows = []
        for t in where:
            noise = noise_of(args.seed, 0, (1, *network.shape[1:]))
            chain = interpolate(network, noise, a, b, t, betas, variance, args.steps, args.eta)
            for _, _, x0 in tqdm(chain, f"t = {t}", min(steps, t + 1), unit="step"):
                mixtures = x0
            rows += [a, *mixtures, b]
        save_image(args.out, grid(to_pixels(np.stack(rows)), len(LAMBDAS) + 2))
        print(f"{args.out}: a picture, mixtures of lambda = 0, 0.1, ... 1, the other picture")
        return

    started, shown, frames = time.monotonic(), [], []
    starts = range(0, args.n, network.batch)
    bar = tqdm(total=len(starts) * steps, unit="step")
    for first in starts:  # the last batch may draw more than it keeps: the shape stays the same
        noise = ahead(noise_of(args.seed, first, network.shape))
        chain = sample_progressive(network, noise, betas, variance, args.steps, args.eta)
        for i, (_, x, x0) in enumerate(chain):
            wanted = i == steps - 1 or i * FRAMES // steps > (i - 1) * FRAMES // steps
            if first == 0 and wanted and (args.gif or args.strip):
                frames.append((to_pixels(x), to_pixels(x0)))
            bar.update()
        pixels = to_pixels(x0[: args.n - first])
        if len(shown) < GRID:
            shown.extend(pixels[: GRID - len(shown)])
        if args.dir:
            for k, picture in enumerate(pixels, first):
                save_image(Path(args.dir) / f"{k:06d}.png", to_image(picture))
    bar.close()

    save_image(args.out, grid(np.stack(shown)))
    if args.gif:
        images = [grid(x) for x, _ in frames] + [grid(frames[-1][1])]
        duration = [60] * (len(images) - 1) + [2000]  # milliseconds
        save_image(
            args.gif, images[0], save_all=True, append_images=images[1:], duration=duration, loop=0
        )
    if args.strip:  # two rows a picture, x_t above x0_hat
        chosen = [frames[i] for i in np.linspace(0, len(frames) - 1, STRIP).round().astype(int)]
        rows = np.stack([np.stack(pair) for pair in chosen], 2)  # (2, B, STRIP, H, W, C)
        rows = rows[:, :4].swapaxes(0, 1)
        save_image(args.strip, grid(rows.reshape(-1, *rows.shape[3:]), STRIP))
    seconds = time.monotonic() - started
    print(f"{args.out}: {args.n} pictures, {seconds:.1f} s, {seconds / args.n:.2f} s each")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("sample.py: stopped")
    except OSError as error:  # a disk that is full, a folder that can't be written to
        sys.exit(f"sample.py: {error}")
