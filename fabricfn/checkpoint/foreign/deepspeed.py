"""Checkpoints of DeepSpeed, of any ZeRO stage and number of ranks, and universal ones: the tree of the whole.

[Note: partitions] ZeRO keeps the parameters of a group as one flat row of numbers: stages 1 and 2 give each rank a
stretch of the row, stage 3 each rank a stretch of every parameter. The rank's file has that flat row of its own
(float32, where the model itself computes in 16 bits) and, of the same length, one row for each slot of the optimizer.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fabricfn.checkpoint.foreign.deepspeed_files import UNIVERSAL, files_of, read
from fabricfn.checkpoint.foreign.stretches import joined
from fabricfn.checkpoint.foreign.values import Stored, taken_up
from fabricfn.errors import CheckpointError

MACHINERY = frozenset(
    {
        *("module", "optimizer", "buffer_names", "param_shapes", "frozen_param_shapes", "frozen_param_fragments"),
        *("shared_params", "ds_config", "universal_checkpoint_info"),
    }
)
"""The entries of a model's file that say how it was cut; the others are DeepSpeed's counters and the user's own."""

Run = tuple[int, int]
"""Where a stretch begins, and how long it is."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Parameters whose numbers lie in one flat row a rank."""

    shapes: Mapping[str, Sequence[int]]
    rows: Sequence[Mapping[str, Any]]
    """For each rank its flat rows: "fp32" are the values, the others slots of the optimizer; and plain values."""
    runs: Callable[[int, str], Run]
    """(rank, name) -> the parameter's numbers in the rank's rows."""

    def slots(self, name: str, file: Path) -> dict[str, Any]:
        """The values of a parameter, and its slots."""
        runs = [self.runs(rank, name) for rank in range(len(self.rows))]
        found: dict[str, Any] = {}
        for slot, first in self.rows[0].items():
            if isinstance(first, torch.Tensor) and first.dim():
                pairs = zip(self.rows, runs, strict=True)
                pieces = [row[slot].narrow(0, *run) for row, run in pairs if run[1]]
                found[slot] = joined(pieces, self.shapes[name], file, f"{slot} of {name}")
            else:
                found[slot] = taken_up(first, file)
        return found


def opened_deepspeed(folder: Path) -> dict[Any, Any]:
    """`module`, `optimizer` (as torch's `state_dict()`, by the names of the parameters), and the further entries.

    Raises:
        CheckpointError: a file is missing, damaged or of another save, or names classes; the message names it.
    """
    models, optimizers = files_of(folder)
    state = read(folder, models[0])
    file = folder / models[0]
    try:
        if not isinstance(state.get("module"), Mapping):
            raise CheckpointError(f"{file} holds no module.")
        tree = {key: taken_up(value, file) for key, value in state.items() if key not in MACHINERY}
        module: dict[str, Any] = taken_up(state["module"], file)
        tree |= {"module": module, "optimizer": taken_up(state.get("optimizer"), file)}
        shapes = [dict(group) for group in state.get("param_shapes") or ()]
        module |= _frozen(folder, models, state)
        if (folder / UNIVERSAL).is_dir():
            values, tree["optimizer"] = _universal(folder, shapes)
            module |= values
        elif optimizers:
            values, tree["optimizer"] = _partitioned(folder, optimizers, shapes)
            module |= values
        twins: dict[str, str] = dict(state.get("shared_params") or {})
        module |= {twin: module[name] for twin, name in twins.items() if name in module}
        return tree
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # files that another program wrote may lead the reading to any of them
        raise CheckpointError(
            f"{folder} is no whole checkpoint of DeepSpeed: {type(error).__name__}: {str(error)[:200]}."
        ) from None


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.40} is no place in a row of numbers")
    return value


def _share(size: int, rank: int, count: int) -> int:
    """How many of a parameter's numbers a rank has under stage 3; the rest of its stretch is padding."""
    stretch = -(-size // count)
    return min(max(size - rank * stretch, 0), stretch)


def _frozen(folder: Path, models: Sequence[str], state: Mapping[Any, Any]) -> dict[str, Stored]:
    """The parameters that no optimizer has, of which each rank of stage 3 has a stretch."""
    shapes: Any = state.get("frozen_param_shapes") or {}
    if len(models) == 1 and not models[0].startswith("zero_"):
        return {}  # whole in the module
    files = [state, *(read(folder, name) for name in models[1:])] if shapes else []
    found: dict[str, Stored] = {}
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        pieces = [
            file["frozen_param_fragments"][name].reshape(-1).narrow(0, 0, _share(size, rank, len(files)))
            for rank, file in enumerate(files)
        ]
        found[name] = joined(pieces, shape, folder / models[0], name)
    return found


def _partitioned(
    folder: Path, files: Sequence[str], shapes: Sequence[Mapping[str, Sequence[int]]]
) -> tuple[dict[str, Any], Any]:
    """(values, the optimizer) from the files of all ranks."""
    states: list[Any] = [read(folder, name)["optimizer_state_dict"] for name in files]
    for name, one in zip(files, states, strict=True):
        counts: Any = one["partition_count"]
        if (counts if type(counts) is int else max(counts)) != len(files):
            raise CheckpointError(
                f"{folder / name} is one of {counts} partitions, and there are {len(files)} files: one is missing, or"
                " of another save."
            )
    third = "fp32_flat_groups" in states[0]
    bases = [one["optimizer_state_dict" if third else "base_optimizer_state"] for one in states]
    flat = "fp32_flat_groups" if third else "single_partition_of_fp32_groups"

    def group(number: int) -> Group:
        sizes = {name: torch.Size(shape).numel() for name, shape in shapes[number].items()}
        begins = itertools.accumulate((-(-size // len(files)) for size in sizes.values()), initial=0)
        begin = dict(zip(sizes, begins, strict=False))

        def of_third(rank: int, name: str) -> Run:
            return begin[name], _share(sizes[name], rank, len(files))

        def of_first(rank: int, name: str) -> Run:
            found = states[rank]["param_slice_mappings"][number].get(name)
            return (0, 0) if found is None else (_count(found.state["start"]), _count(found.state["numel"]))

        rows = [
            {"fp32": one[flat][number], **(base["state"].get(number, {}))}
            for one, base in zip(states, bases, strict=True)
        ]
        return Group(shapes=shapes[number], rows=rows, runs=of_third if third else of_first)

    if not all(isinstance(base, Mapping) for base in bases):
        raise CheckpointError(f"{folder} has an elastic checkpoint, an old kind that is not known.")
    groups = [group(number) for number in range(len(shapes))]
    slots = {name: one.slots(name, folder / files[0]) for one in groups for name in one.shapes}
    values = {name: row.pop("fp32") for name, row in slots.items()}
    return values, _optimizer(slots, bases[0]["param_groups"], shapes, folder / files[0])


def _universal(folder: Path, shapes: Sequence[Mapping[str, Sequence[int]]]) -> tuple[dict[str, Any], Any]:
    """(values, the optimizer) from a universal checkpoint."""
    home = _plain_folder(folder, UNIVERSAL)
    common = read(home, "optimizer_state.pt")
    values: dict[str, Any] = {}
    slots: dict[str, dict[str, Any]] = {}
    inner: Any = common.get("optimizer_state_dict") or {}
    for number, group in enumerate(shapes):
        steps: Any = inner.get("state", {}).get(number, {}) if inner else {}
        for name, shape in group.items():
            place = _plain_folder(home, name)
            row = {"step": taken_up(steps["step"], home)} if "step" in steps else {}
            for file in sorted(place.glob("*.pt")):
                found = read(place, file.name)
                value: Any = found.get("param", found.get(""))
                if isinstance(value, torch.Tensor) and file.stem != "step":
                    row[file.stem] = joined([value.reshape(-1)], shape, file, f"{file.stem} of {name}")
                else:
                    row[file.stem] = taken_up(value, file)
            values[name] = row.pop("fp32")
            slots[name] = row
    return values, _optimizer(slots, common["param_groups"], shapes, home / "optimizer_state.pt")


def _plain_folder(parent: Path, name: str) -> Path:
    path = parent / name
    if name != path.name or path.is_symlink() or not path.is_dir():
        raise CheckpointError(f"{path} is missing, or is not a plain folder of {parent}.")
    return path


def _optimizer(
    slots: Mapping[str, Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    shapes: Sequence[Mapping[str, Any]],
    file: Path,
) -> dict[str, Any]:
    """The state as torch's `optimizer.state_dict()` has it; of stage 3, several flat rows may be one group."""
    made: list[dict[str, Any]] = []
    state = {name: dict(row) for name, row in slots.items()}
    for group in groups:
        names = [name for number in group["params"] for name in shapes[_count(number)]]
        hyper = {key: taken_up(value, file) for key, value in group.items() if key != "params"}
        counted = hyper.pop("step", None)  # of DeepSpeed's own Adam
        if counted is not None:
            state |= {name: {"step": counted, **state[name]} for name in names}
        if hyper.get("bias_correction") is True:  # as in all optimizers of torch
            del hyper["bias_correction"]
        made.append({**hyper, "params": names})
    return {"state": state, "param_groups": made}
