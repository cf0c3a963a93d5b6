"""The processes that fabricfn itself starts: the workers of `launch`, and the copies of a script that re-runs itself.

They run on torch's elastic agent too. The ranks of one node meet in a private folder, so nothing listens for them.
"""

import dataclasses
from collections.abc import Mapping

from fabricfn.environments import torchrun
from fabricfn.environments.topology import Topology, unset

STARTED_BY = "FABRICFN_STARTED_BY"
"""The environment variable that says what started this worker: "launch" or "script"."""
FOLDER = "FABRICFN_FOLDER"
"""The environment variable with the path of the private folder of the job on this node."""


def why_not(environ: Mapping[str, str]) -> str | None:
    """Why fabricfn did not start this process."""
    return torchrun.why_not(environ) or unset(environ, STARTED_BY, FOLDER)


def detect(environ: Mapping[str, str]) -> Topology | None:
    """The place of a worker that fabricfn started; None elsewhere."""
    topology = torchrun.detect(environ)
    if topology is None or why_not(environ) is not None:
        return None
    folder = f"{environ[FOLDER]}/attempt-{topology.attempt}"
    alone = topology.num_nodes == 1
    return dataclasses.replace(
        topology,
        name=environ[STARTED_BY],
        folder=folder,
        max_restarts=None,  # torch's agent is told another number, since it counts attempts by it
        main_address=None if alone else topology.main_address,
        main_port=None if alone else topology.main_port,
    )
