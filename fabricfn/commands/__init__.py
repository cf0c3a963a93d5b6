"""What the command line does besides starting scripts: a file a command, with its options and what it does.

None of them imports torch by itself; what `diff` and `convert` call does.
"""

import argparse
import os
import sys
from typing import Any

from fabricfn.commands import comparing, converting, inspecting, plotting
from fabricfn.errors import FabricfnError

ALL = (inspecting, comparing, converting, plotting)
BROKEN_PIPE = 141
"""The status of a shell for a process that SIGPIPE ended."""


def add_commands(commands: Any) -> None:
    """Add every command to the parser's."""
    for command in ALL:
        command.add(commands)


def carry_out(chosen: argparse.Namespace) -> int:
    """Do what was asked for; returns the exit status, 2 after an error, which is told on stderr."""
    try:
        status = chosen.act(chosen)
        sys.stdout.flush()
    except BrokenPipeError:  # `fabricfn inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (FabricfnError, OSError) as error:
        print(f"fabricfn {chosen.command}: error: {error}", file=sys.stderr)
        return 2
    return status
