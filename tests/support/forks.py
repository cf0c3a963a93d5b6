"""What the tests of collectives share: gloo ranks that are forked for one call, and the text of an error."""

import os
import pickle
import tempfile
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fabricfn.precision import Precision
from fabricfn.runtimes import Runtime
from fabricfn.strategies import resolve
from fabricfn.world import World


def runtime(rank=0, world_size=1, group=None):
    world = World(rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size, group=group)
    return Runtime(world=world, precision=Precision(), strategy=resolve("auto", world_size))


def child(rank, world_size, folder, fn, args):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=timedelta(seconds=20)
    )
    try:
        outcome = (True, fn(runtime(rank, world_size, dist.group.WORLD), *args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    with open(f"{folder}/{rank}", "wb") as file:
        pickle.dump(outcome, file)
    if outcome[0]:
        dist.barrier()
    dist.destroy_process_group()


def fork(world_size, fn, *args):
    """`fn(rt, *args)` on forked gloo ranks: each rank's result."""
    context = mp.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=child, args=(rank, world_size, folder, fn, args)) for rank in range(world_size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        outcomes = []
        for rank in range(world_size):
            assert os.path.exists(f"{folder}/{rank}"), f"rank {rank} died: {ranks[rank].exitcode}"
            with open(f"{folder}/{rank}", "rb") as file:
                outcomes.append(pickle.load(file))
    failures = [f"rank {rank}: {text}" for rank, (fine, text) in enumerate(outcomes) if not fine]
    assert not failures, "\n".join(failures)
    return [result for _, result in outcomes]


def message_of(error_type, fn, *args, **kwargs):
    try:
        fn(*args, **kwargs)
    except error_type as error:
        return str(error)
    raise AssertionError(f"no {error_type.__name__}")


ONE = torch.ones(3)
