"""Which devices exist, and which of them the arguments `accelerator` and `devices` ask for.

`available` looks at the machine; everything else is a pure function of what it found.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from fabricfn.errors import ConfigurationError

AUTO_ORDER = ("tpu", "cuda", "mps", "cpu")
"""What `accelerator="auto"` takes: the first of these that exists."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The devices that the arguments ask for on this node, one process each."""

    accelerator: str
    """"cpu", "cuda", "mps", "tpu", "xla", or the type of another `torch.accelerator` back end."""
    indices: tuple[int, ...]
    """The device index of each process of this node; on CPU just 0 .. n-1."""
    open: bool
    """Whether the number of processes was left to the launcher (auto, -1, None, 0)."""
    replicas: tuple[int, ...] = dataclasses.field(default=(), repr=False)
    """The devices of one process that has several, under strategy="dp" and "xla_fsdp"."""


def available(probe: Any = torch.accelerator) -> dict[str, int]:
    """How many devices of each kind this machine has; "cpu" is always there. Initialises no device.

    A TPU is found as torch finds it, by the package torch_tpu. (What torch_xla knows has a kind of its own, "xla".)

    Args:
        probe: what knows the accelerator of this machine and counts it; tests have others.

    Example:
        >>> available()["cpu"]
        1
    """
    found = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    other = probe.current_accelerator()
    # Whether CUDA is available must not be asked: that initialises the driver, and a forked rank could not use it.
    if other is not None and other.type not in found and probe.is_available():
        found = {other.type: int(probe.device_count()), **found}
    return {kind: count for kind, count in found.items() if count} | {"cpu": 1}


def choose(accelerator: str, devices: int | str | Sequence[int] | None, found: Mapping[str, int]) -> Choice:
    """The devices that `accelerator` and `devices` mean on a machine that has `found`.

    Args:
        accelerator: "auto", "cpu", "gpu" (cuda, else mps), "cuda", "mps", "tpu", "xla", or the name of another one.
        devices: a number of devices; a list of indices, also as "1, 4"; "auto", -1 or "-1" for all (on CPU one
            process); None or 0 for the CPU.
        found: what `available` returned.

    Raises:
        ConfigurationError: it does not exist here, or the two contradict each other; the message says what there is.

    Example:
        >>> choose("auto", "1, 4", {"cuda": 8, "cpu": 1}).indices
        (1, 4)
        >>> choose("cpu", 2, {"cpu": 1})
        Choice(accelerator='cpu', indices=(0, 1), open=False)
    """
    wanted = count_or_indices(devices)
    kind = _kind(accelerator, found)
    if wanted is None:  # None and 0 are the CPU in Fabric too, so scripts that come from there mean it
        if accelerator not in ("auto", "cpu"):
            raise ConfigurationError(
                f"devices={devices!r} means the CPU, but accelerator={accelerator!r}. Write devices=1, or"
                ' accelerator="cpu".'
            )
        return Choice(accelerator="cpu", indices=(0,), open=True)
    if kind == "cpu":
        return _choose_cpus(devices, wanted)
    count = found[kind]
    if wanted == -1:
        return Choice(accelerator=kind, indices=tuple(range(count)), open=True)
    indices = tuple(range(wanted)) if isinstance(wanted, int) else wanted
    if kind == "mps" and len(indices) > 1:
        raise ConfigurationError(
            f"devices={devices!r}, but an Apple GPU (mps) is one device, without collectives. Write devices=1, or"
            f' accelerator="cpu", devices={len(indices)}.'
        )
    if max(indices) >= count:
        raise ConfigurationError(
            f"devices={devices!r} asks for {kind} device {max(indices)}, but this machine has {describe(found)}."
            f' The {kind} indices are 0 to {count - 1}; devices="auto" takes all.'
        )
    return Choice(accelerator=kind, indices=indices, open=False)


def in_one_process(choice: Choice) -> Choice:
    """The same devices for a single process, as strategy="dp" and "xla_fsdp" mean them.

    Raises:
        ConfigurationError: several, on a CPU.

    Example:
        >>> in_one_process(choose("cuda", 2, {"cuda": 2, "cpu": 1})).indices
        (0,)
    """
    if choice.accelerator == "cpu" and len(choice.indices) > 1:
        raise ConfigurationError(
            f'strategy="dp" has one process with several devices, and a CPU is one device; asked for are'
            f' {len(choice.indices)}. Write strategy="ddp", which starts {len(choice.indices)} processes, or devices=1.'
        )
    return dataclasses.replace(choice, indices=choice.indices[:1], replicas=choice.indices)


def _choose_cpus(devices: object, wanted: int | tuple[int, ...]) -> Choice:
    if not isinstance(wanted, int):
        raise ConfigurationError(
            f"devices={devices!r} is a list of indices, but a CPU has none. Write devices={len(wanted)} for"
            f" {len(wanted)} processes on CPU."
        )
    return Choice(accelerator="cpu", indices=tuple(range(max(wanted, 1))), open=wanted == -1)


def _kind(accelerator: str, found: Mapping[str, int]) -> str:
    """The kind of device that a name means, one that exists here."""
    if accelerator == "auto":
        return next(kind for kind in AUTO_ORDER if kind in found)
    if accelerator == "gpu":
        kind = next((kind for kind in ("cuda", "mps") if kind in found), None)
    else:
        kind = accelerator if accelerator in found else None
    if kind is None:
        known = {*AUTO_ORDER, "gpu", *found}
        state = "was not found" if accelerator in known else "is unknown or was not found"
        raise ConfigurationError(
            f"accelerator={accelerator!r} {state}: this machine has {describe(found)}. Write"
            f' accelerator="auto", or one of {", ".join(repr(kind) for kind in found)}.'
        )
    return kind


def count_or_indices(devices: int | str | Sequence[int] | None) -> int | tuple[int, ...] | None:
    """What `devices` says in one form: a positive number, -1 for all, a tuple of indices, or None for the CPU.

    Raises:
        ConfigurationError: it is not understood.
    """
    value: object = devices
    if isinstance(devices, str):
        value = _read_text(devices)
    if isinstance(value, list | tuple | range):
        indices = tuple(cast("Sequence[Any]", value))
        whole = all(type(index) is int and index >= 0 for index in indices)
        if indices and whole and len(set(indices)) == len(indices):
            return indices
    elif value is None:
        return None
    elif type(value) is int and value >= -1:
        return value or None
    raise ConfigurationError(
        f"devices={devices!r} is not understood. Write a number (2), different indices ([1, 4] or"
        ' "1, 4"), "auto" or -1 for all, or None for the CPU.'
    )


def _read_text(text: str) -> object:
    if text.strip() == "auto":
        return -1
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        return text
    return numbers if "," in text or not numbers else numbers[0]


def device_of(accelerator: str, index: int) -> torch.device:
    """The `torch.device` of one process.

    Example:
        >>> device_of("cuda", 1), device_of("cpu", 1)
        (device(type='cuda', index=1), device(type='cpu'))
    """
    if accelerator == "cpu":
        return torch.device("cpu")
    return torch.device(accelerator, 0 if accelerator == "xla" else index)  # of XLA a process has its own device only


def describe(found: Mapping[str, int]) -> str:
    """What there is, in words.

    Example:
        >>> describe({"cuda": 2, "cpu": 1})
        '2 cuda devices and a cpu'
    """
    parts = [f"{count} {kind} device{'s' * (count > 1)}" for kind, count in found.items() if kind != "cpu"]
    return " and ".join([*parts, "a cpu"]) if parts else "a cpu only"
