"""Training in 8-bit floating point by torchao: matrix products of linear layers, in the forward and backward pass."""

import dataclasses
from typing import Any, ClassVar, Literal, cast

from torch import nn

from fabricfn.errors import CapabilityError, ConfigurationError
from fabricfn.precision.packages import package, require

NEEDS = ("torchao", '"fabricfn[fp8]"', "bf16-mixed")
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
MULTIPLE = 16
"""The kernels take matrices whose sides are multiples of it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Float8:
    """A `Precision.convert` that lets linear layers multiply in 8-bit floats, scaled anew in every call."""

    recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise"
    """What has one scale: a tensor, or each row (more exact); the last one computes gradients of weights in 16 bits."""
    skip: tuple[str, ...] = ()
    """The names of layers that stay as they are, for instance the output layer."""
    emulate: bool = False
    """Round as 8-bit floats do and multiply in more bits, for devices without such kernels."""
    runs_on: ClassVar = ("cpu", "cuda")

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise ConfigurationError(f"Float8(recipe={self.recipe!r}): there are {', '.join(map(repr, RECIPES))}.")

    def require(self) -> None:
        """Raise `CapabilityError` unless torchao is there."""
        require(*NEEDS)

    def __call__(self, module: nn.Module) -> nn.Module:
        """The module, whose linear layers are torchao's; those with a side that is no multiple of 16 stay.

        Raises:
            CapabilityError: the package is missing, or there is no layer to convert.
        """
        float8: Any = package("torchao.float8", *NEEDS[1:])
        config = float8.Float8LinearConfig.from_recipe_name(self.recipe)
        config = dataclasses.replace(config, emulate=self.emulate)

        def chosen(layer: nn.Module, name: str) -> bool:
            sides = (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else (1,)
            return name not in self.skip and all(side % MULTIPLE == 0 for side in sides)

        named: dict[str, nn.Module] = dict(cast("Any", module.named_modules()))
        unknown = sorted({*self.skip} - {*named})
        if unknown or not any(chosen(layer, name) for name, layer in named.items()):
            raise CapabilityError(
                f"there is no layer named {', '.join(unknown)} to skip."
                if unknown
                else f"the module has no nn.Linear whose sides are multiples of {MULTIPLE}, so nothing of it can be"
                f' computed in 8-bit floats. Write precision="{NEEDS[2]}".'
            )
        return float8.convert_to_float8_training(module, config=config, module_filter_fn=chosen)
