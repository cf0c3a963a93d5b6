"""The strategy model_parallel: layers cut over neighbouring ranks, and over the data axis; against `single`."""

import dataclasses

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.utils.data import DataLoader

import fabricfn as ff
from fabricfn import testing
from fabricfn.sharding import is_sharded, local_of, sharded_as
from fabricfn.strategies.tensor_plans import assigned
from fabricfn.testing import cases
from tests.worlds import few, world_of

VOCAB, WIDTH, TIME = 12, 8, 4


class Block(nn.Module):
    def __init__(self, heads, dropout):
        super().__init__()
        self.heads = heads
        if heads:
            self.norm1 = nn.LayerNorm(WIDTH)
            self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm2 = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH, bias=False)
        self.drop = nn.Dropout(dropout)

    def attend(self, x):
        batch, time, width = x.shape
        q, k, v = (
            part(x).view(batch, time, self.heads, width // self.heads).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        weights = self.drop((q @ k.transpose(-2, -1) / width**0.5).softmax(-1))
        return self.o((weights @ v).transpose(1, 2).reshape(batch, time, width))

    def forward(self, x):
        if self.heads:
            x = x + self.drop(self.attend(self.norm1(x)))
        return x + self.drop(self.down(self.drop(F.gelu(self.up(self.norm2(x))))))


class Net(nn.Module):
    """A small language model: the user's code knows nothing of parts."""

    def __init__(self, heads=2, dropout=0.0, tied=True):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList([Block(heads, dropout), Block(0, dropout)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x * self.scale))


PLAN = {
    "embed": "rowwise",
    "*.norm1": "sequence",
    "*.[qkv]": "colwise",
    "*.o": "rowwise",
    "*.up": "colwise",
    "*.down": "rowwise",
    "head": "colwise",
}
SEQUENCE = PLAN | {  # what lies between the blocks is cut along time
    "embed": "rowwise_scattered",
    "*norm*": "sequence",
    "*.o": "rowwise_scattered",
    "*.down": "rowwise_scattered",
}
del SEQUENCE["*.norm1"]


def made(**options):
    return cases.initialised(Net(**options), 3)


NETS = {tied: made(tied=tied) for tied in (True, False)}  # not in the ranks: threads share the generator
GENERATOR = torch.Generator().manual_seed(5)
TOKENS = torch.randint(VOCAB, (12, TIME + 1), generator=GENERATOR)


def cross_entropy(net, tokens):
    return F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def loop(net=None, **options):
    return testing.training_loop(net or NETS[True], cross_entropy, TOKENS, **{"lr": 0.1, "momentum": 0.9, **options})


def parallel(size=2, plan=PLAN, **options):
    return ff.strategies.model_parallel(plan, tensor_parallel=size, **options)


ROWS = {
    "tensor parallel": parallel(),
    "2-D with fsdp": parallel(fsdp=True),
    "2-D, one unit": parallel(fsdp={"units": None, "reshard_after_forward": False}),
    "2-D, options": parallel(
        fsdp={"cpu_offload": True, "prefetch": 1, "ignored_params": ("embed.weight", "*.down.*", "*.up.bias")}
    ),
}


ranks = world_of("threads", 4)
processes = world_of("processes", 4)


def double(ranks, fn, strategy, *args, world_size=4):
    return ranks.run(fn, *args, strategy=strategy, world_size=world_size, precision="64-true")


def close(found, expected, tolerance=1e-11):
    assert (text := testing.difference(found, expected, tolerance)) is None, text


# The laws


@pytest.mark.parametrize("strategy", [*ROWS.values(), parallel(plan=SEQUENCE), parallel(plan=SEQUENCE, fsdp=True)])
def test_equivalence(ranks, strategy):
    train = loop(batch_size=11, steps=2)
    testing.check_equivalence(train, accumulation=(2,), strategies=(strategy,), world_sizes=(4,), ranks=ranks)


def test_any_number_of_peers(ranks):
    net = cases.initialised(Mlp(3, 8, bias=True), 5)
    x, y = cases.filled((13, 3), torch.float64, 1), cases.filled((13, 3), torch.float64, 2)
    train = testing.training_loop(net, cases.mean_square, (x, y), steps=3, lr=0.1, momentum=0.9)
    plan = {"up": "colwise", "down": "rowwise"}
    laws = ("purity", "equivalence", "donation", "accumulation", "resume")
    testing.check(train, laws, strategies=(parallel(2, plan),), world_sizes=(2,), ranks=ranks)
    for strategy, size in ((parallel(4, plan), 4), (parallel(1, plan), 1), (parallel(1, plan, fsdp=True), 2)):
        testing.check_equivalence(train, accumulation=(2,), strategies=(strategy,), world_sizes=(size,), ranks=ranks)


def test_pure_and_resumed(ranks):
    testing.check(loop(steps=2), ("purity", "resume"), strategies=(parallel(fsdp=True),), world_sizes=(4,), ranks=ranks)


def gradients(rt, net, allow_unused=False):
    model = ff.setup_model(rt, net)
    loss, grads = ff.value_and_grad(rt, cross_entropy, allow_unused=allow_unused)(model, mine(rt))
    clipped, norm = ff.clip_gradients(rt, grads, max_norm=0.01)
    whole = {name: None if grad is None else ff_full(grad) for name, grad in clipped.params.items()}
    return {"loss": ff.all_reduce(rt, loss), "norm": norm, "grads": whole}


def ff_full(tensor):
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def mine(rt):
    return TOKENS.chunk(rt.world_size)[rt.rank]


@pytest.mark.parametrize("strategy", ROWS.values(), ids=ROWS)
def test_clipping_gives_the_norm_and_the_gradients_of_single(ranks, strategy):
    tied = strategy is not ROWS["2-D with fsdp"]
    (expected,) = double(ranks, gradients, "single", NETS[tied], world_size=1)
    for found in double(ranks, gradients, strategy, NETS[tied]):
        close(found, expected)


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


class Mlp(nn.Module):
    def __init__(self, width, hidden, bias):
        super().__init__()
        self.up, self.down = nn.Linear(3, hidden, bias=bias), nn.Linear(hidden, width, bias=bias)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


@given(
    words=st.sampled_from([("colwise", "rowwise"), ("colwise_gathered", "rowwise"), ("colwise", "replicate")]),
    width=st.integers(1, 3),
    hidden=st.integers(1, 4),
    bias=st.booleans(),
    fsdp=st.booleans(),
    number=cases.accumulations(3),
)
@few(5)
def test_equivalence_for_any_sizes(ranks, words, width, hidden, bias, fsdp, number):
    net = cases.initialised(Mlp(width, 2 * hidden, bias), width + hidden)
    x, y = cases.filled((13, 3), torch.float64, 1), cases.filled((13, width), torch.float64, 2)
    train = testing.training_loop(net, cases.mean_square, (x, y), lr=0.1, momentum=0.9, steps=2)
    strategy = parallel(plan={"up": words[0], "down": words[1]}, fsdp=fsdp)
    testing.check_equivalence(train, accumulation=(number,), strategies=(strategy,), world_sizes=(4,), ranks=ranks)


# Places: ranks, data, keys, collectives


def places(rt):
    loader = ff.setup_dataloader(rt, DataLoader(torch.arange(8), batch_size=2, shuffle=True))
    return {
        "rank": (rt.rank, rt.world_size, rt.global_rank, rt.whole.world_size),
        "mesh": (tuple(rt.mesh.shape), rt.mesh.mesh_dim_names),
        "data": [batch.tolist() for batch in ff.batches(rt, loader, 0)],
        "key": ff.fold_in(ff.key(rt.seed), rt.rank).seed,
        "mean": ff.all_reduce(rt, rt.global_rank),
        "tp": ff.all_gather(rt, rt.global_rank, axis="tp").tolist(),
        "dp": ff.all_gather(rt, rt.global_rank, axis="dp").tolist(),
        "sent": ff.broadcast(rt, rt.global_rank, src=1, axis="tp"),
        "gathered": ff.gather(rt, rt.global_rank, dst=1, axis="tp"),
        "shown": repr(rt),
    }


def test_peers_share_rank_data_and_keys_and_axes_have_names(ranks):
    found = double(ranks, places, parallel())
    assert [one["rank"] for one in found] == [(0, 2, 0, 4), (0, 2, 1, 4), (1, 2, 2, 4), (1, 2, 3, 4)]
    assert {one["mesh"] for one in found} == {((2, 2), ("dp", "tp"))}
    for first, second in ((0, 1), (2, 3)):
        assert found[first]["data"] == found[second]["data"]
        assert found[first]["key"] == found[second]["key"]
    assert sorted(one for batch in found[0]["data"] + found[2]["data"] for one in batch) == list(range(8))
    assert [one["mean"] for one in found] == [1.0, 2.0, 1.0, 2.0]
    assert [one["tp"] for one in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [one["dp"] for one in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [one["sent"] for one in found] == [1, 1, 3, 3]
    assert [None if one["gathered"] is None else one["gathered"].tolist() for one in found] == [
        None,
        [0, 1],
        None,
        [2, 3],
    ]
    assert "rank 1 of 2 on cpu (process 3 of 4), model_parallel" in found[3]["shown"]
    with pytest.raises(ff.CapabilityError, match="has the axes 'dp', 'tp'"):
        double(ranks, lambda rt: ff.all_reduce(rt, 1, axis="pp"), parallel())


def once(rt):
    ff.barrier(rt, "all")
    ff.check_replicas(rt, {"rank": rt.rank // 2})
    with pytest.raises(ff.MismatchError, match="ranks 0, 2 against ranks 1, 3"):
        ff.check_replicas(rt, {"peer": rt.global_rank % 2})
    return ff.run_once(rt, lambda: rt.global_rank)


def started(rt):
    model = ff.setup_model(rt, NETS[True])
    loss, grads = ff.value_and_grad(rt, cross_entropy)(model, mine(rt))
    return (rt.rank, rt.world_size, rt.global_rank), ff_full(grads.params["blocks.0.up.weight"])


def test_a_runtime_is_laid_out_where_processes_start(ranks):
    found = ff.launch(started, devices=2, accelerator="cpu", precision=64, strategy=parallel())
    assert [place for place, _ in found] == [(0, 1, 0), (0, 1, 1)]
    ((_, expected),) = double(ranks, started, "single", world_size=1)
    for _, grad in found:
        close(grad, expected)


def test_one_process_prints_and_runs_once(ranks, capsys):
    assert double(ranks, once, parallel()) == [0] * 4
    double(ranks, lambda rt: ff.print(rt, "hello"), parallel())
    assert capsys.readouterr().out == "hello\n"


@pytest.mark.parametrize("strategy", [parallel(), parallel(plan=SEQUENCE, fsdp=True)], ids=["whole", "sequence, 2-D"])
def test_dropout_is_that_of_one_process_between_layers_and_on_parts(processes, strategy):
    train = testing.training_loop(made(dropout=0.5), cross_entropy, TOKENS, steps=2, lr=0.1)
    (expected, *_) = double(processes, train, "ddp", world_size=2)
    for found in double(processes, train, strategy):
        close(found, expected)


def noises(net, x):
    y = net(x)
    return {
        "rand": torch.rand_like(y),
        "randn": torch.randn_like(y, dtype=torch.float32),
        "randint": torch.randint_like(y, 7),
        "below": torch.randint_like(y, 3, 7),
        "filled": [torch.empty_like(y).normal_(1, 2), torch.empty_like(y).uniform_(1, 2)],
        "exponential": torch.empty_like(y).exponential_(),
        "bernoulli": torch.bernoulli(y.sigmoid()),
        "dropout": F.dropout(y.transpose(0, 1), 0.3),
        "native": torch.native_dropout(y, 0.3, True),
        "next": torch.rand(2),
    }


def drawn(rt):
    model = ff.setup_model(rt, cases.initialised(nn.Sequential(nn.Linear(3, 6)), 2))
    return ff.apply(rt, model, cases.filled((8, 3), torch.float64, 3), method=noises, rng=ff.key(3))


def test_parts_of_random_tensors_are_those_of_the_whole(processes):
    (expected,) = double(processes, drawn, "single", world_size=1)
    for found in double(processes, drawn, parallel(plan={"0": "colwise"}), world_size=2):
        close(found, expected)


# Values


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


def after(rt):
    model = ff.setup_model(rt, NETS[True])
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1, momentum=0.9)
    _, grads = ff.value_and_grad(rt, cross_entropy)(model, mine(rt))
    model, opt = ff.optimizer_step(rt, model, opt, grads)
    return {"model": model, "opt": opt}


def written(rt, path):
    state = after(rt)
    ff.save(rt, path, state)
    return wholes(rt, state)


def wholes(rt, state):
    momentum = {name: ff_full(slots["momentum_buffer"]) for name, slots in state["opt"].state.items()}
    return {"params": ff.gather_params(rt, state["model"]), "momentum": momentum, "step": state["opt"].step}


def read(rt, paths, states):
    """Each file has the numbers of its state: compared part by part, so that nothing is gathered."""
    model = ff.setup_model(rt, NETS[True])
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1, momentum=0.9)
    for path, state in zip(paths, states, strict=True):
        loaded = ff.load(rt, path, like={"model": model, "opt": opt})
        assert loaded["opt"].step == state["step"]
        momentum = {name: slots["momentum_buffer"] for name, slots in loaded["opt"].state.items()}
        for values, expected in ((loaded["model"].params, state["params"]), (momentum, state["momentum"])):
            assert values.keys() == expected.keys()
            for name, value in values.items():
                part = sharded_as(value, expected[name]) if is_sharded(value) else expected[name]
                assert torch.equal(local_of(value), local_of(part)), (path, name)


LAYOUTS = {
    "single": ("single", 1),
    "ddp": ("ddp", 2),
    "fsdp": ("fsdp", 3),
    "groups": (ff.strategies.fsdp(replicate=2), 4),
    "peers": (parallel(), 2),
    "peers and replicas": (parallel(), 4),
    "2-D": (parallel(fsdp=True), 4),
}


def test_every_layout_loads_what_every_other_saved(ranks, tmp_path):
    paths = [str(tmp_path / name) for name in LAYOUTS]
    states = [
        double(ranks, written, strategy, path, world_size=size)[0]
        for (strategy, size), path in zip(LAYOUTS.values(), paths, strict=True)
    ]
    for strategy, size in LAYOUTS.values():
        double(ranks, read, strategy, paths, states, world_size=size)
    for state in states:
        close(state, states[0])


def around(rt):
    model = ff.setup_model(rt, NETS[True])
    ema = ff.map_params(lambda value: value * 0.5, model)
    weight = model.params["blocks.0.up.weight"]
    module = ff.to_module(rt, ema)

    def distil(net, teacher, tokens):
        return F.mse_loss(net(tokens), teacher(tokens).detach())

    loss, grads = ff.value_and_grad(rt, distil)(model, ema, mine(rt))
    return {
        "applied": ff.all_gather(rt, ff.apply(rt, ema, mine(rt))),
        "plain": ff.all_gather(rt, module(mine(rt)).detach()),
        "value": ff.all_reduce(rt, ff.value(rt, cross_entropy)(model, mine(rt))),
        "loss": ff.all_reduce(rt, loss),
        "grads": {name: ff_full(grad) for name, grad in grads.params.items()},
        "local": tuple(local_of(weight).shape),
        "placed": tuple(getattr(weight, "placements", ())),
    }


@pytest.mark.parametrize("strategy", ROWS.values(), ids=ROWS)
def test_apply_teachers_averages_and_plain_modules(ranks, strategy):
    single = ranks.run(around, strategy="ddp", world_size=2, precision="64-true")[0]
    for found in double(ranks, around, strategy):
        placed, local = found.pop("placed"), found.pop("local")
        assert (placed, local) == (
            ((Replicate(), Shard(0)), (16, 8))
            if strategy is ROWS["tensor parallel"]
            else ((Shard(1), Shard(0)), (16, 4))
        )
        close(found["applied"], found["plain"])
        close(found, {name: value for name, value in single.items() if name in found})


def unsharded(rt, net):
    model = ff.setup_model(rt, net)

    def loss_fn(net, tokens):
        with ff.unsharded(rt, net.blocks[0]):
            penalty = sum(p.square().sum() for p in net.blocks[0].parameters())
        return cross_entropy(net, tokens) + penalty

    _, grads = ff.value_and_grad(rt, loss_fn)(model, mine(rt))
    return {name: ff_full(grad) for name, grad in grads.params.items()}


@pytest.mark.parametrize("strategy", ROWS.values(), ids=ROWS)
def test_whole_weights_inside_a_loss(ranks, strategy):
    (expected,) = double(ranks, unsharded, "single", NETS[True], world_size=1)
    for found in double(ranks, unsharded, strategy, NETS[True]):
        close(found, expected)


def from_factory(rt):
    torch.manual_seed(1)
    model = ff.setup_model(rt, lambda: Net(tied=True))
    return is_sharded(model.params["blocks.0.up.weight"]), ff.gather_params(rt, model)


@pytest.mark.parametrize(("strategy", "size"), [(parallel(), 2), (parallel(fsdp=True), 4)], ids=["peers", "2-D"])
def test_a_factory_gives_the_values_that_one_process_makes(processes, strategy, size):
    ((_, expected),) = double(processes, from_factory, "single", world_size=1)
    for sharded, found in double(processes, from_factory, strategy, world_size=size):
        assert sharded
        close(found, expected, 0.0)


def own_plan(net, mesh):
    for block in net.blocks:
        styles = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(block, mesh, styles)
    return net


STYLES = {"*.up": ColwiseParallel(), "*.down": RowwiseParallel()}


@pytest.mark.parametrize("plan", [own_plan, STYLES], ids=["function", "torch's styles"])
def test_a_plan_in_torchs_own_words(ranks, plan):
    (expected,) = double(ranks, gradients, "single", NETS[False], world_size=1)
    for found in double(ranks, gradients, parallel(plan=plan), NETS[False]):
        close(found, expected)


# What is refused


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


# Shards in groups


GROUPS = {
    "plain": ff.strategies.fsdp(replicate=2),
    "options": ff.strategies.fsdp(
        replicate=2, cpu_offload=True, prefetch=1, ignored_params=("embed.weight", "*.down.*"), gradient_divide_factor=4
    ),
}


@pytest.mark.parametrize("strategy", GROUPS.values(), ids=GROUPS)
def test_fsdp_in_groups_obeys_the_laws(ranks, strategy):
    train = loop(batch_size=11, steps=2)
    testing.check(train, ("equivalence", "donation"), strategies=(strategy,), world_sizes=(4,), ranks=ranks)


def test_fsdp_in_groups_on_gloo(processes):
    (expected,) = double(processes, gradients, "single", NETS[True], world_size=1)
    for found in double(processes, gradients, GROUPS["plain"], NETS[True]):
        close(found, expected)


def where_it_is(rt):
    weight = ff.setup_model(rt, NETS[True]).params["blocks.0.up.weight"]
    return rt.rank, rt.world_size, tuple(local_of(weight).shape), weight.placements, rt.mesh.mesh_dim_names


def test_fsdp_in_groups_cuts_over_a_group_only(ranks):
    found = double(ranks, where_it_is, ff.strategies.fsdp(replicate=2))
    assert found == [(r, 4, (16, 8), (Replicate(), Shard(0)), ("replicate", "shard")) for r in range(4)]
