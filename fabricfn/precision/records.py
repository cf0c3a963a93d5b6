"""Numeric precision as plain data: which dtype the parameters, the computation and the results have."""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from fabricfn.errors import ConfigurationError
from fabricfn.precision.bitsandbytes import MODES, Quantized
from fabricfn.precision.float8 import Float8
from fabricfn.precision.transformer_engine import TransformerEngine


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DynamicScale:
    """Settings of a loss scale that finds its size by itself; the names and numbers of `torch.amp.GradScaler`."""

    init_scale: float = 65536.0
    """What a new model starts with."""
    growth_factor: float = 2.0
    """By what it is multiplied after `growth_interval` good steps in a row."""
    backoff_factor: float = 0.5
    """By what it is multiplied after a step whose gradients were not finite."""
    growth_interval: int = 2000
    """How many good steps in a row make it larger."""
    min_scale: float = 2.0**-24
    """Where it would fall below, `optimizer_step` raises `GradientError` instead of leaving out steps for ever."""

    def __post_init__(self) -> None:
        good = 0 < self.backoff_factor < 1 < self.growth_factor < math.inf and self.growth_interval >= 1
        if not (good and 0 < self.min_scale <= self.init_scale < math.inf):
            raise ConfigurationError(
                f"{self}: a loss scale needs 0 < min_scale <= init_scale, 0 < backoff_factor < 1 < growth_factor, and"
                " growth_interval >= 1, all finite. ff.DynamicScale() has the usual numbers."
            )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """How numbers are represented. Pass a record of your own to `init_runtime(precision=...)` for anything unusual."""

    param_dtype: torch.dtype = torch.float32
    """The dtype of floating parameters, and so of the optimizer's state."""
    compute_dtype: torch.dtype = torch.float32
    """The dtype of the arithmetic: floating inputs are cast to it where the net is entered (or by autocast)."""
    output_dtype: torch.dtype | None = None
    """The dtype to which floating outputs are cast where the net is left; None leaves them as they are."""
    reduce_dtype: torch.dtype | None = None
    """The dtype in which gradients are averaged over ranks; None is the gradient's own. The mean comes back in that."""
    autocast: bool = False
    """Whether the whole loss function runs under `torch.autocast(compute_dtype)`; then nothing else is cast."""
    convert: Callable[[nn.Module], nn.Module] | None = None
    """Applied to the copy of the module in `setup_model`, for libraries that replace layers."""
    loss_scale: DynamicScale | float | None = None
    """By what a loss is multiplied before its backward pass, for float16: settings, a number that stays, or nothing."""

    def __post_init__(self) -> None:
        static = self.loss_scale
        if isinstance(static, float | int) and not 0 < static < math.inf:
            raise ConfigurationError(f"loss_scale={static} must be a positive number, or ff.DynamicScale().")
        if self.reduce_dtype is not None and not self.reduce_dtype.is_floating_point:
            raise ConfigurationError(f"reduce_dtype={self.reduce_dtype} cannot hold a mean; write torch.float32.")

    @staticmethod
    def parse(precision: "str | int | Precision") -> "Precision":
        """The record that a name stands for.

        Args:
            precision: "64-true", "32-true", "bf16-true", "bf16-mixed", "16-true", "16-mixed", an alias ("64", 64,
                "double", "32", 32, "float", "bf16" which is bf16-mixed, "16", 16 and "fp16" which are 16-mixed, "half"
                which is 16-true), a name of `PACKAGED`, or a record, which is returned as it is.

        Raises:
            ConfigurationError: the name is unknown; the message lists the known ones.
            CapabilityError: the name needs a package that is not installed; the message has the pip command.

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
        if name in PACKAGED:
            convert: Any = PACKAGED[name].convert
            convert.require()
            return PACKAGED[name]
        raise ConfigurationError(
            f"precision={precision!r} is unknown; there are {', '.join((*NAMES, *PACKAGED))} and the aliases"
            f" {', '.join(f'{alias} = {name}' for alias, name in ALIASES.items())}, or pass an ff.Precision record."
        )


NAMES: dict[str, Precision] = {
    "64-true": Precision(param_dtype=torch.float64, compute_dtype=torch.float64),
    "32-true": Precision(),
    "bf16-true": Precision(param_dtype=torch.bfloat16, compute_dtype=torch.bfloat16, output_dtype=torch.float32),
    "bf16-mixed": Precision(compute_dtype=torch.bfloat16, autocast=True),
    "16-true": Precision(param_dtype=torch.float16, compute_dtype=torch.float16, output_dtype=torch.float32),
    "16-mixed": Precision(compute_dtype=torch.float16, autocast=True, loss_scale=DynamicScale()),
}

_HALF = Precision(param_dtype=torch.bfloat16, compute_dtype=torch.bfloat16, output_dtype=torch.float32)
_FP16 = Precision(param_dtype=torch.float16, compute_dtype=torch.float16, output_dtype=torch.float32)

PACKAGED: dict[str, Precision] = {
    "fp8-mixed": Precision(compute_dtype=torch.bfloat16, autocast=True, convert=Float8()),
    "transformer-engine": dataclasses.replace(_HALF, convert=TransformerEngine()),
    "transformer-engine-float16": dataclasses.replace(_FP16, convert=TransformerEngine()),
    **{mode: dataclasses.replace(_HALF, convert=Quantized(mode=mode)) for mode in MODES},
}
"""The precisions that need a package, which nobody imports before a model is set up."""

ALIASES = {
    **{"64": "64-true", "double": "64-true", "32": "32-true", "float": "32-true", "bf16": "bf16-mixed"},
    **{"16": "16-mixed", "fp16": "16-mixed", "half": "16-true", "fp8": "fp8-mixed"},
}


def check_name(precision: str | int | Precision, accelerator: str) -> None:
    """Refuse a name that means nothing good on this kind of device; a record is taken at its word.

    Raises:
        ConfigurationError: the name is unknown, or it is 16-mixed on CPU, or needs float64 on an Apple GPU, which has
            none (a record, too), or a package that does not run there.
    """
    found = Precision.parse(precision)
    doubles = {found.param_dtype, found.compute_dtype, found.output_dtype, found.reduce_dtype} & {torch.float64}
    if accelerator == "mps" and doubles:
        raise ConfigurationError(
            f"precision={precision!r} needs float64, which Apple GPUs (mps) do not have. Write"
            ' precision="32-true", or accelerator="cpu".'
        )
    elsewhere = accelerator not in getattr(found.convert, "runs_on", (accelerator,))
    if elsewhere and found is not precision:
        raise ConfigurationError(
            f"precision={precision!r} runs on {' and '.join(cast('Any', found.convert).runs_on)}, and this is"
            f' {accelerator}. Write precision="bf16-mixed".'
        )
    if accelerator == "cpu" and found is NAMES["16-mixed"] and found is not precision:
        raise ConfigurationError(
            f"precision={precision!r} is for accelerators: a CPU gains nothing from float16. Write"
            ' precision="bf16-mixed", which needs no loss scale; to try the loss scale on CPU all the same, pass the'
            ' record: precision=ff.Precision.parse("16-mixed").'
        )


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
