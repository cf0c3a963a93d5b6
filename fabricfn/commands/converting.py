"""`fabricfn convert SOURCE TARGET`, also by the name `consolidate`."""

import argparse
from typing import Any

from fabricfn import checkpoint


def add(commands: Any) -> None:
    """The options."""
    parser = commands.add_parser(
        "convert",
        aliases=["consolidate"],
        help="write the model of a checkpoint for other tools: safetensors, Hugging Face, PyTorch",
        description="Write the model of a checkpoint (of fabricfn, PyTorch, safetensors, Hugging Face,"
        " torch.distributed.checkpoint) for other tools. TARGET says how: a name that ends in .safetensors is one file;"
        " in .pt, .pth, .bin or .ckpt a state dict of PyTorch; any other is a folder in Hugging Face's layout.",
    )
    parser.add_argument("source", metavar="SOURCE", help="a folder, file or URL")
    parser.add_argument("target", metavar="TARGET", help="a file or a folder")
    parser.add_argument("--only", action="append", metavar="PATTERN", help='"ema", "student/*"; may be repeated')
    parser.add_argument("--max-shard-size", type=_bytes, metavar="SIZE", help="of the files of a folder: 5GB, 500MB")
    parser.set_defaults(act=act)


def act(chosen: argparse.Namespace) -> int:
    """Print the files that were made."""
    more = {} if chosen.max_shard_size is None else {"max_shard_size": chosen.max_shard_size}
    for file in checkpoint.consolidate(chosen.source, chosen.target, only=chosen.only, **more):
        print(f"{file}  {file.stat().st_size:,} bytes")
    return 0


def _bytes(text: str) -> int:
    """A number of bytes.

    Example:
        >>> _bytes("5GB"), _bytes("100")
        (5000000000, 100)
    """
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3), ("B", 1), ("", 1)):
        if text.upper().endswith(unit):
            return int(text[: len(text) - len(unit)]) * factor
    raise AssertionError
