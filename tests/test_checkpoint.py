"""Checkpoints: bit for bit, at every world size, over every crash; damage is an error that names the place."""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import types
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors import safe_open
from torch import nn

import fabricfn as ff
from fabricfn.checkpoint import sharing
from fabricfn.checkpoint.format import manifest, validation, writing
from fabricfn.checkpoint.format.boxes import whole
from fabricfn.checkpoint.storage import commit
from fabricfn.errors import CheckpointError, DonatedError, MismatchError
from fabricfn.testing import threads
from tests.checkpoints import bits, loss_fn, trained
from tests.worlds import world_of

RT = ff.Runtime(world=ff.World(), precision=ff.Precision(), strategy=ff.strategies.single())


ranks = world_of("processes", 3)


def ones(tree):
    """The same structure, every tensor full of ones."""
    return ff.tree_map(lambda leaf: torch.ones_like(leaf) if isinstance(leaf, torch.Tensor) else leaf, tree)


def folder_of(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(Path(path).rglob("*")) if p.is_file()}


Pair = collections.namedtuple("Pair", "first second")


@dataclasses.dataclass(frozen=True)
class Own:
    weights: torch.Tensor
    note: str = ""
    size: int = dataclasses.field(init=False, default=3)


# ---------------------------------------------------------------- law 5: load(save(x)) is x

DTYPES = [getattr(torch, name) for name in (*manifest.DTYPES, *manifest.RAW_DTYPES)]


def filled(dtype, shape, seed):
    """Any bits: NaN payloads, denormals and all."""
    empty = torch.empty(shape, dtype=dtype)
    data = torch.randint(0, 2 if dtype is torch.bool else 256, (empty.nbytes,), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))  # fmt: skip
    return data.view(dtype).reshape(shape) if empty.numel() else empty


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit_and_other_readers_can_open_the_file(tmp_path, dtype):
    tree = {"a": filled(dtype, (3, 5), 0), "scalar": filled(dtype, (), 1), "empty": filled(dtype, (0, 3), 2)}
    tree["more"] = {name: torch.empty(0, dtype=getattr(torch, name)) for name in ("bool", "float64", "bfloat16")}
    receipt = ff.save(RT, tmp_path / "c", tree)
    assert bits(ff.load(RT, tmp_path / "c")) == bits(tree)
    assert bits(ff.load(RT, tmp_path / "c", tree)) == bits(tree)
    with safe_open(receipt.path / "data/r00000-000.safetensors", "pt") as file:
        assert set(file.keys()) == {f"{number}.0" for number in range(6)}
        read = file.get_tensor("0.0")
    assert bits(read.view(dtype).reshape(3, 5)) == bits(tree["a"])


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    value = filled(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool])), shape,
                   draw(st.integers(0, 99)))  # fmt: skip
    match draw(st.sampled_from(["plain", "transposed", "strided", "expanded", "param", "numpy", "number"])):
        case "transposed":
            return value.transpose(0, -1) if value.ndim else value
        case "strided":
            return value[::2] if value.ndim else value
        case "expanded":
            return value.expand(2, *value.shape)
        case "param" if value.is_floating_point():
            return nn.Parameter(value)
        case "numpy" if value.dtype is not torch.bfloat16:
            return value.numpy()
        case "number" if value.dtype is not torch.bfloat16 and value.numel():
            return value.numpy().reshape(-1)[0]
    return value


PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5), st.binary(max_size=5),
    st.complex_numbers(allow_nan=False), st.just("\udc80"), st.just(-(1 << 9000)),
)  # fmt: skip
KEYS = st.one_of(st.text(max_size=3), st.integers(-5, 5))
TREES = st.recursive(
    st.one_of(tensors(), PLAIN, st.builds(ff.Cursor, epoch=st.integers(0)), st.builds(ff.Key, st.integers(0, 99))),
    lambda inner: st.one_of(
        st.dictionaries(KEYS, inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=3).map(collections.OrderedDict),
        st.dictionaries(KEYS, inner, max_size=3).map(types.MappingProxyType),
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.builds(Pair, inner, inner),
        inner.map(lambda value: [value, {"tied": value}]),
        st.builds(Own, tensors().filter(torch.is_tensor), st.text(max_size=3)),
    ),
    max_leaves=8,
)


@given(TREES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_load_of_save_is_the_tree(tmp_path, tree):
    ff.save(RT, tmp_path / "c", tree)
    assert bits(ff.load(RT, tmp_path / "c", tree)) == bits(tree)
    plain = ff.load(RT, tmp_path / "c")
    ff.save(RT, tmp_path / "plain", plain)
    assert bits(ff.load(RT, tmp_path / "plain")) == bits(plain)
    ff.verify_checkpoint(tmp_path / "c")
    shutil.rmtree(tmp_path / "c")


def test_loaded_tensors_own_their_memory_and_the_template_is_left_alone(tmp_path):
    weights = torch.arange(6.0)
    tree = {"w": weights, "tied": weights, "view": weights[2:], "alone": weights.clone()}
    ff.save(RT, tmp_path / "c", tree)
    like = ones(tree)
    loaded = ff.load(RT, tmp_path / "c", like)
    assert bits(like) == bits(ones(tree))
    assert loaded["w"] is not loaded["tied"]  # the template has two
    plain = ff.load(RT, tmp_path / "c")
    assert plain["w"] is plain["tied"]
    assert ff.load(RT, tmp_path / "c", tree)["w"].data_ptr() != weights.data_ptr()
    size = (tmp_path / "c/data/r00000-000.safetensors").stat().st_size
    os.truncate(tmp_path / "c/data/r00000-000.safetensors", 0)  # a mapped tensor would kill the process here
    assert plain["w"].sum() == 15
    assert size < 4 * (6 + 4 + 6) + 600  # the tied tensor is stored once


def test_a_template_on_the_meta_device_costs_no_memory(tmp_path):
    module = nn.Linear(3, 2)
    ff.save(RT, tmp_path / "c", module.state_dict())
    with torch.device("meta"):
        like = nn.Linear(3, 2).state_dict()
    assert bits(ff.load(RT, tmp_path / "c", like)) == bits(module.state_dict())


def test_tensors_that_stay_in_host_memory_come_back_there(tmp_path):
    elsewhere = dataclasses.replace(RT, world=ff.World(device=torch.device("meta")))
    ff.save(elsewhere, tmp_path / "c", {"step": torch.tensor(3)})
    assert ff.load(elsewhere, tmp_path / "c")["step"].item() == 3
    ff.save(RT, tmp_path / "c", {"w": torch.tensor(3)})
    assert ff.load(elsewhere, tmp_path / "c")["w"].is_meta


# ---------------------------------------------------------------- records of training


OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, {}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "RMSprop": (torch.optim.RMSprop, {}),
    "NAdam": (torch.optim.NAdam, {}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("donate", [False, True])
def test_resume_is_bit_for_bit(tmp_path, name, donate):
    optimizer, hyperparams = OPTIMIZERS[name]
    straight = trained(RT, optimizer, steps=5, **hyperparams)
    model, opt = trained(RT, optimizer, steps=2, **hyperparams)
    ff.save(RT, tmp_path / "c", {"model": model, "opt": opt})
    fresh = trained(RT, optimizer, steps=0, **hyperparams)
    before = bits(list(fresh))
    loaded = ff.load(RT, tmp_path / "c", {"model": fresh[0], "opt": fresh[1]}, donate=donate)
    assert bits(loaded) == bits({"model": model, "opt": opt})
    resumed = trained(RT, steps=3, state=(loaded["model"], loaded["opt"]), donate=True)
    assert bits(list(resumed)) == bits(list(straight))
    if donate:
        assert loaded["model"].params["0.weight"] is fresh[0].params["0.weight"]
        with pytest.raises(DonatedError, match=r"test_checkpoint\.py"):
            trained(RT, steps=1, state=fresh)
    else:
        assert bits(list(fresh)) == before
        trained(RT, steps=1, state=fresh)


def test_an_eval_model_and_gradients_come_back_as_they_were(tmp_path):
    model, opt = trained(RT)
    data = torch.ones(6, 3, dtype=RT.precision.param_dtype)
    _, grads = ff.value_and_grad(RT, loss_fn)(model, data, data[:, :2])
    tree = {"ema": ff.eval_mode(model), "grads": grads}
    ff.save(RT, tmp_path / "c", tree)
    loaded = ff.load(RT, tmp_path / "c", {"ema": model, "grads": grads})
    assert loaded["ema"].training == frozenset()
    assert bits(loaded["grads"].params) == bits(grads.params)
    assert bits(loaded["grads"].new_buffers) == bits(grads.new_buffers)
    assert bits(ff.optimizer_step(RT, model, opt, loaded["grads"])[0]) == bits(
        ff.optimizer_step(RT, model, opt, grads)[0]
    )
    plain = ff.load(RT, tmp_path / "c")
    assert plain["ema"]["training"] == []
    assert bits(plain["ema"]["params"]) == bits(dict(model.params))


def test_what_was_given_away_is_not_saved(tmp_path):
    state = trained(RT, steps=1)
    trained(RT, steps=1, state=state, donate=True)
    for record in state:
        with pytest.raises(DonatedError):
            ff.save(RT, tmp_path / "c", {"record": record})
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- ranks


def common(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "tensors": [torch.randn(size, 3, generator=generator) for size in (7, 1, 0, 50, 9)],
        "ints": torch.arange(5),
        "epoch": seed,
    }


def save_common(rt, path, seed):
    return ff.save(rt, path, common(seed))


def load_plain(rt, path):
    return bits(ff.load(rt, path))


@pytest.mark.parametrize("kind", ["processes", "threads"])
def test_every_world_size_loads_what_any_other_wrote(tmp_path, ranks, kind):
    with contextlib.ExitStack() as stack:
        world = ranks if kind == "processes" else stack.enter_context(threads(3))
        for writers in (1, 2, 3):
            receipts = world.run(save_common, tmp_path / "c", writers, world_size=writers)
            assert len(set(receipts)) == 1
            written = [name for name in folder_of(tmp_path / "c") if name.startswith("data")]
            assert len(written) == writers
            for readers in (1, 2, 3):
                found = world.run(load_plain, tmp_path / "c", world_size=readers)
                assert found == [bits(common(writers))] * readers
    assert os.listdir(tmp_path) == ["c"]
    assert receipts[0].bytes == sum(map(len, folder_of(tmp_path / "c").values()))


def train_and_save(rt, path):
    model, opt = trained(rt)
    ff.save(rt, path, {"model": model, "opt": opt})
    return bits([model, opt])


def load_and_train(rt, path):
    fresh = trained(rt, steps=0)
    loaded = ff.load(rt, path, {"model": fresh[0], "opt": fresh[1]})
    found = bits([loaded["model"], loaded["opt"]])
    trained(rt, steps=1, state=(loaded["model"], loaded["opt"]), donate=True)
    return found


@pytest.mark.parametrize(("saver", "loader"), [("ddp", "functional"), ("functional", "single"), ("single", "ddp")])
def test_a_strategy_loads_what_another_saved(tmp_path, ranks, saver, loader):
    sizes = {"ddp": 2, "functional": 3, "single": 1}
    saved = ranks.run(train_and_save, tmp_path / "c", world_size=sizes[saver], strategy=saver)
    found = ranks.run(load_and_train, tmp_path / "c", world_size=sizes[loader], strategy=loader)
    assert found == [saved[0]] * sizes[loader]


def save_different(rt, path, where):
    tree = common() | {"epoch": rt.rank // 2 if where == "epoch" else 0}
    if where == "shape":
        tree["ints"] = torch.arange(5 + (rt.rank == 1))
    if where == "keys" and rt.rank == 2:
        tree["more"] = 1
    if where == "path":
        path = f"{path}-{rt.rank}"
    try:
        ff.save(rt, path, tree)
    except MismatchError as error:
        return str(error)


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("epoch", "epoch: ranks 0, 1 have 0 (int); ranks 2 have 1 (int)"),
        ("shape", "ints: ranks 0, 2 have a tensor int64[5]; ranks 1 have a tensor int64[6]"),
        ("keys", "more: ranks 0, 1 have nothing; ranks 2 have 1 (int)"),
        ("path", "the path: ranks 0 have"),
    ],
)
def test_ranks_that_differ_are_told_where(tmp_path, ranks, where, text):
    messages = ranks.run(save_different, tmp_path / "c", where)
    assert all(text in message and f"this is rank {rank}" in message for rank, message in enumerate(messages))
    assert os.listdir(tmp_path) == []


def save_with_one_failing(rt, path):
    """Rank 1 may write 1,000 bytes only, as on a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rt.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        ff.save(rt, path, {"w": [torch.full((5000,), 1.0) for _ in range(3)]})
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_a_rank_that_fails_in_the_middle_leaves_the_previous_checkpoint(tmp_path, ranks):
    ranks.run(save_common, tmp_path / "c", 1)
    before = folder_of(tmp_path / "c")
    for rank, message in enumerate(ranks.run(save_with_one_failing, tmp_path / "c")):
        assert "failed on 1 of 3 ranks" in message
        assert "rank 1: OSError: [Errno 27] File too large" in message
        assert f"this is rank {rank}" in message
    assert folder_of(tmp_path / "c") == before
    assert os.listdir(tmp_path) == ["c"]
    ranks.run(save_common, tmp_path / "c", 2)
    assert ranks.run(load_plain, tmp_path / "c", world_size=1) == [bits(common(2))]


def load_from_own_path(rt, path):
    try:
        ff.load(rt, f"{path}-{rt.rank}")
    except (MismatchError, CheckpointError) as error:
        return type(error), str(error)


def test_a_load_fails_on_all_ranks_or_on_none(tmp_path, ranks):
    for rank in range(3):
        ff.save(RT, tmp_path / f"c-{rank}", {"a": torch.ones(9)})
    for rank, (kind, message) in enumerate(ranks.run(load_from_own_path, tmp_path / "c")):
        assert kind is MismatchError
        assert f"this is rank {rank}" in message
    for rank in (1, 2):
        shutil.copytree(tmp_path / "c-0", tmp_path / f"c-{rank}", dirs_exist_ok=True)
    assert ranks.run(load_from_own_path, tmp_path / "c") == [None] * 3
    damage(tmp_path / "c-2/data/r00000-000.safetensors", -1)
    for kind, message in ranks.run(load_from_own_path, tmp_path / "c"):
        assert kind is CheckpointError
        assert "rank 2: CheckpointError" in message
        assert "is damaged" in message


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 5))
def test_shares_are_even_and_complete(sizes, world_size):
    leaves = [manifest.Leaf(kind="tensor", dtype="float32", shape=(size,)) for size in sizes]
    owners = [((whole(leaf.shape), range(world_size)),) for leaf in leaves]
    found = sharing.shares(leaves, owners, world_size)
    assert sorted(chore.leaf for share in found for chore in share) == list(range(len(sizes)))
    loads = [sum(sizes[chore.leaf] for chore in share) for share in found]
    assert max(loads) - min(loads) <= max(sizes, default=0)


# ---------------------------------------------------------------- the commit


def test_what_is_no_checkpoint_is_never_replaced(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/thesis.txt").write_text("mine")
    ff.save(RT, tmp_path / "mixed", {"a": 1})
    (tmp_path / "mixed/data/mine.txt").write_text("mine")
    before = folder_of(tmp_path)
    for name, text in [("file", "is a file"), ("folder", "thesis.txt"), ("mixed", "data/mine.txt")]:
        with pytest.raises(CheckpointError, match=text):
            ff.save(RT, tmp_path / name, {"a": 2})
    with pytest.raises(CheckpointError, match="file is a file|Not a directory"):
        ff.save(RT, tmp_path / "file/c", {"a": 2})
    assert folder_of(tmp_path) == before


def test_saving_goes_through_links_makes_parents_and_keeps_the_umask(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ff.save(RT, "deep/down/last.ckpt", {"n": 1})
    os.symlink("deep/down/last.ckpt", "link")
    (tmp_path / "empty").mkdir()
    ff.save(RT, tmp_path / "empty", {"n": 3})
    umask = os.umask(0o027)
    try:
        ff.save(RT, "link", {"n": 2})
    finally:
        os.umask(umask)
    assert os.path.islink("link")
    assert ff.load(RT, "deep/down/last.ckpt") == ff.load(RT, "link") == {"n": 2}
    assert (tmp_path / "deep/down/last.ckpt/manifest.json").stat().st_mode & 0o777 == 0o640
    assert os.listdir("deep/down") == ["last.ckpt"]


def test_where_folders_cannot_be_exchanged_the_old_one_is_put_aside(tmp_path):
    def prepared(name, number):
        ff.save(RT, tmp_path / name, {"n": number, "w": torch.full((9,), float(number))})
        return tmp_path / name

    target = prepared("c", 1)
    new = prepared("new", 2)
    work = tmp_path / f".tmp-c-{'0' * 32}"
    os.rename(new, work)
    commit.put_in_place(work, target, exchange=lambda a, b: False)
    assert ff.load(RT, target)["n"] == 2
    aside = tmp_path / f".old-c-{'0' * 32}"
    assert sorted(os.listdir(tmp_path)) == [aside.name, "c"]

    shutil.rmtree(target)  # as after a kill between the two renames
    with pytest.warns(UserWarning, match="was being replaced or removed when that was killed"):
        assert ff.load(RT, target)["n"] == 1
    assert ff.list_checkpoints(tmp_path) == [target]
    assert ff.latest(tmp_path) == target
    prepared("c", 3)
    assert os.listdir(tmp_path) == ["c"]
    assert ff.load(RT, target)["n"] == 3


def test_what_killed_saves_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path):
    dead, other = tmp_path / f".tmp-c-{'1' * 32}", tmp_path / f".tmp-cc-{'1' * 32}"
    dead.mkdir()
    other.mkdir()
    work, lock = commit.work_folder(tmp_path / "c", "2" * 32)
    assert not dead.exists()
    ff.save(RT, tmp_path / "c", {"a": 1})
    assert sorted(os.listdir(tmp_path)) == sorted([other.name, work.name, "c"])
    os.close(lock)
    ff.save(RT, tmp_path / "c", {"a": 1})
    assert sorted(os.listdir(tmp_path)) == sorted([other.name, "c"])


def test_a_reader_never_sees_a_mixture_while_the_checkpoint_is_replaced(tmp_path):
    def tree(number):
        return {"n": number, "w": [torch.full((1000,), float(number)) for _ in range(3)]}

    ff.save(RT, tmp_path / "c", tree(0))
    stop = threading.Event()
    seen = []

    def read():
        while not stop.is_set():
            found = ff.load(RT, tmp_path / "c")
            seen.append((found["n"], {value.item() for w in found["w"] for value in w}))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, 40):
        ff.save(RT, tmp_path / "c", tree(number))
    stop.set()
    reader.join()
    assert len(seen) > 1
    assert all(values == {number} for number, values in seen)
    assert [number for number, _ in seen] == sorted(number for number, _ in seen)


# ---------------------------------------------------------------- damage


def damage(path, position, mask=1):
    data = bytearray(Path(path).read_bytes())
    data[position] ^= mask
    Path(path).write_bytes(data)


def checkpoint_of_two_files(folder):
    with threads(2) as world:
        world.run(save_common, folder, 7)
    return folder


def test_cut_missing_swapped_and_foreign_files_are_named(tmp_path):
    whole = checkpoint_of_two_files(tmp_path / "c")
    again = checkpoint_of_two_files(tmp_path / "again")
    good = folder_of(whole)

    def check(name, text):
        with pytest.raises(CheckpointError, match=text):
            ff.load(RT, whole)
        with pytest.raises(CheckpointError, match=text):
            ff.verify_checkpoint(whole)
        with contextlib.suppress(FileNotFoundError):
            (whole / name).unlink()
        (whole / name).write_bytes(good[name])
        assert ff.load(RT, whole)["epoch"] == 7

    for name in good:
        for size in (0, 1, len(good[name]) // 2, len(good[name]) - 1):
            os.truncate(whole / name, size)
            check(name, name)
        (whole / name).write_bytes(good[name] + b"x")
        check(name, name)
        (whole / name).unlink()
        check(name, f"{name}.* is missing")
        (whole / name).unlink()
        os.symlink(again / name, whole / name)
        check(name, f"{name} is a symbolic link")
        (whole / name).unlink()
        os.mkfifo(whole / name)
        check(name, f"{name} is not a plain file")
    data = [name for name in good if name.startswith("data")]
    (whole / data[0]).write_bytes((again / data[0]).read_bytes())
    check(data[0], f"{data[0]} begins otherwise")
    zeroed = bytearray(good[data[0]])
    zeroed[-40:] = bytes(40)
    (whole / data[0]).write_bytes(zeroed)
    check(data[0], f"{data[0]} is damaged")


def signed(text):
    """A manifest with a right checksum, whatever it says."""
    body = json.dumps(text, separators=(",", ":")).encode()[:-1]
    return body + b',\n"sha256":"%s"}\n' % hashlib.sha256(body).hexdigest().encode()


def test_manifests_that_contradict_themselves_are_refused(tmp_path):
    ff.save(RT, tmp_path / "c", {"a": torch.ones(2, 3), "b": torch.ones(4), "n": 1})
    good = json.loads((tmp_path / "c/manifest.json").read_bytes())
    del good["sha256"]
    assert validation.from_bytes(signed(good), "x").leaves[2].value == "1"
    piece = ("leaves", 0, "pieces", 0)
    edits = {
        ("format",): ["other", None],
        ("version",): [2, "1", None],
        ("save_id",): ["x" * 32, 1],
        ("block",): [1],
        ("world_size",): [0, "1"],
        ("created",): ["now"],
        ("files", 0, "name"): ["../r00000-000.safetensors", "/etc/passwd", "data/../x", "manifest.json", 3],
        ("files", 0, "bytes"): [-1, 1 << 70, 1.5],
        ("files",): [[], good["files"] * 2, {}],
        ("tree", "c"): [[0, 1], [0, 1, 1], [0, 1, 9], [0, 1, -1], [0, 1, 2.0], [0, 1, None], 3],
        ("tree", "k"): [["a", "a", "n"], ["a"], ["a", [], "n"], ["a", 1.5, "n"]],
        ("tree", "t"): ["set", None],
        ("leaves", 0, "kind"): ["pickle", [], None],
        ("leaves", 0, "dtype"): ["object", "float64", []],
        ("leaves", 0, "shape"): [[2, 4], [-2, -3], [6], [1 << 60, 1 << 60], [1] * 65, "23", [True, 6]],
        ("leaves", 0, "alias"): [0, 1, -1, 2],
        ("leaves", 1, "alias"): [0, 1, 2],
        ("leaves", 2, "v"): ["0x", "1e5", None, [], "9" * 5000],
        ("leaves", 0, "pieces"): [[], good["leaves"][0]["pieces"] * 2, good["leaves"][1]["pieces"]],
        (*piece, "file"): [1, -1],
        (*piece, "bytes"): [0, 25],
        (*piece, "offset"): [[1, 0], [0], [0, -1]],
        (*piece, "shape"): [[1, 3], [3, 3]],
        (*piece, "crc32"): [[], [1, 2], [-1], [1 << 32]],
    }  # fmt: skip
    edits[*piece, "start"] = [
        start for start in (0, 1, 16, 1 << 61) if start != good["leaves"][0]["pieces"][0]["start"]
    ]
    for place, values in edits.items():
        for value in values:
            text = json.loads(json.dumps(good))
            inner = text
            for part in place[:-1]:
                inner = inner[part]
            inner[place[-1]] = value
            (tmp_path / "c/manifest.json").write_bytes(signed(text))
            with pytest.raises(CheckpointError, match="manifest.json"):
                ff.load(RT, tmp_path / "c")
    for body in (b"[]", b"{", b"[" * 100_000, b"\xff", b'{"format":"fabricfn-checkpoint","version":1'):
        data = body + b',\n"sha256":"%s"}\n' % hashlib.sha256(body).hexdigest().encode()
        with pytest.raises(CheckpointError):
            validation.from_bytes(data, "x")
    with pytest.raises(CheckpointError, match="format version 2, this fabricfn reads version 1"):
        validation.from_bytes(signed(good | {"version": 2}), "x")


def test_an_array_in_pieces_is_put_together_and_overlaps_are_refused(tmp_path):
    """Shards as several ranks will write them: a grid of pieces, over two files."""
    full = torch.arange(7.0 * 5).reshape(7, 5)

    def written(folder, boxes):
        names = ["data/r00000-000.safetensors", "data/r00001-000.safetensors"]
        (folder / "data").mkdir(parents=True)
        leaf = manifest.Leaf(kind="tensor", dtype="float32", shape=(7, 5))
        ends = [0, 0]
        pieces = []
        for number, (offset, shape) in enumerate(boxes):
            size = 4 * shape[0] * shape[1]
            pieces.append(
                manifest.Piece(file=number % 2, offset=offset, shape=shape, start=ends[number % 2], size=size)
            )
            ends[number % 2] += size
        found = []
        sizes = []
        for index, name in enumerate(names):
            entries = [(f"0.{i}", leaf, piece) for i, piece in enumerate(pieces) if piece.file == index]
            parts = []
            for _, _, piece in entries:
                (row, column), (height, width) = piece.offset, piece.shape
                part = full[row : row + height, column : column + width].contiguous()
                parts.append([memoryview(part.numpy()).cast("B")])
            size, checksums = writing.write_file(str(folder / name), writing.header("0" * 32, entries), parts)
            sizes.append((name, size))
            found += [
                (int(key[2:]), dataclasses.replace(piece, crc32=crc))
                for (key, _, piece), crc in zip(entries, checksums, strict=True)
            ]
        leaf = dataclasses.replace(leaf, pieces=tuple(piece for _, piece in sorted(found)))
        content = manifest.Manifest(
            save_id="0" * 32, created=0.0, world_size=2, strategy="fsdp", tree=0, leaves=(leaf,), files=tuple(sizes)
        )
        (folder / "manifest.json").write_bytes(manifest.to_bytes(content))
        return folder

    rows = [((0, 0), (4, 5)), ((4, 0), (3, 5))]
    grid = [((0, 0), (4, 2)), ((0, 2), (4, 3)), ((4, 0), (3, 1)), ((4, 1), (3, 4))]
    for name, boxes in [("rows", rows), ("grid", grid)]:
        path = written(tmp_path / name, boxes)
        assert bits(ff.load(RT, path)) == bits(full)
        assert bits(ff.load(RT, path, torch.zeros(5, 7).t())) == bits(full)
        ff.verify_checkpoint(path)
    bad = {
        "hole": [((0, 0), (4, 5)), ((5, 0), (2, 5))],
        "rows": [((0, 0), (4, 5)), ((3, 0), (3, 5))],
        "cells": [((0, 0), (4, 2)), ((0, 1), (4, 3)), ((4, 0), (3, 1)), ((4, 1), (3, 4))],
    }
    for name, boxes in bad.items():
        with pytest.raises(CheckpointError, match="overlap|as many elements"):
            ff.load(RT, written(tmp_path / f"bad-{name}", boxes))


def test_blocks_are_checked_across_chunk_borders(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "BLOCK", 1000)
    sizes = (0, 1, 999, 1000, 1001, 2500)
    data = bytes(range(256)) * 40
    for first in sizes:
        for second in sizes:
            chunks = [memoryview(data)[:first], memoryview(data)[first : first + second]]
            path = tmp_path / f"{first}-{second}"
            _, (checksums,) = writing.write_file(str(path), b"", [chunks])
            whole = data[: first + second]
            assert path.read_bytes() == whole
            assert list(checksums) == [zlib.crc32(whole[at : at + 1000]) for at in range(0, len(whole), 1000)]


# ---------------------------------------------------------------- what is there


def test_latest_is_by_number_then_by_time_and_says_when_it_falls_back(tmp_path):
    assert ff.latest(tmp_path / "nowhere") is None
    assert ff.latest(tmp_path) is None
    for name in ("last", "step-9", "step-10", "step-000000020", "epoch_2.ckpt"):
        ff.save(RT, tmp_path / name, {"name": name})
    (tmp_path / f".tmp-step-99-{'0' * 32}").mkdir()
    (tmp_path / "step-100-notes").mkdir()
    (tmp_path / "step-200.txt").write_text("")
    names = [path.name for path in ff.list_checkpoints(tmp_path)]
    assert names == ["last", "epoch_2.ckpt", "step-9", "step-10", "step-000000020"]
    assert ff.load(RT, ff.latest(tmp_path))["name"] == "step-000000020"
    damage(tmp_path / "step-000000020/manifest.json", 10)
    with pytest.warns(UserWarning, match=r"falls back to .*step-10.*step-000000020/manifest.json"):
        assert ff.latest(tmp_path).name == "step-10"
    assert len(ff.list_checkpoints(tmp_path)) == 4
    for name in ("a", "b"):
        ff.save(RT, tmp_path / "unnumbered" / name, {"name": name})
    os.utime(tmp_path / "unnumbered/a/manifest.json", (2e9, 2e9))
    assert ff.latest(tmp_path / "unnumbered").name == "a"
    for path in (tmp_path / "unnumbered").iterdir():
        (path / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="no whole checkpoint"):
        assert ff.latest(tmp_path / "unnumbered") is None


def test_a_missing_checkpoint_is_an_error_that_says_what_there_is(tmp_path):
    ff.save(RT, tmp_path / "run/step-1", {"a": 1})
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*step-2; .*run holds step-1"):
        ff.load(RT, tmp_path / "run/step-2")
    with pytest.raises(CheckpointError, match="there is no .*nowhere"):
        ff.load(RT, tmp_path / "nowhere/step-2")
    with pytest.raises(CheckpointError, match=r"folder of checkpoints \(step-1\).*ff.latest"):
        ff.load(RT, tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file"):
        ff.load(RT, tmp_path / "file")


def test_looking_at_a_checkpoint_imports_no_torch(tmp_path):
    ff.save(RT, tmp_path / "step-3", {"w": torch.ones(2, 3), "lr": 0.5, "tied": [None]})
    code = """
import sys, fabricfn as ff
path = ff.latest(sys.argv[1])
assert ff.list_checkpoints(sys.argv[1]) == [path]
print(ff.inspect_checkpoint(path))
ff.verify_checkpoint(path)
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert "step-3" in head
    assert "by 1 rank (single)" in head
    assert lines == ["  w: float32[2, 3]", "  lr = 0.5", "  tied/0 = None"]


def test_a_checkpoint_needs_no_fabricfn_to_be_read(tmp_path):
    ff.save(RT, tmp_path / "c", {"model": {"w": torch.arange(6.0).reshape(2, 3)}, "epoch": 4})
    text = json.loads((tmp_path / "c/manifest.json").read_text())
    leaf = next(leaf for leaf in text["leaves"] if leaf["path"] == "model/w")
    number, piece = text["leaves"].index(leaf), leaf["pieces"][0]
    with safe_open(tmp_path / "c" / text["files"][piece["file"]]["name"], "pt") as file:
        assert file.get_tensor(f"{number}.0").tolist() == [[0, 1, 2], [3, 4, 5]]
        assert file.metadata()["save_id"] == text["save_id"]
