"""No launcher: one process, which may start others."""

from collections.abc import Mapping

from fabricfn.environments.topology import Topology


def why_not(environ: Mapping[str, str]) -> None:
    """None: where nothing else has matched, this does."""


def detect(environ: Mapping[str, str]) -> Topology:
    """The place of a process that nobody launched."""
    return Topology()
