"""A job whose nodes come and go, until there is a file FOLDER/end. Usage: elastic.py FOLDER."""

import sys
import time
from pathlib import Path

import torch

import fabricfn as ff

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    rt = ff.init_runtime(timeout=60)
    (total,) = ff.all_reduce(rt, torch.ones(1), op="sum").tolist()
    (folder / f"attempt-{rt.attempt}-{rt.rank}").write_text(f"{rt.num_nodes} {total:.0f}")
    while not ff.all_reduce(rt, (folder / "end").exists(), op="any"):
        time.sleep(0.02)
