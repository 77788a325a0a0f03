"""Measure what each part of --quick gains, by runs without it.

    python benchmarks/ladder.py quick --data fashion-mnist --seed 1    # train and measure an arm
    python benchmarks/ladder.py page/fashion-mnist.onnx --samples 1000 --sets 3
    python benchmarks/ladder.py                                        # the tables

An arm is trained with --quick --classes --no-flip and its flags in ARMS on DATA/train, which has a
sub-folder for each class; an interrupted run resumes. Each set of samples is a row of
benchmarks/ladder.csv and is sampled only once. With OMP_NUM_THREADS=1, the program uses one core.

The distance is measured by frechet.py, whose ruler for Fashion-MNIST is used unless DATA has its
own ruler.npz. All arms share the noise of their samples, and the intervals hold for this noise. A
run is a seed; give each run a seed that no other arm has, because equal seeds share images and
noise in training. The distances of the runs of an arm are combined as the mean of their logarithms,
whose variance is assumed to be the same for all arms of a table and pooled over them. From it
follow the intervals of the changes, which contain the true change with a probability of 95% if the
logarithms are normal. With fewer than three degrees of freedom, no interval is given.
"""

import argparse
import csv
import itertools
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path

import onnx
import onnxruntime
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from benchmarks import frechet  # noqa: E402
from export import to_onnx  # noqa: E402
from run import QUICK, load  # noqa: E402
from sample import SAMPLERS, Network, sample, to_pixels  # noqa: E402
from train import main as train  # noqa: E402

# The network of nearly as many parameters without patches, and the steps it takes in the same time
PIXELS = {"patch_size": 1, "base_channels": 16, "channel_mults": (1, 2, 4, 4), "steps": 1500}
PAPER = PIXELS | {"parts": (), "lr": 1e-3, "cooldown": 0.0}
ADAM = {"parts": ("v", "weights")}
ARMS = {  # their names in the tables, and the flags that replace some of --quick
    "paper": ("the paper's recipe", PAPER),
    "quick": ("`--quick`", {}),
    "without-v": ("`--quick` without v", {"parts": ("weights", "muon")}),
    "without-weights": ("`--quick` without the loss weights", {"parts": ("v", "muon")}),
    "without-muon": ("`--quick` with Adam at 1e-3", ADAM | {"lr": 1e-3}),
    "without-muon-2e-3": ("`--quick` with Adam at 2e-3", ADAM | {"lr": 2e-3}),
    "without-muon-4e-3": ("`--quick` with Adam at 4e-3", ADAM | {"lr": 4e-3}),
    "without-muon-6e-3": ("`--quick` with Adam at 6e-3", ADAM | {"lr": 6e-3}),
    "without-muon-1e-2": ("`--quick` with Adam at 1e-2", ADAM | {"lr": 1e-2}),
    "without-patches": ("`--quick` without patches", PIXELS),
    "without-cooldown": ("`--quick` without a cooldown", {"cooldown": 0.0}),
    "paper-2e-3": ("the paper's recipe at 2e-3", PAPER | {"lr": 2e-3}),
    "paper-4e-3": ("the paper's recipe at 4e-3", PAPER | {"lr": 4e-3}),
    "paper-v": ("the paper's recipe, and v", PAPER | {"parts": ("v",)}),
    "paper-weights": ("the paper's recipe, and the loss weights", PAPER | {"parts": ("weights",)}),
    "paper-muon": ("the paper's recipe, and Muon", PAPER | {"parts": ("muon",), "lr": 6e-3}),
    "paper-cooldown": ("the paper's recipe, and a cooldown", PAPER | {"cooldown": 0.25}),
}
INCLUDED = "fashion-mnist.onnx"
WAY = "sampler", "sampling_steps", "variance", "guidance", "samples"
COLUMNS = "rung", "data", "seed", "steps", *WAY, "set", "distance", "recognised", "variety"


def open_network(args):
    """Return the Network of a model.onnx or of an arm, which is trained, or resumed, first."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    if args.rung.endswith(".onnx"):
        return Network(args.rung, "cpu", options)
    out = f"ladder/{Path(args.data).name}-{args.rung}-{args.seed}-{args.steps}"
    flags = dict(quick=True, flip=False, classes=True) | ARMS[args.rung][1]
    flags |= dict(steps=args.steps, seed=args.seed, data=os.path.abspath(f"{args.data}/train"))
    if train(flags | {"out": out, "preview_every": args.steps}).step < args.steps:
        sys.exit("ladder.py: the training was stopped; the same command resumes it")
    network, diffusion, state = load(out)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        onnx.save(to_onnx(network, diffusion, state["shape"], state["names"]), path)
        return Network(path, "cpu", options)


def judge(network, ruler, row):
    """Generate the set of samples of a row, and measure them: the last three columns."""
    n, first, pixels = int(row["samples"]), int(row["set"]) * int(row["samples"]), []
    how = {"sampler": row["sampler"], "steps": int(row["sampling_steps"])}
    network.variance = row["variance"]
    for k in range(first, first + n, 50):
        count = min(50, first + n - k)
        x0 = sample(network, count, guidance=float(row["guidance"]), first=k, **how)
        pixels.append(torch.from_numpy(to_pixels(x0)))
    pixels, row = torch.cat(pixels), {}
    if pixels.shape[1] == 3:  # to greyscale, with Pillow's weights
        pixels = (pixels * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
        pixels = pixels.round().byte()
    if names := network.classes:
        labels = [ruler.names.index(names[k % len(names)]) for k in range(first, first + n)]
        share = frechet.share_recognised(ruler.model, pixels, labels := torch.tensor(labels))
        variety = frechet.variety(frechet.features_of(ruler.model, pixels), labels)
        row = {"recognised": f"{share:.3f}", "variety": f"{variety:.1f}"}
    return row | {"distance": f"{ruler.distance(pixels):.2f}"}


def read_rows(path):
    """Return the rows of the table as dictionaries; begin the table if there is none."""
    if not path.exists():
        path.write_text(",".join(COLUMNS) + "\n")
    with open(path, newline="") as file:
        return [*csv.DictReader(file)]


def measure(args):
    """Append a row for each set of samples that is not in the table."""
    key = {name: str(getattr(args, name)) for name in ("seed", "steps", *WAY)}
    key |= {"rung": Path(args.rung).name, "data": Path(args.data).name}
    counts = itertools.product(map(str, args.sampling_steps), map(str, range(args.sets)))
    wanted = [key | {"sampling_steps": n, "set": k} for n, k in counts]
    have = [{name: row[name] for name in wanted[0]} for row in read_rows(args.table)]
    if missing := [row for row in wanted if row not in have]:
        network, own = open_network(args), Path(args.data, "ruler.npz")
        ruler = frechet.Ruler(own if own.exists() else frechet.RULER)
        for row in missing:
            row |= judge(network, ruler, row)
            print(*row.values(), flush=True)
            with open(args.table, "a", newline="") as file:
                csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)


# -------------------------------------------------------------------------------------- the tables


FEW = {"sampler": "dpm-solver++", "sampling_steps": "10"}
USUAL = {"variance": "large", "guidance": "0.0", "samples": "1000"}


def select(rows, rung, **way):
    """Return the rows of an arm or a model.onnx that were sampled in this way."""
    wanted = {"rung": rung} | USUAL | way
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def in_markdown(head, lines):
    """Return a Markdown table without the columns that have only "-", or "" if it has no line."""
    kept = [k for k in range(len(head)) if any(line[k] != "-" for line in lines)]
    lines = lines and [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cells[k] for k in kept)} |" for cells in lines)


def student(degrees):
    """Return the 97.5% quantile of Student's t, to 1% from 3 degrees of freedom on.

    Abramowitz and Stegun 1964, 26.7.5.
    """
    z = statistics.NormalDist().inv_cdf(0.975)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


def gains(rows):
    """Return the distances of the arms, and their differences from --quick, in Markdown."""
    way, runs = FEW | {"samples": "5000", "data": "fashion-mnist"}, {}
    for arm in [arm for arm in ARMS if not arm.startswith("paper-")]:
        for row in select(rows, arm, steps=str(steps_of(arm)), **way):
            sets = runs.setdefault(arm, {}).setdefault(row["seed"], [])
            sets.append(math.log(float(row["distance"])))
    logs = {arm: [statistics.mean(sets) for sets in its.values()] for arm, its in runs.items()}
    means = {arm: statistics.mean(values) for arm, values in logs.items()}
    squares = [(x - means[arm]) ** 2 for arm, values in logs.items() for x in values]
    degrees, lines = len(squares) - len(logs), []
    for arm, values in logs.items():
        change = "-"
        if arm.startswith("without") and "quick" in logs and degrees > 2:
            variance = sum(squares) / degrees * (1 / len(values) + 1 / len(logs["quick"]))
            half, effect = student(degrees) * math.sqrt(variance), means[arm] - means["quick"]
            low, middle, high = (100 * math.expm1(effect + k * half) for k in (-1, 0, 1))
            change = f"{middle:+.0f}% ({low:+.0f} to {high:+.0f})"
        share = cell(select(rows, arm, steps=str(steps_of(arm)), **way), "recognised", 100)
        distance = f"{math.exp(means[arm]):.1f}"
        lines.append([ARMS[arm][0], str(len(values)), distance, change, share])
    head = ["recipe", "runs", "distance", "compared with `--quick` (95% interval)", "recognised, %"]
    return in_markdown(head, lines)


def few_steps(rows):
    """Return the distances of the paper's recipe with one part of --quick, in Markdown."""
    ways = {
        "Algorithm 2, small variance, 20 steps": {"sampler": "ddpm", "variance": "small"},
        "DPM-Solver++, 10 steps": FEW,
    }
    arms = [arm for arm in ARMS if arm.startswith("paper")] + ["quick"]
    found = [[select(rows, arm, **way) for way in ways.values()] for arm in arms]
    lines = [
        [ARMS[arm][0], str(len(of_arm[-1])), *map(cell, of_arm)]
        for arm, of_arm in zip(arms, found, strict=True)
    ]
    return in_markdown(["recipe", "runs", *ways], lines)


def sizes(rows):
    """Return the distances of --quick by the number of training images, in Markdown."""
    lines, way = [], FEW | {"samples": "5000", "steps": str(QUICK["steps"])}
    for n in (100, 300, 1000, 3000, 10_000, 60_000):
        data = "fashion-mnist" + f"-{n}" * (n < 60_000)
        found = select(rows, "quick", **way, data=data)
        lines.append([f"{n:,}", str(len(found)), cell(found), cell(found, "recognised", 100)])
    return in_markdown(["training images", "runs", "distance", "recognised, %"], lines)


def cell(rows, column="distance", scale=1):
    """Return mean ± standard deviation of the sets of samples."""
    values = [scale * float(row[column]) for row in rows]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}" if values else "-"


def samplers(rows, name):
    """Return the distances of a model.onnx by sampler and number of steps, in Markdown."""
    counts = "5", "10", "20", "50", "1000"
    names = {
        "Algorithm 2, large variance": {"sampler": "ddpm"},
        "Algorithm 2, small variance": {"sampler": "ddpm", "variance": "small"},
        "DDIM": {"sampler": "ddim"},
        "DPM-Solver++": {"sampler": "dpm-solver++"},
    }
    lines = [
        [title, *(cell(select(rows, name, **way, sampling_steps=n)) for n in counts)]
        for title, way in names.items()
        if select(rows, name, **way)
    ]
    return in_markdown(["steps", *counts], lines)


def guidance(rows, name):
    """Return distances, shares recognised and variety of a model.onnx for each w, in Markdown."""
    lines = []
    for w in 0, 1, 2, 4, 6:
        found = select(rows, name, **FEW, guidance=f"{w}.0")
        cells = cell(found), cell(found, "recognised", 100), cell(found, "variety")
        lines.append([str(w), *cells])
    return in_markdown(["w", "Fréchet distance", "recognised, %", "variety"], lines)


def steps_of(arm):
    """Return the number of training steps of an arm."""
    return ARMS[arm][1].get("steps", QUICK["steps"])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("rung", nargs="?", help=f"{', '.join(ARMS)} or a model.onnx")
    flag("--data", default="", help="a folder with train; an arm needs it")
    flag("--table", type=Path, default=HERE / "ladder.csv", help="[benchmarks/ladder.csv]")
    flag("--seed", type=int, default=0, help="seed of the training [%(default)s]")
    flag("--sampler", default="dpm-solver++", choices=SAMPLERS, help="[%(default)s]")
    flag("--sampling-steps", type=int, nargs="+", default=[10], help="[10]")
    flag("--variance", default="large", choices=("large", "small"), help="[%(default)s]")
    flag("--guidance", type=float, default=0.0, help="[%(default)s]")
    flag("--samples", type=int, default=5000, help="per set [%(default)s]")
    flag("--sets", type=int, default=1, help="sets of samples [%(default)s]")
    args = parser.parse_args()
    if not args.rung:
        rows = read_rows(args.table)
        of_files = samplers(rows, "paper.onnx"), samplers(rows, INCLUDED), guidance(rows, INCLUDED)
        return print(gains(rows), few_steps(rows), sizes(rows), *of_files, sep="\n\n")
    if args.rung.endswith(".onnx"):
        args.seed = args.steps = ""
    elif args.rung not in ARMS or not args.data:
        parser.error(f"{args.rung} is not an arm, or --data is missing")
    else:
        args.steps = steps_of(args.rung)
    measure(args)


if __name__ == "__main__":
    main()
