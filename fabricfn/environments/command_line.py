"""How the options of `fabricfn run` reach `init_runtime`: one environment variable, for one process and its ranks."""

import json
from collections.abc import Collection, Mapping

from fabricfn.errors import ConfigurationError

RUN = "FABRICFN_RUN"
"""The environment variable."""


def write(options: Mapping[str, str | int], pid: int) -> str:
    """The value of the variable.

    Args:
        options: arguments of `init_runtime` by name.
        pid: the process that they are meant for; other programs that it starts inherit the variable, but not its
            meaning.

    Example:
        >>> write({"devices": "2"}, 7)
        '{"pid": 7, "options": {"devices": "2"}}'
    """
    return json.dumps({"pid": pid, "options": dict(options)})


def read(environ: Mapping[str, str], pids: Collection[int]) -> dict[str, str | int]:
    """The options that the command line gave to one of these processes; none without `fabricfn run`.

    Raises:
        ConfigurationError: the variable was written by something else.

    Example:
        >>> environ = {RUN: write({"devices": "2"}, 7)}
        >>> read(environ, (8, 7)), read(environ, (8,)), read({}, (8, 7))
        ({'devices': '2'}, {}, {})
    """
    if RUN not in environ:
        return {}
    try:
        found = json.loads(environ[RUN])
        return dict(found["options"]) if found["pid"] in pids else {}
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigurationError(
            f"the environment variable {RUN} is {environ[RUN]!r}, which `fabricfn run` did not write. Unset it, and"
            " give the options to the command: fabricfn run --devices 2 train.py"
        ) from error


def spelling(name: str) -> str:
    """The option of the command line for an argument of `init_runtime`.

    Example:
        >>> spelling("num_nodes")
        '--num-nodes'
    """
    return "--" + name.replace("_", "-")
