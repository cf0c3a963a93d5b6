"""Worlds whose ranks are threads of this process: hundreds of examples a second, for property tests.

[Note: thread worlds] torch keeps its process groups in one table of the process. While a world of threads is open that
table is a view that shows each rank thread its own groups and every other thread the real ones; and the C++ registry of
group names is in thread-isolation mode, so that each rank resolves a name to its own group.
"""

import contextlib
import itertools
import sys
import threading
from collections.abc import Callable, Generator
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d
from torch.distributed import distributed_c10d

from fabricfn.errors import LaunchError
from fabricfn.meshes import BESIDE
from fabricfn.precision import Precision
from fabricfn.starting.joining import until_shutdown
from fabricfn.strategy import Strategy
from fabricfn.testing.hub import Hub, Released
from fabricfn.testing.ranks import TIMEOUT, Options, Ranks, named, options_of, runtime_of, stack_text
from fabricfn.testing.thread_group import ThreadGroup

c10d: Any = _distributed_c10d
BACKEND = "fabricfn_threads"


class Table:
    """torch's table of process groups, as one rank thread sees it: the attributes of torch's `_World`."""

    def __init__(self, hub: Hub, rank: int) -> None:
        self.hub, self.rank = hub, rank
        self.default_pg: dist.ProcessGroup | None = None
        self.group_count = 0
        self.pg_map: dict[Any, Any] = {}
        self.pg_names: dict[Any, str] = {}
        self.pg_group_ranks: dict[Any, dict[int, int]] = {}
        self.pg_backend_config: dict[Any, str] = {}
        self.tags_to_pg: dict[str, list[Any]] = {}
        self.pg_to_tag: dict[Any, str] = {}
        self.pg_coalesce_state: dict[Any, Any] = {}
        self.comms: list[Any] = []
        self.pg_config_info: list[dict[str, Any]] = []

    def trim(self) -> None:
        """Forget every group but the default one, so that a run leaves none behind."""
        self.group_count = 0
        for group in [group for group in self.pg_map if group is not self.default_pg]:
            c10d._unregister_process_group(self.pg_names[group])  # pyright: ignore[reportArgumentType]
            for table in (self.pg_map, self.pg_names, self.pg_group_ranks, self.pg_backend_config):
                del table[group]
            self.tags_to_pg = {tag: groups for tag, groups in self.tags_to_pg.items() if group not in groups}
            self.pg_to_tag.pop(group, None)


_tables = threading.local()


class View:
    """Stands for torch's table: a rank thread's own one, or the real one."""

    def __init__(self, real: Any) -> None:
        object.__setattr__(self, "_real", real)

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(_tables, "table", None) or object.__getattribute__(self, "_real"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(getattr(_tables, "table", None) or object.__getattribute__(self, "_real"), name, value)


class Views:
    """Counts the open worlds of threads: the first one puts the view in, the last one takes it away."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.open = 0
        self.real: Any = None

    def enter(self) -> None:
        """A world opens."""
        with self.lock:
            self.open += 1
            if self.open == 1:
                self.real = distributed_c10d._world
                distributed_c10d._world = View(self.real)  # pyright: ignore[reportAttributeAccessIssue]
                c10d._set_thread_isolation_mode(True)
                if BACKEND.upper() not in dist.Backend._plugins:
                    dist.Backend.register_backend(BACKEND, create_group, extended_api=True, devices=["cpu"])

    def leave(self) -> None:
        """A world is closed."""
        with self.lock:
            self.open -= 1
            if self.open == 0:
                distributed_c10d._world = self.real
                c10d._set_thread_isolation_mode(False)


_views = Views()


def create_group(options: Any, _: Any) -> ThreadGroup:
    """What `torch.distributed.new_group` calls on a rank thread."""
    table: Table = _tables.table
    members = list(options.global_ranks_in_group)
    # a rank waits at one place of a hub, so a thread beside it needs another one
    hub = table.hub.beside() if options.group_id.startswith(BESIDE) else table.hub
    return ThreadGroup(hub, options.group_id, members.index(table.rank), members)


def join_table(hub: Hub, rank: int, store: Any) -> ThreadGroup:
    """Give the current thread a table of its own, with the group of all ranks of the hub as the default group."""
    table = Table(hub, rank)
    members = range(hub.world_size)
    group = ThreadGroup(hub, "world", rank, members)
    table.default_pg = group
    table.pg_map[group] = (BACKEND, store)
    table.pg_names[group] = name = f"threads_{next(_names)}"
    table.pg_group_ranks[group] = {member: member for member in members}
    table.pg_backend_config[group] = f"cpu:{BACKEND}"
    table.tags_to_pg[f"ptd:{name}"] = [group]
    table.pg_to_tag[group] = f"ptd:{name}"
    _tables.table = table
    group._set_group_name(name)
    c10d._register_process_group(name, group)  # pyright: ignore[reportArgumentType]
    return group


_names = itertools.count()


class Job:
    """One run: what each rank returned or raised, in the order in which they ended."""

    def __init__(self, hub: Hub, fn: Callable[..., Any], args: tuple[Any, ...], options: Options) -> None:
        self.hub, self.fn, self.args, self.options = hub, fn, args, options
        self.results: list[Any] = [None] * options.world_size
        self.errors: list[tuple[int, BaseException]] = []
        self.pending = set(range(options.world_size))
        self.lock = threading.Lock()
        self.done = threading.Event()

    def run(self, rank: int, group: ThreadGroup | None) -> None:
        """The part of one rank, on its thread."""
        failed = False
        try:
            with torch.enable_grad(), until_shutdown(runtime_of(self.options, rank, group)) as rt:
                self.results[rank] = self.fn(rt, *self.args)
        except Released:
            failed = True
        except BaseException as error:  # SystemExit and KeyboardInterrupt of a rank are the caller's business too
            failed = True
            with self.lock:
                self.errors.append((rank, error))
        self.hub.leave(rank, failed=failed)
        with self.lock:
            self.pending.discard(rank)
            if not self.pending:
                self.done.set()


class ThreadRanks:
    """A pool of persistent threads. See `Ranks`."""

    kind = "threads"

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.hubs = {size: Hub(size) for size in range(1, world_size + 1)}
        self.stores = {size: c10d.HashStore() for size in self.hubs}
        self.jobs: list[Job | None] = [None] * world_size
        self.turns = [threading.Semaphore(0) for _ in range(world_size)]
        self.hung: str | None = None
        self.busy = threading.Lock()
        self.threads = [
            threading.Thread(target=self._serve, args=(rank,), name=f"rank {rank}", daemon=True)
            for rank in range(world_size)
        ]
        for thread in self.threads:
            thread.start()

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        world_size: int | None = None,
        strategy: str | Strategy | None = None,
        precision: str | int | Precision = "32-true",
        seed: int = 0,
        timeout: float = TIMEOUT,
    ) -> list[Any]:
        """See `Ranks.run`."""
        options = options_of(self.world_size, world_size, strategy, precision, seed)
        if self.hung is not None:
            raise LaunchError(f"this world of threads has a rank that never returned: {self.hung}. Open another one.")
        if threading.current_thread() in self.threads or not self.busy.acquire(blocking=False):
            raise LaunchError("a world runs one function at a time: run() was called inside of run(). Open another.")
        with contextlib.ExitStack() as stack:
            stack.callback(self.busy.release)
            job = Job(self.hubs[options.world_size], fn, args, options)
            job.hub.reset()
            for rank in range(options.world_size):
                self.jobs[rank] = job
                self.turns[rank].release()
            try:
                finished = job.done.wait(timeout)
            except BaseException:  # Ctrl-C: the ranks go on, so nothing else may be run on them
                self._give_up(job, timeout)
                raise
            if not finished:
                raise self._give_up(job, timeout)
        if job.errors:
            rank, error = job.errors[0]
            raise named(error, rank, options.world_size)
        return job.results

    def close(self) -> None:
        """End the threads."""
        for turn in self.turns:
            turn.release()
        if self.hung is None:
            for thread in self.threads:
                thread.join()

    def _serve(self, rank: int) -> None:
        groups: dict[int, ThreadGroup | None] = {1: None}
        tables: dict[int, Any] = {1: None}
        # backward passes run on the thread that calls them, as in a process without accelerators
        with torch.autograd.set_multithreading_enabled(False):
            while True:
                self.turns[rank].acquire()
                job, self.jobs[rank] = self.jobs[rank], None
                if job is None:
                    return
                size = job.options.world_size
                if size not in groups:
                    groups[size] = join_table(job.hub, rank, self.stores[size])
                    tables[size] = _tables.table
                _tables.table = tables[size]
                try:
                    job.run(rank, groups[size])
                finally:
                    if tables[size] is not None:
                        tables[size].trim()
                del job

    def _give_up(self, job: Job, timeout: float) -> LaunchError:
        frames, late = sys._current_frames(), sorted(job.pending)
        hung = [rank for rank in late if rank not in job.hub.waiting]
        self.hung = ", ".join(f"rank {rank} of {job.options.world_size}" for rank in hung) or "its last run"
        places = [f"rank {rank} is at\n{stack_text(frames.get(self.threads[rank].ident or 0))}" for rank in hung]
        for rank in hung:  # releases those who wait for it; a thread itself cannot be stopped
            job.hub.leave(rank, failed=True)
        return LaunchError(f"{self.hung} did not return within {timeout} s.\n{''.join(places)}")


@contextlib.contextmanager
def threads(world_size: int) -> Generator[Ranks]:
    """A world of ranks that are threads of this process, with an in-memory process group.

    `torch.distributed`, DDP and functional collectives work on each rank as they do in a process. Calls that can
    never end (ranks that make different calls, or return while others wait) are errors at once.

    Threads share what belongs to the process: the global random generators of torch, numpy and Python, the default
    dtype, the environment, the current folder. So a law about random numbers needs `processes`, and a function under
    test draws from generators of its own (`ff.key(seed).generator()`). While the world is open, functional collectives
    over process groups that this process opened before do not resolve.

    Args:
        world_size: how many ranks there are; `run(..., world_size=2)` uses the first two of them.

    Example:
        >>> with threads(2) as ranks:
        ...     ranks.run(lambda rt, x: rt.rank + x, 10)
        [10, 11]
    """
    _views.enter()
    try:
        ranks = ThreadRanks(world_size)
        try:
            yield ranks
        finally:
            ranks.close()
    finally:
        _views.leave()
