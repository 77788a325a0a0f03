"""Try this project on a GPU, and print a report to paste into an issue.

Expect about 20 minutes, which is an estimate: so far it has run only on CPUs, with --tiny.

    pip install -r requirements.txt
    python benchmarks/gpu.py | tee report.txt    # writes gpu-report/ with the images drawn
    python benchmarks/gpu.py --tiny              # every part with a tiny network, also on a CPU

If a part fails, its traceback is printed and the next part runs.
"""

import argparse
import copy
import itertools
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
from importlib import metadata
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import ddpm_numpy  # noqa: E402
import train  # noqa: E402
from data import demo_images  # noqa: E402
from ddpm import Diffusion, UNet, linear_betas  # noqa: E402
from images import save_image, to_image  # noqa: E402

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
IS_CUDA = DEVICE.type == "cuda"
DIFFUSION = Diffusion(linear_betas())
TINY = "--image-size 8 --base-channels 8 --channel-mults 1 2 --num-res-blocks 1 --batch 8".split()
TINY += ["--attention-resolutions", "4"]


def network(tiny):
    """Return the paper's CIFAR-10 network with random weights, or a tiny one."""
    torch.manual_seed(0)
    return UNet(8, 3, 8, (1, 2), 1, (4,)) if tiny else UNet()


def program(name, *words, interrupt=None):
    """Run a program of this project, and print its last lines.

    interrupt: (a file, seconds); the program receives Ctrl-C so long after the file appears.
    """
    command = [sys.executable, *map(str, name if isinstance(name, list) else [HERE.parent / name])]
    process = subprocess.Popen(
        [*command, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if interrupt:
        path, seconds = interrupt
        while process.poll() is None and not path.exists():
            time.sleep(0.05)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
    said, _ = process.communicate()
    lines = [line for line in said.replace("\r", "\n").splitlines() if line.strip()]
    print(*(f"    {line}" for line in lines[-6:]), sep="\n", flush=True)
    if process.returncode != bool(interrupt):  # train.py ends with 1 if it was interrupted
        raise RuntimeError(f"{name} ended with status {process.returncode}")


# ---------------------------------------------------------------------------------------- the parts


def machine(args):
    """Print the card, its driver and the versions."""
    query = "nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"
    if shutil.which("nvidia-smi"):
        print(subprocess.run(query, capture_output=True, text=True).stdout.strip())
    packages = {d.name.lower(): d.version for d in metadata.distributions()}
    names = "torch", "triton", "onnxruntime-gpu", "onnxruntime", "nvidia-cudnn-cu13"
    versions = [f"{name} {packages[name]}" for name in names if name in packages]
    print(f"{platform.platform()}, Python {platform.python_version()}, {', '.join(versions)}")


def gradients(args):
    """Compare the gradient of the loss on the device with that of float32 on the CPU."""
    model, size = network(args.tiny), 8 if args.tiny else 32
    for p in model.parameters():  # so that no layer is close to 0
        p.data.add_(torch.randn_like(p), alpha=0.01)
    x0, noise = torch.rand(8, 3, size, size) * 2 - 1, torch.randn(8, 3, size, size)
    t = torch.arange(0, 1000, 125)

    def gradient(module, device, amp):
        module.eval().zero_grad()  # no dropout
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            DIFFUSION.loss(module, x0.to(device), t.to(device), noise.to(device)).backward()
        return torch.cat([p.grad.cpu().flatten() for p in module.parameters()])

    exact = gradient(model, torch.device("cpu"), False)
    cases = {"float32": (False, False, False), "TF32": (True, False, False)}
    cases |= {"bfloat16": (True, True, False), "bfloat16, compiled": (True, True, True)}
    for name, (tf32, amp, compiled) in cases.items():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        on_device = copy.deepcopy(model).to(DEVICE)
        on_device = torch.compile(on_device) if compiled and not args.tiny else on_device
        error = (gradient(on_device, DEVICE, amp) - exact).norm() / exact.norm()
        print(f"| gradient, {name} | relative error {error:.1e} |", flush=True)


def steps(args):
    """Time the training step: batch, compiled or not, and memory format."""
    print("| step of train.py | ms | device busy | GB |\n| --- | --- | --- | --- |")
    images = torch.from_numpy(demo_images())
    images = images if args.tiny else images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    images, count = images.to(DEVICE), 3 if args.tiny else 30
    formats = torch.contiguous_format, torch.channels_last
    for batch, compiled, memory_format in itertools.product((128, 16), (False, True), formats):
        torch.compiler.reset()
        model = network(args.tiny).to(DEVICE, memory_format=memory_format)
        ema = copy.deepcopy(model).requires_grad_(False)
        optimizer = torch.optim.Adam(model.parameters(), 1e-5, fused=True)
        flags = train.make_parser().parse_args(["--batch", str(batch), "--amp"])
        flags.device = DEVICE
        if compiled and not args.tiny:
            model = torch.compile(model, dynamic=False)
        torch.set_float32_matmul_precision("high")  # as train.py does
        number = itertools.count()

        def step(model=model, ema=ema, optimizer=optimizer, flags=flags, number=number):
            k = next(number)
            drawn = train.draw_batch(k, images, None, DIFFUSION.T, flags)
            return train.train_step(drawn, model, ema, optimizer, DIFFUSION, k, flags)

        def take(steps, step=step):
            began = time.perf_counter()
            for _ in range(steps):
                status = step()
            assert status.isfinite().all()  # waits for the device
            return time.perf_counter() - began

        take(3 if args.tiny else 10)
        if IS_CUDA:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.set_sync_debug_mode("error")  # no step may wait for the device
            step()
            torch.cuda.set_sync_debug_mode("default")
        ms, busy, memory = take(count) / count * 1000, "", ""
        if IS_CUDA:
            activity = torch.profiler.ProfilerActivity.CUDA
            with torch.profiler.profile(activities=[activity]) as profile:
                take(3)
            kernels = sum(event.self_device_time_total for event in profile.key_averages())
            busy = f"{kernels / 3 / 1000 / ms:.0%}"
            memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}"
        name = f"batch {batch}, {'compiled' if compiled else 'eager'}"
        name += ", channels_last" * (memory_format == torch.channels_last)
        print(f"| {name} | {ms:.2f} | {busy} | {memory} |", flush=True)


def training(args):
    """Train on the demo's images at 32x32, interrupt the run, resume it, and evaluate it."""
    folder, run = args.out / "images", args.out / "run"
    folder.mkdir()
    for k, pixels in enumerate(demo_images()):
        save_image(folder / f"{k}.png", to_image(pixels))
    words = ["--data", folder, "--out", run, *(TINY if args.tiny else [])]
    words += ["--steps", 60 if args.tiny else 5200]
    print("  interrupted:")
    program("train.py", *words, interrupt=(run / "log.csv", 0 if args.tiny else 30))
    print("  resumed:")
    program("train.py", *words)
    print("  evaluate.py:")
    flags = ["--checkpoint", run, "--data", folder, "--images", 2 if args.tiny else 64]
    program("evaluate.py", *flags)


def sampling(args):
    """Export the network, draw with sample.py, and time one forward pass of ONNX Runtime."""
    for kind, flag in (("float32", []), ("float16", ["--half"])):
        path = args.out / f"{kind}.onnx"
        program("export.py", "--checkpoint", args.out / "run", "--onnx", path, *flag)
        where = ["--onnx", path, "--device", DEVICE.type]
        where += ["--out", args.out / f"samples-{kind}.png"]
        program("sample.py", *where, "--steps", 10 if args.tiny else 250)
    print("| one forward pass | ms |\n| --- | --- |")
    for kind, batch in itertools.product(("float32", "float16"), (64, 256)):
        path = args.out / f"{kind}.onnx"
        ways = {"session.run": None}
        if IS_CUDA:
            ways |= {"IO binding": {}, "TF32 off": {"use_tf32": "0"}}
            ways |= {"CUDA graph": {"enable_cuda_graph": "1"}, "NHWC": {"prefer_nhwc": "1"}}
        for way, options in ways.items():
            run = eps_of(path, batch, options)
            for _ in range(5):
                run()
            began = time.perf_counter()
            for _ in range(20):
                run()
            ms = (time.perf_counter() - began) / 20 * 1000
            print(f"| {kind}, batch {batch}, {way} | {ms:.2f} |", flush=True)


def eps_of(path, batch, options):
    """Return a function that computes eps once. options: of CUDA; None is what sample.py does."""
    opened = ddpm_numpy.Network(path, DEVICE.type)
    x, t = np.zeros((batch, *opened.shape), np.float32), np.full(batch, 500)
    if options is None:
        return lambda: opened(x, t)
    session = ort.InferenceSession(path, providers=[("CUDAExecutionProvider", options)])
    binding = session.io_binding()
    values = [ort.OrtValue.ortvalue_from_numpy(value, "cuda", 0) for value in (x, t, x)]
    binding.bind_ortvalue_input("x_t", values[0])
    binding.bind_ortvalue_input("t", values[1])
    binding.bind_ortvalue_output("eps", values[2])
    return lambda: session.run_with_iobinding(binding)


def two_cards(args):
    """Train with two processes, if there are two cards."""
    if torch.cuda.device_count() < 2 and not args.tiny:
        return print("one card only")
    words = ["--data", args.out / "images", "--out", args.out / "two", "--steps", 20]
    words += TINY if args.tiny else ["--batch", 256]
    words += [] if IS_CUDA else ["--device", "cpu"]
    launch = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    return program([*launch, HERE.parent / "train.py"], *words)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny network, on any machine")
    parser.add_argument("--out", type=Path, default="gpu-report", help="a new folder [%(default)s]")
    args = parser.parse_args()
    if not IS_CUDA and not args.tiny:
        parser.error("torch finds no CUDA here; --tiny tries every part on a CPU")
    if args.out.exists():
        parser.error(f"{args.out} exists; choose a new folder")
    args.out.mkdir(parents=True)
    failed = []
    for part in (machine, gradients, steps, training, sampling, two_cards):
        print(f"\n## {part.__name__}\n", flush=True)
        try:
            part(args)
        except Exception:  # the time on a card is short, so the other parts still run
            failed.append(part.__name__)
            print(traceback.format_exc())
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
