"""Binding: the slots of a frame point to the values of a record. See [Note: slots] and [Note: lease]."""

from typing import Any, cast

import torch
from torch.func import functional_call

from fabricfn.engine import Box, Engine, Frame, named_modules
from fabricfn.errors import CapabilityError, ModelError
from fabricfn.leases import increment_version
from fabricfn.records import Model
from fabricfn.tracing import tracing
from fabricfn.tree import path_name, tree_leaves, tree_paths

transforming = torch._C._are_functorch_transforms_active
"""Whether a `torch.func` transform (grad, vmap, jvp) is under way."""


def engine_of(model: Model) -> Engine:
    """The engine behind a record."""
    engine = model.ref.engine
    if engine is None:
        raise ModelError(
            "this Model was unpickled and has no engine behind it. Set the module up with ff.setup_model and put the"
            " values in: dataclasses.replace(live_model, params=model.params, buffers=model.buffers)."
        )
    return engine


def idle(engine: Engine, *, frozen: bool) -> Frame:
    """A frame that no run is using; one more is made when all are in use."""
    pool = engine.frozen if frozen else engine.frames
    for frame in pool:
        if not frame.open:
            return frame
    pool.append(engine.grow(frozen))
    return pool[-1]


def acquire(model: Model, *, frozen: bool) -> Frame:
    """An idle frame of the model's engine, bound to the model's values, and open until `release`.

    A hot loop finds the first frame bound to the very lease: two attribute reads.
    """
    engine = engine_of(model)
    if tracing() and not engine.traced:
        raise CapabilityError(
            "a compiled step takes its models as arguments; this Model came from outside, and its values would be part"
            " of the graph for ever. Write step(model, other, ...) and pass it at every call."
        )
    frame = idle(engine, frozen=frozen)
    if model.lease is not frame.owner:
        bind(engine, frame, model)
    if frame.broken:
        engine.mend(frame)
    if model.training is not frame.training:
        set_training(frame, model.training)
    if frame.places or model.buffers:
        load_buffers(frame, model)
    frame.open = True
    return frame


def unbound(model: Model) -> Frame:
    """A frozen frame for `call_with_values` within a `torch.func` transform, whose tensors cannot be bound to slots."""
    frame = idle(engine_of(model), frozen=True)
    set_training(frame, model.training)
    load_buffers(frame, model)
    frame.open = True
    return frame


def release(frame: Frame) -> None:
    """Close a frame after a run."""
    frame.open = False
    if frame.training is not None and frame.net.training is not ("" in frame.training):
        frame.training = None  # the run called net.train() or net.eval(): the next one sets every mode again


def bind(engine: Engine, frame: Frame, model: Model) -> None:
    """Point the slots to the model's tensors, after every check; values are never copied."""
    assert not frame.open, "a frame is bound while a run is under way"
    lease = model.lease
    lease.check("Model")
    if tuple(model.params) != frame.names:
        wrong = sorted({*model.params} ^ {*frame.names})
        raise ModelError(f"this Model has other names than the module that was set up: {', '.join(wrong[:8])}.")
    values = tuple(model.params.values())
    for value, (dtype, shape, device) in zip(values, frame.kinds, strict=True):
        if value.dtype is not dtype or value.shape != shape or value.device != device:
            refuse_kinds(frame, model)
    if frame.owner is not None:
        frame.owner.frames = [other for other in frame.owner.frames if other is not frame]
        frame.owner = None
    torch.clear_autocast_cache()  # it knows slots, not values
    engine.point(frame, values)
    # the backward pass of an older open graph over these slots must fail, not give the gradient at other values
    increment_version(frame.slots)
    frame.owner = lease
    lease.frames = [*lease.frames, frame]


def refuse_kinds(frame: Frame, model: Model) -> None:
    """Raise `ModelError` naming the first value that does not fit its slot."""
    for (name, value), (dtype, shape, device) in zip(model.params.items(), frame.kinds, strict=True):
        if value.dtype is not dtype or value.shape != shape or value.device != device:
            wanted = describe(torch.empty(shape, dtype=dtype, device="meta")).replace("meta", str(device))
            raise ModelError(
                f"{name} of this Model is {describe(value)}, but the module that was set up has {wanted}."
                " A Model can be mapped to other values, not to other shapes, dtypes or devices."
            )


def bind_constants(tree: Any, frames: list[Frame]) -> Any:
    """`tree` with every Model in it replaced by a frozen net that is bound to its values.

    The frames used are added to `frames`, for the caller to release. A tree without a Model is returned as it is.
    """
    kind = cast("Any", type(tree))
    if kind is torch.Tensor:
        return tree
    if kind is Model:
        for frame in frames:
            if frame.owner is tree.lease and frame.training == tree.training and frame.loaded is tree.buffers:
                return frame.net
        frames.append(acquire(tree, frozen=True))
        return frames[-1].net
    if kind is dict:
        items = cast("dict[Any, Any]", tree)
        new = {key: bind_constants(value, frames) for key, value in items.items()}
        return new if any(new[key] is not value for key, value in items.items()) else tree
    if isinstance(tree, (list, tuple)):
        old = cast("list[Any]", tree)
        for value in old:
            if type(value) is not torch.Tensor:
                break
        else:  # the usual batch
            return cast("Any", tree)
        values = [bind_constants(value, frames) for value in old]
        if all(a is b for a, b in zip(values, old, strict=True)):
            return cast("Any", tree)
        return kind(*values) if hasattr(kind, "_fields") else kind(values)  # named tuples take their fields one by one
    return tree


def describe(tensor: torch.Tensor) -> str:
    """`float32 (3, 4) on cpu`."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} on {tensor.device}"


def set_training(frame: Frame, training: frozenset[str]) -> None:
    """Put the named sub-modules into training mode and all others into evaluation mode."""
    if training != frame.training:
        for name, module in named_modules(frame.net):
            module.training = name in training
    frame.training = training


def load_buffers(frame: Frame, model: Model) -> None:
    """Hang copies of the model's buffers into the net: what the forward pass changes there is not the record."""
    if tuple(model.buffers) != tuple(frame.places):
        wrong = sorted({*model.buffers} ^ {*frame.places})
        raise ModelError(f"this Model has other buffers than the module that was set up: {', '.join(wrong[:8])}.")
    frame.loaded = model.buffers
    frame.copies = {name: value.clone() for name, value in model.buffers.items()}
    for name, places in frame.places.items():
        for buffers, key in places:
            buffers[key] = frame.copies[name]


def changed_buffers(frame: Frame, model: Model) -> dict[str, torch.Tensor]:
    """The buffers that the run changed, by name: replaced, written in place, or possibly written.

    Native batch normalisation writes its statistics without bumping their version (measured), so a floating buffer of
    a module in training mode counts as changed unless it can be compared without waiting for an accelerator.
    (A traced one cannot.)
    """
    changed: dict[str, torch.Tensor] = {}
    for name, places in frame.places.items():
        old, copy, new = model.buffers[name], frame.copies[name], places[0][0][places[0][1]]
        if new is None or new.shape != old.shape or new.dtype is not old.dtype:
            found = "None" if new is None else describe(new)
            raise ModelError(
                f"the forward pass replaced the persistent buffer {name}, {describe(old)}, by {found}. Register a"
                " cache with persistent=False; state keeps its shape and dtype."
            )
        training = name.rpartition(".")[0] in model.training
        if new is not copy:
            changed[name] = new.detach().clone()
        elif new._version or (training and not (new.device.type == "cpu" and not tracing() and torch.equal(new, old))):
            changed[name] = new
    for name, places in frame.absent.items():
        if any(buffers[key] is not None for buffers, key in places):
            raise ModelError(
                f"the persistent buffer {name} was None when the module was set up and is a tensor now, which no record"
                " holds. Give it its value before ff.setup_model, or register it with persistent=False."
            )
    return changed


def call_with_values(frame: Frame, model: Model, fn: Any) -> Any:
    """`fn(net)` with the record's own tensors in place of the slots.

    So a graph that outlives the call looks at the record and not at slots that are bound to others later; and the
    tensors may be those of a `torch.func` transform.
    """
    named = {f"net.{name}": value for name, value in model.params.items()}
    return functional_call(Box(frame.net), named, (fn,))


def needs_graph(tree: Any) -> bool:
    """Whether a tensor among the arguments requires grad."""
    if isinstance(tree, torch.Tensor):
        return tree.requires_grad
    if isinstance(tree, dict):
        return any(map(needs_graph, cast("dict[Any, Any]", tree).values()))
    return isinstance(tree, (list, tuple)) and any(map(needs_graph, cast("list[Any]", tree)))


def check_devices(error: RuntimeError, device: torch.device, args: Any, kwargs: Any) -> None:
    """Raise `ModelError` when an error of torch is about devices and some arguments lie on another one."""
    if "device" not in str(error):
        return
    named = {f"argument {index}": value for index, value in enumerate(args)} | kwargs
    leaves = zip(tree_paths(named), tree_leaves(named), strict=True)
    tensors = [(path_name(path), leaf) for path, leaf in leaves if isinstance(leaf, torch.Tensor)]
    strangers = [f"{name} on {leaf.device}" for name, leaf in tensors if leaf.device.type != device.type]
    if strangers:
        raise ModelError(
            f"the model is on {device}, but not all tensors that it met are: {', '.join(strangers[:6])}. Move them with"
            " ff.to_device(rt, batch), or take batches from ff.batches(rt, loader)."
        ) from error
