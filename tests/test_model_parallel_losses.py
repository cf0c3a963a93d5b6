"""Losses of parts under model_parallel: gradients of parameters and of inputs are those of the whole."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel
from torch.nn import functional as F

import fabricfn as ff
from fabricfn.testing import cases
from tests.support.model_parallel import close, double, ff_full, parallel
from tests.support.worlds import world_of

ranks = world_of("threads", 4)


TARGETS = torch.tensor([0, 5, 2, 3, 1, 4, 4, -100])
LOSSES = {
    "mse": F.mse_loss,
    "huber": lambda x, y: F.huber_loss(x, y, delta=0.3),
    "smooth": F.smooth_l1_loss,
    "own": lambda x, y: (x - y).square().mean(),
    "l1 sum": lambda x, y: F.l1_loss(x, y, reduction="sum"),
    "cross entropy": lambda x, y: F.cross_entropy(x, TARGETS),
    "sum": lambda x, y: F.cross_entropy(x, TARGETS, reduction="sum"),
    "none": lambda x, y: (F.cross_entropy(x, TARGETS, reduction="none") * torch.arange(8)).sum(),
    "weights": lambda x, y: F.cross_entropy(x[:7], TARGETS[:7], weight=torch.arange(1.0, 7.0).double(), ignore_index=4),
    "images": lambda x, y: F.cross_entropy(x.T.reshape(1, 6, 2, 4), TARGETS.view(1, 2, 4)),
    "sequences": lambda x, y: F.cross_entropy(x.T.unsqueeze(0), TARGETS.unsqueeze(0)),
    "one row": lambda x, y: F.cross_entropy(x[1], TARGETS[1]),
    "own smoothed": lambda x, y: F.cross_entropy(x, TARGETS) - 0.1 * F.log_softmax(x, -1).mean(),
    "entropy": lambda x, y: (F.log_softmax(x, -1) * F.softmax(x, -1)).sum(),
    "over rows": lambda x, y: F.log_softmax(x, 0).square().mean(),
    "divergence": lambda x, y: F.kl_div(F.log_softmax(x, -1), F.log_softmax(y, -1), reduction="sum", log_target=True),
    "logsumexp": lambda x, y: x.logsumexp(-1).square().mean(),
}


def parts_to_loss(rt, loss):
    net = cases.initialised(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 6)), 2)
    x = cases.filled((8, 3), torch.float64, 3)

    def loss_fn(net, x):
        return loss(net(x), net[1](torch.tanh(net[0](x * 2))).detach())

    value, grads = ff.value_and_grad(rt, loss_fn)(ff.setup_model(rt, net), x)
    return value, {name: ff_full(grad) for name, grad in grads.params.items()}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses_of_parts_have_the_gradients_of_the_whole(ranks, loss):
    (expected,) = double(ranks, parts_to_loss, "single", loss, world_size=1)
    plan = {"0": "colwise_gathered", "1": "colwise"}
    for found in double(ranks, parts_to_loss, parallel(plan=plan), loss, world_size=2):
        close(found, expected)


def test_a_target_that_is_no_class_is_refused_and_a_loss_that_needs_whole_logits(ranks):
    strategy = parallel(plan={"0": "colwise_gathered", "1": "colwise"})
    with pytest.raises(RuntimeError, match="out of bounds, there are 6 classes"):
        double(ranks, parts_to_loss, strategy, lambda x, y: F.cross_entropy(x, TARGETS + 1), world_size=2)
    parts = parallel(plan={"0": "colwise_gathered", "1": ColwiseParallel()})
    with pytest.raises(IndexError, match=r'(?s)out of bounds.*the word "colwise"'):
        double(ranks, parts_to_loss, parts, lambda x, y: F.cross_entropy(x, TARGETS), world_size=2)
    with pytest.raises(ff.CapabilityError, match='or "colwise_gathered" for that module'):
        double(
            ranks, parts_to_loss, strategy, lambda x, y: F.cross_entropy(x, TARGETS, label_smoothing=0.2), world_size=2
        )


def matched(net, x):
    return F.mse_loss(net(x), net[1](torch.tanh(net[0](x * 2))))


def at_inputs(rt):
    """The graph outlives the run."""
    net = cases.initialised(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 6)), 2)
    x = cases.filled((8, 3), torch.float64, 3).requires_grad_()
    (grad,) = torch.autograd.grad(ff.apply(rt, ff.setup_model(rt, net), x, method=matched), x)
    return grad


@pytest.mark.parametrize("fsdp", [False, True])
def test_gradients_of_inputs(ranks, fsdp):
    (expected,) = double(ranks, at_inputs, "single", world_size=1)
    for found in double(ranks, at_inputs, parallel(plan={"0": "colwise_gathered", "1": "colwise"}, fsdp=fsdp)):
        close(found, expected)
