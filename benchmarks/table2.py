"""Measure a toy analogue of the paper's Table 2: what is predicted, and how the loss is weighted.

    python benchmarks/table2.py            # writes benchmarks/TABLE2.md
    python benchmarks/table2.py --judge run    # counts the correct samples of one run of the demo

Each row is trained as `python train.py` trains the demo, with three seeds. Its numbers cannot be
compared with the paper's, which are FIDs on CIFAR-10.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))


import train  # noqa: E402
from images import from_pixels, grid, save_image, to_pixels  # noqa: E402
from support.demo import are_right, demo_images  # noqa: E402
from support.trained import load  # noqa: E402

ROWS = [
    ("mean", "vlb"), ("mean", "native"), ("eps", "vlb"), ("eps", "simple"), ("eps", "min-snr"),
    ("x0", "vlb"), ("x0", "simple"), ("x0", "native"),
    ("v", "vlb"), ("v", "simple"), ("v", "native"), ("v", "min-snr"),
]  # fmt: skip
SAMPLES = 64


def judge(run):
    """Return how many of a run's SAMPLES are right, and its bound in bits per dimension."""
    trained, images = load(run), torch.from_numpy(demo_images())
    x0 = trained.diffusion.sample(
        trained.eps, (SAMPLES, 3, 8, 8), generator=torch.Generator().manual_seed(0)
    )
    pixels = to_pixels(x0.numpy())
    random = torch.Generator().manual_seed(0)
    bound = trained.diffusion.vlb(trained.eps, from_pixels(images), random)
    save_image(Path(run, "samples.png"), grid(pixels))
    return {"right": int(are_right(pixels).sum()), "bits": bound.total.mean().item()}


def train_and_judge(predicts, weighting, seed, folder, threads, steps):
    """Train in a process of its own. Return judge's answer, or None if the loss diverged."""
    run = Path(folder, f"{predicts}-{weighting}-{seed}")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    flags = ["--predicts", predicts, "--weighting", weighting, "--seed", seed, "--out", run]
    flags += ["--preview-every", 10**6] + (["--steps", steps] if steps else [])
    quiet = {"capture_output": True, "text": True, "env": environment}
    command = [sys.executable, HERE.parent / "train.py", *flags]
    done = subprocess.run([str(word) for word in command], **quiet)
    if done.returncode:
        print(done.stderr.splitlines()[-1], flush=True)
        return None
    command = [sys.executable, __file__, "--judge", str(run)]
    answer = json.loads(subprocess.run(command, check=True, **quiet).stdout.splitlines()[-1])
    print(run.name, answer, flush=True)
    return answer


def table(answers, args, minutes):
    """Return the page, in Markdown. answers: {(predicts, weighting): those of its seeds}."""
    steps, version = args.steps or train.DEMO["steps"], torch.__version__.split("+")[0]
    lines = [
        "# A toy analogue of the paper's Table 2\n",
        "The networks are trained on the 216 images of the demo, and judged by how many of their "
        "samples are correct. The paper's table has FIDs on CIFAR-10, so the numbers cannot be "
        "compared with it.\n",
        f"`python benchmarks/table2.py --jobs {args.jobs}`, {time.strftime('%Y-%m-%d')}, "
        f"{args.seeds} seeds per row, {steps:,} steps each, torch {version}, "
        f"Python {platform.python_version()}, {minutes:.0f} minutes.\n",
        f"| the network predicts | the loss is weighted | correct out of {SAMPLES} samples | "
        "bound, bits per dimension |",
        "| --- | --- | --- | --- |",
    ]
    for (predicts, weighting), runs in answers.items():
        good = [run for run in runs if run]
        right = ", ".join(str(run["right"]) if run else "diverged" for run in runs)
        bits = ", ".join(f"{run['bits']:.2f}" for run in good)
        mean = f" (mean {statistics.mean(run['bits'] for run in good):.2f})" if good else ""
        lines.append(f"| {predicts} | {weighting} | {right} | {bits}{mean} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="[3]")
    parser.add_argument("--steps", type=int, help="training steps per run [as in the demo]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time [1]")
    parser.add_argument("--keep", type=Path, help="a folder for the runs [a temporary one]")
    parser.add_argument("--out", default=str(HERE / "TABLE2.md"), help="[benchmarks/TABLE2.md]")
    parser.add_argument("--judge", metavar="RUN", help="only count the correct samples of a run")
    args = parser.parse_args()
    if args.judge:
        return print(json.dumps(judge(args.judge)))

    threads = max(1, torch.get_num_threads() // args.jobs)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(args.jobs) as pool:
        folder = args.keep or temporary
        futures = {
            row: [
                pool.submit(train_and_judge, *row, seed, folder, threads, args.steps)
                for seed in range(args.seeds)
            ]
            for row in ROWS
        }
        answers = {}
        for row in ROWS:  # the table is written after each, because a later one may fail
            answers[row] = [future.result() for future in futures[row]]
            text = table(answers, args, (time.monotonic() - began) / 60)
            Path(args.out).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
