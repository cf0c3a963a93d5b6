"""Where the ranks that another launcher started meet: the address, and the store there."""

import dataclasses
import os
import socket
from datetime import timedelta

from torch._C._distributed_c10d import FileStore, Store, TCPStore
from torch.distributed.rendezvous import rendezvous  # pyright: ignore[reportUnknownVariableType]

from fabricfn.environments import Topology, mpi
from fabricfn.errors import ConfigurationError
from fabricfn.starting.request import Request

DEFAULT_PORT = 29500
"""Where the ranks of several nodes meet unless `main_port` says otherwise; torchrun's default."""
LOOPBACK = "127.0.0.1"


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


def open_store(topology: Topology, limit: timedelta) -> Store:
    """The store in which the ranks find one another; every rank of the job calls it.

    On one node it listens on the loopback interface alone, or is a file.

    Raises:
        ConfigurationError: nothing says where the ranks meet.
    """
    if topology.folder is not None and topology.num_nodes == 1:
        store = FileStore(f"{topology.folder}/store", -1)
        store.set_timeout(limit)
        return store
    if topology.name == "mpi":
        topology = mpi.meet(topology)
    hosted_by_agent = "TORCHELASTIC_USE_AGENT_STORE" in os.environ
    port = topology.main_port or DEFAULT_PORT
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


def _loopback_store(topology: Topology, port: int, limit: timedelta) -> Store:
    """A store for the ranks of one node. torch's own server listens on every interface, for anybody."""
    descriptor = None
    if topology.rank == 0:
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
        descriptor = listener.detach()
    return TCPStore(
        LOOPBACK,
        port,
        topology.world_size,
        topology.rank == 0,
        limit,
        multi_tenant=False,
        master_listen_fd=descriptor,
    )
