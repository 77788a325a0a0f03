"""Sample images from model.onnx with ONNX Runtime, or from a checkpoint with torch.

    python sample.py --onnx model.onnx                     # 64 images in samples.png
    python sample.py --checkpoint run                      # the same in torch, without an export
    python sample.py --onnx model.onnx --steps 10          # a hundredth of the time
    python sample.py --onnx model.onnx -n 10000 --dir out  # one PNG per image
    python sample.py --onnx model.onnx --interpolate a.png b.png  # between two images
    python sample.py --onnx model.onnx --inpaint image.png mask.png  # redraw the white part
    python sample.py --onnx model.onnx --class boot bag --guidance 2  # if it has classes

With --onnx, the program runs on CUDA or a CPU, and needs ddpm_numpy.py, samplers.py, images.py,
numpy, Pillow, tqdm and onnxruntime (for CUDA, see the manual), but not torch. With --checkpoint, it
runs on every device that torch supports, and needs the files of train.py, but no ONNX package.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

try:
    import numpy as np
    from PIL import Image, ImageOps
    from tqdm import tqdm

    from ddpm_numpy import LAMBDAS, Network, class_labels, mix, noise_of
    from images import (
        catch_signals,
        check_output,
        from_pixels,
        grid,
        guard_output,
        is_folder_name,
        read_image,
        replacing,
        save_animation,
        save_image,
        to_image,
        to_pixels,
    )
    from samplers import SAMPLERS, choose_sampler
except ModuleNotFoundError as error:
    is_ours = error.name in ("ddpm_numpy", "images", "samplers")
    how = f"copy {error.name}.py" if is_ours else "pip install numpy Pillow tqdm onnxruntime"
    sys.exit(f"sample.py needs {error.name}: {how}")
except KeyboardInterrupt:
    sys.exit("sample.py: stopped")

GRID = 256  # the largest number of images in one grid
FRAMES = 50  # the number of steps that the GIF shows
NOTE = ".sample.json"  # in --dir: the settings of its images, so that the same command can resume


def image_file(name, kinds=("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")):
    """Return the name of a file for an image, as an argparse type."""
    if Image.registered_extensions().get(Path(name).suffix.lower()) not in kinds:
        raise argparse.ArgumentTypeError(f"{name} must be a {' or '.join(kinds)} file")
    return name


def arguments():
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        usage="python sample.py --onnx model.onnx [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--onnx", help="network written by export.py [model.onnx]")
    source.add_argument("--checkpoint", help="a run, a checkpoint, or published weights, in torch")
    flag("-n", type=int, help="number of images [64, or 8 of each class]")
    flag("--out", default="samples.png", type=image_file, help="a grid of images [%(default)s]")
    flag("--dir", type=Path, help="one PNG per image, in a new folder or one that this command "
         f"started to fill; needed if -n is above {GRID}")  # fmt: skip
    animation_file = partial(image_file, kinds=("GIF", "WEBP"))
    flag("--scale", type=int, default=1, help="enlarge the files of --dir [%(default)s]")
    flag("--gif", type=animation_file, help="an animation of the reverse process, first batch only")
    flag("--inpaint", nargs=2, metavar=("IMAGE", "MASK"), help="redraw where the mask is white")
    flag("--interpolate", nargs=2, metavar="FILE", help="two images; draw 11 mixtures of them")
    flag("--t", type=int, nargs="+", help="t at which to mix, one row each, 0..T-1 [T / 5]")
    flag("--steps", type=int, help="steps of the reverse process, 1..T [T, as in the paper]")
    flag("--sampler", choices=SAMPLERS, help="[ddpm with all T steps, sa-solver with fewer]")
    flag("--eta", type=float, help="noise of DDIM, 0 to 1; selects --sampler ddim [0, no noise]")
    flag("--batch", default=64, type=int, help="images drawn together [%(default)s]")
    flag("--seed", default=0, type=int, help="the same seed draws the same images [%(default)s]")
    flag("--class", dest="classes", nargs="+", action="extend", metavar="NAME",
         help="classes to draw [all]")  # fmt: skip
    flag("--guidance", type=float, default=0.0, help="w: makes images more typical of a class [0]")
    flag("--device", default="auto", help="auto, cuda, cpu; in torch also cuda:1, mps, xpu [auto]")
    flag("--amp", action=argparse.BooleanOptionalAction,
         help="torch in bfloat16 [if the device has it]")  # fmt: skip
    args = parser.parse_args()
    if args.amp is not None and not args.checkpoint:
        parser.error("--amp needs --checkpoint")
    args.source = args.checkpoint or args.onnx or "model.onnx"
    if min(args.batch, args.scale, 1 if args.n is None else args.n) < 1 or args.seed < 0:
        parser.error("-n, --batch and --scale must be at least 1, and --seed at least 0")
    if (args.n or 1) > GRID and not args.dir:
        parser.error(f"-n {args.n} needs --dir, because --out shows at most {GRID} images")
    if args.interpolate and (args.inpaint or args.n or args.dir or args.gif):
        parser.error("--interpolate can't be combined with --inpaint, -n, --dir or --gif")
    if args.interpolate and (len(args.classes or []) > 1 or (args.guidance and not args.classes)):
        parser.error("--interpolate takes at most one class, and exactly one with --guidance")
    if args.t and not args.interpolate:
        parser.error("--t needs --interpolate")
    inputs = *(args.inpaint or ()), *(args.interpolate or ()), args.source
    outputs = [path for path in (args.out, args.gif, args.dir and args.dir / NOTE) if path]
    if len({os.path.abspath(path) for path in outputs}) < len(outputs):
        parser.error("--out and --gif must be different files")
    for path in outputs:
        check_output(path, *inputs)
    return args


def read(path, shape):
    """Return an image file as uint8 of this shape (C, H, W)."""
    try:
        return read_image(path, shape[-1], shape[0])
    except Exception as error:  # Pillow raises many kinds
        sys.exit(f"sample.py: {path} can't be read: {error}")


def read_mask(path, shape, of):
    """Return where to redraw, bool (1, H, W): where the mask is white or, on transparency, opaque.

    The lightest grey of the file counts as white, so that masks of 0 and 1 work. of: the masked
    file. A mask that is not square must have the same aspect ratio: both are cropped to a square.
    """
    grey = read(path, (1, *shape[1:]))
    with Image.open(path) as mask, Image.open(of) as image:
        (w, h), (W, H) = (ImageOps.exif_transpose(file).size for file in (mask, image))
        if w != h and abs(w * H - h * W) > max(w * H, h * W) / 50:
            sys.exit(f"sample.py: {path} has {w}x{h} pixels and {of} {W}x{H}: give both the "
                     "same shape, or make the mask a square for the cropped image")  # fmt: skip
        alpha = ImageOps.exif_transpose(mask).convert("RGBA").getchannel("A")
    if alpha.getextrema()[0] < 128:
        grey = np.asarray(ImageOps.fit(alpha, shape[:0:-1], Image.Resampling.LANCZOS))[None]
    return grey > grey.max() / 2


def pixels_of(x):
    """Return x_t or x0_hat, an array or a tensor on any device, as pixels. Exits if not finite."""
    x = x if isinstance(x, np.ndarray) else x.cpu().numpy()
    if not np.isfinite(x).all():
        sys.exit("sample.py: the network's output is not finite, so no image is saved")
    return to_pixels(x)


def open_network(args):
    """Return the network of --checkpoint in torch, or that of --onnx in ONNX Runtime.

    sample.py uses the same attributes of both: betas, shape, classes, step, provider, digest, and
    reverse, the loop that yields (t, x_t, x0_hat).
    """
    if not args.checkpoint:
        return Network(args.source, args.device)
    try:
        from support.torch_network import TorchNetwork
    except ModuleNotFoundError as error:
        sys.exit(f"sample.py: --checkpoint needs {error.name}; see requirements.txt")
    return TorchNetwork(args.checkpoint, args.device, args.amp, args.n or 0, args.batch, args.steps)


def draw_interpolation(network, args, y):
    """Save a grid with a row for each --t: the two images, and between them the mixtures."""
    ends, rows = [read(path, network.shape) for path in args.interpolate], []
    y = np.resize(y, len(LAMBDAS)) if args.classes else None
    try:
        for t in args.t:
            draw_noise = noise_of(args.seed, 0, (1, *network.shape))  # for all mixtures
            x_t = mix(*map(from_pixels, ends), t, network.betas, draw_noise)
            steps = min(args.steps, t + 1)
            chain = network.reverse(y, args.guidance, draw_noise, start=t, x_T=x_t, steps=steps,
                                    sampler=args.sampler, eta=args.eta)  # fmt: skip
            for _, _, x0 in tqdm(chain, f"t = {t}", steps, unit="step", mininterval=1):
                mixtures = x0
            rows += [ends[0], *pixels_of(mixtures), ends[1]]
    except KeyboardInterrupt:
        if not rows:
            raise
    catch_signals(signal.SIG_IGN)  # what is finished is saved
    columns = len(LAMBDAS) + 2
    names = [f"t = {t}" for t in args.t[: len(rows) // columns]]
    save_image(args.out, grid(np.stack(rows), columns, names=names))
    print(f"{args.out}: each row has one image, 11 mixtures (lambda = 0 to 1), and the other image")
    if len(names) < len(args.t):
        raise KeyboardInterrupt(f"stopped after {len(names)} of {len(args.t)} rows")


def draw_batch(network, args, y, batch, known, bar, frames):
    """Return the images `batch`, a slice, as pixels; append its part of the GIF to the frames.

    frames: None if the GIF does not show this batch.
    """
    draw_noise = noise_of(args.seed, batch.start, (batch.stop - batch.start, *network.shape))
    chosen = {*np.linspace(0, args.steps - 1, FRAMES).round().astype(int)}
    chain = network.reverse(None if y is None else y[batch], args.guidance, draw_noise, known=known,
                            steps=args.steps, sampler=args.sampler, eta=args.eta)  # fmt: skip
    for i, (_, x, x0_hat) in enumerate(chain):
        if frames is not None and i in chosen:
            frames.append(pixels_of(x[:GRID]))
        bar.update()
        x0 = x0_hat
    pixels = pixels_of(x0)
    if frames is not None:
        frames.append(pixels[:GRID])
    return pixels


def draw_samples(network, args, y):
    """Save -n samples: the grid, and the folder and the GIF if asked for.

    y: the class of each image, or None. Each class has a row in the grid, and a sub-folder. On
    Ctrl-C, the finished batches are saved. Images that --dir already holds are not drawn again.
    """
    n, known, frames = args.n, None, []
    names = [] if y is None else list(dict.fromkeys(network.classes[k] for k in y))
    if args.inpaint:
        image = from_pixels(read(args.inpaint[0], network.shape))
        known = image, read_mask(args.inpaint[1], network.shape, args.inpaint[0])
        print(f"the mask selects {known[1].mean():.0%} of the image")
    paths = begin_folder(args, network, y) if args.dir else []
    here = [path.is_file() for path in paths] or [False] * n
    if any(here):
        print(f"{args.dir} has {sum(here):,} of the images already")
    batches = [slice(k, min(k + args.batch, n)) for k in range(0, n, args.batch)]
    shown, done, drawn, began = [], 0, 0, time.monotonic()
    bar = tqdm(total=sum(not all(here[batch]) for batch in batches) * args.steps, unit="step",
               mininterval=1)  # fmt: skip
    try:
        for batch in batches:
            if all(here[batch]):
                pixels = [read(path, network.shape) for path in paths[batch][: GRID - len(shown)]]
            else:
                of_gif = frames if args.gif and batch.start == 0 else None
                pixels = draw_batch(network, args, y, batch, known, bar, of_gif)
                drawn += len(pixels)
            for path, image in zip(paths[batch], pixels, strict=False):
                if not path.is_file():
                    large = ImageOps.scale(to_image(image), args.scale, Image.Resampling.NEAREST)
                    save_image(path, large)
            shown.extend(pixels[: GRID - len(shown)])
            done = batch.stop
    except KeyboardInterrupt:
        if not done:
            raise
    finally:
        bar.close()
    catch_signals(signal.SIG_IGN)  # what is finished is saved
    seconds = time.monotonic() - began
    save_image(args.out, grid(np.stack(shown), rows=len(names), names=names))
    if args.gif and not frames:
        print(f"{args.gif} is not saved, because the first images were drawn before")
    elif args.gif:
        states = [grid(x, rows=len(names)) for x in frames]
        save_animation(args.gif, states, each=3000 // (len(frames) - 1))
    number = f"{done:,} image{'s' * (done > 1)}"
    shows = f"the first {GRID} of {number}" if done > GRID else number
    of = f" of {', '.join(names)}" if names else ""
    speed = f" ({seconds:.1f} s, {seconds / drawn:.2f} s each)" if drawn else ""
    if args.dir:
        print(f"{args.dir}: {number} as PNG files")
    print(f"{args.out}: {shows}{of}{speed}")
    if done < n:
        raise KeyboardInterrupt(f"stopped after {done:,} of {n:,} images")


def begin_folder(args, network, y):
    """Return the paths of the images of --dir, some of which may be there already.

    Those are from the same command, in which only -n, --batch, --out and --gif may have differed.
    Exits if the folder holds anything else.
    """
    folders = [args.dir] * args.n if y is None else [args.dir / network.classes[k] for k in y]
    paths = [folder / f"{k:06d}.png" for k, folder in enumerate(folders)]
    names = "steps", "sampler", "eta", "seed", "classes", "guidance", "scale"
    settings = {name: getattr(args, name) for name in names}
    inputs = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in args.inpaint or ()]
    note = settings | {"network": network.digest(), "inpainted": inputs}
    here = [*args.dir.iterdir()] if args.dir.exists() else []
    if not any(path.name[0] != "." for path in here):
        with replacing(args.dir / NOTE) as file:
            file.write(json.dumps(note).encode())
        return paths
    old = json.loads((args.dir / NOTE).read_bytes()) if (args.dir / NOTE).is_file() else {}
    if differs := [name for name in note if old.get(name, "") != note[name]]:
        what = f"; what differs: {', '.join(differs)}" if old else ""
        sys.exit(f"sample.py: --dir {args.dir} must be a new or empty folder, or one that the same "
                 f"command started to fill{what}")  # fmt: skip
    return paths


def draw(args):
    """Open the network, and draw what the flags ask for."""
    args.classes = args.classes and list(dict.fromkeys(args.classes))  # each has one row
    try:
        network = open_network(args)
        if bad := [name for name in network.classes if not is_folder_name(name)]:  # for --dir
            raise ValueError(f"{args.source}: a class must not be named {bad[0]!r}")
        T, classes = len(network.betas), len(args.classes or network.classes)
        args.n = args.n or (min(8 * classes, GRID) if classes > 1 else 64)
        args.steps, args.t = T if args.steps is None else args.steps, args.t or [T // 5]
        choose_sampler(args.sampler, args.eta, args.steps, T)
        y = class_labels(network.classes, args.classes, args.n, args.guidance)
    except ValueError as error:
        sys.exit(f"sample.py: {error}")
    if not all(0 <= t < T for t in args.t):
        sys.exit(f"sample.py: this model has T = {T}: --t must be 0..{T - 1}")
    name = network.provider.removesuffix("ExecutionProvider")
    hint = "; to use a GPU, see Accelerators in docs/guide.md"
    step = f", training step {network.step:,}" if network.step else ""
    print(f"{args.source} on {name}{step}{hint if name == 'CPU' and args.device == 'auto' else ''}")
    if args.steps > 50:
        print(f"{args.steps} steps; --steps 10 takes {10 / args.steps:.1%} of the time")
    (draw_interpolation if args.interpolate else draw_samples)(network, args, y)


def main():
    catch_signals()
    guard_output()
    try:
        draw(arguments())
    except KeyboardInterrupt as stop:  # Python exits as on Ctrl-C, and a shell loop ends, too
        stop.args = (f"sample.py: {str(stop) or 'stopped before an image was finished'}",)
        sys.excepthook = lambda _, error, __: print(error, file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
