"""`fabricfn inspect CHECKPOINT`."""

import argparse
import math
from typing import Any

from fabricfn import checkpoint


def add(commands: Any) -> None:
    """The options."""
    parser = commands.add_parser(
        "inspect",
        help="what is in a checkpoint: tree, shapes, dtypes, sizes, files, who wrote it",
        description="Show what is in a checkpoint of fabricfn, PyTorch, safetensors, Hugging Face or"
        " torch.distributed.checkpoint. No tensor is read, nothing is unpickled, torch is not imported.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder, file or URL")
    parser.add_argument("--depth", type=int, default=math.inf, metavar="N", help="levels of the tree to show")
    parser.set_defaults(act=act)


def act(chosen: argparse.Namespace) -> int:
    """Print the tree."""
    print(checkpoint.table(checkpoint.contents_of(chosen.checkpoint), chosen.depth))
    return 0
