"""TPUs and XLA without either: what is chosen, refused and started; several replicas by a fake of `torch_xla`."""

import dataclasses
import subprocess
import sys
import textwrap
import threading
from types import ModuleType, SimpleNamespace

import pytest
import torch

import fabricfn as ff
from fabricfn import testing
from fabricfn.accelerators import available, choose
from fabricfn.errors import CapabilityError, ConfigurationError
from fabricfn.starting.request import choice_of, request_from
from fabricfn.strategies.xla_package import begin
from fabricfn.testing import cases


def probe(kind, count):
    found = None if kind is None else SimpleNamespace(type=kind)
    there = found is not None
    return SimpleNamespace(current_accelerator=lambda: found, is_available=lambda: there, device_count=lambda: count)


def test_a_tpu_is_what_torch_says_it_is():
    assert available(probe("tpu", 4)) == {"tpu": 4, "cpu": 1, **available()}
    assert choose("auto", "auto", available(probe("tpu", 4))).accelerator == "tpu"
    assert "tpu" not in available(probe(None, 0))


NATIVE = """
    import dataclasses
    import torch, torch.distributed as dist
    from fabricfn import accelerators, testing
    from fabricfn.testing import cases
    import fabricfn as ff

    class Probe:  # answers as torch_tpu does; there is no device
        current_accelerator = staticmethod(lambda: torch.device("tpu"))
        is_available = staticmethod(lambda: True)
        device_count = staticmethod(lambda: 2)
        chosen = []

    torch.utils.rename_privateuse1_backend("tpu")
    gloo = lambda store, rank, size, timeout: dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
    dist.Backend.register_backend("tpu_dist", gloo, devices=["tpu"])
    accelerators.available.__defaults__ = (Probe,)
    torch.accelerator.set_device_index = Probe.chosen.append

    module, x_shape, y_shape = cases.build("mlp", 5, 2)
    batch = tuple(cases.filled((23, *shape), torch.float64, seed) for seed, shape in enumerate((x_shape, y_shape)))
    train = testing.training_loop(cases.initialised(module, 7), cases.mean_square, batch, lr=0.1)

    def work(rt):
        config = dist.distributed_c10d._world.pg_backend_config[dist.group.WORLD]
        facts = rt.accelerator, str(rt.device), str(Probe.chosen[-1]), config, rt.strategy.name
        near = dataclasses.replace(rt, world=dataclasses.replace(rt.world, device=torch.device("cpu")))
        sharded = dataclasses.replace(near, strategy=ff.strategies.fsdp())
        return facts, train(near), train(sharded)

    whole = testing.run(train, world_size=1, precision="64-true")[0]
    for facts, *found in ff.launch(work, precision="64-true", start_method="fork"):
        print(*facts, *(testing.difference(one, whole, 1e-11) for one in found))
"""


def test_ranks_of_a_native_tpu_are_those_of_any_accelerator():
    """The engines compute on the CPU in the group of the TPUs, since there is no device."""
    command = [sys.executable, "-c", textwrap.dedent(NATIVE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    ranks = [f"tpu tpu:{rank} tpu:{rank} cpu:gloo,tpu:tpu_dist ddp None None" for rank in range(2)]
    assert done.stdout.splitlines() == ranks, done.stderr


class Replicas:
    """What torch_xla is to fabricfn, for ranks that are threads on the CPU."""

    def __init__(self, monkeypatch, *, kind="TPU", processes=1, devices=1):
        self.meeting, self.sent, self.begun = threading.Barrier(processes, timeout=30), {}, []
        self.settled = self.reduced = 0
        spmd: list[bool] = []
        parts = {
            "runtime": {
                "device_type": lambda: kind,
                "process_count": lambda: processes,
                "addressable_device_count": lambda: devices,
                "addressable_runtime_device_count": lambda: devices,
                "is_spmd": lambda: bool(spmd),
                "use_spmd": lambda: (spmd.append(True), self.begun.append("spmd")),
            },
            "core.xla_model": {"REDUCE_SUM": "sum", "all_reduce": self.all_reduce},
            "_internal.tpu": {"num_available_chips": lambda: 4},
            "_internal.pjrt": {"initialize_multiprocess": lambda *place: self.begun.append(place)},
        }
        for name, names in {"": {"sync": self.sync, "device": lambda: torch.device("cpu")}, **parts}.items():
            module = ModuleType(name)
            vars(module).update(names)
            monkeypatch.setitem(sys.modules, f"torch_xla.{name}".rstrip("."), module)

    def sync(self):
        self.settled += 1

    def all_reduce(self, kind, tensors):
        assert kind == "sum"
        self.sent[threading.get_ident()] = [tensor.clone() for tensor in tensors]
        self.meeting.wait()
        for tensor, parts in zip(tensors, zip(*self.sent.values(), strict=True), strict=True):
            tensor.copy_(sum(parts))
        self.meeting.wait()
        del self.sent[threading.get_ident()]
        self.reduced += 1


@pytest.mark.parametrize("devices", [1, 2])
def test_gradients_are_averaged_by_xla_where_it_reaches_all_ranks(monkeypatch, devices):
    fake = Replicas(monkeypatch, processes=2, devices=devices)
    strategy = dataclasses.replace(ff.strategies.xla(), name="xla, on the CPU")
    module, x_shape, y_shape = cases.build("tied", 5, 2)
    batch = tuple(cases.filled((23, *shape), torch.float64, seed) for seed, shape in enumerate((x_shape, y_shape)))
    train = testing.training_loop(cases.initialised(module, 7), cases.mean_square, batch, lr=0.1)
    testing.check_equivalence(train, accumulation=(1, 2), strategies=(strategy,), world_sizes=(2,))
    # a second device of a process would never come to the meeting, so the gradients take the way of everything else
    assert (fake.reduced > 0) == (devices == 1)
    assert fake.settled > 0


def test_a_process_says_what_it_is_before_its_first_tensor(monkeypatch):
    fake = Replicas(monkeypatch)
    begin(1, 4, spmd=False)
    begin(0, 1, spmd=False)
    assert fake.begun == [(1, 4)]
    begin(0, 1, spmd=True)
    begin(0, 1, spmd=True)
    assert fake.begun == [(1, 4), "spmd"]
    fake = Replicas(monkeypatch, kind="CPU")
    begin(1, 2, spmd=False)  # processes on a CPU know nothing of each other
    assert fake.begun == []


def test_the_devices_of_a_node_are_ranks_or_those_of_one_process(monkeypatch):
    Replicas(monkeypatch)
    ranks = choice_of(request_from({"strategy": "xla"}))
    assert (ranks.accelerator, ranks.indices, ranks.open) == ("xla", (0, 1, 2, 3), True)
    for strategy in ("xla_fsdp", ff.strategies.xla_fsdp(units=None)):
        assert choice_of(request_from({"strategy": strategy, "accelerator": "xla"})).indices == (0,)
    Replicas(monkeypatch, kind="CPU")
    monkeypatch.setenv("CPU_NUM_DEVICES", "2")
    assert choice_of(request_from({"strategy": "xla"})).indices == (0, 1)
    assert choice_of(request_from({"accelerator": "xla", "strategy": "single"})).accelerator == "xla"


@pytest.mark.parametrize("name", ["xla", "xla_fsdp"])
def test_what_is_missing_or_contradicts_is_said_before_anything_starts(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    with pytest.raises(CapabilityError, match=r'pip install "fabricfn\[xla\]"'):
        ff.init_runtime(strategy=name)
    with pytest.raises(ConfigurationError, match=f"strategy='{name}' means accelerator=\"xla\".*PJRT_DEVICE"):
        ff.init_runtime(strategy=name, accelerator="tpu")
