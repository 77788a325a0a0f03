"""Climb from the paper's recipe to --quick, and measure each rung.

    python benchmarks/ladder.py v --data fashion-mnist --seed 1    # train a rung, and measure it
    python benchmarks/ladder.py paper --data fashion-mnist --sampler ddpm --sampling-steps 1000
    python benchmarks/ladder.py page/fashion-mnist.onnx --sampling-steps 10 --sets 3
    python benchmarks/ladder.py                                # the tables

A rung is trained with --quick --no-flip --no-amp and its flags in RUNGS on DATA/train, which has a
sub-folder for each class. An interrupted run resumes. Each set of samples is a row of
benchmarks/ladder.csv and is drawn only once. With OMP_NUM_THREADS=1, the program uses one core.
"""

import argparse
import csv
import itertools
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
from run import load  # noqa: E402
from sample import SAMPLERS, Network, sample, to_pixels  # noqa: E402
from train import main as train  # noqa: E402

ADAM = {"parts": (), "lr": 1e-3}
RUNGS = {  # flags that replace some of --quick, and what they change
    "paper": (ADAM, "the paper's: eps, (14), Adam with a learning rate of 1e-3"),
    "v": ({"parts": ("v",), "lr": 1e-3}, "the network predicts v"),
    "muon": ({}, "Muon with a learning rate of 6e-3"),
    "labels": ({"classes": True}, "labels"),
}
SHORT, LONG = 1500, 10_000  # training steps
INCLUDED = "fashion-mnist.onnx"
WAY = "sampler", "sampling_steps", "variance", "guidance", "samples"
COLUMNS = "rung", "seed", "steps", *WAY, "set", "distance", "recognised"


def open_network(args):
    """Return the Network of a model.onnx or of a rung, which is trained, or resumed, first."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    if args.rung.endswith(".onnx"):
        return Network(args.rung, "cpu", options)
    out = f"ladder/{args.rung}-{args.seed}-{args.steps}"
    flags = dict(quick=True, flip=False, amp=False, warmup=75, preview_every=2500)
    flags |= dict(steps=args.steps, seed=args.seed, data=os.path.abspath(f"{args.data}/train"))
    train(flags | RUNGS[args.rung][0] | {"out": out})
    network, diffusion, state = load(out)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        onnx.save(to_onnx(network, diffusion, state["shape"], state["names"]), path)
        return Network(path, "cpu", options)


def judge(network, ruler, row):
    """Draw the set of samples of a row, and return its distance and the share recognised."""
    n, first, pixels = int(row["samples"]), int(row["set"]) * int(row["samples"]), []
    how = {"sampler": row["sampler"], "steps": int(row["sampling_steps"])}
    network.variance = row["variance"]
    for k in range(first, first + n, 50):
        x0 = sample(network, 50, guidance=float(row["guidance"]), first=k, **how)
        pixels.append(torch.from_numpy(to_pixels(x0)))
    pixels, recognised = torch.cat(pixels), ""
    if names := network.classes:
        labels = [ruler.names.index(names[k % len(names)]) for k in range(first, first + n)]
        share = frechet.share_recognised(ruler.model, pixels, torch.tensor(labels))
        recognised = f"{share:.3f}"
    return {"distance": f"{ruler.distance(pixels):.2f}", "recognised": recognised}


def read_rows(path):
    """Return the rows of the table as dictionaries; begin the table if there is none."""
    if not path.exists():
        path.write_text(",".join(COLUMNS) + "\n")
    with open(path, newline="") as file:
        return [*csv.DictReader(file)]


def measure(args):
    """Append a row for each set of samples that is not in the table."""
    key = {name: str(getattr(args, name)) for name in ("seed", "steps", *WAY)}
    key["rung"] = Path(args.rung).name
    counts = itertools.product(map(str, args.sampling_steps), map(str, range(args.sets)))
    wanted = [key | {"sampling_steps": n, "set": k} for n, k in counts]
    have = [{name: row[name] for name in wanted[0]} for row in read_rows(args.table)]
    if missing := [row for row in wanted if row not in have]:
        network, ruler = open_network(args), frechet.Ruler()
        for row in missing:
            row |= judge(network, ruler, row)
            print(*(row[name] for name in COLUMNS), flush=True)
            with open(args.table, "a", newline="") as file:
                csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)


WAYS = {  # ways to sample: the column's title, and the values in its rows
    "DPM-Solver++, 10": {"sampler": "dpm-solver++", "sampling_steps": "10"},
    "DPM-Solver++, 50": {"sampler": "dpm-solver++", "sampling_steps": "50"},
    "Algorithm 2, 1000": {"sampler": "ddpm", "sampling_steps": "1000"},
}
PLAIN = {"variance": "large", "guidance": "0.0", "samples": "1000"}


def select(rows, rung, steps="", **way):
    """Return the rows of a rung or a model.onnx that were sampled in this way."""
    wanted = {"rung": rung, "steps": str(steps)} | PLAIN | way
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def cell(rows, column="distance", scale=1):
    """Return the mean ± standard deviation of a file's sets, or ± standard error of the seeds."""
    values = [scale * float(row[column]) for row in rows if not row["seed"] or row["set"] == "0"]
    divisor = len(values) ** 0.5 if rows and rows[0]["seed"] else 1
    spread = f" ± {statistics.stdev(values) / divisor:.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}" if values else ""


def in_markdown(head, lines):
    """Return a Markdown table without empty rows and columns."""
    lines = [line for line in lines if any(line[1:])]
    kept = [k for k in range(len(head)) if any(line[k] for line in lines)]
    lines = [[line[k] or "-" for k in kept] for line in lines]
    lines = lines and [[head[k] for k in kept], ["---"] * len(kept), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def table(rows, steps):
    """Return the ladder after a number of training steps, in Markdown."""
    lines = [
        [meaning, *(cell(select(rows, rung, steps, **way)) for way in WAYS.values())]
        for rung, (_, meaning) in RUNGS.items()
    ]
    return in_markdown(["what changes", *WAYS], lines)


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
    ]
    return in_markdown(["steps", *counts], lines)


def guidance(rows, name):
    """Return the distances and the shares recognised of a model.onnx for each w, in Markdown."""
    lines = []
    for w in 0, 1, 2, 4, 6:
        found = select(rows, name, **WAYS["DPM-Solver++, 10"], guidance=f"{w}.0")
        lines.append([str(w), cell(found), cell(found, "recognised", 100)])
    return in_markdown(["w", "Fréchet distance", "recognised, %"], lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("rung", nargs="?", help=f"{', '.join(RUNGS)}, or a model.onnx")
    flag("--data", help="the folder of Fashion-MNIST, with train; a rung needs it")
    flag("--table", type=Path, default=HERE / "ladder.csv", help="[benchmarks/ladder.csv]")
    flag("--steps", type=int, default=SHORT, help="training steps [%(default)s]")
    flag("--seed", type=int, default=0, help="seed of the training [%(default)s]")
    flag("--sampler", default="dpm-solver++", choices=SAMPLERS, help="[%(default)s]")
    flag("--sampling-steps", type=int, nargs="+", default=[10, 50], help="[10 50]")
    flag("--variance", default="large", choices=("large", "small"), help="[%(default)s]")
    flag("--guidance", type=float, default=0.0, help="[%(default)s]")
    flag("--samples", type=int, default=1000, help="per set, a multiple of 50 [%(default)s]")
    flag("--sets", type=int, default=1, help="sets of samples [%(default)s]")
    args = parser.parse_args()
    if not args.rung:
        rows = read_rows(args.table)
        tables = table(rows, SHORT), table(rows, LONG), samplers(rows, "paper.onnx")
        tables += samplers(rows, INCLUDED), guidance(rows, INCLUDED)
        return print(*filter(None, tables), sep="\n\n")
    if args.rung.endswith(".onnx"):
        args.seed = args.steps = ""
    elif args.rung not in RUNGS or not args.data:
        parser.error(f"{args.rung} is not a rung, or --data is missing")
    measure(args)


if __name__ == "__main__":
    main()
