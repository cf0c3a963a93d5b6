"""What model_parallel refuses, by a message that says what to change; nothing hangs."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import fabricfn as ff
from fabricfn.strategies.tensor_plans import assigned
from fabricfn.testing import cases
from tests.support.model_parallel import NETS, TOKENS, Mlp, cross_entropy, double, made, mine, parallel
from tests.support.worlds import world_of

ranks = world_of("threads", 4)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"*.ups": "colwise"}, r"plan\['\*.ups'\] matches no sub-module. Their names are embed, blocks"),
        ({"*.up": "colwise", "blocks.0.u*": "rowwise"}, "blocks.0.up is 'rowwise' by .* and 'colwise' by"),
        ({"*.norm1": "colwise"}, "blocks.0.norm1, a LayerNorm; colwise is for Linear and Embedding"),
        ({"blocks.0": "sequence"}, "matches blocks.0, a Block whose parameters belong to modules inside it"),
        ({"head": "colwise"}, "out_features=12, which 'colwise' cannot cut into 5 equal parts"),
    ],
)
def test_a_plan_that_does_not_fit_says_why(plan, message):
    with pytest.raises(ff.ConfigurationError, match=message):
        assigned(NETS[False], plan, 5)


@pytest.mark.parametrize("plan", [None, {}, {"up": "columns"}, {"up": 3}, {3: "colwise"}])
def test_what_is_no_plan(plan):
    with pytest.raises(ff.ConfigurationError, match="plan"):
        ff.strategies.model_parallel(plan)


def set_up(rt, net):
    ff.setup_model(rt, net)


def run_it(rt, net, loss_fn=cross_entropy):
    ff.value_and_grad(rt, loss_fn)(ff.setup_model(rt, net), mine(rt))


def test_what_would_go_wrong_is_refused(ranks):
    with pytest.raises(ff.ConfigurationError, match="tied weights"):
        double(ranks, set_up, parallel(plan={"embed": "colwise", "head": "colwise"}), NETS[True])
    with pytest.raises(ff.ConfigurationError, match="must change the module that it gets and return it"):
        double(ranks, set_up, parallel(plan=lambda net, mesh: nn.Sequential(net)), NETS[True])
    with pytest.raises(ff.ConfigurationError, match="groups of 3 ranks, but there are 4"):
        double(ranks, set_up, parallel(3), NETS[True])
    with pytest.raises(ff.ConfigurationError, match="made for another strategy"):
        double(ranks, lambda rt: set_up(dataclasses.replace(rt, strategy=parallel()), NETS[True]), "ddp")
    with pytest.raises(ff.ConfigurationError, match=r"ff.strategies.model_parallel\("):
        ranks.run(set_up, NETS[True], strategy="model_parallel")
    with pytest.raises(ff.CapabilityError, match="between use operations that DTensor knows"):
        double(ranks, run_it, parallel(plan={"*.up": "colwise"}), NETS[False])
    with pytest.raises(ff.CapabilityError, match="heads|cannot work on a tensor that the plan has cut"):
        double(ranks, run_it, parallel(4), made(heads=2))
    with pytest.raises(ff.ConfigurationError, match="matches no sub-module"):
        double(ranks, set_up, parallel(1, {"upp": "colwise"}), NETS[True], world_size=1)
    with pytest.raises(ff.ConfigurationError, match="a mesh of dp, tp"):
        double(ranks, lambda rt: set_up(dataclasses.replace(rt, strategy=ff.strategies.fsdp()), NETS[True]), parallel())
    with pytest.raises(ff.ConfigurationError, match="groups of one size"):
        double(ranks, set_up, ff.strategies.fsdp(replicate=3), NETS[True])


def other_numbers(rt):
    """Peers with different numbers of micro-batches."""
    parts = [(part,) for part in TOKENS.chunk(2 + rt.global_rank % 2)]
    ff.accumulate(rt, cross_entropy)(ff.setup_model(rt, NETS[True]), parts)


def test_what_would_hang_is_refused(ranks):
    with pytest.raises(ff.ConfigurationError, match=r"need equally many; they have \[2, 3\]"):
        double(ranks, other_numbers, parallel(), world_size=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replicate": 2}, "fsdp={'replicate': ...}.: there is no such option here. There are units, "),
        ({"prefetch": -1}, "prefetch=-1 must be"),
        ({"reshard_after_forward": 2}, "True or False"),
    ],
)
def test_options_of_fsdp_are_checked(options, message):
    with pytest.raises(ff.ConfigurationError, match=message):
        parallel(fsdp=options)


def other_batches(rt):
    tokens = TOKENS.chunk(4)[rt.global_rank]
    ff.value_and_grad(rt, cross_entropy)(ff.setup_model(rt, NETS[False]), tokens)


def test_peers_with_different_batches_are_found(ranks):
    for strategy in (parallel(), parallel(fsdp=True)):
        with pytest.raises(ff.GradientError, match="peers work on one batch, but they gave embed different inputs"):
            double(ranks, other_batches, strategy)


class Normed(Mlp):
    def __init__(self):
        super().__init__(1, 4, True)
        self.gain = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.down(self.up(x) * self.gain)


def test_whole_weights_that_meet_parts_are_found(ranks):
    """torch's own styles hand out parts as plain tensors, and a whole weight gets the gradient of a part."""
    net, plan = cases.initialised(Normed(), 1), {"up": ColwiseParallel(), "down": RowwiseParallel()}

    def run(rt):
        x = cases.filled((4, 3), torch.float64, 1)
        ff.value_and_grad(rt, lambda net: net(x).square().mean())(ff.setup_model(rt, net))

    with pytest.raises(ff.GradientError, match="the gradient of gain"):
        double(ranks, run, parallel(plan=plan), world_size=2)
