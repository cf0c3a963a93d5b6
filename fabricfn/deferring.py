"""A module that is made without memory, and its values later, part by part: the same bits as if made at once.

[Note: tape] While a factory runs, every operation that would make or change a tensor is written down and done on the
meta device instead, where tensors have a shape and no memory. The values of any tensor are got by repeating the
operations that led to them, and no others. Where an operation draws random numbers, the state of the generator is kept
with it, and the numbers are drawn once, into memory that is dropped at once, so that those after it come as they would.
Code that looks at a value (`.item()`, `.numpy()`, an `if`) gets the true one, by such a repetition.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fabricfn.default_dtypes import default_dtype
from fabricfn.engine import named_modules
from fabricfn.errors import ModelError
from fabricfn.random import device_generator
from fabricfn.tree import tree_flatten, tree_leaves, tree_map, tree_unflatten

disabled: Any = _disable_current_modes
_READS: frozenset[Any] = frozenset({torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__})
"""What looks at memory without an operation."""
_TENSOR: Any = torch.Tensor  # its stubs know these attributes as values, not as descriptors
_PLACES: dict[Any, Callable[[torch.device], Any]] = {
    _TENSOR.is_meta.__get__: lambda device: False,
    _TENSOR.is_cpu.__get__: lambda device: device.type == "cpu",
    _TENSOR.is_cuda.__get__: lambda device: device.type == "cuda",
    _TENSOR.device.__get__: lambda device: device,
}
"""What asks where a tensor is, and the answer."""


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's numbers are: a storage of the meta device, and a geometry."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def place_of(tensor: torch.Tensor) -> Place:
    """The place of a tensor on the meta device."""
    key = tensor.untyped_storage()._cdata
    return Place(key, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


@dataclasses.dataclass(frozen=True, slots=True)
class Op:
    """One operation: what it was called with (places for tensors without memory), and where its results are."""

    fn: Any
    leaves: list[Any]
    spec: Any
    results: list[Place | None]
    versions: list[tuple[torch.Tensor, int]]
    """The tensors with memory among the arguments; they must still be what they were."""
    generator: torch.Generator | None
    state: torch.Tensor | None
    default_dtype: torch.dtype
    """What torch's default was: the product of integers and a float is of that dtype."""


class Tape:
    """The operations of one factory, in their order."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ops: list[Op] = []
        self.writers: dict[int, list[int]] = {}
        self.alive: list[torch.Tensor] = []  # the address of a storage names it

    def write(self, op: Op, written: Iterable[int]) -> None:
        """Keep an operation that changes these storages."""
        for key in written:
            self.writers.setdefault(key, []).append(len(self.ops))
        self.ops.append(op)

    def values(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """These tensors with their values; what shared memory shares it here, too.

        Raises:
            ModelError: one of them was not made by an operation, or from a tensor that has changed since.
        """
        places = [place_of(tensor) for tensor in tensors]
        needed, todo, chosen = set[int](), [place.storage for place in places], set[int]()
        while todo:
            key = todo.pop()
            if key in needed:
                continue
            needed.add(key)
            if key not in self.writers:
                raise ModelError("a tensor was made in a way that cannot be repeated.")
            for index in self.writers[key]:
                chosen.add(index)
                op = self.ops[index]
                todo += [leaf.storage for leaf in op.leaves if isinstance(leaf, Place)]
        memory: dict[int, torch.UntypedStorage] = {}
        for index in sorted(chosen):
            self.repeat(self.ops[index], memory)
        return [seen(memory[place.storage], place, self.device) for place in places]

    def repeat(self, op: Op, memory: dict[int, torch.UntypedStorage]) -> None:
        """Do an operation on true memory."""
        if any(tensor._version != version for tensor, version in op.versions):
            raise ModelError(f"a tensor that {op.fn} read while the factory ran has changed since.")
        before = None if op.generator is None else op.generator.get_state()
        if op.generator is not None and op.state is not None:
            op.generator.set_state(op.state)
        with default_dtype(op.default_dtype):
            found = run(op.fn, op.leaves, op.spec, memory, self.device)
        if op.generator is not None and before is not None:
            op.generator.set_state(before)
        for place, tensor in zip(op.results, tree_leaves(found), strict=True):
            if place is None or place.storage in memory:
                continue
            if tensor.stride() != place.stride or tensor.storage_offset() != place.offset:
                laid = torch.empty_strided(place.size, place.stride, dtype=place.dtype, device=tensor.device)
                memory[place.storage] = laid.copy_(tensor).untyped_storage()
            else:
                memory[place.storage] = tensor.untyped_storage()


def seen(storage: torch.UntypedStorage, place: Place, device: torch.device) -> torch.Tensor:
    """A tensor that looks at a place of true memory."""
    empty: Any = torch.empty(0, dtype=place.dtype, device=storage.device)  # the stubs of set_ know no torch.Size
    return empty.set_(storage, place.offset, place.size, place.stride)


def run(fn: Any, leaves: Sequence[Any], spec: Any, memory: dict[int, torch.UntypedStorage], device: Any) -> Any:
    """`fn` with true tensors."""
    true = [seen(memory[leaf.storage], leaf, device) if isinstance(leaf, Place) else leaf for leaf in leaves]
    args, kwargs = tree_unflatten(spec, true)
    if getattr(kwargs.get("device"), "type", None) == "meta":
        kwargs["device"] = device
    with torch.no_grad():
        return fn(*args, **kwargs)


class Record(TorchDispatchMode):
    """Writes a tape."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # here the truth is wanted, not what `Look` says
            return self.done(func, args, dict(kwargs or {}))

    def done(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The operation on the meta device, written down; or on values, where a shape or a number is wanted."""
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        hollow = [tensor for tensor in tensors if tensor.is_meta]
        makes = any(argument.name == "device" for argument in func._schema.arguments)
        if (tensors and not hollow) or not (hollow or makes):
            return func(*args, **kwargs)  # values that the user holds anyway
        targets = changed(func, args, kwargs)
        if not all(tensor.is_meta for tensor in targets):
            return self.truly(func, args, kwargs)  # into memory that the user holds
        written = {place_of(tensor).storage for tensor in targets}
        state, generator = self.advance(func, args, kwargs, hollow, written)
        meta = [torch.empty_like(x, device="meta") if is_true(x) else x for x in leaves]
        margs, mkwargs = tree_unflatten(spec, meta)
        if makes:
            mkwargs["device"] = torch.device("meta")
        try:
            found = func(*margs, **mkwargs)
        except (RuntimeError, NotImplementedError):
            if written:
                raise
            if generator is not None and state is not None:
                generator.set_state(state)  # it draws its numbers now
            return self.truly(func, args, kwargs)  # its shape depends on values
        results = tree_leaves(found)
        if not all(isinstance(result, torch.Tensor) for result in results):
            return self.truly(func, args, kwargs)
        places = [place_of(result) for result in results]
        fresh = {place.storage for place in places} - self.tape.writers.keys()
        if fresh or written:
            kept = [place_of(leaf) if isinstance(leaf, torch.Tensor) and leaf.is_meta else leaf for leaf in leaves]
            true = [(tensor, tensor._version) for tensor in tensors if not tensor.is_meta]
            default = torch.get_default_dtype()
            self.tape.alive += results
            self.tape.write(Op(func, kept, spec, list(places), true, generator, state, default), fresh | written)
        return found

    def truly(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operation with values."""
        leaves, spec = tree_flatten((args, kwargs))
        places = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_meta]
        with disabled():
            values = iter(self.tape.values(places))
            true = [next(values) if isinstance(leaf, torch.Tensor) and leaf.is_meta else leaf for leaf in leaves]
            args, kwargs = tree_unflatten(spec, true)
            return func(*args, **kwargs)

    def advance(
        self, func: Any, args: Any, kwargs: Any, hollow: Sequence[torch.Tensor], written: set[int]
    ) -> tuple[torch.Tensor | None, torch.Generator | None]:
        """The state of the generator before a random operation, which has drawn its numbers afterwards."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return None, None
        generator = kwargs.get("generator") or device_generator(self.tape.device)
        state = generator.get_state()
        with disabled():
            if len(hollow) == 1 and written:  # it writes over what was there
                self_, *rest = args
                scratch = torch.empty_strided(self_.shape, self_.stride(), dtype=self_.dtype, device=self.tape.device)
                func(scratch, *rest, **kwargs)
                return state, generator
            if not hollow:
                if getattr(kwargs.get("device"), "type", None) == "meta":
                    kwargs = kwargs | {"device": self.tape.device}
                func(*args, **kwargs)
                return state, generator
        self.truly(func, args, kwargs)
        return state, generator


def changed(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The arguments that an operation writes to."""
    found: list[Any] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[index] if index < len(args) else kwargs.get(argument.name))
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]


def is_true(leaf: Any) -> bool:
    """Whether it is a tensor with memory that an operation on the meta device would refuse."""
    return isinstance(leaf, torch.Tensor) and not leaf.is_meta and leaf.dim() > 0


class Look(TorchFunctionMode):
    """Serves what looks at memory, or copies it, without an operation."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else None
        if isinstance(first, torch.Tensor):
            with torch._C.DisableTorchFunction():
                hollow = first.is_meta
            if hollow and func in _PLACES:  # nn.init leaves alone what it sees on the meta device
                return _PLACES[func](self.tape.device)
            if hollow and func in _READS:
                with disabled(), torch._C.DisableTorchFunction():
                    return func(self.tape.values([first])[0], *args[1:], **(kwargs or {}))
            if func is torch.Tensor.__deepcopy__ and not hollow:
                with disabled():  # its storage is copied by operations
                    return func(*args)
            if func is torch.Tensor.__deepcopy__ and type(first) is torch.Tensor:
                memo = args[1]
                if id(first) not in memo:
                    memo[id(first)] = first.detach().clone().requires_grad_(first.requires_grad)
                return memo[id(first)]
        return func(*args, **(kwargs or {}))


def made(factory: Callable[[], nn.Module], device: torch.device) -> tuple[nn.Module, Tape]:
    """(the module that `factory()` makes, without memory; the tape that has its values)."""
    tape = Tape(device)
    try:
        with device, Look(tape), Record(tape):
            module = factory()
    except Exception as error:  # the factory's own, with advice
        error.add_note(
            "The factory ran without memory, so that no rank holds the whole model. If it failed for that reason, make"
            " the whole module on each rank: ff.setup_model(rt, ff.init_module(rt, factory))."
        )
        raise
    kept = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}

    def is_bare(leaf: Any) -> bool:
        return isinstance(leaf, torch.Tensor) and leaf.is_meta and id(leaf) not in kept

    def valued(leaf: Any) -> Any:
        return tape.values([leaf])[0].clone() if is_bare(leaf) else leaf

    for _, part in named_modules(module):
        for name, held in vars(part).items():
            mine = isinstance(held, torch.Tensor) or (type(held) in (list, tuple, dict) and name[0] != "_")
            if mine and any(map(is_bare, tree_leaves(held))):
                vars(part)[name] = tree_map(valued, held)
    return module, tape
