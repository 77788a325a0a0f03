"""Climb from the paper's recipe to --quick, one change at a time, and measure each rung.

    python benchmarks/ladder.py v --data fashion-mnist         # train a rung, draw, and measure
    python benchmarks/ladder.py v --data fashion-mnist --steps 10000 --seed 1
    python benchmarks/ladder.py paper --data fashion-mnist --sampler ddpm --sampling-steps 1000
    python benchmarks/ladder.py paper --data fashion-mnist --sampler bound --samples 128 --sets 1
    python benchmarks/ladder.py included --sampler ddim        # the network of the page
    python benchmarks/ladder.py                                # the tables, and ladder.png

A rung is `train.py --quick --no-flip` on fashion-mnist/train, with the flags below. The images are
named as frechet.py describes, or lie in a sub-folder for each class. An interrupted training
resumes. Each set of samples is a row of benchmarks/ladder.csv and is drawn only once. The bound of
--samples test images is a row, too. With OMP_NUM_THREADS=1, the program uses one core, so that two
rungs can be trained at a time.
"""

import argparse
import contextlib
import csv
import io
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import onnxruntime
import torch
from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import frechet  # noqa: E402

import ddpm_numpy  # noqa: E402
import export  # noqa: E402
from ddpm import Diffusion  # noqa: E402
from images import from_pixels, to_pixels  # noqa: E402
from samplers import SAMPLERS  # noqa: E402
from support.trained import load  # noqa: E402

ADAM = "--optimizer adam --lr 1e-3 --no-lr-decay"
RUNGS = {  # flags in place of those of --quick
    "paper": f"--predicts eps --weighting simple {ADAM}",
    "v": f"--weighting simple {ADAM}",
    "min-snr": ADAM,
    "muon": "--no-lr-decay",
    "quick": "",
    "labels": "--classes",
    # the paper's Table 2, of which "paper" is a row, too
    "mean-vlb": f"--predicts mean --weighting vlb {ADAM}",
    "mean-native": f"--predicts mean --weighting native {ADAM}",
    "eps-vlb": f"--predicts eps --weighting vlb {ADAM}",
}
INCLUDED = HERE.parent / "page" / "fashion-mnist.onnx"  # --quick --classes --steps 13000
LONG = 10_000
WAY = "sampler", "sampling_steps", "variance", "clip", "guidance"
COLUMNS = "rung", "seed", "steps", *WAY, "samples", "set", "distance", "recognised", "bits"


def short(rung):
    """Return the steps of eight minutes on two cores: with Muon, a step takes 1.1 times as long."""
    return 1650 if ADAM in RUNGS[rung] else 1500


def train(args, out):
    """Train a rung in a process of its own, or resume it; nothing happens if it is finished."""
    flags = f"--quick --no-flip --warmup 75 --preview-every 2500 {RUNGS[args.rung]}".split()
    flags += ["--steps", args.steps, "--seed", args.seed, "--out", out]
    command = [sys.executable, HERE.parent / "train.py", "--data", args.data / "train", *flags]
    subprocess.run(list(map(str, command)), check=True)


def open_network(run, args):
    """Return the Network of a run or of an ONNX file, with the variance of args."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = run if run.suffix == ".onnx" else Path(folder, "model.onnx")
        if path != run:
            export.write_onnx(load(run), path)
        network = ddpm_numpy.Network(path, "cpu", options)
    network.variance = args.variance
    return network


def draw(network, args, number):
    """Return set `number` of samples, uint8 (samples, 1, 32, 32), of the classes in turn."""
    how = dict(sampler=args.sampler, steps=args.sampling_steps, clip=args.clip)
    first, pixels = number * args.samples, []
    for k in range(first, first + args.samples, 50):
        x0 = ddpm_numpy.sample(network, 50, guidance=args.guidance, first=k, **how)
        pixels.append(torch.from_numpy(to_pixels(x0)))
    return torch.cat(pixels)


def judge(network, ruler, args, number):
    """Return the columns of the table that describe set `number` of samples."""
    pixels = draw(network, args, number)
    found = {"distance": f"{ruler.distance(pixels):.2f}"}
    if network.classes:
        labels = ddpm_numpy.class_labels(ruler.names, network.classes, args.samples)
        found["recognised"] = f"{frechet.share_recognised(ruler.model, pixels, labels):.3f}"
    return found


def bound(trained, args):
    """Return the bound of --samples test images, evenly spread, in bits per dimension."""
    images = frechet.read(args.data / "test")
    images = images[:: len(images) // args.samples][: args.samples]
    diffusion = Diffusion(trained.diffusion.betas, args.variance)
    random = torch.Generator().manual_seed(0)
    bounds = [diffusion.vlb(trained.eps, from_pixels(x), random).total for x in images.split(64)]
    return {"bits": f"{torch.cat(bounds).mean():.3f}"}


def read_rows(path):
    """Return the rows of the table as dictionaries; begin the table if there is none."""
    if not path.exists():
        path.write_text(",".join(COLUMNS) + "\n")
    with open(path, newline="") as file:
        return [*csv.DictReader(file)]


def measure(args):
    """Train a rung, and append a row for each set of samples that is not in the table."""
    is_run = args.rung != "included"
    out = args.runs / f"{args.rung}-{args.seed}-{args.steps}" if is_run else INCLUDED
    key = {name: str(getattr(args, name)) for name in COLUMNS[: 4 + len(WAY)]}
    wanted = [key | {"set": str(k)} for k in range(args.sets)]
    have = [{name: row[name] for name in wanted[0]} for row in read_rows(args.table)]
    if missing := [row for row in wanted if row not in have]:
        if is_run:
            train(args, out)
        is_bound = args.sampler == "bound"
        network, ruler = (None, None) if is_bound else (open_network(out, args), frechet.Ruler())
        for row in missing:
            number = int(row["set"])
            row |= bound(load(out), args) if is_bound else judge(network, ruler, args, number)
            print(row, flush=True)
            with open(args.table, "a", newline="") as file:
                csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)


def arguments():
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("rung", nargs="?", choices=[*RUNGS, "included"], help="what to train and measure")
    flag("--data", type=Path, help="the folder of Fashion-MNIST, with train and test")
    flag("--runs", type=Path, default=Path("ladder"), help="folder of the runs [%(default)s]")
    flag("--table", type=Path, default=HERE / "ladder.csv", help="[benchmarks/ladder.csv]")
    flag("--steps", type=int, help="training steps [1650, with Muon 1500]")
    flag("--seed", type=int, default=0, help="seed of the training [%(default)s]")
    flag("--sampler", default="sa-solver", choices=[*SAMPLERS, "bound"], help="[%(default)s]")
    flag("--sampling-steps", type=int, default=10, help="[%(default)s]")
    flag("--variance", default="large", choices=("large", "small"), help="[%(default)s]")
    flag("--clip", default=True, action=argparse.BooleanOptionalAction, help="clip x0_hat")
    flag("--guidance", type=float, default=0.0, help="[%(default)s]")
    flag("--samples", type=int, default=1000, help="per set, a multiple of 50 [%(default)s]")
    flag("--sets", type=int, default=3, help="sets of samples [%(default)s]")
    args = parser.parse_args()
    if args.rung == "included":
        args.steps = 13_000
    elif args.rung:
        args.steps = args.steps or short(args.rung)
        if not args.data:
            parser.error("a rung needs --data")
    return args


# ------------------------------------------------------------------------------ tables and figure

MEANING = {
    "paper": "the paper's: eps, (14), Adam with a learning rate of 1e-3, no labels",
    "v": "the network predicts v",
    "min-snr": "weights min(SNR, 5) of the error of x0_hat",
    "muon": "Muon with a learning rate of 6e-3",
    "quick": "the learning rate falls to 0: `--quick`",
    "labels": "labels: `--quick --classes`",
}
WAYS = {  # ways to sample: the column's title, and the values in its rows
    "SA-Solver, 10": {"sampler": "sa-solver", "sampling_steps": "10"},
    "SA-Solver, 50": {"sampler": "sa-solver", "sampling_steps": "50"},
    "DDIM, 10": {"sampler": "ddim", "sampling_steps": "10"},
    "DDIM, 50": {"sampler": "ddim", "sampling_steps": "50"},
    "Algorithm 2, 1000": {"sampler": "ddpm", "sampling_steps": "1000"},
}
PLAIN = {"variance": "large", "clip": "True", "guidance": "0.0", "samples": "1000"}


def distances(rows, rung, steps, **way):
    """Return {seed: the distances of its sets} of a rung, from the rows of the table."""
    wanted, found = {"rung": rung, "steps": str(steps)} | PLAIN | way, {}
    for row in rows:
        if all(row[name] == value for name, value in wanted.items()):
            found.setdefault(row["seed"], []).append(float(row["distance"]))
    return found


def cell(found):
    """Return "mean ± standard deviation" of the seeds' means or, of a single seed, of its sets."""
    values = [statistics.mean(sets) for sets in found.values()]
    values = next(iter(found.values())) if len(values) == 1 else values
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def in_markdown(head, lines, labels=1):
    """Return a table in Markdown, without empty rows and columns. labels: the columns that lead."""
    lines = [line for line in lines if any(line[labels:])]
    kept = [k for k in range(len(head)) if any(line[k] for line in lines)]
    lines = [[line[k] or "-" for k in kept] for line in lines]
    lines = [[head[k] for k in kept], ["---"] * len(kept), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def table(rows, steps_of):
    """Return the ladder in Markdown. steps_of: a function of the rung."""
    lines = [
        [meaning, f"{steps_of(rung):,}",
         *(cell(distances(rows, rung, steps_of(rung), **way)) for way in WAYS.values())]
        for rung, meaning in MEANING.items()
    ]  # fmt: skip
    return in_markdown(["what changes", "steps", *WAYS], lines, labels=2)


def samplers(rows, rung, steps):
    """Return the distances of a network by each sampler and number of its steps, in Markdown."""
    counts = "5", "10", "20", "50", "1000"
    names = {
        "Algorithm 2, large variance": {"sampler": "ddpm"},
        "Algorithm 2, small variance": {"sampler": "ddpm", "variance": "small"},
        "DDIM": {"sampler": "ddim"},
        "SA-Solver": {"sampler": "sa-solver"},
    }
    lines = [
        [name, *(cell(distances(rows, rung, steps, **way, sampling_steps=n)) for n in counts)]
        for name, way in names.items()
    ]
    return in_markdown(["steps", *counts], lines)


def guidance(rows):
    """Return the distances of the included network for several w, in Markdown."""
    lines = []
    for w in "0.0", "1.0", "2.0", "4.0", "6.0":
        way = WAYS["SA-Solver, 10"] | {"guidance": w, "rung": "included", "set": "0"}
        (row,) = (r for r in rows if all(r[name] == value for name, value in way.items()))
        lines.append([w.removesuffix(".0"), row["distance"], f"{float(row['recognised']):.1%}"])
    return in_markdown(["w", "Fréchet distance", "recognised"], lines)


def table_2(rows):
    """Return the rows of the paper's Table 2 for Fashion-MNIST after short runs, in Markdown."""
    meaning = {
        "mean-vlb": ("the mean", "the bound, (8)", "13.22"),
        "mean-native": ("the mean", "(8) without its factor", "unstable"),
        "eps-vlb": ("the noise", "the bound, (12)", "13.51"),
        "paper": ("the noise", "(14)", "3.17"),
    }
    lines = []
    for rung, words in meaning.items():
        ways = ({"variance": variance, "samples": "100"} for variance in ("large", "small"))
        found = [distances(rows, rung, short(rung), **WAYS["Algorithm 2, 1000"] | w) for w in ways]
        lines.append([*words, *(", ".join(f"{d[0]:.0f}" for d in f.values()) for f in found)])
    head = "the network predicts", "loss", "paper, CIFAR-10: FID"
    return in_markdown([*head, "here, large variance", "here, small variance"], lines, labels=3)


def save_figure(rows, path):
    """Draw the distance in 10 steps of SA-Solver against the training steps, a line for a rung."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for rung in MEANING:
        points = [
            (steps, statistics.mean(sets))
            for steps in (short(rung), LONG, 20_000)
            for sets in distances(rows, rung, steps, **WAYS["SA-Solver, 10"]).values()
        ]
        steps = sorted({n for n, _ in points})
        means = [statistics.mean(value for n, value in points if n == at) for at in steps]
        (line,) = axes.plot(steps, means, label=rung)
        axes.plot(*zip(*points, strict=True), ".", color=line.get_color())
    axes.set(xlabel="training steps of 64 images", ylabel="Fréchet distance")
    axes.set(xscale="log", yscale="log")
    axes.minorticks_off()
    axes.set_xticks([1500, 5000, 10_000, 20_000], ["1,500", "5,000", "10,000", "20,000"])
    axes.set_yticks([5, 10, 20, 50], ["5", "10", "20", "50"])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)


def main():
    args = arguments()
    if args.rung:
        return measure(args)
    rows = read_rows(args.table)
    tables = table(rows, short), table(rows, lambda _: LONG), samplers(rows, "paper", 20_000)
    print(*tables, samplers(rows, "included", 13_000), guidance(rows), table_2(rows), sep="\n\n")
    save_figure(rows, HERE / "ladder.png")


if __name__ == "__main__":
    main()
