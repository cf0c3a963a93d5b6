"""The loss scale of 16-bit floats: what a model keeps of it, and how it goes on from step to step.

[Note: loss scale] A gradient below 6e-8 is zero in float16. So the loss is multiplied by a scale before the backward
pass, and the gradients are divided by it afterwards. Where the scale was too large, gradients come out infinite or NaN:
the step is left out and the scale made smaller; after many good steps it is made larger again. The rules and the
numbers are those of `torch.amp.GradScaler`, which keeps them in an object; here they are a value of the model. While a
step is traced ([Note: traced]) they are 0-dim tensors.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, cast

import torch

from fabricfn.errors import GradientError
from fabricfn.precision import DynamicScale
from fabricfn.tracing import refuse_later, tracing

Settings = DynamicScale | float
"""What `Precision.loss_scale` is when it is not None."""

LARGEST = 3.4028234663852886e38
"""The largest float32: a loss in float32 times a larger scale has no finite gradient."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LossScale:
    """By what the next loss is multiplied before its backward pass. Plain data, kept by a `Model` and saved with it.

    After `optimizer_step`, `good_steps == 0` and a smaller `scale` than before say that the step was left out (under a
    static scale, `good_steps == 0` alone).
    """

    scale: float
    """The factor; gradients are divided by it again, so they do not depend on it."""
    good_steps: int = 0
    """Steps with finite gradients since the scale last changed."""


def first_scale(settings: Settings | None) -> LossScale | None:
    """What a new model starts with."""
    if settings is None:
        return None
    return LossScale(scale=settings.init_scale if isinstance(settings, DynamicScale) else float(settings))


def shared_scale(scales: Sequence[LossScale | None], settings: Settings) -> tuple[Any, list[LossScale]]:
    """(the scale of a loss of several models, what each of them goes on from).

    The smallest one is used. A larger one is not tried by that loss: it is not made larger by the loss's success.
    """
    own = [first_scale(settings) if one is None else one for one in scales]
    present = [one for one in own if one is not None]
    if tracing():
        return _shared_in_graph(present)
    used = min(one.scale for one in present)
    return used, [one if one.scale == used else LossScale(scale=one.scale, good_steps=-1) for one in present]


def next_scale(before: LossScale, settings: Settings, *, finite: Any, rank: int) -> LossScale:
    """The scale after a step, as `torch.amp.GradScaler.update` computes it.

    Raises:
        GradientError: the scale cannot fall any further, so it is not the scale that is to blame.
    """
    if isinstance(finite, torch.Tensor):
        return _next_in_graph(before, settings, finite, rank)
    if not isinstance(settings, DynamicScale):
        return LossScale(scale=before.scale, good_steps=before.good_steps + 1 if finite else 0)
    if not finite:
        scale = before.scale * settings.backoff_factor
        if scale < settings.min_scale:
            raise _exhausted(rank, f"of only {before.scale:g}")
        return LossScale(scale=scale)
    if before.good_steps + 1 < settings.growth_interval:
        return LossScale(scale=before.scale, good_steps=before.good_steps + 1)
    grown = before.scale * settings.growth_factor
    return LossScale(scale=grown if grown <= LARGEST else before.scale)


_where: Any = torch.where
"""Untyped, since the fields of a `LossScale` are numbers to everyone else."""


def _shared_in_graph(present: Sequence[LossScale]) -> tuple[Any, list[LossScale]]:
    least: Any = functools.reduce(torch.minimum, [cast("torch.Tensor", one.scale) for one in present])
    return least, [
        one
        if one.scale is least
        else LossScale(scale=one.scale, good_steps=_where(one.scale == least, one.good_steps, -1))
        for one in present
    ]


def _next_in_graph(before: LossScale, settings: Settings, finite: torch.Tensor, rank: int) -> LossScale:
    scale: Any = before.scale
    good = _where(finite, before.good_steps + 1, 0)
    if not isinstance(settings, DynamicScale):
        return LossScale(scale=scale, good_steps=good)
    smaller, larger = scale * settings.backoff_factor, scale * settings.growth_factor
    limit = f"below {settings.min_scale / settings.backoff_factor:g}"
    refuse_later(~finite & (smaller < settings.min_scale), lambda: _exhausted(rank, limit))
    grows = good >= settings.growth_interval
    grown = _where(grows & (larger <= LARGEST), larger, scale)
    return LossScale(scale=_where(finite, grown, smaller), good_steps=_where(grows, 0, good))


def _exhausted(rank: int, scale: str) -> GradientError:
    return GradientError(
        f"the gradients are not finite on rank {rank}, at a loss scale {scale}: the loss or the parameters are not"
        " finite themselves. Lower the learning rate, clip the gradients (ff.clip_gradients), or look for the first"
        " NaN with torch.autograd.detect_anomaly()."
    )
