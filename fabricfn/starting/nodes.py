"""How the agents of a job meet: over the network where there are several, which agree on each new attempt."""

import socket
import time
import uuid
from functools import partial
from typing import Any, cast

from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore
from torch.distributed import DistError
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from fabricfn.errors import ConfigurationError
from fabricfn.starting.meeting import DEFAULT_PORT, LOOPBACK, own_address
from fabricfn.starting.request import Request, node_range, rendezvous_name, seconds

RUN_ID = "fabricfn"
"""What the job is called where its nodes meet."""
ROUND = 0.05
"""Seconds between two looks at who has come."""
LAST_CALL = 3
"""Seconds to wait for further nodes when enough of a range have come. A later one begins a new attempt."""
KEEP_ALIVE, LOST_AFTER = 1, 5
"""A node of a range says every second that it is there; one that missed five times is taken as gone."""


class Alone(StaticTCPRendezvous):
    """The only node of a job: nobody is waited for, and nothing listens. torch's others delay the first attempt."""

    def __init__(self) -> None:
        super().__init__(LOOPBACK, 0, 0, 1, uuid.uuid4().hex, 1)

    @property
    def use_agent_store(self) -> bool:
        """The ranks meet in the private folder; a group that the user makes by `env://` has a store of its own."""
        return False

    def next_rendezvous(self) -> RendezvousInfo:
        """The next attempt."""
        with socket.socket() as free:
            free.bind((LOOPBACK, 0))
            return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo(LOOPBACK, free.getsockname()[1]))


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

    def restarts(self, allowed: int, left: int) -> tuple[int, int]:
        """How many restarts are allowed, and left: a node that followed another one has used one, too."""
        return allowed, allowed - self.attempt

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


class Elastic(RendezvousHandler):
    """A rendezvous of torch's whose nodes come and go: each round is an attempt of those that are there.

    The ranks of a round meet at a store that the agent of the first node keeps for that round. torch's own shared store
    is told to the nodes of the first round alone: one that joins later would wait for it for ever.
    """

    def __init__(self, inner: RendezvousHandler, address: str | None) -> None:
        self.inner = inner
        self.address = address
        """Of this machine, for the others."""
        self.attempt = -1
        """The attempt that has begun; the same number on all nodes, on one that has just come too."""
        self._server: TCPStore | None = None

    @property
    def use_agent_store(self) -> bool:
        """The ranks take the store that `next_rendezvous` names."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait until enough nodes have come for the next attempt, and no further one comes for a while."""
        found = self.inner.next_rendezvous()
        ours = PrefixStore("fabricfn", found.store)
        ours.set(f"attempt-{found.rank}", str(self.attempt + 1))
        self.attempt = max(int(ours.get(f"attempt-{rank}")) for rank in range(found.world_size))
        self._server = None
        if found.rank == 0:
            self._server = TCPStore(self.address or socket.getfqdn(), 0, is_master=True, wait_for_workers=False)
        port = None if self._server is None else self._server.port
        meeting = RendezvousStoreInfo.build(found.rank, ours, self.address, port)
        return RendezvousInfo(found.store, found.rank, found.world_size, meeting)

    def restarts(self, allowed: int, left: int) -> tuple[int, int]:
        """How many restarts are allowed, and left: an attempt that began because a node came has used none."""
        return self.attempt + left, left

    def end(self) -> None:
        """End the job: there is no further attempt, on no node."""
        self.inner.shutdown()

    def get_backend(self) -> str:
        """The name that `rendezvous=` has."""
        return self.inner.get_backend()

    def is_closed(self) -> bool:
        """Whether a node has ended the job."""
        return self.inner.is_closed()

    def set_closed(self) -> None:
        """There is no further attempt, on no node."""
        self.inner.set_closed()

    def num_nodes_waiting(self) -> int:
        """How many nodes have come since this attempt began: more than none makes torch's agent begin the next one."""
        return self.inner.num_nodes_waiting()

    def get_run_id(self) -> str:
        """The name of the job."""
        return self.inner.get_run_id()

    def shutdown(self) -> bool:
        """The same as `end`."""
        return self.inner.shutdown()


def rendezvous_of(request: Request) -> RendezvousHandler:
    """How the agents of these nodes meet. On one node nothing listens.

    Raises:
        ConfigurationError: torch knows no such rendezvous, or nobody answers at the main address.
    """
    (least, most), kind = node_range(request.num_nodes), rendezvous_name(request)
    limit = int(seconds(request.timeout))
    if most == 1:
        return Alone()
    address, port, rank = request.main_address or "", request.main_port or DEFAULT_PORT, request.node_rank or 0
    if kind == "static":
        static = Nodes if request.max_restarts else StaticTCPRendezvous
        return static(address, port, rank, most, RUN_ID, limit)
    (own, keeps), endpoint = own_address(address, port), f"{address}:{port}"  # torch would compare the names of hosts
    times = {"read_timeout": limit, "join_timeout": limit, "last_call_timeout": LAST_CALL}
    times |= {"keep_alive_interval": KEEP_ALIVE, "keep_alive_max_attempt": LOST_AFTER}
    there = partial(RendezvousParameters, kind, endpoint, RUN_ID, least, most, local_addr=own, **times)
    try:
        return Elastic(_handler(there(is_host=keeps), there(is_host=False)), own)
    except ValueError as error:
        raise ConfigurationError(f'rendezvous={kind!r}: {error} There are "static", "c10d", "etcd-v2".') from error
    except RendezvousConnectionError as error:
        raise ConfigurationError(
            f"the nodes would meet at {endpoint} ({kind}), but nobody answers: {error.__cause__ or error}. Start the"
            " same command on that machine, or write the right main_address= and main_port=."
        ) from error


def _handler(params: RendezvousParameters, else_params: RendezvousParameters) -> RendezvousHandler:
    """Where another node of this machine keeps the list of nodes already, this one cannot."""
    try:
        return get_rendezvous_handler(params)
    except RendezvousConnectionError:
        return get_rendezvous_handler(else_params)
