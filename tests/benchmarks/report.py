"""The page docs/benchmarks.md, from the figures: sections of tables, as data."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

Columns = dict[str, str]
"""contender -> title."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A line per row, a column per contender; the first column is in seconds, all others are ratios to it."""

    text: str = ""
    """What stands above it: Markdown."""
    rows: dict[str, str]
    """key of the results -> title."""
    base: str
    """The title of what others are compared with."""
    columns: Columns
    seconds: bool = True
    """Whether the base is shown in seconds (else the ratios alone)."""


HAND = {"plain again (noise)": "again", "fused": "by hand, fused"}
OURS = {"fabricfn, donated": "fabricfn, donated", "fabricfn, pure": "fabricfn, pure"}
PEERS = {"Lightning Fabric": "Lightning Fabric", "Accelerate": "Accelerate"}
COMPILED = {"fabricfn, compiled": "fabricfn, compiled"}
LOOPS = {**HAND, **OURS, **PEERS}
FSDP = {
    f"fsdp 2 {kind} {count}": f"{title}, {'one batch' if count == 1 else f'{count} micro-batches'} a step"
    for kind, title in (("8 blocks", "8 linear blocks"), ("4 encoder layers", "4 encoder layers"), ("GPT", "GPT"))
    for count in (1, 8)
}
FLAT_SHARDED = {f"flat_sharded{key.removeprefix('fsdp')}": f'fabricfn with "flat_sharded": {FSDP[key]}' for key in FSDP}

# What is asked for: figure -> contender -> the largest ratio.
ASKED: dict[str, dict[str, float]] = {
    "steps 4": {"fabricfn, donated": 0.5, "fabricfn, pure": 0.6, "fabricfn, compiled": 0.3},
    "steps 40": {"fabricfn, donated": 0.3, "fabricfn, compiled": 0.25},
    "steps 4 bf16-mixed": {"fabricfn, donated": 0.75},
    "steps GPT 1": {"fabricfn, donated": 1.0, "fabricfn, compiled": 1.0},
    "steps GPT 8": {"fabricfn, donated": 1.0},
    "randomness": {"a key a step": 1.1},
    "ddp 2 4 layers 1": {"fabricfn, donated": 1.0},
    "ddp 2 4 layers 8": {"fabricfn, donated": 0.8},
    "ddp 2 GPT 1": {"fabricfn, donated": 1.0},
    "ddp 2 GPT 8": {"fabricfn, donated": 1.0},
    **{key: {"fabricfn, donated": 1.0 if "GPT" in key else 1.05} for key in FSDP},
    "collectives 200 all_reduce": {"fabricfn": 0.05},
    "collectives 200 broadcast": {"fabricfn": 0.05},
    "collectives 200 all_gather": {"fabricfn": 0.05},
    "to_device": {"fabricfn": 1.2},
    "batches shuffled": {"fabricfn": 1.1},
    "batches ready": {"fabricfn": 1.1},
    "stream": {"fabricfn": 1.1},
    "starting spawn": {"fabricfn": 1.1},
    "starting forkserver": {"fabricfn": 1.1},
    "starting fork": {"fabricfn": 1.1},
    "starting default": {"fabricfn, spawn": 0.5, "fabricfn": 0.5},
    "imports": {"import fabricfn": 1.05},
    "first_step": {"fabricfn": 0.6},
    "memory model": {"fabricfn, donated": 1.05},
    "save": {"fabricfn": 1.11},
    "sharded save": {"fabricfn": 1.11},
    "load": {"fabricfn": 1.0},
    "sharded load": {"fabricfn": 1.0},
    "gpu steps 4": {"fabricfn, donated": 1.0},
    "gpu steps 40": {"fabricfn, donated": 1.0, "fabricfn, captured": 0.5},
    "gpu GPT-2 124M step": {"fabricfn, donated": 1.0},
    "gpu GPT-2 350M step": {"fabricfn, donated": 1.0},
}

HEAD = """# Benchmarks

Made by `nox -s benchmarks` (that is `python -m tests.benchmarks`); the raw figures are in
[benchmarks.json](benchmarks.json). Do not edit by hand. One row: `python -m tests.benchmarks --only "fsdp 2 GPT"`.

Measured on {cpu}; Python {python}, torch {torch}, optree {optree}, Lightning Fabric {lightning-fabric}, Accelerate
{accelerate}; one thread a process.

How: contenders take turns in one process, in a shuffled order, so that a disturbance hits all of them. A turn of a
small step is ten of them in a row after one that does not count (of the others one after one): in a loop, too, a step
comes after its like. Each figure is a median over rounds, then over {processes} fresh processes (one for GPT and for
what starts processes of its own). The tables show ratios to the first contender; **again** is the same code a second
time and shows the noise; brackets hold what is asked for.

![the ratios of the steps](ratios.svg)
"""

PARTS = {
    "partial rows": "half of the rows of one tensor",
    "partial columns": "half of the columns",
    "partial one": "one tensor of 25, by `only=`",
}


def parts_table(results: dict[str, Any]) -> str:
    """Bytes read over bytes needed."""
    text = "Bytes read by a load of a part, manifest and headers included; a block of 4 MiB is read whole."
    lines = [text, "", "| what a rank of two loads | MiB needed | read / needed |", "| --- | --- | --- |"]
    for key, title in PARTS.items():
        result = results[key]
        lines.append(f"| {title} | {result['seconds'] / 2**20:g} | {result['ratios']['fabricfn']:.3f} |")
    return "\n".join(lines) + "\n"


def functions_table(results: dict[str, Any]) -> str:
    """What a call costs, in microseconds."""
    text = """## One call

Microseconds of CPU on one process for the functions that stand in a loop, for 4 layers (tensors of 8 x 32 for
`to_device` and `all_reduce`), and of what one writes without fabricfn: `loss.backward()`, `clip_grad_norm_`, a fused
AdamW, `AveragedModel`. What it costs to send is under "Collectives", to save under "Checkpoints"."""
    lines = [text, "", "| | fabricfn | by hand |", "| --- | --- | --- |"]
    for key, result in results.items():
        if key.startswith("functions "):
            base, ratios = result["seconds"] * 1e6, result["ratios"]
            hand = f"{base:.1f}" if "by hand" in ratios else ""
            lines.append(f"| `{key.removeprefix('functions ')}` | {base * ratios['fabricfn']:.1f} | {hand} |")
    return "\n".join(lines) + "\n"


SECTIONS: tuple[Table | Callable[[dict[str, Any]], str], ...] = (
    Table(
        text="## One step, one process\n\nCPU time of forward, backward and AdamW for layers of `Linear(32, 32)`,"
        " batch 8: how the cost grows from 2 to 1,000 parameters; and for a GPT of 10.8 million parameters (6 layers of"
        " 384, 4 rows of 64 bytes). By hand: `torch.optim.AdamW(params, lr)`. No optimizer: forward and `backward()`"
        " alone, below which nothing comes that is not compiled.",
        rows={
            "steps 1": "1 layer",
            "steps 4": "4 layers",
            "steps 40": "40 layers",
            "steps 500": "500 layers",
            **{f"steps {n} bf16-mixed": f"{n} layer{'s' * (n > 1)}, bf16-mixed" for n in (1, 4, 40)},
            **{f"steps {n} SGD": f"{n} layer{'s' * (n > 1)}, SGD" for n in (1, 4, 40)},
            "steps GPT 1": "GPT",
            "steps GPT 8": "GPT, 8 micro-batches a step",
        },
        base="by hand",
        columns={
            **HAND,
            "no optimizer": "no optimizer",
            **OURS,
            **COMPILED,
            **PEERS,
        },
    ),
    Table(
        text="## One step with dropout\n\nCPU time for 4 layers, each with dropout: fabricfn's step without a key, with"
        " `rng=ff.fold_in(key, opt.step)`, and after `torch.manual_seed(opt.step)`.",
        rows={"randomness": "4 layers"},
        base="no key",
        columns={
            "no key again (noise)": "again",
            "a key a step": "a key a step",
            "torch.manual_seed a step": "`torch.manual_seed` a step",
        },
    ),
    functions_table,
    Table(
        text="## One step, several ranks\n\nWall time under ddp, against hand-written `DistributedDataParallel`"
        " (`no_sync` for the first micro-batches). Four ranks share two cores.",
        rows={
            "ddp 2 4 layers 1": "2 ranks, 4 layers, one batch a step",
            "ddp 2 4 layers 8": "2 ranks, 4 layers, 8 micro-batches a step",
            "ddp 4 4 layers 1": "4 ranks, 4 layers, one batch a step",
            "ddp 2 GPT 1": "2 ranks, GPT, one batch a step",
            "ddp 2 GPT 8": "2 ranks, GPT, 8 micro-batches a step",
            "flat 2 4 layers 1": 'fabricfn with "flat": 2 ranks, 4 layers, one batch a step',
            "flat 2 4 layers 8": 'fabricfn with "flat": 2 ranks, 4 layers, 8 micro-batches a step',
            "flat 2 GPT 1": 'fabricfn with "flat": 2 ranks, GPT, one batch a step',
            "functional 2 4 layers 1": 'fabricfn with "functional": 2 ranks, 4 layers, one batch a step',
            "functional 2 4 layers 8": 'fabricfn with "functional": 2 ranks, 4 layers, 8 micro-batches a step',
        },
        base="by hand",
        columns={**HAND, **OURS, **COMPILED, **PEERS},
    ),
    Table(
        text="## The same bits on any number of ranks\n\nWall time of a step with 8 micro-batches a rank, for 4 layers:"
        ' `accumulate(..., reduce="canonical")` against `reduce="mean"`; see [determinism](determinism.md).',
        rows={"canonical 1": "1 rank", "canonical 2": "2 ranks"},
        base="mean",
        columns={"mean again (noise)": "again", "canonical": "canonical"},
    ),
    Table(
        text="""## One step, two ranks, sharded

Wall time under fsdp, against hand-written `fully_shard` of every block and the root; Lightning Fabric's
`ModelParallelStrategy` calls the same. Blocks: `Linear(256, 256)` and gelu, batch 16 a rank;
`TransformerEncoderLayer(256, 4, 1024)`, batch 8 of 64 tokens a rank. Of 8 micro-batches the last one reduces gradients.
Asked for FSDP2 on CPU ranks, Accelerate takes DDP without a word; here its state is set to FSDP2 by hand.
fabricfn gathers ahead on CPU (an option of torch's that the others leave off) and steps on the local parts.""",
        rows={**FSDP, **FLAT_SHARDED},
        base="by hand",
        columns=LOOPS,
    ),
    Table(
        text="## Memory\n\nPeak memory above what was there before, in copies of the parameters (128 MiB): of setting"
        " the model up, and at the end of three steps of AdamW. Gradients and the optimizer's state make four.",
        rows={"memory model": "the model", "memory three steps": "three steps"},
        base="by hand",
        columns={"by hand, fused": "by hand, fused", **OURS, "Lightning Fabric": "Lightning Fabric"},
        seconds=False,
    ),
    Table(
        text="## Collectives, two ranks\n\nWall time for a tree of small tensors, against a loop over them.",
        rows={
            "collectives 1 all_reduce": "all_reduce, 1 tensor",
            "collectives 10 all_reduce": "all_reduce, 10 tensors",
            "collectives 100 all_reduce": "all_reduce, 100 tensors",
            "collectives 1000 all_reduce": "all_reduce, 1,000 tensors",
            "collectives 200 all_reduce": "all_reduce, 200 tensors",
            "collectives 200 broadcast": "broadcast, 200 tensors",
            "collectives 200 all_gather": "all_gather, 200 tensors",
        },
        base="loop",
        columns={"loop again (noise)": "again", "fabricfn": "fabricfn"},
    ),
    Table(
        text="## Around the step\n\nCPU time.",
        rows={
            "to_device": "`to_device` of 20 nested tensors against `optree.tree_map`",
            "batches shuffled": "`batches` over 8,192 shuffled samples, a batch of 32, against the bare DataLoader",
            "batches ready": "`batches` over batches that stand ready, a batch",
        },
        base="bare",
        columns={"bare again (noise)": "again", "fabricfn": "fabricfn"},
    ),
    Table(
        text="On two ranks the bare DataLoader gives all of the data to each rank; fabricfn gives every sample to"
        " one, and lets the ranks vote whether all of them have further batches.",
        rows={"stream": "an epoch over an IterableDataset of 16384 samples, batches of 32"},
        base="bare",
        columns={"bare again (noise)": "again", "fabricfn": "fabricfn"},
    ),
    Table(
        text="""## Checkpoints

Wall time for 384 MiB of float32 (24 tensors), written to a new place and flushed to the disk; on two ranks half of
every tensor each. Bare: the same bytes by `write` and one `fsync`. fabricfn also computes and keeps a checksum of every
block (by ISA-L: the extra `isal`); what the peers wrote is flushed for them, within their time. Each is called twice in
a row and the second call counts: the host of a virtual machine supplies pages that were free for some seconds one by
one, which takes up to five times as long as the copy into them. DCP is torch's distributed checkpoint.""",
        rows={"save": "save, one process"},
        base="bare",
        columns={
            "bare again (noise)": "again",
            "fabricfn": "fabricfn",
            "torch.save": "torch.save",
            "DCP": "DCP",
            **PEERS,
        },
    ),
    Table(
        rows={"sharded save": "save, two ranks"},
        base="bare",
        columns={"bare again (noise)": "again", "fabricfn": "fabricfn", "DCP": "DCP"},
    ),
    Table(
        text="Loaded into new tensors from the page cache; fabricfn checks every byte, the others none. safetensors:"
        " mapped and copied.",
        rows={"load": "load, one process"},
        base="DCP",
        columns={
            "DCP again (noise)": "again",
            "fabricfn": "fabricfn",
            "torch.load": "torch.load",
            "safetensors, copied": "safetensors",
        },
    ),
    Table(
        rows={"sharded load": "load, two ranks"},
        base="DCP",
        columns={"DCP again (noise)": "again", "fabricfn": "fabricfn"},
    ),
    Table(
        text="How long `save(blocking=False)` holds up its caller, from the second save on, against one copy of the"
        " same bytes into memory in use.",
        rows={"stall": "one process"},
        base="copy",
        columns={"copy again (noise)": "again", "fabricfn": "fabricfn", "fresh clones": "copy into fresh memory"},
    ),
    parts_table,
    Table(
        text="## Start-up\n\nCPU time, each in a process of its own.",
        rows={"imports": "importing"},
        base="import torch",
        columns={
            "import torch again (noise)": "again",
            "import fabricfn": "import fabricfn",
            "import fabricfn, use every name of the loop": "import fabricfn, use every name of the loop",
        },
    ),
    Table(
        rows={"first_step": "from nothing to the first step done"},
        base="by hand",
        columns={"plain again (noise)": "again", "fabricfn": "fabricfn"},
    ),
    Table(
        text="""## Starting two ranks

Wall time from the call to the end of the first collective, `torch.distributed.all_reduce` of one number; each call in a
process of its own, which has imported everything before. torch: `torch.multiprocessing.start_processes` and gloo by
`tcp://`.""",
        rows={"starting spawn": "spawn", "starting forkserver": "forkserver", "starting fork": "fork"},
        base="torch",
        columns={"torch again (noise)": "again", "fabricfn": "fabricfn", "Lightning Fabric": "Lightning Fabric"},
    ),
    Table(
        rows={"starting default": "two ranks"},
        base="Lightning Fabric, spawn",
        columns={"fabricfn, spawn": "fabricfn, spawn", "fabricfn": "fabricfn, by itself (fork)"},
    ),
)


def cell(result: dict[str, Any], name: str, asked: dict[str, float]) -> str:
    """A ratio, and in brackets the largest that is asked for."""
    if name not in result["ratios"]:
        return "not measured"
    limit = f" (<= {asked[name]:g})" if name in asked else ""
    return f"{result['ratios'][name]:.2f}{limit}"


def amount(seconds: float) -> str:
    """Seconds, in a readable unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds * 1e6:.2f} us"


def lines_of(table: Table, results: dict[str, Any]) -> str:
    """The table in Markdown; rows that were never measured are left out."""
    head = ["", table.base, *table.columns.values()]
    lines = [head, ["---"] * len(head)]
    for key, title in table.rows.items():
        if key in results:
            result, asked = results[key], ASKED.get(key, {})
            first = amount(result["seconds"]) if table.seconds else cell(result, table.base, asked)
            lines.append([title, first, *(cell(result, name, asked) for name in table.columns)])
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return (f"{table.text}\n\n" if table.text else "") + text + "\n"


GPU_STEPS = Table(
    text="""Wall time of a step with AdamW, of ten in a row. Layers of `Linear(32, 32)` in float32: all take turns.
GPT-2 with bf16-mixed on random tokens (16 rows of 1,024 for 124M, 8 for 350M), attention by
`scaled_dot_product_attention`: each contender in a process of its own. Compiled by hand: the loss function, before a
fused AdamW. Captured: the whole step as one CUDA graph.""",
    rows={
        "gpu steps 4": "4 layers",
        "gpu steps 40": "40 layers",
        "gpu GPT-2 124M step": "GPT-2 124M",
        "gpu GPT-2 350M step": "GPT-2 350M",
    },
    base="by hand",
    columns={
        **HAND,
        "compiled": "by hand, compiled",
        "captured": "by hand, captured",
        **OURS,
        **COMPILED,
        "fabricfn, captured": "fabricfn, captured",
        **PEERS,
    },
)
GPU_FIGURES = (
    {
        f"gpu GPT-2 {size} {part}": f"{size}: {title}"
        for size in ("124M", "350M")
        for part, title in (("tokens", "1,000 tokens a second"), ("MFU", "MFU in %"), ("memory", "peak memory in GiB"))
    },
    {"gpu checkpoints save": "384 MiB from the GPU to the disk, GB/s"},
    {"gpu checkpoints load": "384 MiB from the page cache to the GPU, GB/s"},
)


def figures_of(rows: dict[str, str], results: dict[str, Any]) -> str:
    """The figures themselves, a column per contender."""
    there = {key: results[key] for key in rows if key in results}
    names = list(dict.fromkeys(name for result in there.values() for name in result["ratios"]))
    titles = {"plain": GPU_STEPS.base, **GPU_STEPS.columns}
    lines = [["", *(titles.get(name, name) for name in names)], ["---"] * (1 + len(names))]
    for key, result in there.items():
        values = (f"{result['seconds'] * result['ratios'].get(name, math.nan):.2f}" for name in names)
        lines.append([rows[key], *values])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines if there) + "\n"


def gpu_section(results: dict[str, Any]) -> str:
    """What was measured on a GPU, or that nothing was."""
    if "gpu" not in results:
        return "## On a GPU\n\nNot measured, for want of one: `python -m tests.benchmarks --only gpu` where CUDA is.\n"
    head = "## On a GPU\n\nMeasured on {name}; torch {torch}, CUDA {cuda}.\n".format(**results["gpu"])
    text = """MFU: products (6 for each parameter and token, and attention) over what the maker's data sheet says of
dense bfloat16. Memory: `torch.cuda.max_memory_allocated`.
"""
    return "\n".join([head, lines_of(GPU_STEPS, results), text, *(figures_of(rows, results) for rows in GPU_FIGURES)])


def render(results: dict[str, Any], processes: int = 3) -> str:
    """The whole page."""
    parts = [section(results) if callable(section) else lines_of(section, results) for section in SECTIONS]
    return "\n".join([HEAD.format(**results["machine"], processes=processes), *parts, gpu_section(results)])
