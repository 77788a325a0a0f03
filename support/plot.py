"""A curve as a PNG, if matplotlib is installed."""

from functools import cache

from images import replacing


@cache  # so that the message appears once
def figure_class():
    """Return matplotlib's Figure, or None, with one message, if it is missing."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("the curve is not drawn, because matplotlib is missing: pip install matplotlib")
        return None
    return Figure


def save_plot(path, x, y, x_label, y_label, log=False):
    """Save a curve as a PNG, if matplotlib is there. log: whether the y axis is logarithmic."""
    if figure_class() is None:
        return
    figure = figure_class()(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(x, y)
    axes.set(xlabel=x_label, ylabel=y_label, yscale="log" if log else "linear")
    axes.grid(alpha=0.3)
    with replacing(path) as file:
        figure.savefig(file, dpi=100, format="png")
