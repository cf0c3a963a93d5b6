"""The page docs/benchmarks.md, from the figures."""

from typing import Any

# What is asked for: figure -> contender -> the largest ratio.
ASKED = {
    "steps 4 32-true": {"fabricfn, donated": 0.5, "fabricfn, pure": 0.6},
    "steps 40 32-true": {"fabricfn, donated": 0.45, "fabricfn, pure": 0.6},
    "steps 4 bf16-mixed": {"fabricfn, donated": 0.8},
    "randomness": {"a key a step": 1.1},
    "ddp 1": {"fabricfn, donated": 1.0},
    "ddp 8": {"fabricfn, donated": 1.0},
    "fsdp linear 1": {"fabricfn, donated": 1.05},
    "fsdp linear 8": {"fabricfn, donated": 1.05},
    "fsdp transformer 1": {"fabricfn, donated": 1.05},
    "fsdp transformer 8": {"fabricfn, donated": 1.05},
    "collectives all_reduce": {"fabricfn": 0.05},
    "collectives broadcast": {"fabricfn": 0.05},
    "collectives all_gather": {"fabricfn": 0.05},
    "to_device": {"fabricfn": 1.2},
    "batches": {"fabricfn": 1.2},
    "stream": {"fabricfn": 1.1},
    "starting spawn": {"fabricfn": 1.1},
    "starting forkserver": {"fabricfn": 1.1},
    "starting fork": {"fabricfn": 1.1},
    "starting default": {"fabricfn, spawn": 0.5, "fabricfn": 0.5},
    "imports": {"import fabricfn": 1.05},
    "save": {"fabricfn": 1.11},
    "sharded save": {"fabricfn": 1.11},
    "load": {"fabricfn": 1.0},
    "sharded load": {"fabricfn": 1.0},
}

STEP_ROWS = {
    "steps 4 32-true": "4 layers",
    "steps 40 32-true": "40 layers",
    "steps 4 bf16-mixed": "4 layers, bf16-mixed",
}
DDP_ROWS = {"ddp 1": "one batch a step", "ddp 8": "8 micro-batches a step"}
CANONICAL_ROWS = {"canonical 1": "1 rank", "canonical 2": "2 ranks"}
FSDP_ROWS = {
    "fsdp linear 1": "8 linear blocks, one batch a step",
    "fsdp linear 8": "8 linear blocks, 8 micro-batches a step",
    "fsdp transformer 1": "4 encoder layers, one batch a step",
    "fsdp transformer 8": "4 encoder layers, 8 micro-batches a step",
}
COLLECTIVE_ROWS = {
    "collectives all_reduce": "all_reduce",
    "collectives broadcast": "broadcast",
    "collectives all_gather": "all_gather",
}
INPUT_ROWS = {
    "to_device": "`to_device` of 20 nested tensors against `optree.tree_map`",
    "batches": "`batches` over ready batches, a batch, against the bare DataLoader",
}
STREAM_ROWS = {"stream": "an epoch over an IterableDataset of 16384 samples, batches of 32"}

FIRST_COLLECTIVE = {"fabricfn": "fabricfn", "Lightning Fabric": "Lightning Fabric"}
SPAWNS = {"fabricfn, spawn": "fabricfn, spawn", "fabricfn": "fabricfn, by itself (fork)"}
STARTING_ROWS = {
    "starting spawn": "spawn",
    "starting forkserver": "forkserver",
    "starting fork": "fork",
}

PARTS = {
    "partial rows": "half of the rows of one tensor",
    "partial columns": "half of the columns",
    "partial one": "one tensor of 25, by `only=`",
}

HEAD = """# Benchmarks

Made by `nox -s benchmarks` (that is `python -m tests.benchmarks`); the raw figures are in
[benchmarks.json](benchmarks.json). Do not edit by hand.

Measured on {cpu}; Python {python}, torch {torch}, optree {optree}, Lightning Fabric {lightning-fabric}, Accelerate
{accelerate}; one thread a process.

How: contenders take turns in one process, in a shuffled order, so that a disturbance hits all of them; each figure is
a median over rounds, then over {processes} fresh processes. The tables show ratios to the first contender; **again** is
the same code a second time and shows the noise; brackets hold what is asked for.
"""

FSDP_HEAD = """## One step, two ranks, sharded

Wall time under fsdp, against hand-written `fully_shard` of every block and the root; Lightning Fabric's
`ModelParallelStrategy` calls the same. Blocks: `Linear(256, 256)` and gelu, batch 16 a rank;
`TransformerEncoderLayer(256, 4, 1024)`, batch 8 of 64 tokens a rank. Of 8 micro-batches the last one reduces gradients.
Asked for FSDP2 on CPU ranks, Accelerate takes DDP without a word; here its state is set to FSDP2 by hand.
fabricfn gathers ahead on CPU (an option of torch's that the others leave off) and steps on the local parts.
"""


SAVERS = {"torch.save": "torch.save", "DCP": "DCP", "Lightning Fabric": "Lightning Fabric", "Accelerate": "Accelerate"}
LOADERS = {"torch.load": "torch.load", "safetensors, copied": "safetensors"}

SAVE_HEAD = """## Checkpoints

Wall time for 384 MiB of float32 (24 tensors), written to a new place and flushed to the disk; on two ranks half of
every tensor each. Bare: the same bytes by `write` and one `fsync`. fabricfn also computes and keeps a checksum of every
block (by ISA-L: the extra `isal`); what the peers wrote is flushed for them, within their time. Each is called twice in
a row and the second call counts: the host of a virtual machine supplies pages that were free for some seconds one by
one, which takes up to five times as long as the copy into them. DCP is torch's distributed checkpoint. Alone:
`python -m tests.benchmarks --only save` (and `load`, `sharded`, `stall`, `partial`).
"""


STARTING_HEAD = """## Starting two ranks

Wall time from the call to the end of the first collective, `torch.distributed.all_reduce` of one number; each call in a
process of its own, which has imported everything before. torch: `torch.multiprocessing.start_processes` and gloo by
`tcp://`. Alone: `python -m tests.benchmarks --only starting`.
"""


def parts_table(results: dict[str, Any]) -> str:
    """Bytes read over bytes needed."""
    lines = ["| what a rank of two loads | MiB needed | read / needed |", "| --- | --- | --- |"]
    for key, title in PARTS.items():
        result = results[key]
        lines.append(f"| {title} | {result['seconds'] / 2**20:g} | {result['ratios']['fabricfn']:.3f} |")
    return "\n".join(lines) + "\n"


def cell(result: dict[str, Any], name: str, asked: dict[str, float]) -> str:
    """A ratio, and in brackets the largest that is asked for."""
    if name not in result["ratios"]:
        return "not installed"
    limit = f" (<= {asked[name]:g})" if name in asked else ""
    return f"{result['ratios'][name]:.2f}{limit}"


def amount(seconds: float) -> str:
    """Seconds, in a readable unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds * 1e6:.2f} us"


def table(results: dict[str, Any], rows: dict[str, str], base: str, contenders: dict[str, str]) -> str:
    """One Markdown table: a line per row, a column per contender."""
    head = ["", base, *contenders.values()]
    lines = [head, ["---"] * len(head)]
    for key, title in rows.items():
        if key not in results:  # `--only` of another row, on a page that is older than this one
            continue
        result = results[key]
        cells = [cell(result, name, ASKED.get(key, {})) for name in contenders]
        lines.append([title, amount(result["seconds"]), *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def render(results: dict[str, Any], processes: int = 3) -> str:
    """The whole page."""
    hand = {"plain again (noise)": "again", "fused": "by hand, fused"}
    ours = {"fabricfn, donated": "fabricfn, donated", "fabricfn, pure": "fabricfn, pure"}
    peers = {"Lightning Fabric": "Lightning Fabric", "Accelerate": "Accelerate"}
    collectives = {"loop again (noise)": "again", "fabricfn": "fabricfn"}
    seeding = {
        "no key again (noise)": "again",
        "a key a step": "a key a step",
        "torch.manual_seed a step": "`torch.manual_seed` a step",
    }
    first = {
        "imports": {name: name for name in list(results["imports"]["ratios"])[1:]},
        "first_step": {"plain again (noise)": "again", "fabricfn": "fabricfn"},
    }
    bare = {"bare again (noise)": "again", "fabricfn": "fabricfn"}
    base = {"DCP again (noise)": "again", "fabricfn": "fabricfn"}
    copies = {"copy again (noise)": "again", "fabricfn": "fabricfn", "fresh clones": "copy into fresh memory"}
    parts = [
        HEAD.format(**results["machine"], processes=processes),
        "## One step, one process\n\nCPU time of forward, backward and AdamW for layers of `Linear(32, 32)`, batch 8."
        " By hand: `torch.optim.AdamW(params, lr)`.\n",
        table(results, STEP_ROWS, "by hand", {**hand, **ours, **peers}),
        "## One step with dropout\n\nCPU time for 4 layers, each with dropout: fabricfn's step without a key, with"
        " `rng=ff.fold_in(key, opt.step)`, and after `torch.manual_seed(opt.step)`.\n",
        table(results, {"randomness": "4 layers"}, "no key", seeding),
        "## One step, two ranks\n\nWall time under ddp for 4 layers, against hand-written `DistributedDataParallel`"
        " (`no_sync` for the first micro-batches).\n",
        table(results, DDP_ROWS, "by hand", {**hand, **ours}),
        "## The same bits on any number of ranks\n\nWall time of a step with 8 micro-batches a rank, for 4 layers:"
        ' `accumulate(..., reduce="canonical")` against `reduce="mean"`; see [determinism](determinism.md). Alone:'
        " `python -m tests.benchmarks --measure canonical"
        ' \'{"size": 2, "layers": 4, "accumulation": 8, "rounds": 120}\'`.\n',
        table(results, CANONICAL_ROWS, "mean", {"mean again (noise)": "again", "canonical": "canonical"}),
        FSDP_HEAD,
        table(results, FSDP_ROWS, "by hand", {**hand, **ours, **peers}),
        "## Collectives, two ranks\n\nWall time for 200 small tensors, against a loop over them.\n",
        table(results, COLLECTIVE_ROWS, "loop", collectives),
        "## Around the step\n\nCPU time.\n",
        table(results, INPUT_ROWS, "bare", {"bare again (noise)": "again", "fabricfn": "fabricfn"}),
        "On two ranks the bare DataLoader gives all of the data to each rank; fabricfn gives every sample to"
        " one, and lets the ranks vote whether all of them have further batches.\n",
        table(results, STREAM_ROWS, "bare", {"bare again (noise)": "again", "fabricfn": "fabricfn"}),
        SAVE_HEAD,
        table(results, {"save": "save, one process"}, "bare", {**bare, **SAVERS}),
        table(results, {"sharded save": "save, two ranks"}, "bare", {**bare, "DCP": "DCP"}),
        "Loaded into new tensors from the page cache; fabricfn checks every byte, the others none. safetensors: mapped"
        " and copied.\n",
        table(results, {"load": "load, one process"}, "DCP", {**base, **LOADERS}),
        table(results, {"sharded load": "load, two ranks"}, "DCP", base),
        "How long `save(blocking=False)` holds up its caller, from the second save on, against one copy of the same"
        " bytes into memory in use.\n",
        table(results, {"stall": "one process"}, "copy", copies),
        "Bytes read by a load of a part, manifest and headers included; a block of 4 MiB is read whole.\n",
        parts_table(results),
        table(results, {"imports": "importing"}, "import torch", first["imports"]),
        table(results, {"first_step": "from nothing to the first step done"}, "by hand", first["first_step"]),
        STARTING_HEAD,
        table(results, STARTING_ROWS, "torch", {"torch again (noise)": "again", **FIRST_COLLECTIVE}),
        table(results, {"starting default": "two ranks"}, "Lightning Fabric, spawn", SPAWNS),
    ]
    return "\n".join(parts)
