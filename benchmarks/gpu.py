"""Try this project on a GPU within ten minutes, and write a report to paste into an issue.

So far it has run only on CPUs, with --tiny.

    pip install -r requirements-dev.txt
    python benchmarks/gpu.py              # prints the report, and writes it to gpu-report/report.md
    python benchmarks/gpu.py --tiny       # every part with a tiny network, also on a CPU

Cheap measurements come first, and the report grows line by line. If one fails, its traceback goes
to gpu-report/errors.txt. Programs have a time limit, and a log each. What no time is left for is
skipped.
"""

import argparse
import contextlib
import copy
import functools
import itertools
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import ddpm_numpy  # noqa: E402
import train  # noqa: E402
from benchmarks.compare import processor  # noqa: E402
from ddpm import Diffusion, UNet, linear_betas  # noqa: E402
from images import save_image, to_image  # noqa: E402
from support.data import demo_images  # noqa: E402
from support.device import can_compile, compiled, has_bfloat16  # noqa: E402
from support.muon import Muon  # noqa: E402
from support.run import RunFolder, make_config  # noqa: E402
from support.trained import load  # noqa: E402

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
IS_CUDA = DEVICE.type == "cuda"  # on ROCm, too
ORT_DEVICE = "cuda" if IS_CUDA and not torch.version.hip else "cpu"
DIFFUSION = Diffusion(linear_betas())
TINY = "--image-size 8 --base-channels 8 --channel-mults 1 2 --num-res-blocks 1 --batch 8".split()
TINY += ["--attention-resolutions", "4"]


class Report:
    """Print lines and append them to a file; measure rows that may fail, until the time is over."""

    def __init__(self, out, minutes):
        self.out, self.end, self.failed = out, time.monotonic() + 60 * minutes, []
        self.step_ms = 0  # of an eager training step, once it is known

    def say(self, line):
        print(line, flush=True)
        with open(self.out / "report.md", "a") as file:
            file.write(line + "\n")

    def head(self, *columns):
        self.say(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")

    def row(self, name, measure, *args):
        """Call measure(*args) for the other cells of a row, unless no time is left."""
        if time.monotonic() > self.end:
            return self.say(f"| {name} | skipped: no time left |")
        try:
            cells = measure(*args)
        except (Exception, SystemExit) as error:  # the time on a card is short; go on
            (first, *_) = traceback.format_exception_only(error)[-1].splitlines()
            cells = f"failed: {first}"
            self.failed.append(name)
            with open(self.out / "errors.txt", "a") as file:
                file.write(f"{name}\n{traceback.format_exc()}\n")
        self.say(f"| {name} | {cells} |")

    def program(self, log, limit, *command, interrupt=None):
        """Run a program for at most `limit` seconds, and return its seconds and its last line.

        log: the name of the file that gets what it prints. interrupt: (a file, seconds); the
        program receives Ctrl-C so long after the file appears.
        """
        began, path = time.monotonic(), self.out / f"{log}.log"
        limit = min(limit, self.end - began)
        with open(path, "w") as file:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)], stdout=file, stderr=subprocess.STDOUT
            )
            try:
                if interrupt:
                    appears, seconds = interrupt
                    while process.poll() is None and not appears.exists():
                        if time.monotonic() - began > limit:
                            raise subprocess.TimeoutExpired(command, limit)
                        time.sleep(0.05)
                    time.sleep(seconds)
                    process.send_signal(signal.SIGINT)
                process.wait(limit - (time.monotonic() - began))
            except subprocess.TimeoutExpired:
                process.terminate()  # torchrun then ends its processes
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                raise RuntimeError(f"{log} was stopped after {limit:.0f} s; see {path}") from None
            finally:
                process.kill()
        lines = path.read_text(errors="replace").replace("\r", "\n").strip().splitlines() or [""]
        stopped = any(line.startswith("stopped at step") for line in lines)
        if process.returncode != bool(interrupt) or stopped != bool(interrupt):
            raise RuntimeError(f"{log} ended with status {process.returncode}; see {path}")
        return f"{time.monotonic() - began:.0f} s | {lines[-1].strip()}"


def network(tiny):
    """Return the paper's CIFAR-10 network with random weights, or a tiny one."""
    torch.manual_seed(0)
    return UNet(8, 3, 8, (1, 2), 1, (4,)) if tiny else UNet()


def ms(call, times):
    """Return the milliseconds of a call, the last of which waits for the device."""
    for _ in range(3):
        call()
    if IS_CUDA:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        call()
    if IS_CUDA:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / times * 1000


# ---------------------------------------------------------------------------------------- the parts


def machine(report, args):
    """Name the card, its driver, the processor and the versions."""
    query = "nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"
    if shutil.which("nvidia-smi"):
        report.say(subprocess.run(query, capture_output=True, text=True).stdout.strip())
    packages = {(d.name or "").lower(): d.version for d in metadata.distributions()}
    names = "torch", "triton", "onnxruntime-gpu", "onnxruntime", "nvidia-cudnn-cu13"
    versions = [f"{name} {packages[name]}" for name in names if name in packages]
    report.say(
        f"{processor()}, {torch.get_num_threads()} threads; {platform.platform()}, "
        f"Python {platform.python_version()}, {', '.join(versions)}"
    )


def gradients(report, args, compile_too=False):
    """Compare the gradient of the loss on the device with that of float32 on the CPU."""
    model, size = network(args.tiny).eval(), 8 if args.tiny else 32  # without dropout
    for p in model.parameters():  # so that no layer is close to 0
        p.data.add_(torch.randn_like(p), alpha=0.01)
    x0, noise = torch.rand(8, 3, size, size) * 2 - 1, torch.randn(8, 3, size, size)
    t = torch.arange(0, 1000, 125)

    def gradient(module, device, amp):
        module.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            DIFFUSION.loss(module, x0.to(device), t.to(device), noise.to(device)).backward()
        return torch.cat([p.grad.cpu().flatten() for p in module.parameters()])

    def error(tf32, amp, compile_it=False):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        on_device = copy.deepcopy(model).to(DEVICE)
        on_device = compiled(on_device) if compile_it and not args.tiny else on_device
        return f"{(gradient(on_device, DEVICE, amp) - exact).norm() / exact.norm():.1e}"

    exact = gradient(model, torch.device("cpu"), False)
    report.head("gradient", "relative error")
    if compile_too:
        return report.row("compiled", error, True, args.amp, True)
    report.row("float32", error, False, False)
    report.row("TF32", error, True, False)
    if args.amp:
        report.row("bfloat16", error, True, True)


def steps(report, args, compile_too=False):
    """Time the training step: eager or compiled, with and without cudnn.benchmark."""
    images = torch.from_numpy(demo_images())
    images = images if args.tiny else images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    images, count = images.to(DEVICE), 3 if args.tiny else 30

    def measure(batch, make=lambda model: model, benchmark=True, muon=False):
        torch.compiler.reset()
        torch.set_float32_matmul_precision("high")  # as train.py does
        torch.backends.cudnn.benchmark = benchmark
        model = network(args.tiny).to(DEVICE)
        ema = copy.deepcopy(model).requires_grad_(False)
        optimizer = Muon(model, 1e-5) if muon else torch.optim.Adam(model.parameters(), fused=True)
        settings = train.Settings(batch=batch, amp=args.amp, device=DEVICE)
        model, numbers = make(model), itertools.count()
        loss = train.make_loss(model, DIFFUSION, settings)

        def step():
            k = next(numbers)
            batch = train.draw_batch(k, images, None, DIFFUSION.T, settings)
            parts = train.parts_of(batch, k, images, settings)
            return train.train_step(parts, loss, model, ema, optimizer, k, settings)

        began = time.perf_counter()
        assert step().isfinite().all()
        first, busy, memory = time.perf_counter() - began, "", ""
        if IS_CUDA:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.set_sync_debug_mode("error")  # no step may wait for the device
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        each = ms(step, count)
        if IS_CUDA:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
                ms(step, 3)  # with the warm-up, six steps
            kernels = sum(event.self_device_time_total for event in seen.key_averages())
            busy, memory = f"{kernels / 6 / 1000 / each:.0%}", torch.cuda.max_memory_allocated()
            memory = f"{memory / 1e9:.1f}"
            torch.cuda.empty_cache()
        report.step_ms = report.step_ms or each
        return f"{each:.2f} | {first:.1f} | {busy} | {memory}"

    report.head("step of train.py", "ms", "first, s", "device busy", "GB")
    if compile_too:
        backend = {"backend": "eager"} if args.tiny else {}
        own = functools.partial(torch.compile, dynamic=False, **backend)
        ours = own if args.tiny else compiled
        report.row("batch 128, compiled in channels_last", measure, 128, ours)
        report.row("batch 128, compiled in torch's layout", measure, 128, own)
        return report.row("batch 16, compiled in channels_last", measure, 16, ours)
    report.row("batch 128", measure, 128)
    report.row("batch 128, without cudnn.benchmark", measure, 128, lambda model: model, False)
    report.row("batch 128, Muon", functools.partial(measure, muon=True), 128)
    report.row("batch 16", measure, 16)
    torch.backends.cudnn.benchmark = False


def preview(report, args):
    """Time what a preview and a checkpoint cost."""
    model, size = network(args.tiny).to(DEVICE).eval(), 8 if args.tiny else 32
    settings = train.Settings(out=args.out, image_size=size, amp=args.amp, device=DEVICE)
    run, times = (
        RunFolder(settings, make_config(settings, 3), 0, lambda k: 1e-4),
        1 if args.tiny else 3,
    )
    run.log(50_000, [(0.05, 0.1)] * 50_000)
    ema, optimizer = copy.deepcopy(model), torch.optim.Adam(model.parameters(), fused=True)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()  # so that it has its averages

    def seconds(call, *args):
        return f"{ms(functools.partial(call, *args), times) / 1000:.2f}"

    report.head("of a run of 50,000 steps", "s")
    report.row("preview", seconds, run.preview, 1, model, DIFFUSION)
    report.row("checkpoint", seconds, run.save, 1, model, ema, optimizer)
    (args.out / "checkpoint.pt").unlink(missing_ok=True)


def programs(report, args):
    """Train on the demo's images at 32x32, interrupt, resume, evaluate, export and draw."""
    folder, run, root = args.out / "images", args.out / "run", HERE.parent
    count = max(100, min(1000, int(60_000 / (report.step_ms or 600))))  # a minute of training
    for k, pixels in enumerate(demo_images()):
        save_image(folder / f"{k}.png", to_image(pixels))
    words = [root / "train.py", "--data", folder, "--out", run, "--device", DEVICE.type]
    words += [*TINY, "--steps", 60] if args.tiny else ["--steps", count]
    report.head("program", "s", "its last line")
    if sys.platform != "win32":  # which has no SIGINT for other processes
        stop = run / "log.csv", 0 if args.tiny else 3
        train_it = functools.partial(report.program, interrupt=stop)
        report.row("train.py, interrupted", train_it, "interrupted", 120, *words)
    report.row("train.py, resumed", report.program, "train", 150, *words)
    flags = "--checkpoint", run, "--data", folder, "--images", 2 if args.tiny else count // 30
    flags += "--device", DEVICE.type
    report.row("evaluate.py", report.program, "evaluate", 60, root / "evaluate.py", *flags)
    for name, flag in (("float32", []), ("float16", ["--half"])):
        path = args.out / f"{name}.onnx"
        flags = root / "export.py", "--checkpoint", run, "--onnx", path, *flag
        report.row(f"export.py, {name}", report.program, f"export-{name}", 120, *flags)
        flags = root / "sample.py", "--onnx", path, "--device", ORT_DEVICE, "--steps", 10
        flags += "--out", args.out / f"samples-{name}.png"
        report.row(f"sample.py, {name}", report.program, f"sample-{name}", 60, *flags)


def sampling(report, args):
    """Compare eps of ONNX Runtime with torch, and time it and the loop of sampling around it."""
    names = "float32", "float16"
    paths = {name: args.out / f"{name}.onnx" for name in names}
    trained = load(args.out / "run")
    random = torch.Generator().manual_seed(0)
    x0 = torch.from_numpy(demo_images()[:8] / np.float32(127.5) - 1)
    x0 = torch.nn.functional.interpolate(x0, trained.shape[1:])

    def errors(name):
        network, cells = ddpm_numpy.Network(paths[name], ORT_DEVICE), []
        for i in (0, 10, 100, 500, 999):
            t = torch.full((8,), i)
            x_t = trained.diffusion.q_sample(x0, t, torch.randn(x0.shape, generator=random))
            with torch.no_grad():
                exact = trained.eps(x_t, t).numpy()
            eps = network(x_t.numpy(), t.numpy())
            cells.append(f"{np.linalg.norm(eps - exact) / np.linalg.norm(exact):.1e}")
        return " | ".join(cells)

    report.head("eps against torch on the CPU, relative error at t =", *"0 10 100 500 999".split())
    for name in names:
        report.row(name, errors, name)

    def forward(name, batch):
        network = ddpm_numpy.Network(paths[name], ORT_DEVICE)
        x, t = np.zeros((batch, *network.shape), np.float32), np.full(batch, 500)
        return f"{ms(lambda: network(x, t), 3 if args.tiny else 20):.2f}"

    report.head("one forward pass", "ms")
    for name, batch in itertools.product(names, (64, 256)):
        report.row(f"{name}, batch {batch}", forward, name, batch)

    def loop(name, in_thread):
        network = ddpm_numpy.Network(paths[name], ORT_DEVICE)
        with ThreadPoolExecutor(1) as pool:
            draw = ddpm_numpy.noise_of(0, 0, (64, *network.shape))
            draw, count = ahead(draw, pool) if in_thread else draw, 5 if args.tiny else 100
            began = time.perf_counter()
            chain = ddpm_numpy.sample_progressive(
                network, draw, network.betas, network.variance, count, "ddpm"
            )
            *_, (_, _, x0) = chain
            seconds = time.perf_counter() - began
        return f"{1000 * seconds / count:.2f} | {x0.sum():.3f}"

    report.head("Algorithm 2, 64 images", "ms a step", "sum of the images")
    for name, in_thread in itertools.product(names, (False, True)):
        where = "the next z drawn in a thread" if in_thread else "as in sample.py"
        report.row(f"{name}, {where}", loop, name, in_thread)


def ahead(draw_noise, pool):
    """Return a draw_noise that has the next z drawn in a thread."""
    waiting = [pool.submit(draw_noise)]

    def draw():
        waiting.append(pool.submit(draw_noise))
        return waiting.pop(0).result()

    return draw


def compiling(report, args):
    """Time the compiled step, and compare its gradient."""
    if not args.tiny and not can_compile(DEVICE):
        return report.say("not run: Triton, a C compiler or Python.h is missing, or an old card")
    steps(report, args, compile_too=True)
    gradients(report, args, compile_too=True)


def tests(report, args):
    """Run the tests that need a GPU, and train with two processes if there are two cards."""
    report.head("program", "s", "its last line")
    if ORT_DEVICE == "cuda":
        flags = "-m", "pytest", "-q", "-m", "gpu", HERE.parent
        report.row("pytest -m gpu", report.program, "pytest", 120, *flags)
    if torch.cuda.device_count() < 2 and not args.tiny:
        return report.say("| two processes | not run: one card only |")
    words = ["--data", args.out / "images", "--out", args.out / "two", "--steps", 20]
    words += TINY if args.tiny else ["--batch", 256]
    words += ["--device", DEVICE.type]
    launch = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    words = [*launch, HERE.parent / "train.py", *words]
    return report.row("two processes", report.program, "two", 120, *words)


PARTS = machine, gradients, steps, preview, programs, sampling, tests, compiling


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny network, on any machine")
    parser.add_argument("--minutes", type=float, default=10, help="time for all [%(default)s]")
    parser.add_argument("--out", type=Path, default="gpu-report", help="a new folder [%(default)s]")
    args = parser.parse_args()
    if not IS_CUDA and not args.tiny:
        parser.error("torch finds no CUDA here; --tiny tries every part on a CPU")
    if args.out.exists():
        parser.error(f"{args.out} exists; choose a new folder")
    args.out.mkdir(parents=True)
    args.amp = args.tiny or has_bfloat16(DEVICE)
    report = Report(args.out, args.minutes)
    for part in PARTS:
        report.say(f"\n## {part.__name__}\n")
        try:
            part(report, args)
        except (Exception, SystemExit):
            report.failed.append(part.__name__)
            report.say(traceback.format_exc())
    sys.exit(f"failed: {', '.join(report.failed)}" if report.failed else 0)


if __name__ == "__main__":
    main()
