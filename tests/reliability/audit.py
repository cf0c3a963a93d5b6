"""R13: what the interpreter itself tells of a load: it imports, unpickles, compiles and runs nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fabricfn as ff
from tests.reliability.scene import ALONE, scratch

WATCHED = ("import", "pickle.find_class", "compile", "exec", "marshal.loads", "os.system", "subprocess.Popen", "open")
OURS = ("manifest.json", "data", ".")
"""Names that are opened relative to the checkpoint's own descriptors."""


def watch(rt: ff.Runtime, warm: Path, place: Path) -> list[tuple[str, str]]:
    """Load a checkpoint, then another one under the hook; what happened on this rank."""
    template = made()
    ff.load(rt, warm, template)
    ff.verify_checkpoint(warm)
    seen: list[tuple[str, str]] = []
    on = False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if on and event.startswith(WATCHED):
            seen.append((event, " ".join(str(arg)[:200] for arg in args[:2])))

    sys.addaudithook(hook)
    on = True
    ff.load(rt, place)
    ff.load(rt, place, template)
    ff.verify_checkpoint(place)
    on = False
    return seen


def made() -> dict[str, Any]:
    """Every kind of entry, and arrays so large that several threads read them."""
    net = torch.nn.Linear(3, 2)
    model = ff.setup_model(ALONE, net)
    return {
        "model": model,
        "optimizer": ff.setup_optimizer(ALONE, model, torch.optim.AdamW, lr=0.1),
        "cursor": ff.Cursor(epoch=2),
        "large": [torch.ones(3 << 20), np.ones(5)],
        "raw": torch.ones(2, dtype=torch.complex64),
        "plain": (1, "a", 0.5, None, b"b", 1j),
    }


def audit(ranks: int) -> dict[str, int]:
    """Load on so many fresh processes with an audit hook.

    Returns:
        counts of the events that a load must not cause, and of the files that it opened inside and outside of the
        checkpoint; on all ranks together.
    """
    with scratch() as folder:
        for name in ("warm", "a"):
            ff.save(ALONE, folder / name, made())
        command = [sys.executable, "-m", "tests.reliability.audit", str(ranks), str(folder)]
        root = Path(__file__).parents[2]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, env=os.environ)
        if done.returncode:
            raise AssertionError(done.stderr)
        counts = {event: 0 for event in WATCHED if event != "open"} | {"opened inside": 0, "opened outside": 0}
        for event, text in json.loads(done.stdout.splitlines()[-1]):
            if event != "open":
                counts[event] = counts.get(event, 0) + 1
                continue
            name = text.partition(" ")[0]
            inside = name in OURS or name.endswith(".safetensors") or name.startswith(f"{folder}/a")
            counts["opened inside" if inside else "opened outside"] += 1
        return counts


def main() -> None:
    """The child of `audit`: print what all its ranks saw."""
    folder = Path(sys.argv[2])
    ranks = ff.launch(watch, folder / "warm", folder / "a", accelerator="cpu", devices=int(sys.argv[1]))
    print(json.dumps([event for seen in ranks for event in seen]))


if __name__ == "__main__":
    # As `python -m` calls this file `__main__`, its functions could not be found by the ranks under that name.
    from tests.reliability.audit import main as run

    run()
