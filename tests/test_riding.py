"""Loaders with a state of their own, in checkpoints."""

import pytest
import torch
from torch.utils.data import DataLoader

import fabricfn as ff
from fabricfn.testing import processes


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
