"""The options of fsdp and ddp, and the strings for strategies: each gives what `single` gives, and is checked."""

import multiprocessing

import pytest
import torch
from torch import nn

import fabricfn as ff
from fabricfn import sharding
from fabricfn.errors import ConfigurationError
from fabricfn.starting.request import Request, start_method_of
from fabricfn.strategies import ddp, fsdp
from tests.support.blocks import NET, NORMED, X, rows, squares, wholes
from tests.support.runtimes import RT64
from tests.support.worlds import world_of

threads = world_of("threads", 4)
processes = world_of("processes", 2)


def assert_close(found, expected, tolerance=1e-12):
    assert list(found) == list(expected)
    torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=tolerance)


def single_grads(loss_fn=squares, module=NET):
    return ff.value_and_grad(RT64, loss_fn, allow_unused=True)(ff.setup_model(RT64, module), X)[1].params


# fsdp


def steps(rt, factor=1.0):
    """Gradients at several values, and a unit that runs only now and then: what was gathered must never go stale."""
    model = ff.setup_model(rt, NET)
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
    x = rows(rt)
    for last in (True, False, True):
        short = ff.apply(rt, model, x, last=False)
        _, grads = ff.value_and_grad(rt, squares, allow_unused=True)(model, x, last=last)
        grads = ff.tree_map(lambda grad: grad * factor, grads)
        model, opt = ff.optimizer_step(rt, model, opt, grads, donate=True)
    return wholes(model.params), short


FSDP = {
    "offload": {"cpu_offload": True},
    "prefetch 1": {"prefetch": 1},
    "prefetch 2": {"prefetch": 2, "reshard_after_forward": False},
    "groups of 2": {"reshard_after_forward": 2},
    "ignored by pattern": {"ignored_params": ("inp.*", "blocks.0.*")},
    "ignored by predicate": {"ignored_params": lambda name, slot: slot.dim() == 1, "units": nn.Linear},
    "all": {"cpu_offload": True, "prefetch": 1, "ignored_params": "out.bias", "gradient_divide_factor": 4},
}


@pytest.mark.parametrize("options", FSDP.values(), ids=FSDP)
def test_options_of_fsdp_train_as_single(threads, options):
    expected, _ = steps(RT64)
    for found, _ in threads.run(steps, strategy=fsdp(**options), precision=64):
        assert_close(found, expected)


def test_the_divide_factor_scales_every_gradient(threads, processes):
    expected, _ = steps(RT64)
    for ranks, size in ((threads, 1), (threads, 3), (processes, 2)):
        for factor in (1, 2.5):
            strategy = fsdp(gradient_divide_factor=factor, ignored_params="inp.bias")
            for found, _ in ranks.run(steps, factor / size, strategy=strategy, precision=64, world_size=size):
                assert_close(found, expected)


def parts(rt):
    params = ff.setup_model(rt, NET).params
    return {name for name, value in params.items() if not sharding.is_sharded(value)}


def test_ignored_parameters_stay_whole(threads):
    scalars = {f"blocks.{i}.gain" for i in range(3)}
    for ignored, more in (("inp.*", {"inp.weight", "inp.bias"}), (lambda name, slot: name == "out.bias", {"out.bias"})):
        assert threads.run(parts, strategy=fsdp(ignored_params=ignored), world_size=2) == [scalars | more] * 2


def gathered_at(rt):
    """Which blocks are gathered, or on the way, when each block's forward begins."""
    model = ff.setup_model(rt, NET)
    seen = []

    def loss_fn(net, x):
        def note(block, args):
            groups = [b._get_fsdp_state()._fsdp_param_groups[0] for b in net.blocks]
            seen.append([group._all_gather_result is not None or group.is_unsharded for group in groups])

        handles = [block.register_forward_pre_hook(note) for block in net.blocks]
        loss = squares(net, x)
        for handle in handles:
            handle.remove()
        return loss

    ff.value_and_grad(rt, loss_fn)(model, rows(rt))
    return seen


def test_prefetching_gathers_units_ahead(threads):
    one, two, three = ([i == j for i in range(3)] for j in range(3))
    assert threads.run(gathered_at, strategy=fsdp(), precision=64, world_size=2)[0] == [one, two, three]
    ahead = threads.run(gathered_at, strategy=fsdp(prefetch=1), precision=64, world_size=2)[0]
    assert ahead == [[True, True, False], [False, True, True], [False, False, True]]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"reshard_after_forward": 0}, "reshard_after_forward=0 must be True, False"),
        ({"reshard_after_forward": "no"}, "reshard_after_forward='no' must be"),
        ({"gradient_divide_factor": 0}, "must be a positive number"),
        ({"gradient_divide_factor": float("inf")}, "must be a positive number"),
        ({"prefetch": -1}, "prefetch=-1 must be a whole number"),
        ({"prefetch": True}, "prefetch=True must be a whole number"),
        ({"ignored_params": 3}, "must be a pattern of names"),
    ],
)
def test_options_of_fsdp_are_checked(options, match):
    with pytest.raises(ConfigurationError, match=match):
        fsdp(**options)


def refused(rt, match):
    with pytest.raises(ConfigurationError, match=match):
        ff.setup_model(rt, NET)


def test_options_of_fsdp_that_do_not_fit_the_world_or_the_net(threads):
    threads.run(refused, "must divide the 3 ranks", strategy=fsdp(reshard_after_forward=2), world_size=3)
    threads.run(refused, r"no parameter fits 'x\*'; there are inp", strategy=fsdp(ignored_params="x*"), world_size=2)


# ddp


def averaged(rt):
    model = ff.setup_model(rt, NET)
    for _ in range(2):
        _, grads = ff.accumulate(rt, squares)(model, rows(rt).chunk(2))
    return grads.params


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"comm_hook": "bf16"}, 2e-2),
        ({"comm_hook": "fp16"}, 1e-3),
        ({"comm_hook": "bf16", "static_graph": True, "gradient_as_bucket_view": True}, 2e-2),
        ({"static_graph": True, "bucket_cap_mb": 1e-4}, 1e-12),
        ({"bucket_cap_mb_list": [1, 2], "batched_grad_copy": True}, 1e-12),
        ({"find_unused_parameters": True, "skip_all_reduce_unused_params": True}, 1e-12),
    ],
    ids=str,
)
def test_options_of_ddp_average_gradients(processes, options, tolerance):
    expected = single_grads()
    for found in processes.run(averaged, strategy=ddp(**options), precision=64, world_size=2):
        assert_close(found, expected, tolerance)
        rounded = any(not torch.equal(value, expected[name]) for name, value in found.items() if value is not None)
        assert rounded or tolerance < 1e-10


def test_a_low_rank_hook_loses_what_has_a_higher_rank(processes):
    state = {"matrix_approximation_rank": 1, "start_powerSGD_iter": 2, "min_compression_rate": 1}
    strategy = ddp(comm_hook="powersgd", comm_state=state)
    first, second = processes.run(compressed, strategy=strategy, precision=64)
    assert torch.equal(first[0], second[0])
    assert [torch.linalg.matrix_rank(grad, rtol=1e-9).item() for grad in first] == [3, 3, 1]


def compressed(rt):
    """The gradients of the first calls; no scalars, which torch's hook does not know."""
    with pytest.raises(ff.CapabilityError, match=r"without dimensions: blocks.0.gain, blocks.1.gain"):
        ff.setup_model(rt, NET)
    model = ff.setup_model(rt, NORMED)
    grad_fn = ff.value_and_grad(rt, squares)
    return [grad_fn(model, rows(rt))[1].params["3.weight"] for _ in range(3)]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"find_unused_parameter": True}, r"no option find_unused_parameter; .*Did you mean find_unused_parameters\?"),
        ({"broadcast_buffers": True}, r'decided by fabricfn: write value_and_grad\(..., buffers="rank0"'),
        ({"mixed_precision": None}, "Precision"),
        ({"static_graph": 1}, "static_graph=1.* must be True or False"),
        ({"bucket_cap_mb": -1}, "must be a positive number of MiB"),
        ({"comm_hook": "bf61"}, "there are 'bf16', 'fp16', 'powersgd'"),
        ({"comm_hook": 3}, "neither a function nor one of"),
        ({"comm_hook": "bf16", "comm_state": {}}, "has no comm_state"),
        ({"comm_hook": "powersgd", "comm_state": {"rank": 2}}, "There are matrix_approximation_rank"),
        ({"comm_hook": "powersgd", "comm_state": {"start_powerSGD_iter": 1}}, "start_powerSGD_iter"),
    ],
)
def test_options_of_ddp_are_checked(options, match):
    with pytest.raises(ConfigurationError, match=match):
        ddp(**options)


# Strings


def test_every_string_is_a_strategy_and_a_wrong_one_suggests():
    known = ff.strategies.NAMES | ff.strategies.PRESETS
    for name in known:
        found = ff.strategies.resolve(name, 1)
        assert isinstance(found, ff.Strategy)
        assert name.startswith(found.name)
    assert ff.strategies.resolve("ddp_find_unused_parameters_true", 2).check_unused() is None
    for wrong, right in (("dddp", "ddp"), ("fdsp", "fsdp"), ("DDP_Spawn", "ddp_spawn"), ("ddp_find_unused", "ddp_")):
        with pytest.raises(ConfigurationError, match=f'Did you mean "{right}.*There are .auto., .single.'):
            ff.strategies.resolve(wrong, 2)
    with pytest.raises(ConfigurationError, match="is unknown. There are"):
        ff.strategies.resolve("horovod", 2)


def where(rt):
    return rt.strategy.name, rt.world_size, multiprocessing.current_process().name.split("-")[0]


@pytest.mark.parametrize(("strategy", "kind"), [("ddp_fork", "ForkProcess"), ("ddp_notebook", "ForkProcess")])
def test_strings_that_say_how_launch_starts_ranks(strategy, kind):
    assert ff.launch(where, devices=2, accelerator="cpu", strategy=strategy) == [("ddp", 2, kind)] * 2


def test_which_method_a_string_means_and_contradictions():
    for strategy, given, method in (
        ("ddp_spawn", "auto", "spawn"),
        ("ddp_spawn", "spawn", "spawn"),
        ("ddp", "spawn", "spawn"),
        ("ddp", "auto", "auto"),
        (ddp(), "fork", "fork"),
    ):
        assert start_method_of(Request(strategy=strategy, start_method=given)) == method
    with pytest.raises(ConfigurationError, match=r"'ddp_fork' means start_method=\"fork\", but start_method='spawn'"):
        ff.launch(where, devices=2, accelerator="cpu", strategy="ddp_fork", start_method="spawn")
