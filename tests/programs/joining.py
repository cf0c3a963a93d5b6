"""A script that joins the processes which are there, under any launcher. Usage: joining.py [words ...]."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from script import listeners

import fabricfn as ff


def main(*words):
    rt = ff.init_runtime(timeout=60)
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    total = ff.all_reduce(rt, torch.tensor([rt.rank + 1.0]), op="sum").tolist()
    facts = {
        "rank": rt.rank,
        "sum": total,
        "environment": rt.environment,
        "place": [rt.local_rank, rt.local_world_size, rt.node_rank, rt.num_nodes],
        "compute": str(rt.precision.compute_dtype),
        "strategy": rt.strategy.name,
        "words": words,
        "listens": listeners("self"),
        "attempt": attempt,
    }
    Path(os.environ["FACTS"], f"rank-{rt.rank}").write_text(json.dumps(facts))
    ff.barrier(rt)
    if words[:1] == ("exit",) and rt.rank == 1:
        sys.exit(7)
    if words[:1] == ("fail once",) and attempt == 0:
        if rt.rank == 1:
            raise ValueError("the first attempt")
        signal.pause()  # notices nothing by itself
    ff.barrier(rt)


if __name__ == "__main__":
    main(*sys.argv[1:])
