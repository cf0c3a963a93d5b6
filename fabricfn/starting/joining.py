"""From a request and a topology to a `Runtime`: conflicts, the device, the process group; and the way back."""

import atexit
import contextlib
import dataclasses
import os
import sys
from collections.abc import Generator
from datetime import timedelta
from functools import partial
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from fabricfn.accelerators import Choice, available, describe, device_of
from fabricfn.environments import Topology
from fabricfn.errands import finish
from fabricfn.errors import ConfigurationError
from fabricfn.interrupts import install, uninstall
from fabricfn.loggers.journal import Journal, close
from fabricfn.precision import Precision
from fabricfn.runtimes import Runtime
from fabricfn.starting.letting_go import await_gloo
from fabricfn.starting.meeting import interface, open_store, settle
from fabricfn.starting.parents import mark
from fabricfn.starting.request import Request, callbacks_of, loggers_of, node_range, rendezvous_name, seconds
from fabricfn.starting.words import give_up, tell_uncaught
from fabricfn.strategies import dp, resolve
from fabricfn.strategies.xla_package import begin
from fabricfn.watching import Watch, check_everything, guard, shared_memory
from fabricfn.world import CPU, World

Board = tuple[str | None, Store]
"""The file that the ranks of this node share, if there is a folder for it; and where they tell each other otherwise."""

_WATCHES: WeakKeyDictionary[dist.ProcessGroup, Watch] = WeakKeyDictionary()
"""The watch of each process group, as torch keeps its own table of groups: a second runtime finds it here."""


def place(topology: Topology) -> Topology:
    """The topology, or that of the process group which exists in this process already and which no launcher made."""
    if topology.name != "single" or not dist.is_initialized():
        return topology
    rank, size = dist.get_rank(), dist.get_world_size()
    return Topology(name="process group", rank=rank, world_size=size, local_rank=rank, local_world_size=size)


def check_conflicts(request: Request, topology: Topology, choice: Choice) -> None:
    """Raise `ConfigurationError` when an option says otherwise than the launcher. Omitted or auto is no conflict."""
    least, most = node_range(request.num_nodes)
    fits = most == 1 or least <= topology.num_nodes <= most
    # Where a dynamic rendezvous is held says nothing about the node that gets rank 0.
    fixed = rendezvous_name(request) == "static"
    pairs = (
        ("devices", None if choice.open else len(choice.indices), topology.local_world_size, "processes on this node"),
        ("num_nodes", None if fits else request.num_nodes, topology.num_nodes, "nodes"),
        ("node_rank", request.node_rank, topology.node_rank, "as the rank of this node"),
        ("main_address", request.main_address if fixed else None, topology.main_address, "as the main address"),
        ("main_port", request.main_port if fixed else None, topology.main_port, "as the main port"),
        ("max_restarts", request.max_restarts or None, topology.max_restarts, "restarts"),
    )
    for name, wanted, found, what in pairs:
        if wanted is not None and found is not None and wanted != found:
            shown = request.devices if name == "devices" else wanted
            raise ConfigurationError(
                f"{name}={shown!r}, but {topology.name} says {found!r} {what} (rank {topology.rank} of"
                f" {topology.world_size}). Leave {name} out to take what {topology.name} says, or start it with"
                f" the same value."
            )


def local_device(topology: Topology, choice: Choice) -> torch.device:
    """The device of this process.

    Raises:
        ConfigurationError: the launcher started more processes on this node than there are devices.
    """
    if choice.accelerator == "cpu":
        return device_of("cpu", 0)
    alone_with_it = topology.own_devices and len(choice.indices) == 1
    local = 0 if alone_with_it else topology.local_rank
    if local >= len(choice.indices):
        raise ConfigurationError(
            f"{topology.name} started {topology.local_world_size} processes on this node, but it has"
            f" {describe(available())} (local rank {topology.local_rank} finds none left). Start"
            f' {len(choice.indices)}, or write accelerator="cpu".'
        )
    return device_of(choice.accelerator, choice.indices[local])


def join(request: Request, topology: Topology, choice: Choice) -> Runtime:
    """The runtime of this process. Every rank of the topology must call it; it returns when all have met.

    Raises:
        ConfigurationError: the request contradicts the topology or the process group that exists.
    """
    topology = settle(request, topology)
    check_conflicts(request, topology, choice)
    strategy = resolve(request.strategy, topology.world_size)
    if request.strategy == "dp" and len(choice.replicas) > 1:
        strategy = dp([device_of(choice.accelerator, index) for index in choice.replicas])
    device = local_device(topology, choice)
    if device.type == "xla":
        begin(topology.local_rank, topology.local_world_size, spmd=bool(choice.replicas))
    elif device.type not in ("cpu", "mps"):
        torch.accelerator.set_device_index(device)
    owns_group = topology.world_size > 1 and not dist.is_initialized()
    board = _make_group(request, topology, device) if owns_group else None
    if (
        not owns_group
        and dist.is_initialized()
        and (dist.get_rank(), dist.get_world_size()) != (topology.rank, topology.world_size)
    ):
        raise ConfigurationError(
            f"{topology.name} says rank {topology.rank} of {topology.world_size}, but the process group that exists"
            f" has rank {dist.get_rank()} of {dist.get_world_size()}. Call torch.distributed.destroy_process_group()"
            " first, or leave the process group to init_runtime."
        )
    checked = check_everything(device) if owns_group and request.debug else None
    world = World(
        rank=topology.rank,
        world_size=topology.world_size,
        local_rank=topology.local_rank,
        local_world_size=topology.local_world_size,
        node_rank=topology.node_rank,
        num_nodes=topology.num_nodes,
        device=device,
        group=dist.group.WORLD if topology.world_size > 1 else None,
    )
    if board is not None:
        world = _watched(world, board, request, topology)
        if checked is not None:
            checked.watch = world.watch
    elif world.group is not None:
        world = dataclasses.replace(world, watch=_WATCHES.get(world.group))
    rt = Runtime(
        world=strategy.arrange(world),
        precision=Precision.parse(request.precision),
        strategy=strategy,
        accelerator=choice.accelerator,
        environment=topology.name,
        seed=request.seed or 0,
        owns_group=owns_group,
        attempt=topology.attempt,
        callbacks=callbacks_of(request),
        journal=Journal(loggers=loggers_of(request)),
        stop=install(request.stop_signals),
    )
    mark(topology.folder, topology.rank, "joined")
    if owns_group and topology.name not in ("launch", "script"):
        tell_uncaught(topology)
    if owns_group or rt.loggers:
        # Four gloo ranks that leave without destroying their group: 5 of 6 runs ended in SIGABRT.
        atexit.register(_shutdown_at_exit, rt, os.getpid(), topology.folder)
    return rt


def _watched(world: World, board: Board, request: Request, topology: Topology) -> World:
    """The world with a watch over its ranks, and a thread that ends this one when it waits in vain."""
    memory = shared_memory(world, *board)
    watch = Watch(world, memory, seconds(request.timeout), debug=request.debug)
    assert world.group is not None
    _WATCHES[world.group] = watch
    guard(watch, partial(give_up, topology), host_waits=world.device.type in ("cpu", "mps", "xla"))
    return dataclasses.replace(world, watch=watch)


def say_goodbye(error: BaseException | None) -> None:
    """Tell the other ranks that this one leaves, and why, if for a reason."""
    for watch in list(_WATCHES.values()):
        watch.leave(error)
    _WATCHES.clear()


def _make_group(request: Request, topology: Topology, device: torch.device) -> Board:
    """Join the others. Returns where the ranks of this node find the memory that they share."""
    limit = timedelta(seconds=seconds(request.timeout))
    store = open_store(topology, limit, lasting=device.type != "cpu")
    # Also for groups that are made later: gloo binds to the address of this interface, else to the host's name.
    network = interface(topology)
    if network is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", network)
    if network is not None and topology.num_nodes == 1:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", network)
    # A store outlives the groups: what an earlier group or attempt wrote must not be read again.
    generation = store.add(f"fabricfn/{topology.attempt}/{topology.rank}", 1)
    backend = request.backend
    if backend is None:
        # no group carries XLA's tensors: see [Note: over the host]
        own = dist.get_default_backend_for_device(device if device.type != "xla" else CPU)
        backend = own if device.type in ("cpu", "xla") else f"cpu:gloo,{device.type}:{own}"
    dist.init_process_group(
        backend,
        store=PrefixStore(f"fabricfn/{topology.attempt}/{generation}", store),
        rank=topology.rank,
        world_size=topology.world_size,
        timeout=limit,
        device_id=device if device.type == "cuda" and "nccl" in backend else None,
    )
    file = None if topology.folder is None else f"{topology.folder}/board-{generation}"
    return file, PrefixStore(f"fabricfn/board/{topology.attempt}/{generation}", store)


def shutdown(rt: Runtime) -> None:
    """End what `init_runtime` began: wait for a save in flight, destroy the process group if this runtime made it.

    Idempotent, and no collective: it may be called on one rank, after an error, twice. A runtime that joined an
    existing group leaves it alone. At exit it is called by itself.

    Args:
        rt: the runtime; afterwards no collective may be called on it, or on another runtime that shares its group.

    Raises:
        CheckpointError: a save with `blocking=False` failed, and nobody has been told; all else is done before.

    Example:
        >>> import fabricfn as ff
        >>> rt = ff.init_runtime(accelerator="cpu")
        >>> ff.shutdown(rt)
    """
    try:
        finish(rt.world.whole)
    finally:
        _let_go(rt)


def _let_go(rt: Runtime) -> None:
    try:
        close(rt.journal)
    finally:
        uninstall(rt.stop)
        if rt.owns_group and dist.is_initialized() and dist.group.WORLD is rt.world.whole.group:
            say_goodbye(sys.exc_info()[1] or getattr(sys, "last_value", None))
            dist.destroy_process_group()
            await_gloo()


@contextlib.contextmanager
def until_shutdown(rt: Runtime) -> Generator[Runtime]:
    """`shutdown` at the end of a block. What the block raises is not replaced by what `shutdown` raises."""
    try:
        yield rt
    except BaseException as error:
        try:
            shutdown(rt)
        except Exception as late:  # not lost: it is told beside the error of the block
            error.add_note(f"Besides, {type(late).__name__}: {late}")
        raise
    shutdown(rt)


def _shutdown_at_exit(rt: Runtime, pid: int, folder: str | None) -> None:
    if os.getpid() == pid:  # a forked child inherits the call, but not the threads of the group
        mark(folder, rt.global_rank, "left")
        shutdown(rt)
