"""Where the ranks that another launcher started meet: the address, and the store there."""

import contextlib
import dataclasses
import fcntl
import os
import socket
import struct
import sys
import time
from datetime import timedelta
from pathlib import Path

from torch._C._distributed_c10d import FileStore, Store, TCPStore
from torch.distributed.rendezvous import rendezvous  # pyright: ignore[reportUnknownVariableType]

from fabricfn.environments import Topology, mpi
from fabricfn.errors import ConfigurationError, HangError
from fabricfn.starting.request import Request

DEFAULT_PORT = 29500
"""Where the ranks of several nodes meet unless `main_port` says otherwise; torchrun's default."""
LOOPBACK = "127.0.0.1"
LOOPBACKS = ("127.", "::1")
"""What addresses of the loopback interface begin with."""
SIOCGIFADDR = 0x8915
"""Linux's number for the question for the address of an interface."""


_STORES: dict[str, Store] = {}
"""The store of a private folder. It outlives the groups that find each other in it, as a file does by itself."""


def settle(request: Request, topology: Topology) -> Topology:
    """The topology with the request's address and port in the place of those that no launcher said."""
    wanted = {"main_address": request.main_address, "main_port": request.main_port}
    open_ones = {name for name in wanted if getattr(topology, name) is None} | set(topology.guessed)
    if topology.folder is not None or topology.world_size == 1:
        return topology
    return dataclasses.replace(
        topology,
        **{name: value for name, value in wanted.items() if value is not None and name in open_ones},
        guessed=tuple(name for name in topology.guessed if wanted[name] is None),
    )


def open_store(topology: Topology, limit: timedelta, *, lasting: bool) -> Store:
    """The store in which the ranks find one another; every rank of the job calls it.

    On one node it listens on the loopback interface alone, or is a file.

    Args:
        topology: the place of this process.
        limit: how long to wait for the others.
        lasting: whether a back end goes on asking the store, until after rank 0 has ended (NCCL). A file can be asked
            then; but it is looked at every 10 ms only, and two forked ranks have met after 20.

    Raises:
        ConfigurationError: nothing says where the ranks meet.
        HangError: rank 0 did not come in time.
    """
    if topology.folder is not None and topology.num_nodes == 1:
        store = _STORES.get(topology.folder)
        if store is None:
            file = FileStore(f"{topology.folder}/store", -1) if lasting else None
            store = _STORES[topology.folder] = file or _noted_store(Path(topology.folder), topology, limit)
        store.set_timeout(limit)
        return store
    told = topology.main_port
    topology, listener = mpi.meet(topology) if topology.name == "mpi" else (topology, None)
    hosted_by_agent = "TORCHELASTIC_USE_AGENT_STORE" in os.environ
    port = topology.main_port or DEFAULT_PORT
    if topology.main_address is not None and topology.main_port != told:  # the kernel chose it, and rank 0 holds it
        return _store(listener, port, topology, limit, topology.main_address)
    if topology.num_nodes == 1 and not hosted_by_agent:
        return _loopback_store(topology, port, limit)
    if topology.main_address is None:
        raise ConfigurationError(
            f"{topology.name} says rank {topology.rank} of {topology.world_size} on {topology.num_nodes} machines, but"
            " not where they meet. Write main_address=, the name of the machine with rank 0, and main_port=."
        )
    return next(rendezvous(f"tcp://{topology.main_address}:{port}", topology.rank, topology.world_size, timeout=limit))[
        0
    ]


def own_address(main_address: str, port: int) -> tuple[str | None, bool]:
    """Who this machine is in the network in which it sees the main address; nothing is sent.

    Returns:
        Its address; None where that is the loopback interface and other machines could not reach it (on some systems a
        machine has its own name there). And whether this machine is that of the main address.

    Raises:
        ConfigurationError: the main address is no known host.
    """
    try:
        family, _, _, _, there = socket.getaddrinfo(main_address, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(there)
            found: str = probe.getsockname()[0]
    except OSError as error:
        raise ConfigurationError(
            f"the ranks would meet at main_address={main_address!r}, but that cannot be reached: {error}. Write the"
            " name or the address of the machine with rank 0."
        ) from error
    loopback = found.startswith(LOOPBACKS)
    hidden = loopback and not main_address.startswith((*LOOPBACKS, "localhost"))
    return None if hidden else found, loopback or found == there[0]


def interface(topology: Topology) -> str | None:
    """The network interface through which the ranks reach each other; None where that is left to the libraries."""
    names = [name for _, name in socket.if_nameindex()]
    if topology.num_nodes == 1:
        return next((name for name in names if name.startswith("lo")), "lo")
    if topology.main_address is None or sys.platform != "linux":
        return None
    own = None
    with contextlib.suppress(ConfigurationError):
        own, _ = own_address(topology.main_address, topology.main_port or DEFAULT_PORT)
    return next((name for name in names if own is not None and _address_of(name) == own), None)


def _address_of(name: str) -> str | None:
    """The IPv4 address of a network interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()))
        return socket.inet_ntoa(answer[20:24])
    return None


def _noted_store(folder: Path, topology: Topology, limit: timedelta) -> Store:
    """A store that rank 0 keeps, at a port that the kernel chooses and that stands in the private folder."""
    note = folder / "port"
    if topology.rank == 0:
        listener = _listener(0)
        port = listener.getsockname()[1]
        draft = note.with_suffix(".draft")
        draft.write_text(str(port))
        draft.rename(note)
        return _store(listener, port, topology, limit)
    deadline = time.monotonic() + limit.total_seconds()
    while not note.exists():
        if time.monotonic() > deadline:
            raise HangError(f"rank {topology.rank} has waited {limit.total_seconds():g} s for rank 0 to come.")
        time.sleep(0.0005)
    return _store(None, int(note.read_text()), topology, limit)


def _loopback_store(topology: Topology, port: int, limit: timedelta) -> Store:
    """A store for the ranks of one node. torch's own server listens on every interface, for anybody."""
    return _store(_listener(port) if topology.rank == 0 else None, port, topology, limit)


def _listener(port: int) -> socket.socket:
    """A socket that listens on the loopback interface.

    Raises:
        ConfigurationError: somebody else has the port.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((LOOPBACK, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"the ranks would meet at {LOOPBACK}:{port}, but that port cannot be had: {error}. Another job may"
            " hold it; write another one on every rank: main_port=."
        ) from error
    return listener


def _store(
    listener: socket.socket | None, port: int, topology: Topology, limit: timedelta, host: str = LOOPBACK
) -> Store:
    """The store behind that socket on rank 0; elsewhere the connection to it."""
    return TCPStore(
        host,
        port,
        topology.world_size,
        listener is not None,
        limit,
        wait_for_workers=False,
        multi_tenant=False,
        master_listen_fd=None if listener is None else listener.detach(),
    )
