"""Random histories of saves, kills, damage, retention and resharding beside a model: nothing acknowledged is lost.

[Note: acknowledged] A save is acknowledged when it has returned. From then on it loads bit for bit, until another save
to its path or a removal that retention was asked for. A killed save or removal leaves the state before or after it.
Kills are real: a forked child sends itself SIGKILL before its n-th call to the file system. Damage is done to the
newest checkpoint from outside; it must be an error, and the newest one that is left must be found, with a warning.
"""

import contextlib
import dataclasses
import functools
import os
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fabricfn as ff
from fabricfn.checkpoint.storage import commit
from fabricfn.testing import threads

RT = ff.Runtime(world=ff.World(), precision=ff.Precision(), strategy=ff.strategies.single())
SAYS_ASIDE = "this is the checkpoint that stood there before"
PLACEMENTS = {"rows": Shard(0), "columns": Shard(1), "copies": Replicate()}


def contents(number):
    """The tree of the n-th save."""
    generator = torch.Generator().manual_seed(number)
    return {
        "w": torch.randn(5, 3, generator=generator),
        "half": torch.randn(2, 4, generator=generator).bfloat16(),
        "n": number,
        "rate": 1 / (number + 3),
        "loss": float(number * 7 % 5),
    }


def laid_out(rt, tree, layout):
    """The tree of one rank: matrices in parts, or plain."""
    if layout == "plain" or rt.world.group is None:
        return tree
    mesh = DeviceMesh.from_group(rt.world.group, "cpu", mesh_dim_names=("dp",))
    put = lambda leaf: distribute_tensor(leaf, mesh, [PLACEMENTS[layout]], src_data_rank=None)  # noqa: E731
    return {name: put(leaf) if isinstance(leaf, torch.Tensor) else leaf for name, leaf in tree.items()}


def bits(tree):
    """Everything of a tree that must be equal: of a part, the part of this rank."""
    local = lambda leaf: leaf.to_local() if isinstance(leaf, DTensor) else leaf  # noqa: E731
    return {
        name: (leaf.dtype, tuple(leaf.shape), local(leaf).contiguous().view(torch.uint8).tolist())
        if isinstance(leaf, torch.Tensor)
        else repr(leaf)
        for name, leaf in tree.items()
    }


def save_as(rt, path, number, layout):
    """One rank's part of a save."""
    ff.save(rt, path, laid_out(rt, contents(number), layout))


def load_as(rt, path, number, layout):
    """One rank's part of a load: it is the n-th save, in this layout."""
    tree = contents(number)
    like = {
        name: torch.zeros_like(leaf) if isinstance(leaf, torch.Tensor) else type(leaf)() for name, leaf in tree.items()
    }
    assert bits(ff.load(rt, path, laid_out(rt, like, layout))) == bits(laid_out(rt, tree, layout))


def die_before(call):
    """SIGKILL to this process before its n-th call to the file system; of `renameat2`, when it is looked up."""
    left = [call]
    fsync = os.fsync

    def count(event, _=()):
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fsync", "ctypes.dlsym"):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1

    def counted(fd):
        count("fsync")
        fsync(fd)

    os.fsync = counted
    sys.addaudithook(count)


def survived(work, call, can_exchange):
    """Run `work` in a forked child that is killed before its n-th call; whether it came to its end before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about forks of processes with threads; these are idle
        child = os.fork()
    if child == 0:
        try:
            if not can_exchange:
                commit.put_in_place = functools.partial(commit.put_in_place, exchange=lambda a, b: False)
            die_before(call)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(3)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), f"the child ended with {status}"
    return status == 0


@dataclasses.dataclass
class Known:
    """What the model knows of a checkpoint."""

    number: int
    """Of the save that it holds."""
    order: int
    """When it was committed, as a count."""
    damage: str = ""
    """What was done to it from outside."""


WORLDS = st.sampled_from([(1, "plain"), (2, "plain"), (2, "rows"), (3, "rows"), (3, "columns"), (2, "copies")])
PLACES = st.integers(0, 5)
CALLS = st.integers(0, 45)
FEW_CALLS = st.none() | st.integers(0, 30)
UNSEEN = ("flip",)
"""Damage that is found when the data are read, not before."""


class Machine(RuleBasedStateMachine):
    """The rules. `ranks` is a world of three threads; see `machine`."""

    ranks = None
    known = {}  # noqa: RUF012 (preconditions ask before the first checkpoints are there)

    @initialize(places=st.permutations(range(6)), count=st.integers(2, 5))
    def begin(self, places, count):
        """Some checkpoints, written in any order: histories that begin with nothing seldom come far."""
        self.folder = Path(tempfile.mkdtemp(prefix="machine-")).resolve()
        self.known = {}
        self.count = 0
        for place in places[:count]:
            number = self.next()
            save_as(RT, self.path(place), number, "plain")
            self.known[place] = Known(number, number)

    def teardown(self):
        shutil.rmtree(self.folder, ignore_errors=True)

    def path(self, place):
        """Numbers of one and two digits: their order is not that of the text."""
        return self.folder / f"step-{place * 4}"

    def next(self):
        self.count += 1
        return self.count

    def whole(self):
        """The places that `latest` takes for whole, oldest first."""
        return sorted(place for place, known in self.known.items() if known.damage in ("", *UNSEEN))

    @rule(place=PLACES, world=WORLDS)
    def save(self, place, world):
        number, (size, layout) = self.next(), world
        self.ranks.run(save_as, self.path(place), number, layout, world_size=size)
        self.known[place] = Known(number, number)
        traces = [name for name in os.listdir(self.folder) if name[0] == "." and f"-step-{place * 4}-" in name]
        assert traces == [], "a save leaves nothing of those before it"

    @rule(place=PLACES, call=CALLS, can_exchange=st.booleans())
    def killed_save(self, place, call, can_exchange):
        number, path = self.next(), self.path(place)
        ended = survived(functools.partial(save_as, RT, path, number, "plain"), call, can_exchange)
        before = self.known.pop(place, None)
        found = self.found(path)
        if ended or found == number:
            assert found == number
            self.known[place] = Known(number, number)
        elif before is not None:
            assert found == (None if before.damage else before.number), "neither the old nor the new one"
            self.known[place] = before
        else:
            assert found is None

    @precondition(lambda self: any(not known.damage for known in self.known.values()))
    @rule(data=st.data(), world=WORLDS)
    def load(self, data, world):
        good = sorted(place for place, known in self.known.items() if not known.damage)
        place, (size, layout) = data.draw(st.sampled_from(good)), world
        with quiet():
            self.ranks.run(load_as, self.path(place), self.known[place].number, layout, world_size=size)

    @rule(
        last=st.integers(1, 3),
        every=st.sampled_from([None, 8]),
        best=st.integers(0, 2),
        call=st.none() | st.integers(0, 20),
    )
    def retain(self, last, every, best, call):
        whole = self.whole()
        paths = [self.path(place) for place in whole]
        loss = {self.path(place): contents(self.known[place].number)["loss"] for place in whole}
        options = {"last": last, "every": every, "best": best}
        kept = set(ff.retained(paths, **options, metric=loss if best else None))
        kept.update(self.path(place) for place in sorted(whole, key=lambda place: self.known[place].order)[-1:])
        prune = functools.partial(ff.prune_checkpoints, RT, self.folder, **options, metric="loss" if best else None)
        if call is None or survived(prune, call, True):
            assert call is not None or prune() == [path for path in paths if path not in kept]
            gone = {place for place in whole if self.path(place) not in kept}
        else:
            there = ff.list_checkpoints(self.folder)
            gone = {place for place in whole if self.path(place) not in kept and self.path(place) not in there}
        for place in gone:
            assert not self.path(place).exists()
            del self.known[place]

    @precondition(lambda self: self.known)
    @rule(damage=st.sampled_from(["flip", "cut", "manifest", "no manifest", "no data"]))
    def damage_the_newest(self, damage):
        place = max(self.whole(), default=None)
        if place is None or not self.path(place).is_dir() or self.known[place].damage:
            return
        path = self.path(place)
        data = sorted((path / "data").iterdir())[0]
        match damage:
            case "flip":
                flip(data)
            case "cut":
                os.truncate(data, data.stat().st_size - 1)
            case "manifest":
                flip(path / "manifest.json")
            case "no manifest":
                (path / "manifest.json").unlink()
            case "no data":
                data.unlink()
        self.known[place].damage = damage

    @rule()
    def fall_back(self):
        """A job that begins anew: from the newest one that can be read."""
        for path in reversed(ff.list_checkpoints(self.folder)):
            number = self.found(path)
            if number is not None:
                break
        else:
            number = None
        good = [place for place, known in sorted(self.known.items()) if not known.damage]
        assert number == (self.known[good[-1]].number if good else None)

    @invariant()
    def acknowledged_saves_are_there_and_damage_is_never_silent(self):
        for place, known in self.known.items():
            expected = None if known.damage else known.number
            assert self.found(self.path(place)) == expected, f"{self.path(place)}: {known}"

    @invariant()
    def latest_is_the_newest_whole_one_or_says_that_it_fell_back(self):
        if not self.known:
            return
        assert ff.list_checkpoints(self.folder) == [self.path(place) for place in self.whole()]
        newest = max(self.whole(), default=-1)
        passed = [place for place, known in self.known.items() if known.damage and place > newest]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = ff.latest(self.folder)
        assert found == (self.path(newest) if newest >= 0 else None)
        visible = [place for place in passed if self.path(place).is_dir()]
        text = " ".join(str(warning.message) for warning in said)
        assert all(str(self.path(place)) in text for place in visible), (visible, text)
        assert passed or not said, text

    def found(self, path):
        """The number of the save that is at a path, every bit of it looked at; None when it cannot be loaded."""
        try:
            with quiet():
                tree = ff.load(RT, path)
        except ff.CheckpointError:
            return None
        assert bits(tree) == bits(contents(tree["n"]))
        return tree["n"]


def flip(file):
    """One bit of the last byte but one."""
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)


@contextlib.contextmanager
def quiet():
    """A killed save's predecessor is found under another name, and a warning says so; here that is as it should be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*{SAYS_ASIDE}")
        yield


def run_machine(examples=15, steps=12, *, shrink=False):
    """Run so many random histories of up to so many steps. Full count (R16): 200 x 30.

    Args:
        shrink: look for the shortest history of a violation, which takes minutes.

    Raises:
        AssertionError: a violation; hypothesis prints its history.
    """
    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]
    with threads(3) as ranks:
        run_state_machine_as_test(
            type("Histories", (Machine,), {"ranks": ranks}),
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                phases=phases,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
