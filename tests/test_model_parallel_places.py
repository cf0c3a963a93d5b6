"""Where things are under model_parallel: ranks, data and keys, collectives, checkpoints of every layout."""

import pytest
import torch
from torch.utils.data import DataLoader

import fabricfn as ff
from fabricfn.sharding import is_sharded, local_of, sharded_as
from tests.support.model_parallel import NETS, close, cross_entropy, double, ff_full, mine, parallel
from tests.support.worlds import world_of

ranks = world_of("threads", 4)


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
