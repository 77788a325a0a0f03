"""Train for some minutes, and measure how good the samples are: a row of benchmarks/speedrun.md.

    python benchmarks/speedrun.py --data fashion-mnist                      # --quick --no-flip
    python benchmarks/speedrun.py --data fashion-mnist --seed 1 --lr 3e-3   # with flags of train.py

--data is that of frechet.py. The time is that of the whole command train.py, with the start, the
decoding and the previews. A copy of the checkpoint each minute shows when a distance was reached.
"""

import argparse
import contextlib
import io
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import compare  # noqa: E402
import frechet  # noqa: E402

import checkpoint  # noqa: E402
import export  # noqa: E402
import sample  # noqa: E402
from images import to_pixels  # noqa: E402

GOALS = 30, 10  # the distances of which the table says when they were reached


def train(data, flags, folder):
    """Run train.py; returns [(seconds, a copy of the checkpoint)], the last one of the end."""
    command = [sys.executable, HERE.parent / "train.py", "--data", data / "train", *flags]
    command += ["--out", folder / "run", "--save-minutes", "1"]
    began, copies = time.perf_counter(), []
    process = subprocess.Popen(list(map(str, command)))
    while process.poll() is None:
        time.sleep(0.2)
        seconds = time.perf_counter() - began
        if seconds > 60 * (len(copies) + 1) and (folder / "run" / "checkpoint.pt").exists():
            copies.append((seconds, folder / f"{seconds:.0f}.pt"))
            shutil.copy(folder / "run" / "checkpoint.pt", copies[-1][1])
    if process.returncode:
        sys.exit(process.returncode)
    return [*copies, (time.perf_counter() - began, folder / "run" / "checkpoint.pt")]


def distance(path, reference, steps, count):
    """Return the Frechet distance of samples of a checkpoint. reference: of frechet.reference."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        export.write_onnx(checkpoint.load(path), Path(folder, "model.onnx"))
        network = sample.Network(Path(folder, "model.onnx"), "cpu")
    pixels = []
    for first in range(0, count, 50):
        noise = sample.noise_of(0, first, (min(50, count - first), *network.shape))
        for _, _, x0 in sample.sample_progressive(
            network, noise, network.betas, network.variance, steps, "dpm"
        ):
            images = to_pixels(x0)
        pixels.append(torch.from_numpy(images))
    model, test, _ = reference
    return frechet.frechet_distance(frechet.statistics(model, torch.cat(pixels)), test)


def main():
    parser = argparse.ArgumentParser(
        usage="python benchmarks/speedrun.py --data fashion-mnist [flags of train.py]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with train and test")
    parser.add_argument("--samples", type=int, default=1000, help="[%(default)s]")
    args, flags = parser.parse_known_args()
    reference = frechet.reference(args.data)
    with tempfile.TemporaryDirectory() as folder:
        copies = train(args.data, ["--quick", "--no-flip", *flags], Path(folder))
        seconds, last = copies[-1]
        ten, fifty = (distance(last, reference, steps, args.samples) for steps in (10, 50))
        curve = [(at, distance(path, reference, 10, args.samples)) for at, path in copies[:-1]]
        curve.append((seconds, ten))
        step = checkpoint.read(last)["step"]
    reached = [next((f"{at:.0f} s" for at, d in curve if d <= goal), "-") for goal in GOALS]
    print("distance in 10 steps, by time:", *(f"{at:.0f} s: {d:.1f}," for at, d in curve))
    commit = subprocess.run(
        ["git", "-C", HERE, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    print("| date | seconds | steps | distance, 10 passes | 50 passes | to 30 | to 10 | flags | "
          "commit | machine |")  # fmt: skip
    row = [time.strftime("%Y-%m-%d"), f"{seconds:.0f}", f"{step:,}", f"{ten:.1f}", f"{fifty:.1f}"]
    row += [*reached, " ".join(flags), commit, compare.machine()]
    print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
