"""A training loop from its parts, which the laws can be checked on: the user's module, loss, data and optimizer."""

import itertools
import operator
import os
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from fabricfn.checkpoint import load, save
from fabricfn.gathering import gather_params
from fabricfn.gradients import accumulate, value
from fabricfn.model import setup_model
from fabricfn.modes import eval_mode
from fabricfn.optimizers import optimizer_step, setup_optimizer
from fabricfn.random import fold_in, key
from fabricfn.runtimes import Runtime
from fabricfn.sharding import whole
from fabricfn.transfers import to_device
from fabricfn.tree import Tree, tree_leaves, tree_map

Train = Callable[..., Tree]
"""`train(rt, **options) -> tree of final values, equal on all ranks`; see `fabricfn.testing.laws`."""


def cut(size: int, parts: int) -> list[slice]:
    """`size` rows in `parts` contiguous pieces whose sizes differ by one at most."""
    ends = [size * part // parts for part in range(parts + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def training_loop(
    module: nn.Module | Callable[[], nn.Module],
    loss_fn: Callable[..., Any],
    data: Tree,
    optimizer: Any = torch.optim.SGD,
    *,
    steps: int = 3,
    batch_size: int | None = None,
    weighted: bool = False,
    buffers: Any = "rank0",
    **hyperparams: Any,
) -> Train:
    """A training loop of a few steps that knows every option that laws ask for.

    Each step takes `batch_size` rows of the data, in an order that is a function of `rt.seed` and the step, cuts them
    into one piece a rank and each piece into micro-batches, unevenly where they do not divide.

    Args:
        module: the module to train, or a function that makes it; called once, here.
        loss_fn: as for `value_and_grad`: `loss_fn(net, *batch)`, the mean over the rows of the batch; with `weighted`
            the pair (sum, weight).
        data: a tuple, or another tree, of tensors with the same number of rows; a tuple's items are the arguments.
        optimizer: as for `setup_optimizer`. For equivalence take SGD: Adam amplifies rounding near zero gradients.
        steps: how many steps are trained.
        batch_size: rows a step, over all ranks; None is all rows. At least one row a rank and micro-batch is needed.
        weighted: see `loss_fn`.
        buffers: as for `value_and_grad`.
        **hyperparams: of the optimizer; `lr=0.1` when there are none.

    Returns:
        `train(rt, *, accumulation=1, donate=False, folder=None, stop=None) -> tree` with the final parameters,
        buffers, optimizer state and the loss over all data in evaluation mode. With `folder` it goes on from the
        checkpoint there; with `stop` it ends after so many steps and saves one.

    Example:
        >>> train = training_loop(nn.Linear(2, 1), lambda net, x: net(x).square().mean(), (torch.ones(8, 2),))
        >>> from fabricfn.testing import run
        >>> sorted(run(train, world_size=2)[1])
        ['buffers', 'loss', 'optimizer', 'params']
    """
    net = module if isinstance(module, nn.Module) else module()
    args = cast("tuple[Any, ...]", data if isinstance(data, tuple) else (data,))
    size = len(tree_leaves(args)[0])
    options = hyperparams or {"lr": 0.1}

    def weighted_loss(net: nn.Module, *batch: Any) -> Any:
        rows = len(tree_leaves(batch)[0])
        return loss_fn(net, *batch) if weighted else (loss_fn(net, *batch) * rows, rows)

    def pieces(rt: Runtime, step: int, accumulation: int) -> list[Any]:
        order = torch.randperm(size, generator=fold_in(key(rt.seed), step).generator())[:batch_size]
        mine = order[cut(len(order), rt.world_size)[rt.rank]]
        return [to_device(rt, rows_of(args, mine[part])) for part in cut(len(mine), accumulation)]

    def train(
        rt: Runtime,
        *,
        accumulation: int = 1,
        donate: bool = False,
        folder: str | None = None,
        stop: int | None = None,
    ) -> Tree:
        model = setup_model(rt, net)
        opt = setup_optimizer(rt, model, optimizer, **options)
        grad_fn = accumulate(rt, weighted_loss, weighted=True, buffers=buffers)
        path = None if folder is None else os.path.join(folder, "last")
        if path is not None and os.path.exists(path):
            state = load(rt, path, like={"model": model, "opt": opt})
            model, opt = state["model"], state["opt"]
        while opt.step < steps:
            if opt.step == stop and path is not None:
                save(rt, path, {"model": model, "opt": opt})
                break
            rng = fold_in(key(rt.seed + 1), opt.step)
            _, grads = grad_fn(model, pieces(rt, opt.step, accumulation), rng=rng)
            model, opt = optimizer_step(rt, model, opt, grads, donate=donate)
        mine = rows_of(args, torch.arange(size)[cut(size, rt.world_size)[rt.rank]])
        return {
            "params": gather_params(rt, model),
            "buffers": dict(model.buffers),
            "optimizer": [whole(leaf) for leaf in tree_leaves(opt)],
            "loss": value(rt, weighted_loss, weighted=True)(eval_mode(model), *to_device(rt, mine)),
        }

    return train


def rows_of(args: Any, rows: torch.Tensor) -> Any:
    """These rows of every tensor."""
    return tree_map(operator.itemgetter(rows), args)
