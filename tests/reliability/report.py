"""The page docs/reliability.md, from the counts."""

from typing import Any

HEAD = """# Checkpoints that survive, jobs that end

What fabricfn promises of a checkpoint and of a job that breaks, and how often it was tried. The counts are made by

```
python -m tests.reliability --full --write      # one figure: --only R3
```

and at a smaller size by `tests/test_survival.py`, `tests/test_checkpoint_machine.py` and `tests/test_failures.py` in
every round of tests. Anything but zero in a column "lost", "mixed", "silent", "unnamed", "slow", "other", "violations",
"left", "status 0", "aborted", "orphans" or "beyond" is a bug.
"""

TEXTS = {
    "R1": """## Kill -9 at a random instant of a save

Real processes; with two ranks on a real gloo group both, or one of them, are killed. What stands afterwards is the
old checkpoint or the new one. The rank that survives gets a `CheckpointError` ("survivors unclear" counts others), and
what the killed save left is gone after the next one ("left" counts hidden folders).
""",
    "R2": """## A power failure after every call

The calls that a save makes (create, mkdir, write, fsync, rename, exchange, unlink, rmdir) really run and are recorded;
a small model of a file system (`tests/reliability/filesystem.py`) tells what a power failure after each of them may
leave: of what was not yet flushed, each write and each name on its own may be there or not, a write also in part or as
zeros. Each such disk is made and loaded. Once `save` has returned, only the new checkpoint counts. "After a kill": a
save is killed at each of its calls, and the power fails after each call of the next. "A call fails": each call raises
an input/output error once; the next save in the same process finds and leaves nothing ("no error": what failed was the
removal of something after the commit). "The old" of a first save is nothing.

The promise needs a file system that keeps what was fsynced, and whose rename is atomic. Where a checkpoint stands in a
folder that the caller has just made, that folder's name is flushed as long as the folder is empty.
""",
    "R3": """## Damage

A checkpoint of two ranks, arrays of several dtypes, one larger than a checksum's block. `ff.load` and
`ff.verify_checkpoint` must both raise a `CheckpointError` that names the file. Every byte of every file is covered:
data by a CRC-32 each 4 MiB, headers by comparison with the manifest, the manifest by its SHA-256. Whoever edits a
manifest and makes its SHA-256 right again is found where the data files tell otherwise (sizes, places, shapes, dtypes,
checksums, save id). What only the manifest says (plain values, names, the time, the strategy) can be rewritten like
that: a checksum is no signature.
""",
    "R4": """## Hostile checkpoints

Each field of a manifest removed or replaced, links, pipes, sockets, devices, holes of 2 TiB, deep nesting, a million
empty lists, arrangements of pieces that are costly to tell apart; and manifests changed at random by hypothesis, signed
again. Each must end as an error or as the load that an independent reader of the same files finds, within 1 s of CPU
and, held by the kernel, within twice the size of the files plus 96 MiB of address space. Time and memory grow with the
manifest, which is refused beyond 64 MiB: JSON made for it takes 0.3 s and up to 35 MiB a MiB.
""",
    "R8": """## A rank breaks

Two ranks in the middle of training, one of which raises, leaves, crashes, is killed or runs out of memory; the ways to
start (script, `fabricfn run`, `launch` with fork, spawn, forkserver) take turns. "left" counts processes of the ranks,
and what these had started, that were still there; "unnamed" first lines on stderr that do not say which rank failed and
how; "slow" trials of more than 5 s. The milliseconds are the worst from the death to the end of the last process, and
to the line that names the cause. "leaving": the interpreters of all ranks end right after a collective or a step, or
with a save in flight; torch's threads must be done with Python by then ("aborted": SIGABRT, or another status but 0).
""",
    "R10": """## The process that started the ranks is killed

`kill -9` in the middle of training; "orphans" are jobs of which a rank was there 2 s later.
""",
    "R13": """## No code in a checkpoint

Events of Python's audit hook (`sys.addaudithook`) during `load` with and without a template and `verify_checkpoint`,
after one load to warm up, on all ranks together. What the ranks tell each other is JSON; only the states of objects
that differ between ranks (loaders) travel pickled, between the ranks of one job, never from the disk.
""",
    "R14": """## Who listens

The addresses on which the two ranks of a job on one machine, and the process that started them, listen (TCP, as the
kernel lists them). The kernel chooses the ports.
""",
    "R16": """## Random histories

hypothesis draws histories of saves (sharded over up to three ranks), loads, real kills at a file-system call, damage to
the newest, retention and resharding, and keeps a model of them beside: every acknowledged save stays readable bit for
bit until it is deleted, and `latest` is the newest whole one, or says that it fell back.
""",
}

PEERS = """## Others

Counted on 20 Nov 2026 while fabricfn was developed: lightning 2.6.6, accelerate 1.15.0, torch 2.13.0 (DCP),
safetensors 0.8.0, on 2 cores and ext4. 100 MB saved over an existing checkpoint, killed at a random instant:

| | kills | old | new | mixed | lost |
|---|---|---|---|---|---|
| `torch.save` in place | 40 | 32 | 0 | 0 | 8 |
| `safetensors.save_file` | 38 | 37 | 1 | 0 | 0 |
| `Fabric.save`, file system of `$TMPDIR` | 34 | 33 | 1 | 0 | 0 |
| `Fabric.save`, another file system | 32 | 28 | 2 | 0 | 2 |
| `Accelerator.save_state`, one folder | 46 | 38 | 3 | 4 | 1 |
| `Accelerator.save_state`, automatic names, `total_limit=1` | 11 | 0 | 2 | 0 | 9 |
| DCP `save` | 29 | 21 | 2 | 0 | 6 |
| DCP, Hugging Face writer | 38 | 19 | 2 | 0 | 17 |

Bits flipped, files cut, blocks of 4 KiB zeroed; silent means a load without an error and with wrong data:

| | flips: silent / error / no effect | cuts: error / silent | zeroed: silent / error / no effect |
|---|---|---|---|
| Fabric | 117 / 1 / 2 | 40 / 0 | 16 / 4 / 0 |
| Accelerate | 102 / 3 / 15 | 39 / 1 | 13 / 4 / 3 |
| DCP | 82 / 13 / 25 | 40 / 0 | 8 / 12 / 0 |
| DCP, Hugging Face writer | 118 / 1 / 1 | 40 / 0 | 19 / 0 / 1 |

A pickle planted in a checkpoint was run by DCP (`.metadata`, byte entries) and Accelerate (`custom_checkpoint_0.pkl`).
Power failures and hostile headers were not tried on others; no call of fsync is in the Python of Fabric or Accelerate.
"""


def table(rows: dict[str, dict[str, int]]) -> str:
    """Rows of counts, a table for each set of columns."""
    lines: list[str] = []
    columns: list[str] = []
    for name, counts in grouped(rows).items():
        if list(counts) != columns:
            columns = list(counts)
            lines += ["", f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
        lines.append(f"| {name} | {' | '.join(f'{count:,}' for count in counts.values())} |")
    total = [key for key in columns if all(key in counts for counts in rows.values())]
    if len(rows) > 1 and len(total) == len(columns):
        sums = ((max if key.endswith("ms") else sum)(row[key] for row in rows.values()) for key in columns)
        lines.append(f"| **all** | {' | '.join(f'**{count:,}**' for count in sums)} |")
    return "\n".join(lines[1:])


def page(found: dict[str, Any]) -> str:
    """The whole page."""
    parts = [HEAD]
    for name, text in TEXTS.items():
        if name in found:
            figure = found[name]
            parts += [
                text,
                table(figure["rows"]) + "\n",
                f"{name}, {figure['date']}, {figure['seconds']} s.{figure.get('note', '')}\n",
            ]
    return "\n".join([*parts, PEERS])


def grouped(rows: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Rows of equal columns together."""
    return dict(sorted(rows.items(), key=lambda row: [list(other) for other in rows.values()].index(list(row[1]))))
