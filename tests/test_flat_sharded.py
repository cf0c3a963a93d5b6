"""What `flat_sharded` has of its own; the laws that it shares with fsdp are held by test_fsdp*.py and test_laws.py."""

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import fabricfn as ff
from fabricfn.sharding import full
from fabricfn.strategies import flat_sharded
from fabricfn.testing.thread_group import ThreadGroup
from tests.support.runtimes import RT64
from tests.support.worlds import world_of

threads = world_of("threads", 3)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return x + self.fc(x).tanh()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.out = nn.Linear(5, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])

    def forward(self, x):
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def built(frozen=()):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net().double()
    for name in frozen:
        net.get_submodule(name).requires_grad_(False)
    return net


FROZEN = ("blocks.1", "blocks.2")
NETS = {frozen: built(frozen) for frozen in ((), FROZEN)}  # not in the ranks: threads share the generator
X = torch.randn(12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def squares(net, x):
    return net(x).square().mean()


def rows(rt):
    return X.tensor_split(rt.world_size)[rt.rank]


def wholes(params):
    return {name: None if value is None else full(value).detach().clone() for name, value in params.items()}


def oracle(module, loss_fn=squares):
    return ff.value_and_grad(RT64, loss_fn)(ff.setup_model(RT64, module), X)[1].params


def close(found, expected):
    assert list(found) == list(expected)
    torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=1e-12)


# What is there when


def there(net):
    return [type(block.fc.weight) is nn.Parameter for block in net.blocks]


def gathered_at(rt):
    """Which blocks are there when the forward of each is left, and when a gradient comes; how many send meanwhile."""
    model = ff.setup_model(rt, NETS[()])
    groups = model.ref.engine.frames[0].handle.groups
    before, after, sending = [], [], []

    def loss_fn(net, x):
        x = net.inp(x)
        for block in net.blocks:
            x = block(x)
            before.append(there(net))
            x.register_hook(lambda grad: after.append(there(net)))
            x.register_hook(lambda grad: sending.append(sum(unit.leaving is not None for unit in groups)))
        result = net.out(x).square().mean()
        assert not hasattr(net.inp.weight, "_local_tensor"), "the rest is there for the whole loss function"
        return result

    _, grads = ff.value_and_grad(rt, loss_fn)(model, rows(rt))
    memory = [line.memory.untyped_storage().nbytes() for unit in groups for line in unit.lines]
    return before, after, sending, memory, wholes(grads.params)


def test_a_unit_is_there_while_it_computes(threads):
    last = [False, False, False, True]
    for before, after, sending, memory, grads in threads.run(gathered_at, strategy="flat_sharded", precision=64):
        assert before == [[False] * 4] * 3 + [last], "the last one stays, for the backward pass begins with it"
        assert after == [[i == j for i in range(4)] for j in reversed(range(4))]
        assert sending == [0, 1, 2, 2], "more would take memory"
        assert memory == [0] * 5, "and afterwards nothing is"
        close(grads, oracle(NETS[()]))


# What is sent


class Counted:
    """What `ThreadGroup` carries for rank 0: (collective, the bytes that rank 0 brings)."""

    def __init__(self, monkeypatch):
        self.calls = []
        meet = ThreadGroup._meet

        def counting(group, call, payload, work):
            if group.place == 0:
                mine = payload[1] if isinstance(payload, tuple) else payload
                self.calls.append((call[0], sum(tensor.nbytes for tensor in tensors_in(mine))))
            return meet(group, call, payload, work)

        monkeypatch.setattr(ThreadGroup, "_meet", counting)


def tensors_in(tree):
    return [tree] if isinstance(tree, torch.Tensor) else [tensor for one in tree or () for tensor in tensors_in(one)]


def one_step(rt, frozen, counted, count=None):
    model = ff.setup_model(rt, NETS[frozen])
    ff.barrier(rt)
    begin = len(counted.calls)
    if count is None:
        _, grads = ff.value_and_grad(rt, squares)(model, rows(rt))
    else:
        _, grads = ff.accumulate(rt, squares)(model, [(part,) for part in rows(rt).chunk(count)])
    return counted.calls[begin:], wholes(grads.params)


@pytest.mark.parametrize("strategy", ["flat", "ddp", "functional", "fsdp", "flat_sharded"])
def test_nothing_is_sent_for_the_gradients_of_frozen_parts(threads, monkeypatch, strategy):
    counted = Counted(monkeypatch)

    def sent(frozen):
        calls, grads = threads.run(one_step, frozen, counted, strategy=strategy, precision=64, world_size=2)[0]
        close(grads, oracle(NETS[frozen]))
        return sum(nbytes for name, nbytes in calls if name in ("all_reduce", "reduce_scatter", "all_to_all"))

    block = sum(slot.nbytes for slot in NETS[()].blocks[0].parameters())
    assert sent(()) - sent(FROZEN) == 2 * block  # of the whole gradient, under every strategy


def test_a_unit_is_one_message_and_gradients_leave_while_the_backward_pass_goes_on(threads, monkeypatch):
    counted = Counted(monkeypatch)

    def messages(count):
        calls, grads = threads.run(one_step, (), counted, count, strategy="flat_sharded", precision=64)[0]
        close(grads, oracle(NETS[()]))
        return [name for name, _ in calls if name in ("all_gather", "all_to_all")]

    forth, back = ["all_gather"] * 5, ["all_gather", "all_to_all"] * 3  # a unit and the next; the last one is there
    assert messages(None) == [*forth, *back, "all_to_all", "all_to_all"]
    several = messages(2)
    assert several.count("all_to_all") == 5, "once, whatever the number of micro-batches"
    assert several.count("all_gather") == 1 + 2 * 8, "and how many micro-batches the others have"


# What a unit may be


class Odd(nn.Module):
    """A frozen weight in the way of the gradients, inputs that are changed in place, several inputs and results."""

    def __init__(self):
        super().__init__()
        self.fixed, self.trained = nn.Linear(6, 6), nn.Linear(6, 6)
        self.fixed.requires_grad_(False)

    def forward(self, x, *, shift):
        x.mul_(2)
        y = self.trained(x)
        return {"x": self.fixed(y), "y": (y + shift, None)}


class Odds(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(5, 6)
        self.odds = nn.ModuleList([Odd(), Odd()])

    def forward(self, x):
        x = self.inp(x)
        for odd in self.odds:
            for _ in range(2):
                found = odd(x.sin(), shift=x)
                x = found["x"].cos() + found["y"][0]
        return x


def odd():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Odds().double()


ODD = odd()


def sensitive(net, x):
    """The loss looks at its gradient with respect to the input, as a number."""
    x = x.clone().requires_grad_()
    out = net(x).square().mean(1)
    (grad,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    return (out * grad.square().sum(1)).mean()


def of_odds(rt, loss_fn):
    return wholes(ff.value_and_grad(rt, loss_fn)(ff.setup_model(rt, ODD), rows(rt))[1].params)


@pytest.mark.parametrize("units", ["auto", (Odd, nn.Linear), nn.Linear, None])
@pytest.mark.parametrize("loss_fn", [squares, sensitive])
def test_units_of_any_kind_give_the_gradients_of_single(threads, units, loss_fn):
    for found in threads.run(of_odds, loss_fn, strategy=flat_sharded(units=units), precision=64):
        close(found, oracle(ODD, loss_fn))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.low = nn.Parameter(torch.linspace(-1, 1, 25).view(5, 5))
        self.high = nn.Parameter(torch.linspace(1, -1, 5).double())

    def forward(self, x):
        return torch.tanh(x @ self.low + self.high.to(x.dtype))


def of_two_dtypes(rt):
    model = ff.setup_model(rt, nn.Sequential(Two(), Two()))
    return wholes(ff.value_and_grad(rt, squares)(model, rows(rt).float())[1].params)


def test_a_unit_may_have_parameters_of_two_dtypes(threads):
    found, right = (
        threads.run(of_two_dtypes, strategy=strategy, precision="bf16-mixed")[0]
        for strategy in ("flat_sharded", "flat")
    )
    assert [value.dtype for value in found.values()] == [torch.float32, torch.float64] * 2
    torch.testing.assert_close(found, right, rtol=0.05, atol=0.02)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's compiler hides it, and pytest sees it
def test_the_compiler_leaves_its_hooks_alone(group):
    import torch._dynamo

    def grads(**options):
        world = ff.World(group=group)
        rt = ff.Runtime(world=world, precision=ff.Precision.parse(64), strategy=flat_sharded())
        frames: list[str] = []

        def backend(graph, _):
            frames.extend(str(node.target) for node in graph.graph.nodes)
            return graph

        if options:
            options = {"compile": {"backend": backend}}
        found = wholes(ff.value_and_grad(rt, squares)(ff.setup_model(rt, NETS[()], **options), X)[1].params)
        return found, frames

    torch._dynamo.reset()
    found, traced = grads(compile=True)
    close(found, grads()[0])
    assert any("tanh" in name for name in traced) and not any("resize" in name or "c10d" in name for name in traced)


# What it refuses


def of_sparse(rt):
    model = ff.setup_model(rt, nn.Embedding(6, 4, sparse=True))
    ff.value_and_grad(rt, lambda net, x: net(x).square().mean())(model, torch.tensor([1, 2]))


def of_late(rt):
    def loss_fn(net, x):
        block = net.blocks[0]
        x = net.inp(x)
        for _ in range(2):  # two backward passes bring the gradient twice
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=True)
        return x.square().mean()

    ff.value_and_grad(rt, loss_fn, allow_unused=True)(ff.setup_model(rt, NETS[()]), rows(rt))


@pytest.mark.parametrize(
    ("job", "match"), [(of_sparse, "one is sparse"), (of_late, "use_reentrant=False")], ids=["sparse", "late"]
)
def test_what_it_cannot_send_is_refused(threads, job, match):
    with pytest.raises(ff.CapabilityError, match=match):
        threads.run(job, strategy="flat_sharded", precision=64)
