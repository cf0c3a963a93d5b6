"""Collectives that keep the graph: their gradients are those of one process."""

import torch
from torch.nn import functional as F

from fabricfn.collectives import all_gather, all_reduce, barrier
from fabricfn.errors import MismatchError
from tests.support.forks import fork, message_of
from tests.support.worlds import world_of

threads = world_of("threads", 3)


def embeddings(rank, rows=4):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(rows, 5, dtype=torch.float64, generator=generator)


def contrastive(rank, anchors, everyone):
    """The loss of one rank: its rows against all rows."""
    start = anchors.shape[0] * rank
    target = torch.arange(start, start + anchors.shape[0])
    return F.cross_entropy(F.normalize(anchors) @ F.normalize(everyone).T / 0.1, target)


def gathered_gradient(rt):
    mine = embeddings(rt.rank).requires_grad_()
    frozen = torch.ones(2)
    everyone, constant = all_gather(rt, (mine, frozen), differentiable=True)
    assert not constant.requires_grad
    (grad,) = torch.autograd.grad(contrastive(rt.rank, mine, everyone.flatten(0, 1)), mine)
    # second order: the norm of a gradient that went through the collective
    loss = contrastive(rt.rank, mine, all_gather(rt, mine, differentiable=True).flatten(0, 1))
    (first,) = torch.autograd.grad(loss, mine, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), mine)
    with torch.no_grad():
        assert not all_gather(rt, mine, differentiable=True).requires_grad
    assert not all_gather(rt, mine).requires_grad
    return grad, second


def oracle_gradients(world_size):
    parts = [embeddings(rank).requires_grad_() for rank in range(world_size)]
    everyone = torch.cat(parts)
    loss = sum(contrastive(rank, part, everyone) for rank, part in enumerate(parts))
    first = torch.autograd.grad(loss, parts, create_graph=True)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in first), parts)
    return [(grad.detach(), again) for grad, again in zip(first, second, strict=True)]


def test_a_contrastive_loss_has_the_gradients_of_one_process(threads):
    for world_size in (1, 2, 3):
        expected = oracle_gradients(world_size)
        torch.testing.assert_close(
            threads.run(gathered_gradient, world_size=world_size), expected, rtol=1e-10, atol=1e-12
        )
    torch.testing.assert_close(fork(2, gathered_gradient), oracle_gradients(2), rtol=1e-10, atol=1e-12)


def uneven_and_reduced_gradients(rt):
    mine = embeddings(rt.rank, rows=rt.rank + 1).requires_grad_()
    rows = all_gather(rt, mine, uneven=True, differentiable=True)
    (grad,) = torch.autograd.grad(((rt.rank + 1) * rows.pow(3)).sum(), mine)
    x = embeddings(rt.rank).requires_grad_()
    mean = all_reduce(rt, {"x": x}, differentiable=True)["x"]
    total = all_reduce(rt, x, "sum", differentiable=True)
    (other,) = torch.autograd.grad((rt.rank + 1) * (mean.pow(3) + total.pow(2)).sum(), x)
    return grad, other


def test_uneven_gathers_and_reductions_have_the_gradients_of_one_process(threads):
    for world_size in (1, 3):
        weight = sum(rank + 1 for rank in range(world_size))
        xs = [embeddings(rank).requires_grad_() for rank in range(world_size)]
        stacked = torch.stack(xs)
        loss = weight * (stacked.mean(0).pow(3) + stacked.sum(0).pow(2)).sum()
        expected = [
            (weight * 3 * embeddings(rank, rank + 1).square(), grad)
            for rank, grad in enumerate(torch.autograd.grad(loss, xs))
        ]
        results = threads.run(uneven_and_reduced_gradients, world_size=world_size)
        torch.testing.assert_close(results, expected, rtol=1e-10, atol=1e-12)


def backward_on_one_rank(rt):
    x = torch.ones(2, requires_grad=True)
    total = all_reduce(rt, x, "sum", differentiable=True)
    if rt.rank == 0:
        return message_of(MismatchError, total.sum().backward)
    return message_of(MismatchError, barrier, rt)


def test_a_backward_pass_that_a_peer_does_not_run_is_named():
    for message in fork(2, backward_on_one_rank):
        assert "rank 0: the backward pass of all_reduce" in message
        assert "rank 1: barrier()" in message
