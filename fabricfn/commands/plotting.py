"""`fabricfn plot LOGS ...`: curves of one or several runs."""

import argparse
import os
import shutil
import sys
from typing import Any

from fabricfn.plots import logs, pictures, terminal


def add(commands: Any) -> None:
    """The options."""
    parser = commands.add_parser(
        "plot",
        help="curves of one or several runs, in the terminal or as a picture",
        description="Draw what ff.loggers.csv and ff.loggers.jsonl wrote: in the terminal, or with -o as a picture, for"
        " which matplotlib is needed (pip install 'fabricfn[plot]'). torch is not imported.",
    )
    parser.add_argument("logs", nargs="+", metavar="LOGS", help="metrics.csv, metrics.jsonl, or folders above them")
    parser.add_argument("--only", action="append", metavar="PATTERN", help='"train/*"; may be repeated')
    parser.add_argument("-o", "--output", metavar="FILE", help="a picture: curves.png, curves.svg, curves.pdf")
    parser.add_argument("--log", action="store_true", help="logarithmic vertical axes")
    parser.add_argument("--height", type=int, default=12, metavar="N", help="lines of each plot in the terminal (12)")
    parser.add_argument("--ascii", action="store_true", help="no braille dots in the terminal, but letters")
    parser.set_defaults(act=act)


def act(chosen: argparse.Namespace) -> int:
    """Draw."""
    found = logs.curves_of(chosen.logs, chosen.only or ())
    if chosen.output:
        pictures.draw(found, chosen.output, chosen.log)
        print(chosen.output)
        return 0
    width, height = shutil.get_terminal_size().columns, max(2, chosen.height)
    braille = not chosen.ascii and (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for number, row in enumerate(found.values()):
        shown = terminal.drawn(row, width=width, height=height, log=chosen.log, braille=braille, colours=colours)
        print("\n" * bool(number) + shown)
    return 0
