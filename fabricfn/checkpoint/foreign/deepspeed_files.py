"""The files of a DeepSpeed checkpoint: which there are, and what is in them, without DeepSpeed's classes."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from fabricfn.checkpoint.foreign.hub_folders import inside
from fabricfn.checkpoint.foreign.torch_files import loaded
from fabricfn.errors import CheckpointError

LATEST = ("latest", "latest_universal")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
MODEL = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<slice>\d+)_model_states\.pt")
OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<slice>\d+)_optim_states\.pt")
FURTHER = re.compile(r"(?:layer_|expp_rank_).*_states\.pt")
UNIVERSAL = "zero"
"""The folder in which a universal checkpoint has one folder for each parameter."""

INERT = (
    "deepspeed.utils.tensor_fragment.fragment_address",
    *(f"deepspeed.runtime.fp16.loss_scaler.{name}" for name in ("LossScaler", "DynamicLossScaler")),
    "deepspeed.checkpoint.universal_checkpoint.SubparamShape",
    "argparse.Namespace",
)
"""Classes that such files name, of which only the fields are wanted, if anything."""


class Inert:
    """Stands for an object of one of these classes: its fields as they were pickled."""

    state: Any = None

    def __new__(cls, *args: Any) -> "Inert":
        """Whatever it is made of; only what is set afterwards is kept."""
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read(folder: Path, name: str) -> Mapping[Any, Any]:
    """The dict in a file, its tensors mapped. Classes are stand-ins, made anew for every file.

    Raises:
        CheckpointError: it is missing, damaged, a link that leads elsewhere, or names other classes.
    """
    path = inside(folder, name)
    known = {name: type(name.rpartition(".")[2], (Inert,), {}) for name in INERT}
    stage = {"deepspeed.runtime.zero.config.ZeroStageEnum": type("ZeroStageEnum", (int,), {})}
    found: Any = loaded(path, {**known, **stage})
    return cast("Mapping[Any, Any]", found) if isinstance(found, Mapping) else {"": found}


def tagged(path: Path) -> Path | None:
    """The folder with the files: `path`, or what its file `latest` names; None where it is no DeepSpeed checkpoint."""
    for name in LATEST:
        if (path / name).is_file():
            with inside(path, name).open("rb") as file:
                tag = file.read(300).decode("utf-8", "replace").strip()
            if not TAG.fullmatch(tag) or not (path / tag).is_dir():
                raise CheckpointError(f"{path / name} names {tag!r}, which is no folder beside it.")
            return path / tag
    return path if any(map(MODEL.fullmatch, _names(path))) else None


def _names(folder: Path) -> list[str]:
    return sorted(found.name for found in folder.iterdir())


def files_of(folder: Path) -> tuple[list[str], list[str]]:
    """(files of models, files of optimizers), each in the order of the ranks.

    Raises:
        CheckpointError: a rank's file is missing; the model itself was cut (tensor, pipeline or expert parallel).
    """
    names = _names(folder)
    found: list[list[str]] = []
    for pattern in (MODEL, OPTIMIZER):
        fits = [match for name in names if (match := pattern.fullmatch(name))]
        cut = [match[0] for match in fits if int(match["slice"])] + [name for name in names if FURTHER.fullmatch(name)]
        if cut:
            raise CheckpointError(
                f"{folder} was written by ranks that hold slices of the model ({cut[0]}: tensor, pipeline or expert"
                " parallel), which only the model's own code can put together. Save the whole state dict with it."
            )
        by_rank = {int(match["rank"] or 0): match[0] for match in fits}
        gaps = sorted(set(range(max(by_rank, default=0))) - set(by_rank))
        if gaps:
            raise CheckpointError(f"{folder} is not whole: of the files like {fits[0][0]}, rank {gaps} is missing.")
        found.append([by_rank[rank] for rank in sorted(by_rank)])
    if not found[0]:
        raise CheckpointError(f"{folder} is no whole checkpoint of DeepSpeed: no *_model_states.pt is there.")
    return found[0], found[1]
