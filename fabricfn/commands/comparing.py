"""`fabricfn diff A B`."""

import argparse
from typing import Any

from fabricfn import checkpoint


def add(commands: Any) -> None:
    """The options."""
    parser = commands.add_parser(
        "diff",
        help="which entries of two checkpoints differ, and by how much",
        description="Compare two checkpoints of fabricfn, PyTorch, safetensors or Hugging Face, bit for bit. Exit"
        " status: 0 equal, 1 different, 2 error.",
    )
    parser.add_argument("a", metavar="A", help="a folder, file or URL")
    parser.add_argument("b", metavar="B", help="the other one")
    parser.add_argument("--only", action="append", metavar="PATTERN", help='"model", "opt/state/*"; may be repeated')
    parser.add_argument("--atol", type=float, default=0.0, metavar="X", help="differences of floats that do not count")
    parser.add_argument("-q", "--quiet", action="store_true", help="the exit status alone")
    parser.set_defaults(act=act)


def act(chosen: argparse.Namespace) -> int:
    """Print the differences."""
    found = checkpoint.diff_checkpoints(chosen.a, chosen.b, only=chosen.only, atol=chosen.atol)
    if not chosen.quiet:
        print(found)
    return 0 if found.equal else 1
