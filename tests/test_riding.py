"""Objects with a state of their own, in checkpoints: loaders, schedulers, scalers, whatever has a state_dict."""

import collections
import dataclasses

import pytest
import torch
from torch.optim import lr_scheduler as lr
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

import fabricfn as ff
from fabricfn.testing import processes, threads


class Stateful(DataLoader):
    """A small real one: it knows how many batches it has yielded, and goes on there."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.yielded, self.history = 0, torch.zeros(2)

    def state_dict(self):
        return {"yielded": self.yielded, "history": self.history, "nothing": None, "nested": [{"a": 1.5}]}

    def load_state_dict(self, state):
        assert state["nested"] == [{"a": 1.5}] and state["nothing"] is None
        self.yielded, self.history = state["yielded"], state["history"]

    def __iter__(self):
        for place, batch in enumerate(super().__iter__()):
            if place >= self.yielded:
                self.yielded += 1
                self.history = self.history + batch.sum()
                yield batch
        self.yielded = 0


def own_share(rt, num):
    """Every rank goes through another number of samples of its own."""
    loader = Stateful(range(rt.rank, num, rt.world_size), batch_size=1)
    return ff.setup_dataloader(rt, loader, shard=False)


@pytest.fixture
def rt():
    with ff.runtime(accelerator="cpu", devices=1) as one:
        yield one


def test_a_loader_with_a_state_rides_along(rt, tmp_path):
    loader = own_share(rt, 6)
    stream = ff.batches(rt, loader)
    seen = [int(next(stream)) for _ in range(2)]
    ff.save(rt, tmp_path / "last", {"loader": loader, "more": [1, (loader, "x")]})
    fresh = own_share(rt, 6)
    state = ff.load(rt, tmp_path / "last", {"loader": fresh, "more": [0, (own_share(rt, 6), "")]})
    assert state["loader"] is fresh
    assert (state["more"][0], state["more"][1][0].yielded, state["more"][1][1]) == (1, 2, "x")
    assert seen + [int(batch) for batch in ff.batches(rt, fresh)] == [0, 1, 2, 3, 4, 5]
    assert fresh.history.tolist() == [15, 15]
    assert ff.load(rt, tmp_path / "last", strict=False, like={"loader": own_share(rt, 6)}).tree["loader"].yielded == 2


def test_parts_and_missing_entries_leave_a_loader_as_it_is(rt, tmp_path):
    ff.save(rt, tmp_path / "a", {"epoch": 3})
    loader = own_share(rt, 6)
    found = ff.load(rt, tmp_path / "a", {"epoch": 0, "loader": loader}, strict=False)
    assert (found.tree["epoch"], found.tree["loader"], found.missing) == (3, loader, ("loader",))
    with pytest.raises(ff.CheckpointError, match="loader: is in the template, not in the checkpoint"):
        ff.load(rt, tmp_path / "a", {"epoch": 0, "loader": loader})
    ff.save(rt, tmp_path / "b", {"epoch": 3, "loader": 5})
    with pytest.raises(ff.CheckpointError, match="loader: the template has a Stateful"):
        ff.load(rt, tmp_path / "b", {"epoch": 0, "loader": loader})
    assert ff.load(rt, tmp_path / "b", {"epoch": 0, "loader": loader}, only="epoch")["loader"] is loader


def test_a_plain_loader_has_no_state_and_the_message_names_the_cursor(rt, tmp_path):
    with pytest.raises(ff.CheckpointError, match="a DataLoader cannot be stored. Write its cursor"):
        ff.save(rt, tmp_path / "a", {"loader": DataLoader(range(3))})


def taken(rt, loader, num):
    stream = ff.batches(rt, loader)
    return [int(next(stream)) for _ in range(num)]


def save_positions(rt, path, differ):
    loader = own_share(rt, 10)
    found = taken(rt, loader, 1 + rt.rank if differ else 0)
    ff.save(rt, path, {"loader": loader})
    return found


def load_positions(rt, path):
    loader = own_share(rt, 10)
    try:
        ff.load(rt, path, {"loader": loader})
    except ff.CheckpointError as error:
        return str(error)
    return [int(batch) for batch in ff.batches(rt, loader)]


def test_every_rank_gets_its_own_position_back(tmp_path):
    with processes(3) as world:
        before = world.run(save_positions, tmp_path / "a", True, world_size=2)
        after = world.run(load_positions, tmp_path / "a", world_size=2)
        assert [first + rest for first, rest in zip(before, after, strict=True)] == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]
        for text in world.run(load_positions, tmp_path / "a"):
            assert "each of 2 ranks saved a position of its own, but 3 load" in text and "Cursor" in text
        world.run(save_positions, tmp_path / "b", False, world_size=2)
        assert world.run(load_positions, tmp_path / "b")[1] == [1, 4, 7], "states that are equal serve any world"


# ---------------------------------------------------------------- schedulers, scalers, torch's optimizers

SCHEDULERS = {
    "StepLR": lambda opt: lr.StepLR(opt, 2),
    "MultiStepLR": lambda opt: lr.MultiStepLR(opt, [2, 4], gamma=0.5),
    "CosineAnnealingWarmRestarts": lambda opt: lr.CosineAnnealingWarmRestarts(opt, 3),
    "OneCycleLR": lambda opt: lr.OneCycleLR(opt, 0.3, total_steps=9),
    "CyclicLR": lambda opt: lr.CyclicLR(opt, 0.1, 0.4, cycle_momentum=False),
    "LambdaLR": lambda opt: lr.LambdaLR(opt, lambda epoch: 0.9**epoch),
    "ReduceLROnPlateau": lambda opt: lr.ReduceLROnPlateau(opt, patience=0),
    "SequentialLR": lambda opt: lr.SequentialLR(opt, [lr.LinearLR(opt, 0.1), lr.MultiStepLR(opt, [3, 4])], [2]),
    "ChainedScheduler": lambda opt: lr.ChainedScheduler([lr.ConstantLR(opt, 0.5, 2), lr.ExponentialLR(opt, 0.9)]),
}


def scheduled(make):
    param = torch.linspace(-1, 1, 5, dtype=torch.float64).requires_grad_()
    opt = torch.optim.Adam([param], lr=0.1)
    return param, opt, make(opt)


def advance(param, opt, scheduler, steps):
    seen = []
    for _ in range(steps):
        param.grad = param.detach() ** 2
        opt.step()
        scheduler.step(*[1.0] * isinstance(scheduler, lr.ReduceLROnPlateau))
        seen.append(opt.param_groups[0]["lr"])
    return seen, param.tolist()


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_of_torch_goes_on_to_the_bit(rt, tmp_path, name):
    straight = advance(*scheduled(SCHEDULERS[name]), 6)
    param, opt, scheduler = scheduled(SCHEDULERS[name])
    before = advance(param, opt, scheduler, 3)[0]
    ff.save(rt, tmp_path / "c", {"w": param.detach(), "run": State(opt, scheduler)})
    param, opt, scheduler = scheduled(SCHEDULERS[name])
    like = {"w": param.detach(), "run": State(opt, scheduler)}
    loaded = ff.load(rt, tmp_path / "c", like)
    assert (loaded["run"].opt, loaded["run"].scheduler) == (opt, scheduler)
    with torch.no_grad():
        param.copy_(loaded["w"])
    after, values = advance(param, opt, scheduler, 3)
    assert (before + after, values) == straight
    assert type(getattr(scheduler, "milestones", None)) is type(
        getattr(scheduled(SCHEDULERS[name])[2], "milestones", None)
    )
    ff.verify_checkpoint(tmp_path / "c")


@dataclasses.dataclass(frozen=True)
class State:
    """Objects ride along in records too."""

    opt: torch.optim.Optimizer
    scheduler: object


class Broken:
    """What it gives and takes is up to the test."""

    def __init__(self, state=0, refuse=False):
        self.state, self.refuse = state, refuse

    def state_dict(self):
        if isinstance(self.state, Exception):
            raise self.state
        return {"state": self.state}

    def load_state_dict(self, state):
        if self.refuse:
            raise KeyError("nothing here")
        self.state = state["state"]


def test_the_loss_scale_of_torch_and_a_counter_ride_along(rt, tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    tree = {"scaler": scaler, "own": Broken(collections.Counter(a=2)), "default": Broken({"x": [(1,)]})}
    ff.save(rt, tmp_path / "c", tree)
    like = {"scaler": torch.amp.GradScaler("cpu"), "own": Broken(collections.Counter()), "default": Broken()}
    ff.load(rt, tmp_path / "c", like)
    assert like["scaler"].state_dict() == scaler.state_dict()
    assert like["own"].state == collections.Counter(a=2)
    assert type(like["own"].state) is collections.Counter
    assert like["default"].state == {"x": [(1,)]}
    plain = ff.load(rt, tmp_path / "c")["own"]
    assert plain == {"states_by_rank": [{"state": {"a": 2}}], "plain_containers": False}


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_a_stateful_loader_of_torchdata_goes_on(rt, tmp_path):
    loader = StatefulDataLoader(list(range(8)), batch_size=2)
    stream = iter(loader)
    seen = [next(stream).tolist() for _ in range(2)]
    ff.save(rt, tmp_path / "c", {"loader": loader})
    fresh = StatefulDataLoader(list(range(8)), batch_size=2)
    ff.load(rt, tmp_path / "c", {"loader": fresh})
    assert seen + [batch.tolist() for batch in fresh] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_what_a_state_cannot_hold_is_named(rt, tmp_path):
    tree = {"a": {"own": Broken([1, {2}])}}
    with pytest.raises(ff.CheckpointError, match=r"a/own: the state_dict\(\) of the Broken .*(?s:.)*state/1: a set"):
        ff.save(rt, tmp_path / "c", tree)
    with pytest.raises(ff.CheckpointError, match=r"a/own: state_dict\(\) of the Broken raised ValueError: gone"):
        ff.save(rt, tmp_path / "c", {"a": {"own": Broken(ValueError("gone"))}})
    assert not (tmp_path / "c").exists()
    ff.save(rt, tmp_path / "c", {"b": 1, **tree}, only="b")
    assert ff.load(rt, tmp_path / "c") == {"b": 1}, "what is not selected is not asked"
    with pytest.raises(ff.CheckpointError, match="a Linear cannot be stored. Write its Model"):
        ff.save(rt, tmp_path / "d", {"a": torch.nn.Linear(1, 1)})


def test_objects_are_parts_and_can_be_renamed(rt, tmp_path):
    ff.save(rt, tmp_path / "c", {"a": Broken(1), "b": {"x": Broken(2), "y": 3}})
    one, two = Broken(), Broken()
    loaded = ff.load(rt, tmp_path / "c", {"a": one, "b": {"x": two, "y": 0}}, only=["b"])
    assert (one.state, two.state, loaded["b"]["y"]) == (0, 2, 3)
    ff.load(rt, tmp_path / "c", {"z": one}, rename={"b/x": "z"}, only=lambda path: path == "z")
    assert one.state == 2
    with pytest.raises(ff.CheckpointError, match="b/y: the template has a Broken, .* the checkpoint has a plain value"):
        ff.load(rt, tmp_path / "c", {"b": {"y": one}})


def test_no_object_is_given_a_state_unless_everything_was_read(rt, tmp_path):
    ff.save(rt, tmp_path / "c", {"own": Broken(1), "more": Broken(2), "w": torch.ones(3)})
    file = tmp_path / "c/data/r00000-000.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"x")
    one = Broken()
    with pytest.raises(ff.CheckpointError, match="is damaged"):
        ff.load(rt, tmp_path / "c", {"own": one, "w": torch.zeros(3)})
    with pytest.raises(ff.CheckpointError, match="does not fit"):
        ff.load(rt, tmp_path / "c", {"own": one, "w": torch.zeros(2)})
    assert one.state == 0
    file.write_bytes(whole)
    with pytest.raises(ff.CheckpointError, match=r"more: load_state_dict\(\) of the Broken raised KeyError.* anew"):
        ff.load(rt, tmp_path / "c", {"own": one, "more": Broken(refuse=True)})


def save_states(rt, path, case):
    own = {
        "same": Broken(torch.ones(2)),
        "differ": Broken(torch.full((2,), float(rt.rank))),
        "unstorable": Broken({1} if rt.rank else 1),
        "place": Broken(1),
    }[case]
    key = "own" if case != "place" or not rt.rank else "other"
    try:
        ff.save(rt, path, {key: own, "n": 1})
    except ff.FabricfnError as error:
        return f"{type(error).__name__}: {error}"
    template = Broken(refuse=case == "refuse")
    ff.load(rt, path, {key: template, "n": 0})
    return template.state.tolist()


def load_with_a_fault(rt, path, where):
    """One rank's load fails in reading, or its template has no object; no rank's object may change."""
    own = Broken(-1, refuse=where == "refuse" and rt.rank == 1)
    like = {"own": own, "n": 0}
    if rt.rank == 1 and where == "template":
        like = {"n": 0}
    if rt.rank == 1 and where == "read":
        like["w"] = torch.zeros(3)
    try:
        ff.load(rt, path, like)
    except ff.FabricfnError as error:
        return f"{type(error).__name__}: {error}", own.state
    return "", own.state


def test_states_on_two_ranks(rt, tmp_path):
    with threads(2) as world:
        assert world.run(save_states, tmp_path / "c", "same") == [[1, 1], [1, 1]]
        assert len(ff.load(rt, tmp_path / "c")["own"]["states_by_rank"]) == 1
        assert world.run(save_states, tmp_path / "d", "differ") == [[0, 0], [1, 1]]
        for text in world.run(save_states, tmp_path / "e", "unstorable"):
            assert "failed on 1 of 2 ranks" in text and "own: the state_dict() of the Broken" in text
        for text in world.run(save_states, tmp_path / "e", "place"):
            assert "MismatchError" in text and "rank 0 ['own']; rank 1 ['other']" in text
        assert not (tmp_path / "e").exists()
        for text, state in world.run(load_with_a_fault, tmp_path / "c", "template"):
            assert "MismatchError" in text and "rank 0 own; rank 1 none" in text and state == -1
        ff.save(rt, tmp_path / "damaged", {"own": Broken(1), "n": 1, "w": torch.ones(3)})
        file = tmp_path / "damaged/data/r00000-000.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"x")
        for text, state in world.run(load_with_a_fault, tmp_path / "damaged", "read"):
            assert "failed on 1 of 2 ranks" in text and "is damaged" in text and state == -1
        for text, _ in world.run(load_with_a_fault, tmp_path / "c", "refuse"):
            assert "load_state_dict() of the Broken raised KeyError" in text
    own = Broken(-1)
    with pytest.raises(ff.CheckpointError, match="own: each of 2 ranks saved a position of its own, but 1 load"):
        ff.load(rt, tmp_path / "d", {"own": own, "n": 0})
    assert own.state == -1
