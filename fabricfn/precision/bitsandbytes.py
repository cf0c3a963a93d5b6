"""Linear layers whose weights are kept in 4 or 8 bits, by the package bitsandbytes; it computes on CPU, too.

[Note: packed] A packed weight is a frozen parameter of bytes, and so are its scales: values that records hold, ranks
share and checkpoints keep bit for bit, and that no cast, average or optimizer touches.
"""

import dataclasses
from typing import Any, ClassVar, Literal, cast

import torch
from torch import nn

from fabricfn.errors import CapabilityError, ConfigurationError
from fabricfn.precision.packages import package, require

NEEDS = ("bitsandbytes", '"fabricfn[bitsandbytes]"', "bf16-true")
Mode = Literal["nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training"]
MODES: tuple[Mode, ...] = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """A `Precision.convert` that packs the weights of linear layers, which are frozen then: train what is added."""

    mode: Mode = "nf4"
    """4 bits ("nf4", "fp4"; "-dq": their scales are packed, too), or 8 ("int8"). "int8-training" packs nothing: weights
    stay trainable, and are rounded to 8 bits where they are multiplied."""
    skip: tuple[str, ...] = ()
    """The names of layers that stay as they are, for instance adapters and the output layer."""
    runs_on: ClassVar = ("cpu", "cuda")

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigurationError(f"Quantized(mode={self.mode!r}): there are {', '.join(map(repr, MODES))}.")

    def require(self) -> None:
        """Raise `CapabilityError` unless the package is there."""
        require(*NEEDS)

    def __call__(self, module: nn.Module) -> nn.Module:
        """The module with other linear layers.

        Raises:
            CapabilityError: the package is missing, or there is no layer to convert.
        """
        kit: Any = package(*NEEDS)
        named = dict(cast("Any", module.named_modules()))
        chosen = [name for name, layer in named.items() if name and type(layer) is nn.Linear and name not in self.skip]
        unknown = sorted({*self.skip} - {*named})
        if unknown or not chosen:
            why = f"no layer is named {', '.join(unknown)}" if unknown else "it has no nn.Linear inside"
            raise CapabilityError(f"Quantized(mode={self.mode!r}) cannot convert this module: {why}.")
        for name in chosen:
            parent, _, own = name.rpartition(".")
            setattr(named[parent], own, layer_for(self.mode)(kit, named[name], self.mode).train(named[name].training))
        return module


def layer_for(mode: Mode) -> Any:
    """The class of layers that a mode means."""
    return Rounded if mode == "int8-training" else Packed8 if mode == "int8" else Packed4


def frozen(value: torch.Tensor) -> nn.Parameter:
    """A tensor as a parameter of bytes: see [Note: packed]."""
    return nn.Parameter(value.detach().contiguous().reshape(-1).view(torch.uint8), requires_grad=False)


class Linear(nn.Module):
    """What the layers below have in common: sides, a bias, and inputs of any number of dimensions."""

    def __init__(self, kit: Any, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        self.kit = Kit(kit)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As `nn.Linear`: [..., in_features] -> [..., out_features]."""
        bias = None if self.bias is None else self.bias.to(x.dtype)  # pyright: ignore[reportUnnecessaryComparison]  # Linear(bias=False)
        if x.dim() == 2:
            return self.product(x, bias)
        return self.product(x.reshape(-1, self.in_features), bias).view(*x.shape[:-1], self.out_features)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Of a matrix."""
        raise NotImplementedError


class Kit:
    """The imported package, which copies of a layer share."""

    def __init__(self, kit: Any) -> None:
        self.kit = kit

    def __deepcopy__(self, memo: Any) -> "Kit":
        return self


class Rounded(Linear):
    """A trainable weight that is multiplied in 8 bits."""

    def __init__(self, kit: Any, layer: nn.Linear, mode: Mode) -> None:
        super().__init__(kit, layer)
        self.weight = layer.weight

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """With a state of its own in every call: the package would keep the rounded weight otherwise."""
        state = self.kit.kit.MatmulLtState()
        return self.kit.kit.matmul(x, self.weight.to(x.dtype), bias=bias, state=state)


class Packed8(Linear):
    """A weight in 8 bits, one scale a row."""

    def __init__(self, kit: Any, layer: nn.Linear, mode: Mode) -> None:
        super().__init__(kit, layer)
        packed, scales, _ = kit.functional.int8_vectorwise_quant(layer.weight.detach().half())
        self.weight_int8, self.scales = frozen(packed), frozen(scales)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The weight itself is a constant."""
        state = self.kit.kit.MatmulLtState()
        state.has_fp16_weights = False
        state.CB = self.weight_int8.detach().view(torch.int8).view(self.out_features, self.in_features)
        state.SCB = self.scales.detach().view(torch.float32)
        return self.kit.kit.matmul(x, state.CB, bias=bias, state=state)


class Packed4(Linear):
    """A weight in 4 bits, one scale for 64 numbers."""

    def __init__(self, kit: Any, layer: nn.Linear, mode: Mode) -> None:
        super().__init__(kit, layer)
        kind, _, nested = mode.partition("-")
        packed, state = kit.functional.quantize_4bit(
            layer.weight.detach(), blocksize=64, quant_type=kind, compress_statistics=bool(nested)
        )
        self.kind, self.dtype = kind, layer.weight.dtype
        self.weight_4bit, self.scales, self.code = frozen(packed), frozen(state.absmax), frozen(state.code)
        if nested:
            inner = state.state2
            self.offset = frozen(state.offset)
            self.scales_of_scales, self.code_of_scales = frozen(inner.absmax), frozen(inner.code)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The weight itself is a constant."""
        kit = self.kit.kit.functional
        common = {"blocksize": 64, "quant_type": self.kind, "dtype": self.dtype}
        state = kit.QuantState(
            self.scales.detach(), shape=(self.out_features, self.in_features), code=numbers(self.code), **common
        )
        if hasattr(self, "offset"):
            inner = kit.QuantState(
                numbers(self.scales_of_scales), code=numbers(self.code_of_scales), blocksize=256, dtype=torch.float32
            )
            state.offset, state.state2, state.nested = numbers(self.offset).view(()), inner, True
        else:
            state.absmax = numbers(self.scales)
        return self.kit.kit.matmul_4bit(x, self.weight_4bit.detach().view(-1, 1), state, bias=bias)


def numbers(value: torch.Tensor) -> torch.Tensor:
    """The scales behind the bytes."""
    return value.detach().view(torch.float32)
