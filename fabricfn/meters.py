"""How fast a run is, and with which learning rates: numbers for `log_dict`."""

import dataclasses
import time
from typing import Any

from fabricfn.collectives import all_reduce
from fabricfn.errors import ConfigurationError
from fabricfn.optimizers.overrides import overridden
from fabricfn.runtimes import Runtime
from fabricfn.states import Optimizer

COUNTED = ("batches", "samples", "tokens", "flops")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """What a rank has done lately, and when; see `throughput`. Not to be saved: the times are those of one process."""

    window: int = 100
    """Over so many of the last calls a rate is taken."""
    marks: tuple[tuple[float, int, int, int, int], ...] = ()
    """(seconds, batches, samples, tokens, flops) of each call, the oldest first. Of the oldest only the time counts."""


def throughput(
    meter: Throughput,
    *,
    samples: int,
    tokens: int = 0,
    flops: int = 0,
    batches: int = 1,
    now: float | None = None,
) -> Throughput:
    """The meter after one more step. Not collective; the rates are taken by `rates`.

    The first call starts the clock, so the first step, which compiles and warms up, is in no rate. No call waits for a
    device: there a rate is right over a window that is long beside the steps that are queued, as 100 are.

    Args:
        meter: of the last call; at first `ff.Throughput(window=100)`.
        samples: how many this rank has done since the last call: `len(x)`.
        tokens: likewise: `x.numel()`.
        flops: likewise: see `measure_flops`.
        batches: likewise.
        now: in seconds, on any clock; None is `time.perf_counter()`.

    Returns:
        A new meter.

    Raises:
        ConfigurationError: the clock goes backwards, or a window below 1.

    Example:
        >>> import fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> meter = ff.Throughput()
        >>> for second in range(5):
        ...     meter = ff.throughput(meter, samples=32, now=second / 2)
        >>> ff.rates(rt, meter)["samples_per_sec"]
        64.0
    """
    now = time.perf_counter() if now is None else now
    if meter.window < 1 or (meter.marks and now < meter.marks[-1][0]):
        last = meter.marks[-1][0] if meter.marks else "none yet"
        raise ConfigurationError(
            f"time must not go backwards, and the window be 1 at least; found now={now!r} after {last},"
            f" window={meter.window!r}. Begin anew with ff.Throughput() after a pause that shall not count."
        )
    marks = (*meter.marks[-meter.window :], (now, batches, samples, tokens, flops))
    return Throughput(window=meter.window, marks=marks)


def rates(rt: Runtime, meter: Throughput, *, available_flops: float | None = None) -> dict[str, float]:
    """How much is done in a second, by all ranks and by this one. Every rank must call it: one message for all numbers.

    Laws: a number of all ranks is the sum of those of each, however uneven their batches and clocks are.

    Args:
        rt: the runtime.
        meter: see `throughput`.
        available_flops: of one device in a second, for "device/mfu": `ff.available_flops(rt)`.

    Returns:
        On every rank "batches_per_sec", "samples_per_sec", "tokens_per_sec", "flops_per_sec" of all ranks, the same of
        this rank under "device/...", and "device/mfu", the part of `available_flops` that is used. What was never
        counted is left out; before the second call of `throughput` that is everything.

    Example:
        >>> import fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> meter = ff.throughput(ff.Throughput(), samples=8, now=0.0)
        >>> meter = ff.throughput(meter, samples=8, flops=6_000, now=2.0)
        >>> ff.rates(rt, meter, available_flops=10_000)
        ... # doctest: +NORMALIZE_WHITESPACE
        {'batches_per_sec': 0.5, 'samples_per_sec': 4.0, 'flops_per_sec': 3000.0, 'device/batches_per_sec': 0.5,
         'device/samples_per_sec': 4.0, 'device/flops_per_sec': 3000.0, 'device/mfu': 0.3}
    """
    seconds = meter.marks[-1][0] - meter.marks[0][0] if meter.marks else 0.0
    counts = (sum(column) for column in list(zip(*meter.marks[1:], strict=True))[1:]) if seconds else (0,) * 4
    own = {name: count / (seconds or 1.0) for name, count in zip(COUNTED, counts, strict=True)}
    everyone = {name: rate for name, rate in all_reduce(rt, own, "sum").items() if rate}
    found = {f"{name}_per_sec": rate for name, rate in everyone.items()}
    found |= {f"device/{name}_per_sec": own[name] for name in everyone}
    if available_flops and "flops" in everyone:
        found["device/mfu"] = own["flops"] / available_flops
    return found


def learning_rates(opt: Optimizer, **overrides: Any) -> dict[str, float]:
    """The learning rates of the next step, by name, for `log_dict`. Not collective.

    Args:
        opt: the optimizer.
        overrides: what the next `optimizer_step` is given: `**schedule(opt.step)`.

    Returns:
        {"lr": rate} of one group, {"lr/0": rate, "lr/1": rate, ...} of several; nothing where there is no "lr".

    Raises:
        ConfigurationError: an override that the optimizer does not know.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> model = ff.setup_model(rt, torch.nn.Linear(2, 1))
        >>> opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1, groups={"*bias": {"lr": 0.2}})
        >>> sorted(ff.learning_rates(opt).values()), ff.learning_rates(opt, lr=[0.3, 0.4])
        ([0.1, 0.2], {'lr/0': 0.3, 'lr/1': 0.4})
    """
    found = [float(group["lr"]) for group in overridden(opt, overrides) if "lr" in group]
    return {"lr": found[0]} if len(found) == 1 else {f"lr/{group}": rate for group, rate in enumerate(found)}
