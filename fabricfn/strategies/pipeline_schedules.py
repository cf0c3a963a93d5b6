"""The schedules of torch.distributed.pipelining: who computes which micro-batch when, and what travels.

[Note: doors] torch drives a stage as a module. Ours is a door: it has no parameters, and calls a function with the
number of the stage, that of the micro-batch, and what was received. Inputs, targets and the loss stay behind the door
(the last one returns the loss itself), so they may be any trees, and torch sees tensors only.

[Note: static shapes] torch would find out what travels by a forward and a backward pass over the first micro-batch, in
which BatchNorm counts and a user's code runs once more. So the shapes are found out here, on tensors without memory.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.func import functional_call

from fabricfn.engine import Box, Frame
from fabricfn.errors import ConfigurationError, ModelError
from fabricfn.strategies.pipeline_parallel import Pipe
from fabricfn.strategies.pipeline_stages import as_tuple
from fabricfn.tree import tree_map

Run = Callable[[int, int, tuple[torch.Tensor, ...]], Any]
"""(stage, micro-batch, what was received) -> what is sent on; of the last stage the loss."""
Flow = tuple[tuple[torch.Tensor, ...], ...]
"""What each stage but the last sends on, without memory."""

SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
}


class Door(nn.Module):
    """See [Note: doors]."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        self.stage = stage
        self.run: Run | None = None

    def forward(self, *received: torch.Tensor, index: torch.Tensor) -> Any:
        """What the function returns for the micro-batch of this index."""
        assert self.run is not None
        return self.run(self.stage, int(index), received)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A schedule of torch's with the doors of this rank's stages."""

    flow: Flow
    doors: tuple[Door, ...]
    schedule: Any


def check_schedule(name: str, num_microbatches: int, num_stages: int, num_ranks: int) -> None:
    """Raise `ConfigurationError` where a schedule cannot run so many stages and micro-batches on so many ranks."""
    if name not in SCHEDULES:
        raise ConfigurationError(f"schedule={name!r} is unknown; there are {', '.join(map(repr, SCHEDULES))}.")
    if num_ranks == 1:
        return
    rounds = max(1, num_microbatches // num_ranks)
    if name != "interleaved_1f1b" and num_stages != num_ranks:
        raise ConfigurationError(
            f"schedule={name!r} runs one stage on each rank, but here are {num_stages} stages on {num_ranks} ranks."
            ' Write schedule="interleaved_1f1b", or cut the net into fewer stages.'
        )
    if name == "1f1b" and num_microbatches < num_stages:
        raise ConfigurationError(
            f'schedule="1f1b" needs at least as many micro-batches as stages, but num_microbatches={num_microbatches}'
            f' for {num_stages} stages. Write num_microbatches={num_stages}, or schedule="gpipe".'
        )
    if name == "interleaved_1f1b" and num_microbatches % rounds:
        raise ConfigurationError(
            f'schedule="interleaved_1f1b" goes through the micro-batches in rounds of about {num_ranks}, one for each'
            f" rank, and num_microbatches={num_microbatches} does not make {rounds} equal rounds. Write"
            f" num_microbatches={rounds * num_ranks}."
        )


def route_for(frame: Frame, name: str, num_microbatches: int, flow: Flow, device: torch.device) -> Route:
    """A new schedule; it has memory for whatever this rank receives."""
    pipe: Pipe = frame.handle
    doors, stages = tuple(Door(number) for number in pipe.here), list[Any]()
    ends = (torch.empty(0, device="meta"), torch.empty((), device="meta"))
    sent: Sequence[tuple[torch.Tensor, ...]] = ((), *flow, ends[1:])
    for door in doors:
        stage: Any = PipelineStage(
            door,
            door.stage,
            len(pipe.stages),
            device,
            input_args=sent[door.stage],
            output_args=sent[door.stage + 1],
            group=pipe.group,
        )
        stages.append(stage)
    made = SCHEDULES[name](
        stages if name == "interleaved_1f1b" else stages[0], num_microbatches, loss_fn=_itself, scale_grads=False
    )
    return Route(flow=flow, doors=doors, schedule=made)


def _itself(loss: torch.Tensor, target: Any) -> torch.Tensor:
    return loss


def drive(route: Route, num_microbatches: int, run: Run, *, backward: bool) -> None:
    """All micro-batches through this rank's stages. Every rank of the pipeline must call it."""
    failures: list[BaseException] = []

    def guarded(stage: int, index: int, received: tuple[torch.Tensor, ...]) -> Any:
        try:
            return run(stage, index, received)
        except BaseException as error:
            failures.append(error)
            raise

    for door in route.doors:
        door.run = guarded
    index = torch.arange(num_microbatches)
    step = route.schedule.step if backward else route.schedule.eval
    try:
        step(index=index, target=index, return_outputs=False)
    except RuntimeError:
        if not failures:
            raise
    finally:
        for door in route.doors:
            door.run = None
    if failures:  # not raised above: torch has put it into an error of its own, which would become its context
        raise failures[0]


def flow_of(frame: Frame, inputs: tuple[Any, ...], device: torch.device) -> Flow:
    """What travels between the stages when the first one gets such inputs; see [Note: static shapes].

    Raises:
        ModelError: a stage returns something else than tensors, or looks at numbers.
    """
    pipe: Pipe = frame.handle
    with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():

        def like(tensor: torch.Tensor) -> torch.Tensor:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

        held = {
            f"net.{name}": like(slot).requires_grad_(slot.requires_grad) for name, slot in frame.net.named_parameters()
        }
        held |= {f"net.{name}": like(buffer) for name, buffer in frame.net.named_buffers()}

        def through(net: nn.Module) -> list[tuple[Any, ...]]:
            values, found = tree_map(like, inputs), list[tuple[Any, ...]]()
            for number, stage in enumerate(pipe.stages[:-1]):
                values = sent_by(number, stage(net, *values))
                found.append(values)
            return found

        try:
            found = functional_call(Box(frame.net), held, (through,))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ModelError(
                f"what travels between stages must be known from the shapes of a batch, but {error} depends on its"
                " numbers. Compute that in the loss function, or on a shape that is always the same (a mask)."
            ) from error
    return tuple(tuple(map(_without_memory, values)) for values in found)


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta", requires_grad=tensor.requires_grad)


def sent_by(stage: int, output: Any) -> tuple[torch.Tensor, ...]:
    """What a stage sends on: its tensors, in order.

    Raises:
        ModelError: it returned something else.
    """
    values = as_tuple(output)
    strangers = [type(value).__name__ for value in values if not isinstance(value, torch.Tensor)]
    if strangers or not values:
        raise ModelError(
            f"stage {stage} returned {', '.join(strangers) or 'nothing'}; between stages tensors travel, one or a"
            " tuple. Cut the net elsewhere, or let the stage be a pair (names, fn), whose function returns tensors."
        )
    return values


def check_sent(stage: int, index: int, values: Sequence[torch.Tensor], flow: Flow) -> None:
    """Raise `ModelError` unless a stage sends on what the next one has memory for."""
    found = [(tuple(value.shape), value.dtype) for value in values]
    wanted = [(tuple(value.shape), value.dtype) for value in flow[stage]]
    if found != wanted:
        raise ModelError(
            f"stage {stage} returned {found} for micro-batch {index}, where it should return {wanted}, as it does for"
            " every other batch of these shapes. What travels between stages has one shape: pad, or cut the net"
            " elsewhere."
        )
