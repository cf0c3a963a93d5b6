"""What runs inside the processes of a world of processes: the mother that imports torch once, and the ranks it forks.

[Note: process worlds] The user's process starts the mother, a fresh interpreter with one thread. On demand it forks one
rank per pair of connections; ranks that failed, hang or died are killed, all of them, and new ones take 30 ms. A rank
holds one end of two connections to the user's process: jobs, and life. When the life connection closes, because the
owner was killed, the rank is gone at once, and so is the mother. Ranks end by a signal or `os._exit`: leaving an
interpreter in which gloo threads are alive aborts now and then.
"""

import datetime
import os
import pickle
import random
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection

import torch
import torch._dynamo  # pyright: ignore[reportUnusedImport]  # DDP needs it, and a rank would take 1 s for it
import torch.distributed as dist

from fabricfn.starting.joining import until_shutdown
from fabricfn.testing.carrying import FORK, READY, WHERE, pack
from fabricfn.testing.ranks import runtime_of, stack_text


def mother(control_fd: int, world_size: int, folder: str) -> None:
    """Fork and kill ranks as the owner says, until it closes the control connection."""
    torch.set_num_threads(1)
    control = socket.socket(fileno=control_fd)
    pids: list[int] = []
    while True:
        command, fds, _, _ = socket.recv_fds(control, 16, 2 * world_size)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        pids = []
        if command == FORK:
            for rank in range(world_size):
                pid = os.fork()
                if pid == 0:
                    control.detach()
                    os.close(control_fd)
                    live(rank, fds)
                pids.append(pid)
        for fd in fds:
            os.close(fd)
        if not command:
            shutil.rmtree(folder, ignore_errors=True)  # the owner may have been killed
            os._exit(0)
        control.sendall(READY)


def live(rank: int, fds: list[int]) -> None:
    """The life of one rank: jobs, one after the other. Never returns."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the owner, which then ends the ranks
        mine = fds[2 * rank], fds[2 * rank + 1]
        for fd in fds:
            if fd not in mine:
                os.close(fd)
        jobs, life = Connection(mine[0]), Connection(mine[1])
        threading.Thread(target=watch, args=(life, threading.get_ident()), daemon=True).start()
        member = Member(rank)
        while True:
            jobs.send_bytes(member.work(jobs.recv_bytes()))
    except (EOFError, OSError):
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def watch(life: Connection, main: int) -> None:
    """Answer where the rank is, and end it when nobody asks any more."""
    try:
        while life.recv_bytes() == WHERE:
            life.send_bytes(stack_text(sys._current_frames().get(main)).encode())
    except (EOFError, OSError):
        os._exit(1)


class Member:
    """One rank and its process group, which lives until a run of another size."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.joined: str | None = None

    def work(self, message: bytes) -> bytes:
        """Do one job and report: ("ok", time, result) or ("error", time, exception, text)."""
        try:
            return self.result(message)
        except BaseException as error:  # whatever ends the user's function is reported
            return failure(error)

    def result(self, message: bytes) -> bytes:
        """Join the group of this run when it is another one, and call the function."""
        place, timeout, options, payload = pickle.loads(message)
        if self.joined != place:
            if dist.is_initialized():
                dist.destroy_process_group()
            if options.world_size > 1:
                join(place, self.rank, options.world_size, timeout)
            self.joined = place
        seed_all(options.seed)
        fn, args = pickle.loads(payload)
        group = dist.group.WORLD if options.world_size > 1 else None
        with until_shutdown(runtime_of(options, self.rank, group)) as rt:
            result = fn(rt, *args)
        return pack(("ok", time.monotonic(), result))


def join(place: str, rank: int, world_size: int, timeout: float) -> None:
    """Initialise gloo over the loopback device, with a file as the meeting point."""
    hook = sys.excepthook
    dist.init_process_group(
        "gloo",
        init_method=f"file://{place}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout + 30),
    )
    sys.excepthook = hook  # torch wraps it once more at each initialisation


def seed_all(seed: int) -> None:
    """Global random numbers start from the same place in each run."""
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def failure(error: BaseException) -> bytes:
    """The report of an exception; one that cannot be pickled travels as its text."""
    text = "".join(traceback.format_exception(error))
    try:
        report = pack(("error", time.monotonic(), error, text))
        pickle.loads(report)
        return report
    except Exception:  # whatever a __reduce__ raises
        return pickle.dumps(("error", time.monotonic(), RuntimeError(f"{type(error).__name__}: {error}"), text))
