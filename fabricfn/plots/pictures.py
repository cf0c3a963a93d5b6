"""Curves as a picture, by matplotlib: the only file that names it."""

import os
from collections.abc import Mapping, Sequence

from fabricfn.errors import ConfigurationError
from fabricfn.plots.logs import Curve

WIDTH, HEIGHT = 5.0, 3.2
"""Inches of one name's plot."""


def draw(curves: Mapping[str, Sequence[Curve]], path: str, log: bool) -> None:
    """Write a picture: a plot for each name, up to three beside one another.

    Args:
        curves: name -> its curve in each run.
        path: its ending says the format: .png, .svg, .pdf.
        log: vertical axes are logarithmic.

    Raises:
        ConfigurationError: matplotlib is not installed, or does not know the format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigurationError(
            "pictures are drawn by matplotlib: pip install 'fabricfn[plot]'. Without -o the curves are drawn as text."
        ) from None
    across = min(3, len(curves))
    down = -(-len(curves) // across)
    figure = Figure(figsize=(WIDTH * across, HEIGHT * down), layout="constrained")
    known = figure.canvas.get_supported_filetypes()
    if os.path.splitext(path)[1].removeprefix(".").lower() not in known:
        raise ConfigurationError(f"{path}: the ending says the format; write one of {', '.join(sorted(known))}.")
    runs = list(dict.fromkeys(curve.run for row in curves.values() for curve in row))
    for number, (name, row) in enumerate(curves.items(), 1):
        axes = figure.add_subplot(down, across, number)
        for curve in row:
            dot = "." if len(curve.steps) == 1 else ""
            axes.plot(curve.steps, curve.values, dot, color=f"C{runs.index(curve.run) % 10}", label=curve.run)
        axes.set_title(name)
        axes.set_xlabel("step")
        axes.set_yscale("log" if log else "linear")
        axes.grid(alpha=0.3)
        if len(runs) > 1:
            axes.legend()
    figure.savefig(path)
