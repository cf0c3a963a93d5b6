"""Numeric precision as plain data: which dtype the parameters, the computation and the results have."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from fabricfn.errors import ConfigurationError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """How numbers are represented. Pass a record of your own to `init_runtime(precision=...)` for anything unusual."""

    param_dtype: torch.dtype = torch.float32
    """The dtype of floating parameters, and so of the optimizer's state."""
    compute_dtype: torch.dtype = torch.float32
    """The dtype of the arithmetic: floating inputs are cast to it where the net is entered (or by autocast)."""
    output_dtype: torch.dtype | None = None
    """The dtype to which floating outputs are cast where the net is left; None leaves them as they are."""
    autocast: bool = False
    """Whether the whole loss function runs under `torch.autocast(compute_dtype)`; then nothing else is cast."""
    convert: Callable[[nn.Module], nn.Module] | None = None
    """Applied to the copy of the module in `setup_model`, for libraries that replace layers."""

    @staticmethod
    def parse(precision: "str | int | Precision") -> "Precision":
        """The record that a name stands for.

        Args:
            precision: "64-true", "32-true", "bf16-true", "bf16-mixed", an alias ("64", 64, "double", "32", 32, "float",
                "bf16" which is bf16-mixed), or a record, which is returned as it is.

        Raises:
            ConfigurationError: the name is unknown; the message lists the known ones.

        Example:
            >>> Precision.parse(32) == Precision.parse("32-true")
            True
        """
        if isinstance(precision, Precision):
            return precision
        name = str(precision)
        name = ALIASES.get(name, name)
        if name in NAMES:
            return NAMES[name]
        if name.startswith(("16", "fp16", "half")):
            raise ConfigurationError(
                f"precision={precision!r}: 16-bit floats need a loss scale, which this version of fabricfn does not"
                ' have. Write precision="bf16-mixed", which needs none and also runs on CPU.'
            )
        raise ConfigurationError(
            f"precision={precision!r} is unknown; there are {', '.join(NAMES)} and the aliases"
            f" {', '.join(f'{alias} = {name}' for alias, name in ALIASES.items())}, or pass an ff.Precision record."
        )


NAMES: dict[str, Precision] = {
    "64-true": Precision(param_dtype=torch.float64, compute_dtype=torch.float64),
    "32-true": Precision(),
    "bf16-true": Precision(param_dtype=torch.bfloat16, compute_dtype=torch.bfloat16, output_dtype=torch.float32),
    "bf16-mixed": Precision(compute_dtype=torch.bfloat16, autocast=True),
}

ALIASES = {"64": "64-true", "double": "64-true", "32": "32-true", "float": "32-true", "bf16": "bf16-mixed"}


def autocast_of(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context in which a "-mixed" precision computes; nothing happens under the others."""
    if not precision.autocast:
        return contextlib.nullcontext()
    return torch.autocast(device.type, precision.compute_dtype)


def cast_floating(tree: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in dicts, lists and tuples cast to `dtype`; everything else, integers included, as it is."""
    if isinstance(tree, torch.Tensor):
        return tree if tree.dtype is dtype or not tree.is_floating_point() else tree.to(dtype)
    if type(tree) is dict:
        return {key: cast_floating(item, dtype) for key, item in cast("dict[Any, Any]", tree).items()}
    if type(tree) in (list, tuple):
        items = [cast_floating(item, dtype) for item in cast("list[Any]", tree)]
        return items if type(tree) is list else tuple(items)
    return tree
