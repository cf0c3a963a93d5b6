"""A compiled step as a CUDA graph: its kernels are recorded once, and one call of the host starts all of them.

[Note: slots] A recording reads and writes the addresses that it saw. Records that a donated step hands on lie where
they lay, so their tensors are recorded as they are. Every other input has a slot, which is filled before a replay (and
read back after it, where the step changes the input). Results lie in memory that the next replay writes over, so each
call gives copies.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fabricfn.compiling.arguments import Part
from fabricfn.compiling.overlaps import Spent
from fabricfn.errors import CapabilityError
from fabricfn.leases import bump
from fabricfn.records import Model
from fabricfn.tree import tree_leaves

Run = Callable[..., Sequence[torch.Tensor]]
_kernels: Any = torch
"""The functions on lists of tensors have no types."""


def record(run: Run, inputs: Sequence[torch.Tensor]) -> tuple[Callable[[], None], Sequence[torch.Tensor]]:
    """(what computes it once more, where its outputs will lie): nothing is computed yet.

    What other threads ask of the device meanwhile (a loader that pins memory) is no part of it and does not disturb it.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = run(*inputs)
    return graph.replay, outputs


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recording:
    """One recording; call it as the graph."""

    memories: Sequence[object | None]
    """For each argument: what says that it lies where it lay then; None: it may lie anywhere."""
    places: Sequence[int]
    """The inputs that have slots."""
    slots: Sequence[torch.Tensor]
    changed: Sequence[int]
    """The inputs that the graph changes."""
    back: Sequence[int]
    """Those of the slots that are read back."""
    replay: Callable[[], None]
    outputs: Sequence[torch.Tensor]

    def __call__(self, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        """Copies of the outputs for these inputs."""
        given = [inputs[place] for place in self.places]
        _kernels._foreach_copy_(self.slots, given)
        self.replay()
        bump([inputs[place] for place in self.changed])
        for number in self.back:
            given[number].copy_(self.slots[number])
        return [output.clone() for output in self.outputs]


class Recorder:
    """Chooses how a call runs: the first as it is, which loads and tunes kernels, the others by a recording.

    Where records lie elsewhere than they did, there is such a first call again.
    """

    def __init__(self, run: Run, spent: Spent, counts: Sequence[int]) -> None:
        """`counts`: how many tensors each argument has."""
        self.run = run
        self.changed = {sum(counts[:place]) + i for place, changed in spent for i in changed}
        self.before: Sequence[object | None] | None = None
        """Where the arguments of the first call lay."""
        self.recording: Recording | None = None

    def run_for(self, parts: Sequence[Part], inputs: Sequence[torch.Tensor]) -> Run:
        """What computes the outputs for these inputs; the arguments' tensors come first among them."""
        now = [None if part.known is None else part.known.memory for part in parts]
        if self.before is None:
            self.before = now
            return self.run
        if self.recording is None:
            memories = [then if then is here else None for then, here in zip(self.before, now, strict=True)]
            self.recording = self._recorded(parts, inputs, memories)
        elif any(then not in (None, here) for then, here in zip(self.recording.memories, now, strict=True)):
            self.before, self.recording = now, None
            return self.run
        return self.recording

    def _recorded(
        self, parts: Sequence[Part], inputs: Sequence[torch.Tensor], memories: Sequence[object | None]
    ) -> Recording:
        stay: set[int] = set()
        at = 0
        for part, memory in zip(parts, memories, strict=True):
            if memory is not None:  # buffers are new tensors after a step, whatever is known of the parameters
                stay.update(range(at, at + len(part.given.params if type(part.given) is Model else part.tensors)))
            at += len(part.tensors)
        own = {
            place: torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device=one.device)
            for place, one in enumerate(inputs)
            if place not in stay
        }
        try:
            replay, outputs = record(self.run, [own.get(place, one) for place, one in enumerate(inputs)])
        except RuntimeError as error:
            error.add_note("while capture=True recorded your step as a CUDA graph; nothing was computed, nothing lost")
            raise
        return Recording(
            memories=memories,
            places=[*own],
            slots=[*own.values()],
            changed=[*self.changed],
            back=[number for number, place in enumerate(own) if place in self.changed],
            replay=replay,
            outputs=outputs,
        )


def check_devices(gm: fx.GraphModule, device: torch.device) -> None:
    """Raise `CapabilityError` if the graph computes elsewhere: a recording holds what one device does, and no more."""
    for node in gm.graph.nodes:
        value = getattr(gm, node.target) if node.op == "get_attr" else node.meta.get("val")
        for one in tree_leaves(value):
            if isinstance(one, torch.Tensor) and one.device.type != device.type:
                raise CapabilityError(
                    f"capture=True records what {device} does, and this step also works on the {one.device.type}:"
                    f" {node.name}, shape {tuple(one.shape)}. Make it there (torch.zeros(..., device=rt.device)), pass"
                    " numbers as floats, move batches with ff.batches or ff.to_device; or leave capture out."
                )
