"""A training script that starts its own ranks. Usage: script.py what [words ...]; the ranks leave facts in $FACTS."""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

import fabricfn as ff


def listeners(pid):
    """The local addresses on which a process listens, in /proc's hexadecimal notation."""
    files = Path(f"/proc/{pid}/fd").iterdir()
    links = [os.readlink(file) for file in files if file.exists() or file.is_symlink()]
    sockets = {link[8:-1] for link in links if link.startswith("socket:[")}
    rows = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()
    ]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in sockets]


def tell(rank, **facts):
    """Leave facts of this rank for the test; lines that several ranks print can be torn."""
    Path(os.environ["FACTS"], f"rank-{rank}-{len(facts)}").write_text(json.dumps({"rank": rank, **facts}))


def main(what):
    if what == "never":
        ff.init_runtime(devices=2, accelerator="cpu", spawn="never")
    if what == "torchrun":
        join_torchrun()
        return
    try:
        os.chdir(os.environ.get("ELSEWHERE", "."))
        rt = ff.init_runtime(devices=2, accelerator="cpu", timeout=60)
    finally:  # in the process that waits for the ranks this block must not run
        tell(os.environ.get("RANK"), came_back=True)
    group = rt.world.group
    if rt.rank == 1 and what == "raise":
        raise ValueError("the data are gone")
    if rt.rank == 1 and what == "exit":
        sys.exit(3)
    dist.barrier(group=group)
    facts = {
        "environment": rt.environment,
        "strategy": rt.strategy.name,
        "argv": sys.argv[1:],
        "optimize": sys.flags.optimize,
        "xoptions": sys._xoptions.get("mine"),
        "omp": os.environ.get("OMP_NUM_THREADS"),
        "listens": listeners("self"),
        "parent_listens": listeners(os.getppid()),
    }
    tell(rt.rank, **facts)
    dist.barrier(group=group)


def join_torchrun():
    """The same file under torchrun: with all defaults, with ddp, with conflicts, twice."""
    with ff.runtime() as rt:
        assert (rt.world_size, rt.environment, rt.strategy.name) == (2, "torchrun", "ddp")
        second = ff.init_runtime(strategy="functional", devices=2, precision="bf16-mixed", num_nodes=1)
        assert second.world.group is rt.world.group
        ff.shutdown(second)  # it did not make the group
        dist.barrier(group=rt.world.group)
    assert not dist.is_initialized()
    with ff.runtime(strategy="ddp") as rt:  # a second group over the same store
        dist.barrier(group=rt.world.group)
    errors = []
    for options in ({"devices": 3}, {"num_nodes": 2}, {"node_rank": 1}, {"max_restarts": 5}, {"strategy": "single"}):
        try:
            ff.init_runtime(**options)
        except ff.errors.ConfigurationError as error:
            errors.append(str(error))
    tell(rt.rank, errors=errors)


if __name__ == "__main__":
    main(sys.argv[1])
