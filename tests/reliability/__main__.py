"""Count how checkpoints survive: `python -m tests.reliability [--only R1] [--full] [--write]`.

Without `--full` the counts are those of tests/test_survival.py; with it 500 kills, 2,000 corruptions, 100,000 fuzzed
manifests: about an hour. `--write` writes docs/reliability.md.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.reliability import audit, corruption, crashes, endings, hostility, kills, machine, report

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs/reliability.json"

Rows = dict[str, dict[str, int]]


def complain(name: str, end: object) -> None:
    """Show an input that did harm."""
    print(f"  {name}: {end if isinstance(end, str) else repr(end)[:2000]}", flush=True)


def r1(full: bool) -> Rows:
    """Kill -9."""
    return kills.rows(504 if full else 48)


def r2(full: bool) -> Rows:
    """Power failures, and calls that fail."""
    found: Rows = {}
    for name in crashes.OPERATIONS:
        seeds = [Counter(crashes.power_failures(name, seed=seed)) for seed in range(10 if full else 1)]
        found[name] = {key: sum(counts[key] for counts in seeds) for key in seeds[0]}
        if "2 ranks" not in name:
            found[f"{name}, after a kill"] = crashes.kill_then_power_failure(name)
        found[f"{name}, a call fails"] = crashes.failing_calls(name, lambda: OSError(5, "Input/output error"))
    return found


def r3(full: bool) -> Rows:
    """Damage."""
    return corruption.corruptions(2000 if full else 200)


def r4(full: bool) -> Rows:
    """Hostile manifests and folders."""
    return {
        "made by hand": hostility.handmade(1 if full else 20, complain),
        "fuzzed": hostility.fuzz(100_000 if full else 500, report=complain),
    }


def r8(full: bool) -> Rows:
    """A rank breaks."""
    return endings.breakages(full) | {
        f"leaving, {ranks} ranks": {"jobs": times, "aborted": endings.aborted(ranks, times)}
        for ranks, times in ((2, 100 if full else 5), (4, 100 if full else 5))
    }


def r10(full: bool) -> Rows:
    """The parent of the ranks is killed."""
    return endings.orphans(10 if full else 2)


def r14(full: bool) -> Rows:
    """Who listens."""
    return endings.listeners()


def r13(full: bool) -> Rows:
    """The audit hook."""
    return {"load and verify": audit.audit(1), "load and verify, two ranks": audit.audit(2)}


def r16(full: bool) -> Rows:
    """Random histories; a violation is an AssertionError that shows the history."""
    examples, steps = (200, 30) if full else (20, 12)
    machine.run_machine(examples, steps)
    return {"save, load, kill, damage, retain, reshard": {"histories": examples, "steps": steps, "violations": 0}}


FIGURES_OF: dict[str, Callable[[bool], Rows]] = {
    **{"R1": r1, "R2": r2, "R3": r3, "R4": r4},
    **{"R8": r8, "R10": r10, "R13": r13, "R14": r14, "R16": r16},
}


def main() -> None:
    """Count and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=FIGURES_OF, help="one figure; the others stay as they were")
    parser.add_argument("--full", action="store_true", help="the full counts")
    parser.add_argument("--write", action="store_true", help="write docs/reliability.md and .json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for name in [args.only] if args.only else FIGURES_OF:
        began = time.monotonic()
        rows = FIGURES_OF[name](args.full)
        found[name] = {"rows": rows, "seconds": round(time.monotonic() - began), "date": time.strftime("%d %b %Y")}
        print(report.table(rows), flush=True)
        if args.write:  # after each figure: the full counts take long
            FIGURES.write_text(json.dumps(found, indent=1) + "\n")
            (ROOT / "docs/reliability.md").write_text(report.page(found))


if __name__ == "__main__":
    main()
