"""Training in 8-bit floating point by NVIDIA's Transformer Engine. Unverified: no test machine has its hardware."""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import nn

from fabricfn.errors import CapabilityError
from fabricfn.precision.packages import package, require

NEEDS = ("transformer_engine", '--no-build-isolation "transformer-engine[pytorch]"', "bf16-mixed")
DEVICE = "cuda"
HARDWARE = "an NVIDIA GPU of compute capability 8.9 (Ada, Hopper) or newer"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TransformerEngine:
    """A `Precision.convert` that puts Transformer Engine's layers in the place of linear ones and layer norms."""

    recipe: Any = None
    """A recipe of `transformer_engine.common.recipe`. None scales by the values at hand (`Float8CurrentScaling`); one
    that remembers earlier calls (`DelayedScaling`) breaks the law that the same inputs give the same bits."""
    runs_on: ClassVar = ("cuda",)

    def require(self) -> None:
        """Raise `CapabilityError` unless the package is there."""
        require(*NEEDS, HARDWARE)

    def __call__(self, module: nn.Module) -> nn.Module:
        """The module, with other layers of the same names and values where their sides allow 8-bit products.

        Raises:
            CapabilityError: the package is missing; the module is not on an NVIDIA GPU.
        """
        engine: Any = package("transformer_engine.pytorch", *NEEDS[1:])
        kinds = {value.device.type for value in module.parameters()}
        if kinds != {DEVICE}:
            raise CapabilityError(
                f"Transformer Engine needs {HARDWARE}, and this module is on {', '.join(sorted(kinds)) or 'nothing'}."
                ' Write precision="fp8-mixed" (torchao, on CPU'
                ' too), or accelerator="cuda".'
            )
        recipe = self.recipe
        if recipe is None:
            recipe = package("transformer_engine.common.recipe", *NEEDS[1:]).Float8CurrentScaling()
        linear, norm = (inside(engine, kind, recipe) for kind in (engine.Linear, engine.LayerNorm))
        for parent in module.modules():
            for name, layer in parent.named_children():
                made = replaced(layer, linear, norm)
                if made is not None:
                    setattr(parent, name, made)
        return module


def inside(engine: Any, kind: Any, recipe: Any) -> Any:
    """The layer's class, whose forward computes in 8 bits wherever it is called from."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with engine.fp8_autocast(enabled=True, fp8_recipe=recipe):
            return kind.forward(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward})


def replaced(layer: nn.Module, linear: Any, norm: Any) -> nn.Module | None:
    """The layer that takes its place, with its values; None where it stays."""
    if type(layer) is nn.Linear and layer.in_features % 8 == 0 and layer.out_features % 16 == 0:
        bias: Any = layer.bias
        made = linear(layer.in_features, layer.out_features, bias=bias is not None, params_dtype=layer.weight.dtype)
    elif type(layer) is nn.LayerNorm and len(layer.normalized_shape) == 1 and layer.elementwise_affine:
        if layer.bias is None:  # pyright: ignore[reportUnnecessaryComparison]  # LayerNorm(bias=False)
            return None
        made = norm(layer.normalized_shape[0], eps=layer.eps, params_dtype=layer.weight.dtype)
    else:
        return None
    made = made.to(layer.weight.device)
    with torch.no_grad():
        for name, value in layer.named_parameters():
            getattr(made, name).copy_(value).requires_grad_(value.requires_grad)
    return made.train(layer.training)
