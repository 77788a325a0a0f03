"""Try this project on a GPU within ten minutes, and write a report to paste into an issue.

So far, it has run only on CPUs, with --tiny. Its times replace the estimates in docs/guide.md.

    pip install -r requirements-dev.txt
    python benchmarks/gpu.py              # prints the report, and writes it to gpu-report/report.md
    python benchmarks/gpu.py --tiny       # every part with a tiny network, also on a CPU

The report grows line by line. If a measurement fails, its traceback goes to gpu-report/errors.txt.
Each program has a time limit and a log. When the time is up, the remaining parts are skipped.
"""

import argparse
import copy
import functools
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
from importlib import metadata
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import ddpm_numpy  # noqa: E402
import train  # noqa: E402
from benchmarks.compare import processor  # noqa: E402
from ddpm import Diffusion, UNet, linear_betas  # noqa: E402
from images import save_image, to_image  # noqa: E402
from support.demo import demo_images  # noqa: E402
from support.device import can_compile, compiled, has_bfloat16, prefer_speed  # noqa: E402
from support.run import preview, save  # noqa: E402
from support.torch_network import TorchNetwork  # noqa: E402

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
IS_CUDA = DEVICE.type == "cuda"  # on ROCm, too
ORT_DEVICE = "cuda" if IS_CUDA and not torch.version.hip else "cpu"
DIFFUSION = Diffusion(linear_betas())
TINY = "--image-size 8 --base-channels 8 --channel-mults 1 2 --num-res-blocks 1 --batch 8".split()
TINY += ["--attention-resolutions", "4"]


class Report:
    """Print lines and append them to a file; measure rows that may fail, until the time is up."""

    def __init__(self, out, minutes):
        self.out, self.end, self.failed = out, time.monotonic() + 60 * minutes, []
        self.step_ms = 0  # the time of an eager training step, once it is known

    def say(self, line):
        print(line, flush=True)
        with open(self.out / "report.md", "a") as file:
            file.write(line + "\n")

    def head(self, *columns):
        self.say(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")

    def row(self, name, measure, *args, **options):
        """Call measure for the other cells of a row, unless no time is left."""
        if time.monotonic() > self.end:
            return self.say(f"| {name} | skipped: no time left |")
        try:
            cells = measure(*args, **options)
        except (Exception, SystemExit) as error:  # the time on a card is short; go on
            (first, *_) = traceback.format_exception_only(error)[-1].splitlines()
            cells = f"failed: {first}"
            self.failed.append(name)
            with open(self.out / "errors.txt", "a") as file:
                file.write(f"{name}\n{traceback.format_exc()}\n")
        self.say(f"| {name} | {cells} |")

    def program(self, log, limit, *command, interrupt=None):
        """Run a program for at most `limit` seconds, and return its seconds and its last line.

        log: the name of the file for its output. interrupt: a file; once it exists, send Ctrl-C.
        """
        began, path = time.monotonic(), self.out / f"{log}.log"
        limit = min(limit, self.end - began)
        with open(path, "w") as file:
            words = [sys.executable, *map(str, command)]
            process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
        try:
            while interrupt and process.poll() is None and not interrupt.exists():
                if time.monotonic() - began > limit:
                    raise subprocess.TimeoutExpired(words, limit)
                time.sleep(0.05)
            if interrupt:
                process.send_signal(signal.SIGINT)
            process.wait(max(0, limit - (time.monotonic() - began)))
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its processes
            process.wait(10)
            raise RuntimeError(f"{log} was stopped after {limit:.0f} s; see {path}") from None
        finally:
            process.kill()
        said = path.read_text(errors="replace").replace("\r", "\n").strip()
        is_stopped = "\nstopped at step" in said
        if process.returncode != -signal.SIGINT * bool(interrupt) or is_stopped != bool(interrupt):
            raise RuntimeError(f"{log} ended with status {process.returncode}; see {path}")
        *_, last = ["", *said.splitlines()]
        return f"{time.monotonic() - began:.0f} s | {last.strip()}"


def network(tiny):
    """Return the paper's CIFAR-10 network with random weights, or a tiny one."""
    torch.manual_seed(0)
    return UNet(8, 3, 8, (1, 2), 1, (4,)) if tiny else UNet()


def ms(call, times):
    """Return the mean milliseconds per call; wait for the device after the last one."""
    for count in (3, times):  # the first three are not counted
        began = time.perf_counter()
        for _ in range(count):
            call()
        if IS_CUDA:
            torch.cuda.synchronize()
    return (time.perf_counter() - began) / times * 1000


def machine(report, args):
    """Name the card, its driver, the processor and the versions."""
    query = "nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"
    if shutil.which("nvidia-smi"):
        report.say(subprocess.run(query, capture_output=True, text=True).stdout.strip())
    names = "torch", "triton", "onnxruntime-gpu", "onnxruntime", "nvidia-cudnn-cu13"
    versions = [f"{d.name} {d.version}" for d in metadata.distributions() if d.name in names]
    report.say(
        f"{processor()}, {torch.get_num_threads()} threads; {platform.platform()}, "
        f"Python {platform.python_version()}, {', '.join(versions)}"
        f"{'' if args.compile else '; torch.compile lacks something, see support/device.py'}"
    )


def gradients(report, args):
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

    def error(tf32, amp, prepare=lambda model: model):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        on_device = prepare(copy.deepcopy(model).to(DEVICE))
        return f"{(gradient(on_device, DEVICE, amp) - exact).norm() / exact.norm():.1e}"

    exact = gradient(model, torch.device("cpu"), False)
    report.head("gradient", "relative error")
    report.row("float32", error, False, False)
    report.row("TF32", error, True, False)
    if args.amp:
        report.row("bfloat16", error, True, True)
    if args.compile:
        report.row("compiled", error, True, args.amp, args.compile)


def steps(report, args):
    """Time the training step, and extrapolate to the 800,000 steps of the paper's run."""
    size = 8 if args.tiny else 32
    images = torch.randint(256, (1000, 3, size, size), dtype=torch.uint8, device=DEVICE)

    def measure(batch, prepare=lambda model: model, accumulate=1):
        torch.compiler.reset()
        prefer_speed()  # as train.py does
        model = network(args.tiny).to(DEVICE)
        ema = copy.deepcopy(model).requires_grad_(False)
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        settings = train.Settings(
            batch=batch, accumulate=accumulate, amp=args.amp, device=DEVICE, warmup=5000
        )
        prepared = prepare(model)
        step = train.algorithm_1(prepared, ema, optimizer, DIFFUSION, images, None, settings)
        began = time.perf_counter()
        assert step(0).isfinite().all()
        first = time.perf_counter() - began
        if IS_CUDA:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.set_sync_debug_mode("error")  # no step may wait for the device
            try:
                step(1)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        each = ms(functools.partial(step, 2), 3 if args.tiny else 30)
        memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if IS_CUDA else ""
        report.step_ms = report.step_ms or each
        return f"{each:.2f} | {each * 800_000 / 3.6e6:.2f} | {first:.1f} | {memory}"

    report.head("step of train.py", "ms", "hours for 800,000 steps", "first, s", "GB")
    report.row("batch 128", measure, 128)
    report.row("batch 128 in two parts", measure, 128, accumulate=2)
    if args.compile:
        report.row("batch 128, compiled", measure, 128, args.compile)
        report.row("batch 16, compiled", measure, 16, args.compile)


def saving(report, args):
    """Time a preview and a checkpoint."""
    model, size = network(args.tiny).to(DEVICE).eval(), 8 if args.tiny else 32
    settings = train.Settings(amp=args.amp, device=DEVICE)
    ema, optimizer = copy.deepcopy(model), torch.optim.Adam(model.parameters(), fused=True)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()  # so that the optimizer has its averages
    image, checkpoint = args.out / "preview.png", args.out / "checkpoint.pt"
    calls = {
        "preview": (preview, image, (3, size, size), ema, DIFFUSION, settings),
        "checkpoint": (save, checkpoint, {}, 1, model, ema, optimizer),
    }

    def seconds(call, *words):
        return f"{ms(functools.partial(call, *words), 1 if args.tiny else 3) / 1000:.2f}"

    report.head("of a run", "s")
    for name, words in calls.items():
        report.row(name, seconds, *words)
    checkpoint.unlink(missing_ok=True)


def programs(report, args):
    """Train on the demo's images at 32x32, interrupt, resume, evaluate, export and draw."""
    folder, run, root = args.out / "images", args.out / "run", HERE.parent
    count = 150 if args.tiny else int(60_000 / (report.step_ms or 600))  # a minute of training
    for k, pixels in enumerate(demo_images()):
        save_image(folder / f"{k}.png", to_image(pixels))
    words = [root / "train.py", "--data", folder, "--out", run, "--device", DEVICE.type]
    words += ["--steps", count, *(TINY if args.tiny else ["--compile"] if args.compile else [])]
    report.head("program", "s", "its last line")
    if sys.platform != "win32":  # Windows has no SIGINT for other processes
        log = run / "log.csv"  # exists after the first steps
        report.row("train.py, interrupted", report.program, "stop", 120, *words, interrupt=log)
    report.row("train.py, resumed", report.program, "train", 150, *words)
    flags = "--data", folder, "--images", count // 30, "--checkpoint", run, "--device", DEVICE.type
    report.row("evaluate.py", report.program, "evaluate", 60, root / "evaluate.py", *flags)
    draw = root / "sample.py", "--steps", 10, "--out"
    flags = *draw, args.out / "samples-torch.png", "--checkpoint", run, "--device", DEVICE.type
    report.row("sample.py, torch", report.program, "sample-torch", 120, *flags)
    for name, flag in (("float32", []), ("float16", ["--half"])):
        path = args.out / f"{name}.onnx"
        flags = root / "export.py", "--checkpoint", run, "--onnx", path, *flag
        report.row(f"export.py, {name}", report.program, f"export-{name}", 120, *flags)
        flags = *draw, args.out / f"samples-{name}.png", "--onnx", path, "--device", ORT_DEVICE
        report.row(f"sample.py, {name}", report.program, f"sample-{name}", 60, *flags)


@torch.no_grad()
def sampling(report, args):
    """Compare eps on the device with float32 in torch on the CPU, and time Algorithm 2."""
    run, random = args.out / "run", torch.Generator().manual_seed(0)
    reference, inputs = TorchNetwork(run, "cpu", amp=False), []
    x0 = torch.from_numpy(demo_images()[:64]) / 127.5 - 1
    x0 = torch.nn.functional.interpolate(x0, reference.shape[1:])
    for i in (0, 10, 100, 500, 999):
        t = torch.full((64,), i)
        x_t = DIFFUSION.q_sample(x0, t, torch.randn(x0.shape, generator=random))
        inputs.append((x_t, t, reference.eps(x_t, t)))

    def open_network(name, batch=64):
        if name == "torch":
            return TorchNetwork(run, DEVICE.type, images=50_000, batch=batch)  # compiled
        return ddpm_numpy.Network(args.out / name, ORT_DEVICE)

    def errors(name):
        network, cells = open_network(name), []
        for x_t, t, exact in inputs:
            if name == "torch":
                eps = network.eps(x_t.to(DEVICE), t.to(DEVICE)).cpu()
            else:
                eps = torch.from_numpy(network(x_t.numpy(), t.numpy()))
            cells.append(f"{(eps - exact).norm() / exact.norm():.1e}")
        return " | ".join(cells)

    def loop(name, batch):
        network = open_network(name, batch)
        draw_noise = ddpm_numpy.noise_of(0, 0, (batch, *network.shape))
        chain = network.reverse(None, 0, draw_noise)
        each = ms(functools.partial(next, chain), 3 if args.tiny else 100)
        return f"{each:.2f} | {each * 1000 * -(-50_000 // batch) / 3.6e6:.2f}"

    report.head("relative error of eps at t =", *"0 10 100 500 999".split())
    for name in ("torch", "float32.onnx", "float16.onnx"):
        report.row(name, errors, name)
    report.head("a step of Algorithm 2", "ms", "hours for 50,000 images in 1000 steps")
    for name, batch in (("torch", 64), ("torch", 512), ("float32.onnx", 64), ("float16.onnx", 64)):
        report.row(f"{name}, batch {batch}", loop, name, batch)


def tests(report, args):
    """Run the tests that need a GPU, and train with two processes if there are two cards."""
    report.head("program", "s", "its last line")
    if ORT_DEVICE == "cuda":
        flags = "-m", "pytest", "-q", "-m", "gpu", HERE.parent
        report.row("pytest -m gpu", report.program, "pytest", 120, *flags)
    if torch.cuda.device_count() < 2 and not args.tiny:
        return report.say("| two processes | not run: one card only |")
    words = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    words += [HERE.parent / "train.py", "--data", args.out / "images", "--out", args.out / "two"]
    words += ["--steps", 20, "--device", DEVICE.type, *(TINY if args.tiny else ["--batch", 256])]
    report.row("two processes", report.program, "two", 120, *words)


PARTS = machine, gradients, steps, saving, programs, sampling, tests


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny network, on any machine")
    parser.add_argument("--minutes", type=float, default=10, help="total time [%(default)s]")
    parser.add_argument("--out", type=Path, default="gpu-report", help="a new folder [%(default)s]")
    args = parser.parse_args()
    if not IS_CUDA and not args.tiny:
        parser.error("torch finds no CUDA here; --tiny tries every part on a CPU")
    if args.out.exists():
        parser.error(f"{args.out} exists; choose a new folder")
    args.out.mkdir(parents=True)
    args.amp = args.tiny or has_bfloat16(DEVICE)
    args.compile = compiled if can_compile(DEVICE) else None
    if args.tiny:
        args.compile = functools.partial(torch.compile, backend="eager", dynamic=False)
    report = Report(args.out, args.minutes)
    for part in PARTS:
        report.say(f"\n## {part.__name__}")
        try:
            part(report, args)
        except (Exception, SystemExit):
            report.failed.append(part.__name__)
            report.say(traceback.format_exc())
        torch.cuda.empty_cache()  # the programs need memory, too
    sys.exit(f"failed: {', '.join(report.failed)}" if report.failed else 0)


if __name__ == "__main__":
    main()
