"""How far a save or a load is, what its receipt says, and what travels between the ranks meanwhile."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import fabricfn as ff
from fabricfn.checkpoint import meters as progress_lines
from fabricfn.checkpoint.agreement import HEAD, together
from fabricfn.checkpoint.format import manifest
from fabricfn.errors import CheckpointError
from tests.support.gates import ends
from tests.support.runtimes import RT
from tests.support.worlds import world_of

nothing_is_left = ends()

ranks = world_of("threads", 2)


def test_receipts_say_the_same_on_all_ranks(tmp_path, ranks):
    def saved(rt, blocking):
        receipt = ff.save(rt, tmp_path / "c", {"w": [torch.ones(500), torch.ones(300)]}, blocking=blocking)
        return receipt if blocking else receipt.wait()

    for blocking in (True, False):
        a, b = ranks.run(saved, blocking)
        assert a == b
        files = sorted((tmp_path / "c/data").iterdir())
        assert a.rank_bytes == tuple(path.stat().st_size for path in files)
        assert a.bytes == sum(a.rank_bytes) + (tmp_path / "c/manifest.json").stat().st_size
        assert 0 < a.seconds_writing < a.seconds
        assert a.seconds_stalled == a.seconds if blocking else 0 < a.seconds_stalled < a.seconds


def watched(rt, folder, seen):
    tree = {"w": [torch.ones(1_500_000), torch.ones(700_000), torch.zeros(0)]}
    saved, loaded = [], []
    receipt = ff.save(rt, folder / "c", tree, progress=lambda *at: saved.append(at))
    assert ff.save(rt, folder / "c", tree, blocking=False, progress=lambda *at: seen.append(at)).wait()
    ff.load(rt, folder / "c", tree, progress=lambda *at: loaded.append(at))
    return receipt, saved, loaded


@pytest.mark.parametrize("size", [1, 2])
def test_rank_0_is_told_how_far_its_part_is(tmp_path, ranks, size):
    seen = []
    results = ranks.run(watched, tmp_path, seen, world_size=size)
    receipt, saved, loaded = results[0]
    own = 6_000_000 if size == 2 else 8_800_000
    assert saved[-1] == seen[-1] == (own, own)
    assert loaded[-1] == (8_800_000, 8_800_000)
    for calls in (saved, seen, loaded):
        assert calls == sorted(set(calls))
    assert saved[0] == (manifest.BLOCK, own)  # a large array is told of by blocks
    assert receipt.rank_bytes[0] > own
    assert [result[1:] for result in results[1:]] == [([], [])] * (size - 1)


def test_lines_are_printed_when_it_takes_long(tmp_path, capfd, monkeypatch):
    tree = {"w": torch.ones(3_000_000)}
    ff.save(RT, tmp_path / "c", tree, progress=True)
    ff.load(RT, tmp_path / "c", progress=True)
    ff.save(RT, tmp_path / "c", tree, progress=False)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(progress_lines, "PATIENCE", 0.0)
    ff.save(RT, tmp_path / "c", tree, progress=True)
    ff.load(RT, tmp_path / "c", progress=True)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 4
    assert f"ff.save to {tmp_path}/c: 0.01 of 0.01 GB in 0 s, about 0 s left" in lines
    assert lines[-1].startswith("ff.load of")


def test_calls_come_at_most_ten_times_a_second(monkeypatch):
    now = iter(0.03 * n for n in range(100))
    monkeypatch.setattr(progress_lines.time, "perf_counter", lambda: next(now))
    calls = []
    tell = progress_lines.meter(lambda *at: calls.append(at), "x", 20)
    for _ in range(20):
        tell(1)
    assert calls == [(1, 20), (5, 20), (9, 20), (13, 20), (17, 20), (20, 20)]


# ---------------------------------------------------------------- what travels between the ranks


@given(st.lists(st.integers(0, 3 * HEAD), min_size=2, max_size=2))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_messages_of_any_length_arrive(ranks, lengths):
    def exchange(rt):
        data = {"é\udc80": ["x" * lengths[rt.rank], rt.rank, None, 2.5]}
        plain = together(rt.world, "here", lambda: (rt.rank, data))
        objects = together(rt.world, "here", lambda: (rt.rank, (1j, data)), objects=True)[1]
        assert [value for _, value in objects] == plain[1]
        return plain

    results = ranks.run(exchange)
    assert [mine for mine, _ in results] == [0, 1]
    expected = [{"é\udc80": ["x" * lengths[rank], rank, None, 2.5]} for rank in range(2)]
    assert [data for _, data in results] == [expected] * 2


def test_a_failure_meets_every_rank_whatever_it_is(ranks):
    def one_fails(rt, work):
        with pytest.raises(CheckpointError, match=r"here failed on 1 of 2 ranks.*rank 1: "):
            together(rt.world, "here", lambda: (None, work() if rt.rank else 1))

    ranks.run(one_fails, lambda: 1 / 0)
    ranks.run(one_fails, set)  # what JSON does not know
