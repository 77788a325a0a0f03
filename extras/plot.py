"""Draw the loss of a run against the step, averaged within each of up to 200 intervals.

python -m extras.plot run/log.csv run/loss.png
"""

import argparse
import sys
import warnings

import numpy as np
from matplotlib.figure import Figure

from sample import check_output


def save_plot(path, x, y, x_label, y_label, log=False):
    """Save a curve as a PNG. log: whether the y axis is logarithmic."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(x, y)
    axes.set(xlabel=x_label, ylabel=y_label, yscale="log" if log else "linear")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100, format="png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("log", help="log.csv of a run")
    parser.add_argument("out", nargs="?", default="loss.png", help="a PNG file [%(default)s]")
    args = parser.parse_args()
    check_output(args.out, args.log)
    try:
        with warnings.catch_warnings(action="error"):  # loadtxt warns if there is no row
            table = np.loadtxt(args.log, delimiter=",", skiprows=1, usecols=(0, 1), ndmin=2)
        parts = np.array_split(table, min(200, len(table)))
    except (OSError, ValueError, UserWarning) as error:
        sys.exit(f"plot.py: {args.log} can't be read: {error}")
    save_plot(args.out, *np.transpose([part.mean(0) for part in parts]), "step", "loss", log=True)
    print(f"{args.out}: the loss of {len(table):,} steps")


if __name__ == "__main__":
    main()
