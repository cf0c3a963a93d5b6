"""How the agents of a job meet: by a file on one node, over the network on several, which agree on each new attempt."""

import time
import uuid
from pathlib import Path
from typing import Any, cast

from torch._C._distributed_c10d import PrefixStore
from torch.distributed import DistError
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousTimeoutError
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from fabricfn.starting.meeting import DEFAULT_PORT
from fabricfn.starting.request import Request, seconds

ROUND = 0.05
"""Seconds between two looks at who has come."""


class Nodes(StaticTCPRendezvous):
    """torch's static rendezvous, in rounds: the nodes keep their ranks, and where one starts a new attempt all do.

    torch's own never tells a node that another one has started again, so its workers would wait for those for ever.
    """

    attempt: int = -1
    """The attempt that has begun; the same number on all nodes."""

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait until every node has come for the next attempt.

        Raises:
            RendezvousClosedError: a node has ended, so there will be none.
            RendezvousTimeoutError: a node did not come.
        """
        found: Any = super().next_rendezvous()
        store: Any = found.store
        self.attempt += 1
        store.add(f"came-{self.attempt}", 1)
        deadline = time.monotonic() + self.timeout.total_seconds()
        while self._counted(f"came-{self.attempt}", 0) < self.world_size:
            if self._counted("ended", 0, lost=1):
                raise RendezvousClosedError("a node has ended")
            if time.monotonic() > deadline:
                raise RendezvousTimeoutError(f"not all of {self.world_size} nodes came in {self.timeout}")
            time.sleep(ROUND)
        rounds = PrefixStore(f"attempt-{self.attempt}", store)
        return RendezvousInfo(rounds, found.rank, found.world_size, found.bootstrap_store_info)

    def num_nodes_waiting(self) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """How many nodes have begun the next attempt: more than none makes torch's agent follow them."""
        return self._counted(f"came-{self.attempt + 1}", 0)

    def end(self) -> None:
        """Tell the other nodes that this one takes part in no further attempt."""
        self._counted("ended", 1)

    def _counted(self, key: str, more: int, lost: int = 0) -> int:
        """A count in the store after `more` was added; `lost` where the node that keeps it is gone."""
        if self._store is None:
            return lost
        try:
            return PrefixStore(self.run_id, cast("Any", self._store)).add(key, more)
        except DistError:
            return lost


def rendezvous_of(request: Request, folder: Path) -> RendezvousHandler:
    """How the agents of these nodes meet. On one node nothing listens."""
    nodes = request.num_nodes
    if nodes == 1:
        endpoint, run_id = str(folder / "rendezvous"), uuid.uuid4().hex
        file = RendezvousParameters("c10d", endpoint, run_id, 1, 1, local_addr="127.0.0.1", store_type="file")
        return get_rendezvous_handler(file)
    address, port, rank = request.main_address or "", request.main_port or DEFAULT_PORT, request.node_rank or 0
    kind = Nodes if request.max_restarts else StaticTCPRendezvous
    return kind(address, port, rank, nodes, "fabricfn", int(seconds(request.timeout)))
