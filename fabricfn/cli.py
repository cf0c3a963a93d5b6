"""The command line: `fabricfn run train.py`, `fabricfn env`, and those in `commands`.

It imports torch only where something is to be measured or computed.

`run` starts nothing itself: it becomes `python train.py`, with its options in one environment variable, which
`init_runtime` and `launch` read. So flags, signals and the exit status are those of the script, and the ranks are
started and watched exactly as without it.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from fabricfn.commands import add_commands, carry_out
from fabricfn.environments.command_line import RUN, write
from fabricfn.errors import CapabilityError, ConfigurationError

USAGE = "fabricfn run [options] SCRIPT [ARGS ...]\n       fabricfn run [options] -m MODULE [ARGS ...]"
HELP = """\
Run a training script; the options stand for arguments of init_runtime or launch that the script leaves out. Where the
script says something else, it ends with an error that names both. Options after SCRIPT are the script's own."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command `fabricfn`. Never returns.

    Args:
        arguments: the words after the command; None takes those of this process.
    """
    chosen = _parser().parse_args(arguments)
    if chosen.command == "env":
        print(import_module("fabricfn.facts").environment_report())
        sys.exit(0)
    if chosen.command != "run":
        sys.exit(carry_out(chosen))
    _run(chosen, _flags(sys.orig_argv, sys.argv[1:]) if arguments is None else [])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fabricfn", description="Training PyTorch models with pure functions.")
    version = import_module("fabricfn").__version__
    parser.add_argument("--version", action="version", version=f"fabricfn {version}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("env", help="what is installed and which launcher was found, for a bug report")
    add_commands(commands)
    run = commands.add_parser("run", help="run a script", usage=USAGE, description=HELP, allow_abbrev=False)
    run.add_argument("--accelerator", metavar="NAME", help="auto, cpu, gpu, cuda, mps, tpu, ...")
    run.add_argument("--strategy", metavar="NAME", help="auto, single, ddp, fsdp, functional, package.module:factory")
    run.add_argument(
        *_words("devices", "nproc-per-node"),
        metavar="WHICH",
        help='per node: a number, indices ("1, 4"), or auto: all (on CPU one process)',
    )
    run.add_argument(
        *_words("num-nodes", "nnodes"), type=_nodes, metavar="N", help="machines: a number, or a range 1:4"
    )
    run.add_argument(*_words("node-rank"), type=int, metavar="I", help="which this is, 0 .. num_nodes - 1")
    run.add_argument(
        *_words("main-address", "master-addr", "rdzv-endpoint"),
        metavar="HOST[:PORT]",
        help="the machine with node rank 0, or where the nodes meet",
    )
    run.add_argument(*_words("main-port", "master-port"), type=int, metavar="PORT", help="its port (29500)")
    run.add_argument(*_words("rendezvous", "rdzv-backend"), metavar="NAME", help="how several nodes meet: static, c10d")
    run.add_argument("--precision", metavar="NAME", help="32-true, bf16-mixed, bf16-true, 16-mixed, 64-true, ...")
    run.add_argument(*_words("max-restarts"), type=int, metavar="N", help="how often to start again after a failure")
    run.add_argument("--environment", metavar="NAME", help="the launcher, if it is not to be found out: single, ...")
    run.add_argument(*_words("dry-run"), action="store_true", help="say what would be started, and start nothing")
    run.add_argument("-m", dest="module", nargs=argparse.REMAINDER, metavar="MODULE", help="a module, as python -m")
    run.add_argument(
        "script", nargs=argparse.REMAINDER, metavar="SCRIPT [ARGS ...]", help="the script and its arguments"
    )
    return parser


def _words(*names: str) -> tuple[str, ...]:
    """The spellings of an option: dashes, underscores, and the word that torchrun has for it.

    Example:
        >>> _words("num-nodes", "nnodes")
        ('--num-nodes', '--num_nodes', '--nnodes')
    """
    return tuple(dict.fromkeys(f"--{word}" for name in names for word in (name, name.replace("-", "_"))))


def _nodes(text: str) -> int | str:
    """A number of machines; a range stays as it is."""
    return text if ":" in text else int(text)


NOT_FOR_THE_SCRIPT = ("command", "dry_run", "module", "script")


def _run(chosen: argparse.Namespace, flags: Sequence[str]) -> NoReturn:
    program = ["-m", *chosen.module] if chosen.module else list(chosen.script)
    if not program or program == ["-m"]:
        _refuse(f"the script is missing\nusage: {USAGE}")
    options = {
        name: value for name, value in vars(chosen).items() if name not in NOT_FOR_THE_SCRIPT and value is not None
    }
    host, _, port = str(options.get("main_address", "")).partition(":")
    if port.isdecimal():
        options["main_address"] = host
        if options.setdefault("main_port", int(port)) != int(port):
            _refuse(f"--main-address says port {port}, but --main-port={options['main_port']}; leave one of them out")
    command = [sys.executable, *flags, *program]
    if chosen.dry_run:
        try:
            _tell(command, options)
        except (CapabilityError, ConfigurationError) as error:
            _refuse(str(error))
        sys.exit(0)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], command, {**os.environ, RUN: write(options, os.getpid())})


def _refuse(text: str) -> NoReturn:
    print(f"fabricfn run: error: {text}", file=sys.stderr)
    sys.exit(2)


def _flags(orig_argv: Sequence[str], words: Sequence[str]) -> Sequence[str]:
    """Python's own flags, such as `-X dev`, with which `python -m fabricfn` was called.

    Example:
        >>> _flags(["python", "-X", "dev", "-m", "fabricfn", "run", "a.py"], ["run", "a.py"])
        ['-X', 'dev']
        >>> _flags(["python", "/usr/bin/fabricfn", "env"], ["env"])
        []
    """
    before = orig_argv[1 : len(orig_argv) - len(words)]
    return before[:-2] if before[-2:] == ["-m", "fabricfn"] else before[:-1]


def _tell(command: Sequence[str], options: dict[str, Any]) -> None:
    """Print what would be started."""
    print(f"command: {shlex.join(command)}")
    print(import_module("fabricfn.facts").plan(options))
