"""Try this project on a GPU within ten minutes, and write a report to paste into an issue.

So far, this script has run only on CPUs, with --tiny.

    pip install -r requirements-dev.txt
    python benchmarks/gpu.py              # prints the report, and writes it to gpu-report/report.md
    python benchmarks/gpu.py --tiny       # every part with a tiny network, also on a CPU

It runs without diffusers and, if the rows of ONNX Runtime are not wanted, without onnxruntime-gpu.
Each part is a process of its own, because a CUDA error makes its process unusable.
The report grows row by row, errors.txt has the traceback of each row that fails, and each program
has a log. When the time is up, the remaining rows are skipped.
"""

import argparse
import copy
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import train  # noqa: E402
from benchmarks import compare  # noqa: E402
from benchmarks.compare import DEVICE, IS_CUDA, ONNX  # noqa: E402
from extras.torch_network import TorchNetwork  # noqa: E402
from images import demo_images, from_pixels  # noqa: E402
from sample import Network, noise_of, to_image  # noqa: E402

IS_TINY = "--tiny" in sys.argv
TINY = {
    "image_size": 8, "base_channels": 8, "channel_mults": (1, 2), "num_res_blocks": 1,
    "attention_resolutions": (4,), "batch": 8,
}  # fmt: skip
GIVEN = TINY if IS_TINY else {}  # what differs from the paper's run
BATCH, SIZE = GIVEN.get("batch", 128), GIVEN.get("image_size", 32)
END = float(os.environ.get("GPU_REPORT_END", "inf"))  # when the time is up
OUT = Path("gpu-report").resolve()
WORK = OUT / "work"  # is removed at the end
FILES = WORK / "float32.onnx", WORK / "float16.onnx"


def say(line):
    """Print a line, and append it to the report."""
    print(line, flush=True)
    with open(OUT / "report.md", "a") as file:
        file.write(line + "\n")


def head(*columns):
    """Begin a table of the report."""
    say(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")


def row(name, measure, *args, **options):
    """Say what `measure` returns for the other cells of a row, or why it fails."""
    if time.time() > END:
        return say(f"| {name} | skipped: no time left |")
    try:
        cells = measure(*args, **options)
    except (Exception, SystemExit) as error:  # the time on a card is short; go on
        cells = f"failed: {traceback.format_exception_only(error)[-1].splitlines()[0]}"
        print(f"\n{name}:\n{traceback.format_exc()}", file=sys.stderr)
    say(f"| {name} | {cells} |")


def program(log, *command, interrupt=None, limit=120):
    """Run a program for at most `limit` seconds, and return its running time and its last line.

    log: the name of the file for its output. interrupt: a file; when it has two lines, send Ctrl-C.
    """
    began, path = time.time(), OUT / f"{log}.log"
    expected = -signal.SIGINT if interrupt else 0
    words = [sys.executable, *map(str, command)]
    with open(path, "w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, cwd=HERE.parent)
    while process.poll() is None and time.time() < min(END, began + limit):
        if interrupt and interrupt.exists() and interrupt.read_text().count("\n") > 1:
            process.send_signal(signal.SIGINT)
            interrupt = None  # a second one would end the program at once
        time.sleep(0.05)
    if process.poll() is None:
        process.terminate()  # torchrun then ends its processes
        process.wait(10)
        raise RuntimeError(f"{log} was stopped after {time.time() - began:.0f} s; see {path.name}")
    if process.returncode != expected:
        raise RuntimeError(f"{log} ended with status {process.returncode}; see {path.name}")
    *_, last = ["", *path.read_text(errors="replace").replace("\r", "\n").strip().splitlines()]
    return f"{time.time() - began:.0f} s | {last.strip()}"


# --------------------------------------------------------------------------------------- the parts


def card():
    """Name the card, its driver, the processor and the versions."""
    query = "nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"
    if shutil.which("nvidia-smi"):
        say(subprocess.run(query, capture_output=True, text=True).stdout.strip())
    say(f"{compare.machine()}; ONNX Runtime computes on {ONNX}")


def compiled(network):
    """Compile a network as train.py does or, with --tiny, only trace it."""
    torch.compiler.reset()
    how = {"backend": "eager", "dynamic": False}
    return torch.compile(network, **how) if IS_TINY else compare.compiled(network)


def gradients():
    """Compare the gradient of a training step on the device with one in float32 on the CPU."""
    torch.manual_seed(0)
    network, diffusion = train.build(compare.settings(dropout=0.0, **GIVEN), (3, SIZE, SIZE), ())
    for p in network.parameters():  # so that no layer is close to 0
        p.data.add_(torch.randn_like(p), alpha=0.01)
    x0, noise = torch.rand(BATCH, 3, SIZE, SIZE) * 2 - 1, torch.randn(BATCH, 3, SIZE, SIZE)
    t = torch.randint(1000, (BATCH,))

    def gradient(module, device, amp=False):
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            diffusion.loss(module, x0.to(device), t.to(device), noise.to(device)).backward()
        return torch.cat([p.grad.cpu().flatten() for p in module.parameters()])

    def error(tf32, amp=False, prepare=lambda network: network):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        on_device = prepare(copy.deepcopy(network).to(DEVICE))
        return f"{(gradient(on_device, DEVICE, amp) - exact).norm() / exact.norm():.1e}"

    exact = gradient(network, torch.device("cpu"))
    head("gradient", "relative error")
    row("float32", error, False)
    row("TF32", error, True)
    row("bfloat16", error, True, True)
    row("bfloat16, compiled", error, True, True, compiled)


def steps():
    """Time the training step, and extrapolate to the 800,000 steps of the paper's run."""
    images = torch.randint(256, (1000, 3, SIZE, SIZE), dtype=torch.uint8, device=DEVICE)

    def measure(prepare, **given):
        step = compare.train_py(images, prepare, **GIVEN | given)
        began = time.perf_counter()
        step()
        first, memory = time.perf_counter() - began, ""
        ms = 1000 * min(compare.clock(step) for _ in range(2))
        if IS_CUDA:
            memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}"
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.set_sync_debug_mode("error")  # no step may wait for the device
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return f"{ms:.2f} | {ms * 800_000 / 3.6e6:.2f} | {first:.1f} | {memory}"

    head("step of train.py", "ms", "hours for 800,000 steps", "first, s", "GB")
    row(f"batch {BATCH}", measure, lambda network: network)
    row(f"batch {BATCH}, compiled", measure, compiled)
    row(f"batch {BATCH // 8}, compiled", measure, compiled, batch=BATCH // 8)


def programs():
    """Train on the demo's images at 32x32, interrupt, resume, evaluate, export, draw and test."""
    folder, run, device = WORK / "images", WORK / "run", ("--device", DEVICE.type)
    folder.mkdir()
    for k, pixels in enumerate(demo_images()):
        to_image(pixels).save(folder / f"{k}.png")
    tiny = " ".join(train.as_flag(*item) for item in GIVEN.items()).split()
    words = ["train.py", "--data", folder, "--out", run, *device, "--steps", 150, *tiny]
    words += ["--no-compile" if IS_TINY else "--compile"]
    head("program", "s", "its last line")
    if sys.platform != "win32":  # Windows has no SIGINT for other processes
        row("train.py, interrupted", program, "stop", *words, interrupt=run / "log.csv")
    row("train.py, resumed", program, "train", *words)
    flags = "--data", folder, "--images", 8, "--checkpoint", run, *device
    row("evaluate.py", program, "evaluate", "-m", "extras.evaluate", *flags)
    row("export.py", program, "export", "export.py", "--checkpoint", run, "--onnx", FILES[0])
    row("half.py", program, "half", "-m", "extras.half", *FILES)
    draw = "sample.py", "--steps", 10, "--out", WORK / "samples.png"
    row("sample.py, torch", program, "sample-torch", *draw, "--checkpoint", run, *device)
    for path in FILES:
        flags = "--onnx", path, "--device", ONNX
        row(f"sample.py, {path.name}", program, f"sample-{path.stem}", *draw, *flags)
    if ONNX == "cuda":  # in a file that imports no package of the other tests
        test = "-m", "pytest", "-q", "-m", "gpu", "tests/test_export.py"
        row("pytest -m gpu", program, "pytest", *test)
    if IS_TINY or torch.cuda.device_count() > 1:
        words = "-m torch.distributed.run --standalone --nproc_per_node=2 train.py".split()
        words += ["--data", folder, "--out", WORK / "two", *device, "--steps", 20, *tiny]
        row("two processes", program, "two", *words)


@torch.no_grad()
def sampling():
    """Compare eps on the device with float32 in torch on the CPU, and time Algorithm 2."""
    exact, diffusion, _ = train.load(WORK / "run")
    x0 = from_pixels(torch.from_numpy(demo_images()[:64]))
    x0 = torch.nn.functional.interpolate(x0, SIZE)
    random = torch.Generator().manual_seed(0)

    def open_network(name):
        is_torch = name == "torch"
        return TorchNetwork(WORK / "run", DEVICE.type) if is_torch else Network(WORK / name, ONNX)

    def errors(name):
        network, cells = open_network(name), []
        for t in (0, 10, 100, 500, 999):
            times = torch.full((64,), t)
            x_t = diffusion.q_sample(x0, times, torch.randn(x0.shape, generator=random))
            eps = network(x_t.to(DEVICE) if name == "torch" else x_t.numpy(), t)
            expected = exact(x_t, times)
            cells.append(f"{(torch.as_tensor(eps).cpu() - expected).norm() / expected.norm():.1e}")
        return " | ".join(cells)

    def loop(name, batch):
        network = open_network(name)
        chain = network.reverse(network, noise_of(0, 0, batch, network.shape))
        ms = 1000 * min(compare.clock(functools.partial(next, chain)) for _ in range(3))
        return f"{ms:.2f} | {ms * 1000 * -(-50_000 // batch) / 3.6e6:.2f}"

    names = ["torch", *(path.name for path in FILES if ONNX == "cuda" or IS_TINY)]  # otherwise slow
    head("relative error of eps at t =", *"0 10 100 500 999".split())
    for name in names:
        row(name, errors, name)
    head("a step of Algorithm 2", "ms", "hours for 50,000 images in 1000 steps")
    for name, batch in [("torch", 512), *((name, 64) for name in names)]:
        row(f"{name}, batch {batch}", loop, name, batch)


PARTS = card, gradients, steps, programs, sampling


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny network, on any machine")
    parser.add_argument("--minutes", type=float, default=8, help="total time [%(default)s]")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # how it calls itself
    args = parser.parse_args()
    if args.part:
        return globals()[args.part]()
    if not IS_CUDA and not IS_TINY:
        parser.error("torch finds no CUDA here; --tiny tries every part on a CPU")
    if OUT.exists():
        parser.error(f"{OUT} exists; rename or remove it")
    WORK.mkdir(parents=True)
    end = time.time() + 60 * args.minutes
    environment = os.environ | {"GPU_REPORT_END": str(end)}
    for part in PARTS:
        say(f"\n## {part.__name__}")
        words = [sys.executable, __file__, *sys.argv[1:], "--part", part.__name__]
        try:
            with open(OUT / "errors.txt", "a") as errors:
                limit = max(0, end - time.time()) + 20
                subprocess.run(words, stderr=errors, env=environment, timeout=limit, check=True)
        except subprocess.SubprocessError as error:
            say(f"failed: {error}")
    shutil.rmtree(WORK)
    sys.exit("failed: " in (OUT / "report.md").read_text())


if __name__ == "__main__":
    main()
