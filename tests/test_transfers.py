"""`to_device`: structure, dtypes and aliases stay; what is there already is returned itself."""

import collections
import contextlib
import dataclasses

import optree
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from fabricfn.precision import Precision
from fabricfn.runtimes import Runtime
from fabricfn.strategies import resolve
from fabricfn.transfers import MOVERS, move_ahead, move_all, moved, to_device
from fabricfn.world import World

# A second device that every machine has: moving to it is real, only the values are gone.
META = torch.device("meta")


def runtime(device="cpu"):
    world = World(device=torch.device(device))
    return Runtime(world=world, precision=Precision(), strategy=resolve("single", 1))


Point = collections.namedtuple("Point", "x y")

tensors = st.sampled_from(
    [torch.ones(2), torch.zeros(0, 3, dtype=torch.int8), torch.tensor(True), torch.ones(3).half()]
)
trees = st.recursive(
    st.one_of(tensors, st.sampled_from([None, 3, 1.5, "text", b"bytes"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        st.tuples(inner, inner).map(lambda pair: Point(*pair)),
        st.lists(inner, max_size=3).map(tuple),
    ),
)


@settings(max_examples=150)
@given(trees)
def test_structure_dtypes_and_aliases_stay(tree):
    leaves, spec = optree.tree_flatten(tree)
    moved, moved_spec = optree.tree_flatten(to_device(runtime("meta"), tree))
    assert moved_spec == spec
    for old, new in zip(leaves, moved, strict=True):
        if isinstance(old, torch.Tensor):
            assert (new.device, new.dtype, new.shape) == (META, old.dtype, old.shape)
            assert old.device.type == "cpu"
        else:
            assert new is old
    places = range(len(leaves))
    assert [(i, j) for i in places for j in places if moved[i] is moved[j]] == [
        (i, j) for i in places for j in places if leaves[i] is leaves[j]
    ]
    here, here_spec = optree.tree_flatten(to_device(runtime(), tree))
    assert here_spec == spec
    assert all(new is old for old, new in zip(leaves, here, strict=True))


def test_leaves_with_a_method_to():
    @dataclasses.dataclass
    class Batch:
        x: torch.Tensor

        def to(self, device):
            return Batch(self.x.to(device))

    class InPlace:
        def to(self, device):
            self.device = device

    batch, in_place = Batch(torch.ones(2)), InPlace()
    moved = to_device(runtime("meta"), [batch, batch, in_place, Batch])
    assert moved[0].x.device == META
    assert moved[0] is moved[1]
    assert moved[2] is in_place
    assert in_place.device == META
    assert moved[3] is Batch
    assert batch.x.device.type == "cpu"


def test_a_packed_sequence_keeps_its_sizes_on_the_cpu():
    packed = pack_sequence([torch.ones(2), torch.ones(3)], enforce_sorted=False)
    moved = to_device(runtime("meta"), {"x": packed})["x"]
    assert (moved.data.device, moved.batch_sizes.device.type) == (META, "cpu")
    assert to_device(runtime(), packed).data is packed.data


def test_a_module_is_copied_and_not_moved_in_place():
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "norm": nn.BatchNorm1d(2)})
    net["b"].weight = net["a"].weight
    assert to_device(runtime(), net) is net
    moved, again = to_device(runtime("meta"), (net, net))
    assert moved is again
    assert moved is not net
    assert {tensor.device for tensor in moved.state_dict().values()} == {META}
    assert moved["a"].weight is moved["b"].weight
    assert {tensor.device.type for tensor in net.state_dict().values()} == {"cpu"}


def test_gradients_flow_through_the_move():
    x = torch.ones(2, requires_grad=True)
    moved = to_device(runtime("meta"), {"x": x})["x"]
    assert moved.requires_grad
    assert moved.grad_fn is not None
    assert to_device(runtime(), x) is x


# Batches on their way to the device


def test_streams_are_used_where_there_are_some():
    assert {"cuda": move_ahead} == MOVERS
    for device in ("cpu", "meta"):
        rt = runtime(device)
        found = moved(rt, iter([(torch.ones(2), 1)]))
        assert type(found) is type(move_all(rt, iter([]))), "no generator of ours between the loader and the loop"
        assert next(found)[0].device.type == device


class Streams:
    """What `move_ahead` asks of torch.cuda, written down in the order in which it is asked."""

    def __init__(self):
        self.log = []

    def Stream(self, device):
        return Line(self.log, "copying")

    def current_stream(self, device):
        return Line(self.log, "computing")

    @contextlib.contextmanager
    def stream(self, line):
        self.log.append(f"on {line.name}")
        yield
        self.log.append("off")


@dataclasses.dataclass
class Line:
    log: list
    name: str

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        self.log.append("copied")
        return sum(entry == "copied" for entry in self.log) - 1

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for copy {event}")


def test_copies_and_computation_wait_for_each_other_in_the_right_order(monkeypatch):
    """There is no CUDA device here: this shows the order of the calls, on the device that all machines have."""
    streams = Streams()
    monkeypatch.setattr("fabricfn.transfers.torch.cuda", streams)
    log = streams.log

    def source():
        for place in range(4):
            log.append(f"fetch {place}")
            yield torch.full((1,), place)

    found = move_ahead(runtime("meta"), source())
    for place in range(4):
        batch = next(found)
        log.append(f"step {place}")
        assert batch.device == META
    assert list(found) == []
    copies = ["copying waits for computing", "on copying", "off", "copied"]
    assert log == [
        *("fetch 0", *copies, "fetch 1", *copies),
        *("computing waits for copy 0", "fetch 2", *copies, "step 0"),
        *("computing waits for copy 1", "fetch 3", *copies, "step 1"),
        *("computing waits for copy 2", "step 2"),
        *("computing waits for copy 3", "step 3"),
    ]
