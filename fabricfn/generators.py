"""The global random generators of torch, numpy and Python: seeded, captured, put back.

fabricfn itself draws from keys (`random.py`) and never from these; they are for code that does.
"""

import operator
import random
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fabricfn.errors import ConfigurationError
from fabricfn.random import device_generator

State = dict[str, torch.Tensor]
"""A generator's name -> its state, uint8."""

TWISTER = struct.Struct("<624IIId")
"""How the state of a Mersenne twister is stored, numpy's and Python's alike: its words, the place of the next one,
whether a second normal number is at hand, and that number."""


def seed_everything(seed: int | None = None, *, workers: bool = True) -> int:
    """Seed the global generators of torch (all devices), numpy and Python: for code that draws from them.

    Laws: every process that calls it with the same seed draws the same numbers from then on; for others on each rank
    write `seed_everything(seed + rt.rank)`. Not needed for what fabricfn does: order of data, seeds of workers and
    dropout under `rng=` are functions of `rt.seed` and of keys, whatever the global generators do. What does draw from
    them is the initialisation of a module: call this before the module is made.

    Args:
        seed: 0 .. 2**32 - 1, as numpy takes it. None is 0, as in `init_runtime`; no environment variable is read.
        workers: only True. The workers of a loader from `setup_dataloader` are always seeded by
            (`rt.seed`, epoch, rank, worker), independently of this call; there is no switch to turn off.

    Returns:
        The seed.

    Raises:
        ConfigurationError: no integer, out of range, or `workers=False`.

    Not collective: no communication.

    Example:
        >>> import torch, fabricfn as ff
        >>> before = ff.random_state()
        >>> ff.seed_everything(42)
        42
        >>> torch.rand(2)
        tensor([0.8823, 0.9150])
        >>> ff.set_random_state(before)
    """
    if not workers:
        raise ConfigurationError(
            "workers=False cannot be had: the workers of a loader from ff.setup_dataloader are seeded by (rt.seed,"
            " epoch, rank, worker) and not by the global generators. Leave the argument out. A worker_init_fn of your"
            " own runs after that and may seed again; setup_dataloader(rt, loader, shard=False) leaves it all to torch."
        )
    try:
        number = 0 if seed is None else operator.index(seed)
    except TypeError:
        raise ConfigurationError(f"a seed is an integer, found {seed!r}. Write seed_everything(int(seed)).") from None
    if not 0 <= number < 1 << 32:
        raise ConfigurationError(
            f"seed={number} is out of range: numpy takes 0 .. 2**32 - 1. Write seed_everything(seed % 2**32)."
        )
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)
    return number


def random_state() -> State:
    """Where the global generators of torch, numpy and Python are: a dict of byte tensors that `save` takes.

    Law: `set_random_state(random_state())` changes nothing, and what is drawn after it is drawn again, bit for bit.

    It is this process's own. To save the states of all ranks, gather them: a plain leaf of a checkpoint is written
    once, for all ranks. It fits the same number of ranks only; keys (`ff.key`) have no state that could be lost.

    Returns:
        uint8 tensors on the CPU, of shapes that never change, in memory of their own: "torch" (CPU), "numpy",
        "python", and the current accelerator under its type ("cuda"), if it is initialised.

    Raises:
        ConfigurationError: numpy's global generator was replaced by one of another kind.

    Not collective: no communication.

    Example:
        >>> import torch, fabricfn as ff
        >>> state = ff.random_state()
        >>> first = torch.rand(3)
        >>> ff.set_random_state(state)
        >>> torch.equal(torch.rand(3), first)
        True

        On several ranks, each with numbers of its own:

        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> rows = ff.all_gather(rt, ff.random_state())  # {"torch": (world_size, 5056), ...}: for ff.save
        >>> ff.set_random_state(ff.tree_map(lambda states: states[rt.rank], rows))
    """
    state = {"torch": torch.get_rng_state()}
    accelerator = _accelerator()
    if accelerator is not None:
        state[accelerator.type] = device_generator(accelerator).get_state()
    _, words, place, has_normal, normal = _numpy_state()
    state["numpy"] = _packed(words.tolist(), place, normal if has_normal else None)
    _, numbers, normal = random.getstate()
    state["python"] = _packed(numbers[:-1], numbers[-1], normal)
    return state


def set_random_state(state: Mapping[str, torch.Tensor]) -> None:
    """Put the global generators where `random_state` found them.

    Law: all of it or nothing: a state that does not fit changes no generator.

    Args:
        state: what `random_state` returned, or a part of it: generators that are not in it stay as they are. On any
            device.

    Raises:
        ConfigurationError: it does not fit the generators of this process.

    Not collective: no communication.

    Example:
        >>> import random, fabricfn as ff
        >>> state = ff.random_state()
        >>> number = random.random()
        >>> ff.set_random_state({"python": state["python"]})
        >>> random.random() == number
        True
    """
    here = random_state()
    _check(state, here)
    found = {name: value.detach().cpu().clone() for name, value in state.items()}
    twisters = {name: _unpacked(name, found.pop(name)) for name in ("numpy", "python") if name in found}
    accelerator = _accelerator()
    others = {} if accelerator is None else {accelerator.type: device_generator(accelerator)}
    generators = [({"torch": torch.default_generator} | others)[name] for name in found]
    for (name, value), generator in zip(found.items(), generators, strict=True):
        try:
            torch.Generator(generator.device).set_state(value)
        except RuntimeError as error:
            raise _unfit(f"{name!r}: {error}") from None
    for value, generator in zip(found.values(), generators, strict=True):
        generator.set_state(value)
    if "numpy" in twisters:
        words, place, normal = twisters["numpy"]
        found_normal = {"has_gauss": int(normal is not None), "gauss": 0.0 if normal is None else normal}
        twister = {"key": np.array(words, np.uint32), "pos": place}
        np.random.set_state({"bit_generator": "MT19937", "state": twister, **found_normal})
    if "python" in twisters:
        words, place, normal = twisters["python"]
        random.setstate((3, (*words, place), normal))


def _accelerator() -> torch.device | None:
    """The current accelerator, once somebody has initialised it: else it has no state yet, and ranks may be forked."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return None
    module: Any = torch.get_device_module(found)
    initialised: Any = getattr(module, "is_initialized", None)  # mps has none: it is there from the beginning
    if initialised is not None and not initialised():
        return None
    return torch.device(found.type, torch.accelerator.current_device_index())


def _numpy_state() -> tuple[str, Any, int, int, float]:
    state: Any = np.random.get_state(legacy=False)
    kind = state["bit_generator"]
    if kind != "MT19937":
        raise ConfigurationError(
            f"numpy's global generator is {kind} here, and only its own MT19937 has a known state. Undo"
            " np.random.set_bit_generator, or keep the state of your generator yourself."
        )
    return kind, state["state"]["key"], state["state"]["pos"], state["has_gauss"], state["gauss"]


def _packed(words: Any, place: int, normal: float | None) -> torch.Tensor:
    packed = TWISTER.pack(*words, place, normal is not None, 0.0 if normal is None else normal)
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def _unpacked(name: str, value: torch.Tensor) -> tuple[tuple[int, ...], int, float | None]:
    *words, place, has_normal, normal = TWISTER.unpack(value.numpy().tobytes())
    if place > len(words) or has_normal > 1:
        raise _unfit(f"{name!r}: these bytes are no state of a Mersenne twister")
    return tuple(words), place, normal if has_normal else None


def _check(state: Mapping[str, torch.Tensor], here: State) -> None:
    """Raise unless every entry has the name, dtype and shape of one that this process has."""
    if not isinstance(state, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise _unfit(f"it is a {type(state).__name__}")
    wrong: list[str] = []
    for name, value in state.items():
        if name not in here:
            wrong.append(f"{name!r}: this process has no such generator, it has {', '.join(here)}")
        elif not isinstance(value, torch.Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            wrong.append(f"{name!r}: a {type(value).__name__}, not a tensor")
        elif (value.dtype, value.shape) != (torch.uint8, here[name].shape):
            wrong.append(f"{name!r}: {value.dtype} {list(value.shape)}, not torch.uint8 {list(here[name].shape)}")
    if wrong:
        raise _unfit("; ".join(wrong))


def _unfit(found: str) -> ConfigurationError:
    return ConfigurationError(
        f"set_random_state takes what ff.random_state() returned in a process like this one: {found}. Of states that"
        " were gathered from all ranks take this rank's: ff.tree_map(lambda states: states[rt.rank], state)."
    )
