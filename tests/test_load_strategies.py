"""What other tools wrote, into any strategy and placement: the values of the real packages' files, bit for bit."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import fabricfn as ff
from fabricfn.errors import CheckpointError
from tests.support.runtimes import RT
from tests.support.torch_files import Net, dcp_save, setup, state_of, trained
from tests.support.worlds import world_of

pair = world_of("processes", 2)


def written(folder, net, optimizer):
    """One net in the formats of real packages, written by one process."""
    folder.mkdir()
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, folder / "torch.pt")
    once = {name: value.clone() for name, value in net.state_dict().items()}
    save_file(once, folder / "net.safetensors")
    dcp_save(state, folder / "dcp")


def load_each(rt, folder, mesh=None):
    """Every file into a model under this strategy; the whole tensors, and the optimizer's state."""
    found = {}
    for name in ("torch.pt", "net.safetensors", "dcp", "dcp2"):
        model = setup(rt)
        loaded = ff.load_raw(rt, folder / name, model, key="model" if name != "net.safetensors" else None)
        assert [type(v) for v in loaded.params.values()] == [type(v) for v in model.params.values()]
        found[name] = state_of(loaded)
        if name != "net.safetensors":
            like = ff.setup_optimizer(rt, loaded, torch.optim.AdamW, lr=1.0)
            opt = ff.load_raw(rt, folder / name, like)
            moments = {param: row["exp_avg"] for param, row in opt.state.items()}
            found[name + "/opt"] = opt.step, {n: getattr(v, "full_tensor", lambda: v)() for n, v in moments.items()}
    return found


def save_sharded(rt, folder):
    """FSDP2's own save by real ranks: DTensors of uneven parts, the optimizer by name."""
    net = Net(5)
    mesh = init_device_mesh("cpu", (rt.world_size,))
    for part in (net.mid, net):
        fully_shard(part, mesh=mesh)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    net(torch.ones(2, 4)).backward()
    optimizer.step()
    state = {"model": net.state_dict(), "optimizer": get_optimizer_state_dict(net, optimizer), "epoch": 3}
    dcp.save(state, checkpoint_id=folder / "dcp2")
    whole = {name: getattr(value, "full_tensor", lambda: value)() for name, value in net.state_dict().items()}
    rows = {name: optimizer.state[value]["exp_avg"].full_tensor() for name, value in net.named_parameters()}
    return whole, rows


def test_every_format_loads_into_every_strategy(tmp_path, pair):
    folder = tmp_path / "files"
    net = Net(5)
    optimizer = trained(net)
    written(folder, net, optimizer)
    whole, rows = pair.run(save_sharded, folder)[0]
    expected = {name: value for name, value in net.state_dict().items() if name != "out.weight"}
    ours = {name: optimizer.state[value]["exp_avg"] for name, value in net.named_parameters()}
    worlds = [("single", lambda: [load_each(RT, folder)])]
    worlds += [(name, lambda name=name: pair.run(load_each, folder, strategy=name)) for name in ("ddp", "fsdp")]
    for strategy, run in worlds:
        for found in run():
            for name in ("torch.pt", "net.safetensors", "dcp", "dcp2"):
                target = expected if name != "dcp2" else {n: v for n, v in whole.items() if n != "out.weight"}
                assert set(found[name]) == set(target)
                assert all(torch.equal(value, target[n]) for n, value in found[name].items()), (strategy, name)
            for name in ("torch.pt/opt", "dcp/opt", "dcp2/opt"):
                step, moments = found[name]
                target = ours if name != "dcp2/opt" else rows
                assert step == 1
                assert all(torch.equal(value, target[n]) for n, value in moments.items()), (strategy, name)


def load_placed(rt, folder):
    """A tensor of any placement takes its own part: rows, columns, both, a copy."""
    mesh = DeviceMesh.from_group(rt.world.group, "cpu")
    for name, at in (("torch.pt", "model/inp.weight"), ("net.safetensors", "inp.weight"), ("dcp", "model/inp.weight")):
        value = ff.load_raw(rt, folder / name, key=at)
        for placement in (Shard(0), Shard(1), Replicate()):
            like = distribute_tensor(torch.zeros_like(value), mesh, [placement], src_data_rank=None)
            found = ff.load_raw(rt, folder / name, like, key=at)
            assert found._spec == like._spec
            expected = distribute_tensor(value, mesh, [placement], src_data_rank=None)
            assert torch.equal(found.to_local(), expected.to_local())


def test_a_part_of_a_rank_is_taken_from_every_format(tmp_path, pair):
    net = Net(5)
    written(tmp_path / "files", net, trained(net))
    pair.run(load_placed, tmp_path / "files")


def only_on_rank_one(rt, path):
    if rt.rank == 1:
        path = path.with_name("other.pt")
    ff.load_raw(rt, path)


def test_all_ranks_fail_when_one_does_and_when_their_files_differ(tmp_path, pair):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"(?s)failed on 1 of 2 ranks.*no file or folder.*other\.pt"):
        pair.run(only_on_rank_one, tmp_path / "a.pt")
    torch.save({"a": torch.ones(3)}, tmp_path / "other.pt")
    with pytest.raises(ff.MismatchError, match="different files"):
        pair.run(only_on_rank_one, tmp_path / "a.pt")
