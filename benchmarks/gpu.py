"""Measure this project on a GPU within 15 minutes, and write a report to paste into an issue.

    pip install -r requirements-dev.txt -r requirements-cuda.txt
    python benchmarks/gpu.py              # prints the report, and writes it to gpu-report/report.md
    python benchmarks/gpu.py --tiny       # every part with a tiny network, also on a CPU

So far, this script has run only on CPUs and on a simulated card, with --tiny.

Each part is a process of its own, because a CUDA error makes its process unusable. The report grows
row by row: a row that fails says so, errors.txt has its traceback, and each program has a log. When
the time is up, the remaining rows are skipped.
"""

import argparse
import contextlib
import copy
import importlib.metadata
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import arguments  # noqa: E402
import run  # noqa: E402
import train  # noqa: E402
from images import demo_images, from_pixels  # noqa: E402
from sample import Network, noise_of, to_image  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IS_CUDA = DEVICE.type == "cuda"  # on ROCm, too
TINY = {
    "image_size": 8, "base_channels": 8, "channel_mults": (1, 2), "num_res_blocks": 1,
    "attention_resolutions": (4,), "batch": 8,
}  # fmt: skip
OUT = Path("gpu-report").resolve()
WORK = OUT / "work"  # removed at the end
FILES = WORK / "float32.onnx", WORK / "float16.onnx"

# ------------------------------------------------------------ what benchmarks/compare.py uses, too


def clock(step):
    """Return the seconds per call. On CUDA, 20 calls are timed, which overlap as in a loop."""
    calls, wait = (20, torch.cuda.synchronize) if IS_CUDA else (1, lambda: None)
    wait()
    began = time.perf_counter()
    for _ in range(calls):
        step()
    wait()
    return (time.perf_counter() - began) / calls


def unchanged(network):
    """Return the network."""
    return network


def train_step(prepare=unchanged, **given):
    """Return a function that takes a step of train.py on random images.

    prepare: a function of the network, such as `compiled`. given: settings unlike the paper's.
    """
    s = run.Settings(**{"warmup": 5000, "amp": run.has_bfloat16(DEVICE)} | given)
    shape = 3, s.image_size, s.image_size
    images = torch.randint(256, (1000, *shape), dtype=torch.uint8, device=DEVICE)
    network, diffusion = run.build(s, shape)
    ema = copy.deepcopy(network.to(DEVICE)).requires_grad_(False)
    optimizer, data = run.make_optimizer(network, s), train.Data(images, None, (), "")
    steps = train.algorithm_1(prepare(network), ema, optimizer, diffusion, data, s)
    return partial(next, steps)


def compiled(network, is_tiny=False):
    """Compile a network as train.py does on CUDA; only trace it if it is tiny."""
    torch.compiler.reset()
    if is_tiny:
        return torch.compile(network, dynamic=False, backend="eager")
    return run.compiled(network)


def machine():
    """Return the name of the GPU or the processor, and the versions."""
    name = torch.cuda.get_device_name() if IS_CUDA else platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):  # on ARM, the file names no model
        lines = Path("/proc/cpuinfo").read_text().splitlines() if not IS_CUDA else ()
        name = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    name += "" if IS_CUDA else f", {torch.get_num_threads()} threads"
    versions = [f"Python {platform.python_version()}"]
    for package in "torch triton onnxruntime-gpu onnxruntime diffusers".split():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package).split('+')[0]}")
    return f"{name}, {', '.join(versions)}"


# -------------------------------------------------------------------------------------- the report


class Report:
    """report.md, which grows row by row until the time `end`. given: what replaces settings."""

    def __init__(self, end, is_tiny):
        self.end, self.is_tiny, self.given = end, is_tiny, TINY if is_tiny else {}
        self.batch, self.size = self.given.get("batch", 128), self.given.get("image_size", 32)
        self.onnx = "cuda" if IS_CUDA and not is_tiny else "auto"

    def say(self, line):
        """Print a line, and append it to the report."""
        print(line, flush=True)
        with open(OUT / "report.md", "a") as file:
            file.write(line + "\n")

    def head(self, *columns):
        """Begin a table."""
        self.say(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")

    def row(self, name, measure, *args, **options):
        """Say what `measure` returns for the other cells of a row, or why it fails."""
        if time.time() > self.end:
            return self.say(f"| {name} | skipped: no time left |")
        try:
            cells = measure(*args, **options)
        except (Exception, SystemExit) as error:  # the time on a card is short; go on
            cells = f"failed: {traceback.format_exception_only(error)[-1].splitlines()[0]}"
            print(f"\n{name}:\n{traceback.format_exc()}", file=sys.stderr)
        self.say(f"| {name} | {cells} |")

    def program(self, log, *command, interrupt=None, limit=300):
        """Run a program for at most `limit` seconds; return its running time and last line.

        log: the name of the file for its output. interrupt: a file; after its second line, Ctrl-C
        is sent.
        """
        began, path = time.time(), OUT / f"{log}.log"
        expected = -signal.SIGINT if interrupt else 0
        words = [sys.executable, *map(str, command)]
        with open(path, "w") as file:
            process = subprocess.Popen(words, stdout=file, stderr=file, cwd=HERE.parent)
        while process.poll() is None and time.time() < min(self.end, began + limit):
            if interrupt and interrupt.exists() and interrupt.read_text().count("\n") > 1:
                process.send_signal(signal.SIGINT)
                interrupt = None  # a second one would end the program at once
            time.sleep(0.05)
        if process.poll() is None:
            process.terminate()  # torchrun then ends its processes
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(10, limit))
            process.kill()  # a compilation can ignore the first signal
            raise RuntimeError(f"{log} was stopped after {time.time() - began:.0f} s; see its log")
        if process.returncode != expected:
            raise RuntimeError(f"{log} ended with status {process.returncode}; see its log")
        *_, last = ["", *path.read_text(errors="replace").replace("\r", "\n").strip().splitlines()]
        return f"{time.time() - began:.0f} s | {last.strip()}"


# --------------------------------------------------------------------------------------- the parts


def card(report):
    """Name the card, its driver and the versions, and how attention is computed in training."""
    query = "nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"
    if shutil.which("nvidia-smi"):
        report.say(subprocess.run(query, capture_output=True, text=True).stdout.strip())
    report.say(machine())
    shape = 1, 1, report.size**2 // 4, 2 * report.given.get("base_channels", 128)
    for dtype in torch.float32, torch.bfloat16:
        q = torch.zeros(shape, dtype=dtype, device=DEVICE, requires_grad=True)
        name = SDPBackend(torch.ops.aten._fused_sdp_choice(q, q, q)).name
        report.say(f"attention in {str(dtype)[6:]}: {name}")


def steps(report):
    """Time the training step, and compare it with the fastest matrix product."""
    n = 256 if report.is_tiny else 8192
    a, seconds = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16), []
    for _ in range(5):
        seconds.append(clock(partial(torch.mm, a, a)))
    peak = 2 * n**3 / min(seconds)
    report.say(f"a product of two bfloat16 matrices {n} x {n}: {peak / 1e12:.4g} TFLOP/s")
    with FlopCounterMode(display=False) as counter:
        train_step(**report.given | {"batch": 8})()
    flops = counter.get_total_flops() / 8  # per image

    def measure(amp, prepare=unchanged):
        step = train_step(prepare, **report.given, amp=amp)
        began = time.perf_counter()
        step()
        first, memory = time.perf_counter() - began, ""
        seconds = min(clock(step) for _ in range(3))
        if IS_CUDA:
            memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}"
            torch.cuda.reset_peak_memory_stats()
        share = flops * report.batch / seconds / peak
        return (f"{1000 * seconds:.2f} | {report.batch / seconds:.0f} | {share:.1%} | "
                f"{seconds * 800_000 / 3600:.2f} | {first:.1f} | {memory}")  # fmt: skip

    report.head(f"a step of {report.batch} images", "ms", "images/s", "share of this",
                "hours for 800,000 steps", "first step, s", "GB")  # fmt: skip
    report.row("float32", measure, False)
    report.row("bfloat16", measure, True)
    report.row("bfloat16, compiled", measure, True, partial(compiled, is_tiny=report.is_tiny))


def gradients(report):
    """Compare the gradient of a training step on the device with one in float32 on the CPU."""
    torch.manual_seed(0)
    shape = report.batch // 4, 3, report.size, report.size
    network, diffusion = run.build(run.Settings(**report.given, dropout=0.0), shape[1:])
    for p in network.parameters():  # so that no layer is close to 0
        p.data.add_(torch.randn_like(p), alpha=0.01)
    x0, noise, t = torch.rand(shape) * 2 - 1, torch.randn(shape), torch.randint(1000, shape[:1])

    def gradient(module, device, amp=False):
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            diffusion.loss(module, x0.to(device), t.to(device), noise.to(device)).backward()
        return torch.cat([p.grad.cpu().flatten() for p in module.parameters()])

    def error(tf32, amp=False, prepare=unchanged):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        on_device = prepare(copy.deepcopy(network).to(DEVICE))
        return f"{(gradient(on_device, DEVICE, amp) - exact).norm() / exact.norm():.1e}"

    exact = gradient(network, torch.device("cpu"))
    report.head("gradient", "relative error")
    report.row("float32", error, False)
    report.row("TF32", error, True)
    report.row("bfloat16", error, True, True)
    report.row("bfloat16, compiled", error, True, True, partial(compiled, is_tiny=report.is_tiny))


def programs(report):
    """Train, interrupt, resume, evaluate, export, sample and test, on the demo's images."""
    folder, device, row = WORK / "images", ("--device", DEVICE.type), report.row
    folder.mkdir()
    for k, pixels in enumerate(demo_images()):
        to_image(pixels).save(folder / f"{k}.png")
    tiny = [word for item in report.given.items() for word in arguments.as_flag(*item)]
    words = ["train.py", "--data", folder, *device, *tiny]
    short = [*words, "--steps", 20 if report.is_tiny else 100, "--out"]
    resumed, whole, log = WORK / "resumed", WORK / "whole", WORK / "compiled" / "log.csv"
    report.head("program", "s", "its last line, or the result")
    if sys.platform != "win32":  # Windows has no SIGINT for other processes
        row("train.py, interrupted", report.program, "stop", *short, resumed,
            interrupt=resumed / "log.csv")  # fmt: skip
    row("train.py, resumed", report.program, "resumed", *short, resumed)
    row("train.py, whole", report.program, "whole", *short, whole)

    def difference():
        one, other = (torch.load(path / "checkpoint.pt", "cpu") for path in (resumed, whole))
        one, other = (torch.cat([v.flatten() for v in s["model"].values()]) for s in (one, other))
        return f"| {(one - other).norm() / other.norm():.1e}, relative to the weights"

    def losses():
        loss = np.loadtxt(log, delimiter=",", skiprows=1)[:, 1]
        return (
            f"| {loss[:20].mean():.4f} in the first 20 steps, {loss[-20:].mean():.4f} in the last"
        )

    row("weights, resumed and whole", difference)
    longer = ["--steps", 60] if report.is_tiny else ["--steps", 300, "--compile"]
    row("train.py, compiled", report.program, "compiled", *words, *longer, "--out", log.parent)
    row("its mean loss", losses)
    from_run = "--checkpoint", resumed
    held_out = "--data", folder, "--images", 1 if report.is_tiny else 8
    measure = "-m", "extras.evaluate", *held_out, *from_run, *device
    row("evaluate.py", report.program, "evaluate", *measure)
    row("export.py", report.program, "export", "export.py", *from_run, "--onnx", FILES[0])
    row("half.py", report.program, "half", "-m", "extras.half", *FILES)
    n, count = (8, 50) if report.is_tiny else (64, 1000)
    draw = "--out", WORK / "samples.png", "-n", n, "--steps", count, "--device"
    in_torch = "-m", "extras.sample_checkpoint", resumed, *draw, DEVICE.type
    row(f"{count} steps in torch", report.program, "sample-torch", *in_torch)
    for path in FILES:
        words = "sample.py", "--onnx", path, *draw, report.onnx
        row(f"{count} steps, {path.name}", report.program, f"sample-{path.stem}", *words)
    if IS_CUDA and not report.is_tiny:
        test = "-m", "pytest", "-q", "-m", "gpu", "tests/test_export.py", "tests/test_gpu.py"
        row("pytest -m gpu", report.program, "pytest", *test)
    if torch.cuda.device_count() > 1 or not IS_CUDA:
        torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"
        row("two processes", report.program, "two", *torchrun, *short, WORK / "two")


@torch.no_grad()
def sampling(report):
    """Compare eps on the device with float32 in torch on the CPU, and time Algorithm 2."""
    from extras.sample_checkpoint import TorchNetwork

    exact, diffusion, _ = run.load(WORK / "resumed")
    x0 = from_pixels(torch.from_numpy(demo_images()[:64]))
    x0 = torch.nn.functional.interpolate(x0, report.size)

    def open_network(name):
        if name == "torch":
            return TorchNetwork(WORK / "resumed", DEVICE.type)
        return Network(WORK / name, report.onnx)

    examples = []
    for t in (0, 10, 100, 500, 999):
        times, random = torch.full((64,), t), torch.Generator().manual_seed(t)
        x_t = diffusion.q_sample(x0, times, torch.randn(x0.shape, generator=random))
        examples.append((t, x_t, exact(x_t, times)))

    def errors(name):
        network, cells = open_network(name), []
        for t, x_t, expected in examples:
            eps = network(x_t.to(DEVICE) if name == "torch" else x_t.numpy(), t)
            cells.append(f"{(torch.as_tensor(eps).cpu() - expected).norm() / expected.norm():.1e}")
        return " | ".join(cells)

    def loop(name, batch):
        if IS_CUDA:
            torch.cuda.reset_peak_memory_stats()
        network = open_network(name)
        x_t = noise_of(0, 0, batch, network.shape)()
        x_t = torch.from_numpy(x_t).to(DEVICE) if name == "torch" else x_t
        chain = network.reverse(network, noise_of(0, 0, batch, network.shape))
        next(chain)
        whole = min(clock(partial(next, chain)) for _ in range(5))
        bare = min(clock(partial(network, x_t, 500)) for _ in range(5))
        hours = whole * 1000 * -(-50_000 // batch) / 3600
        in_torch = IS_CUDA and name == "torch"
        memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if in_torch else ""
        return f"{1000 * whole:.2f} | {1000 * bare:.2f} | {hours:.2f} | {memory}"

    names = ["torch", *(path.name for path in FILES if IS_CUDA or report.is_tiny)]  # or it is slow
    report.head("relative error of eps at t =", *"0 10 100 500 999".split())
    for name in names:
        report.row(name, errors, name)
    report.head("a step of Algorithm 2", "ms", "of which the network",
                "hours for 50,000 images in 1,000 steps", "GB of torch")  # fmt: skip
    for name, batch in [*((name, 64) for name in names), ("torch", 512)]:
        report.row(f"{name}, batch {batch}", loop, name, batch)


PARTS = card, steps, gradients, programs, sampling


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny network, on any machine")
    parser.add_argument("--minutes", type=float, default=15, help="total time [%(default)s]")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)  # how it calls itself
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")  # as train.py does
    torch.backends.cudnn.benchmark = True
    if args.part:
        name, end = args.part
        return {part.__name__: part for part in PARTS}[name](Report(float(end), args.tiny))
    if not IS_CUDA and not args.tiny:
        parser.error("torch finds no CUDA here; --tiny tries every part on a CPU")
    if OUT.exists():
        parser.error(f"{OUT} exists; rename or remove it")
    WORK.mkdir(parents=True)
    end = time.time() + 60 * args.minutes
    report = Report(end, args.tiny)
    for part in PARTS:
        report.say(f"\n## {part.__name__}")
        words = [sys.executable, __file__, *["--tiny"] * args.tiny, "--part", part.__name__, end]
        try:
            with open(OUT / "errors.txt", "a") as errors:
                limit = max(0, end - time.time()) + 20
                subprocess.run([*map(str, words)], stderr=errors, timeout=limit, check=True)
        except subprocess.SubprocessError as error:
            report.say(f"failed: {error}")
    shutil.rmtree(WORK)
    sys.exit("failed: " in (OUT / "report.md").read_text())


if __name__ == "__main__":
    main()
