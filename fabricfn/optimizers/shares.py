"""ZeRO stage 1: parameters are whole on every rank, the optimizer's state is not.

[Note: shares] Each rank keeps the state of a stretch of every flattened parameter, steps that stretch, in place in the
whole parameter, and sends it to all others. The stretches of the ranks meet at multiples of `UNIT` numbers. Fused
kernels compute the last numbers of a tensor, those that fill no vector, by other instructions; cut there, every number
is computed as in the whole tensor, so the results have the same bits.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fabricfn import flat
from fabricfn.errors import GradientError
from fabricfn.sharding import hollow
from fabricfn.states import Optimizer, Plan
from fabricfn.strategies.stretch import laid, stretch_of
from fabricfn.world import World

UNIT = 64
"""Numbers that stay together: a vector of every CPU is a part of so many, of any dtype."""


def bounds_over(sizes: Iterable[int], count: int) -> list[tuple[int, ...]]:
    """For tensors of these sizes, where the stretches of `count` ranks begin and end: even, over all tensors together.

    Example:
        >>> bounds_over([256, 10, 10, 200], 2)
        [(0, 128, 256), (0, 0, 10), (0, 10, 10), (0, 128, 200)]
    """
    bounds: list[tuple[int, ...]] = []
    dealt = 0
    for size in sizes:
        units = -(-size // UNIT)
        bounds.append(tuple(min(UNIT * ((units * rank + dealt) // count), size) for rank in range(count + 1)))
        dealt = (dealt + units) % count  # who gets the unit that is left over
    return bounds


def likes_over(values: Sequence[Tensor], positions: Iterable[int], world: World) -> tuple[Any, ...]:
    """How the state of the parameters at `positions` lies on the ranks; None at the others. See `Plan.likes`."""
    assert world.group is not None, "one rank shares nothing"
    mesh = DeviceMesh.from_group(world.group, world.device.type, mesh_dim_names=("dp",))
    covered = sorted(positions)
    likes: list[Any] = [None] * len(values)
    for i, bounds in zip(covered, bounds_over((values[i].numel() for i in covered), world.world_size), strict=True):
        part = values[i].detach().reshape(-1)[bounds[world.rank] : bounds[world.rank + 1]]
        likes[i] = hollow(laid(part, mesh, bounds, values[i].shape))
    return tuple(likes)


def parts(likes: Sequence[Any], wholes: Sequence[Tensor]) -> list[Tensor]:
    """Of each tensor, the stretch of this rank; a view where the tensor is contiguous."""
    pairs = zip(likes, wholes, strict=True)
    return [whole if like is None else stretch_of(whole, like._spec) for like, whole in pairs]


def advance(
    step: Callable[..., Any],
    opt: Optimizer,
    params: list[Tensor],
    grads: list[Tensor | None],
    hyperparams: Sequence[Mapping[str, Any]],
    donate: bool,
    evaluate: Callable[[], tuple[Any, list[Tensor | None]]] | None,
) -> Any:
    """`Plan.advance` over whole parameters, of which `step` moves this rank's stretches. Every rank must call it."""
    plan = opt.plan
    likes: Any = plan.likes
    covered = [i for i, like in enumerate(likes) if like is not None]
    specs = [likes[i]._spec for i in covered]
    works = list(params)
    for i in covered:  # of parameters that are laid out otherwise, flat copies
        works[i] = params[i].contiguous()

    def spread() -> None:
        lines = [works[i].view(-1) for i in covered]
        flat.share(lines, [spec.placements[0].bounds for spec in specs], specs[0].mesh.get_group())
        for i in covered:
            if works[i] is not params[i]:
                params[i].copy_(works[i])

    def trial() -> tuple[Any, list[Tensor | None]]:
        assert evaluate is not None
        spread()  # the optimizer may have moved its stretches since the last one
        loss, found = evaluate()
        return loss, cut_grads(plan, found)

    mine, found = parts(likes, works), cut_grads(plan, grads)
    moved = step(opt, mine, found, hyperparams, donate, None if evaluate is None else trial)
    spread()
    return moved


def cut_grads(plan: Plan, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Of each gradient, the stretch of this rank.

    Raises:
        GradientError: a gradient has another shape than its parameter, or is sparse.
    """
    likes: Any = plan.likes
    names = (name for names in plan.names for name in names)
    out: list[Tensor | None] = []
    for name, like, shape, grad in zip(names, likes, plan.shapes, grads, strict=False):
        if grad is None or like is None:
            out.append(grad)
            continue
        if grad.shape != shape or grad.is_sparse:
            raise GradientError(
                f"the gradient of {name} is {grad.layout} of shape {tuple(grad.shape)}; the optimizer was set up for"
                f" a dense one of {tuple(shape)}, of which each rank takes its part. Pass the Grads of this very Model."
            )
        out.append(stretch_of(grad, like._spec))
    return out
