"""Moving a tree to this process' device."""

import copy
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.rnn import PackedSequence

from fabricfn.runtimes import Runtime
from fabricfn.tree import Tree, tree_flatten, tree_unflatten

WAITING = ("cpu", "mps")
"""Kinds of device to which a copy that returns early would leave the values undefined for whoever reads them next."""


def to_device(rt: Runtime, tree: Tree) -> Tree:
    """The tree with every tensor on `rt.device`; structure, dtypes and aliases stay, and inputs are untouched.

    A tensor that is there already is returned itself, not copied. So is any other leaf without a method `to` (numbers,
    strings). A leaf with one (`PackedSequence`, a batch of a tokenizer, your own class) is moved by `leaf.to(device)`.
    Copies from pinned memory to an accelerator do not wait (`non_blocking=True`).

    Unlike in Fabric an `nn.Module` is not moved in place: one that is not on the device wholly is copied (tied
    parameters stay tied), and the copy moved; one that is, is returned itself. To train, `setup_model` moves by itself.

    Args:
        rt: the runtime.
        tree: any pytree; one object that stands in several places is moved once and stays one.

    Returns:
        A new tree on this rank. Not a collective.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> ff.to_device(rt, {"x": torch.ones(2), "id": "a"})
        {'x': tensor([1., 1.]), 'id': 'a'}
    """
    device = rt.world.device
    leaves, spec = tree_flatten(tree, _moves_itself)
    moved: dict[int, Any] = {}
    results: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and leaf.device == device:
            results.append(leaf)
        else:
            if id(leaf) not in moved:
                moved[id(leaf)] = _moved(leaf, device)
            results.append(moved[id(leaf)])
    return tree_unflatten(spec, results)


def _moves_itself(node: Any) -> bool:
    # a named tuple, whose batch_sizes must stay on the CPU
    return isinstance(node, PackedSequence)


def _moved(leaf: Any, device: torch.device) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.to(device, non_blocking=device.type not in WAITING)
    if isinstance(leaf, nn.Module):
        tensors = [*leaf.parameters(), *leaf.buffers()]
        return leaf if all(_is_on(tensor, device) for tensor in tensors) else _moved_module(leaf, device)
    move = getattr(leaf, "to", None)
    if move is None or isinstance(leaf, type):
        return leaf
    result = move(device)
    # some classes move in place and return nothing
    return leaf if result is None else result


def _moved_module(module: nn.Module, device: torch.device) -> nn.Module:
    """A deep copy whose parameters and buffers are made on the device, each once: `Module.to` unties them on some."""
    memo: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        if not isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
            copied = tensor.detach().to(device, copy=True)
            memo[id(tensor)] = (
                nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
            )
    return copy.deepcopy(module, memo).to(device)


def _is_on(tensor: torch.Tensor, device: torch.device) -> bool:
    """`cuda` without an index is any of them, as for `Tensor.to`."""
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


def move_batch(rt: Runtime, batch: object) -> Any:
    """`to_device`; a flat batch whose tensors are there already is passed on, at a tenth of the cost of walking it."""
    kind, leaves, device = type(batch), cast(Any, batch), rt.world.device
    for leaf in leaves if kind is tuple or kind is list else leaves.values() if kind is dict else (leaves,):
        if type(leaf) is not torch.Tensor or leaf.device != device:
            return to_device(rt, batch)
    return batch


def move_all(rt: Runtime, batches: Iterator[Any]) -> Iterator[Any]:
    """The batches, each moved to the device when it is asked for."""
    return map(partial(move_batch, rt), batches)


AHEAD = 2
"""So many batches are on their way to the device, or there, beside the one that is computed with."""


def move_ahead(rt: Runtime, batches: Iterator[Any]) -> Iterator[Any]:
    """The batches, each moved on a stream of its own while the steps before it compute.

    Out of pinned memory (`DataLoader(..., pin_memory=True)`) the copies run beside the computation; out of other memory
    they are right, too, but the host waits for them.
    """
    device = rt.world.device
    side = torch.cuda.Stream(device)
    ahead: deque[tuple[Any, Any]] = deque()

    def fetch() -> None:
        for batch in islice(batches, 1):
            # The copies may reuse the memory of an earlier batch, so its step must be done. All that was queued is
            # waited for, whatever holds the tensors: `record_stream` would have to find them in a user's own classes.
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                found = move_batch(rt, batch)
            ahead.append((found, side.record_event()))

    for _ in range(AHEAD):
        fetch()
    while ahead:
        batch, arrived = ahead.popleft()
        torch.cuda.current_stream(device).wait_event(arrived)
        fetch()
        yield batch


MOVERS: dict[str, Callable[[Runtime, Iterator[Any]], Iterator[Any]]] = {"cuda": move_ahead}
"""The kinds of device that have streams; on the others a batch is moved when it is asked for."""


def moved(rt: Runtime, batches: Iterator[Any]) -> Iterator[Any]:
    """The batches on the device of this process."""
    return MOVERS.get(rt.world.device.type, move_all)(rt, batches)
