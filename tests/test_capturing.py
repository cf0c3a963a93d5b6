"""`compile_step(..., capture=True)`: a recorded step means what the step means.

Without a GPU there is nothing that records kernels, so on CPU a stand-in takes the place of `record`, the one function
that calls torch's recorder: it runs the graph again over the same memory, unseen by version counters, as a replay does.
Where there is CUDA the same tests run with the real one.
"""

import pytest
import torch

import fabricfn as ff
from fabricfn.compiling import capturing, step as compiling
from tests.support.compiled import ATOL, BACKEND, assert_close, copies, make_batch, make_net, make_step, mse

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))


@pytest.fixture(params=["cpu", CUDA])
def rt(request):
    return ff.init_runtime(accelerator=request.param, devices=1, precision="64-true")


@pytest.fixture
def recordings(rt, monkeypatch):
    """Counts them: a list with the inputs of each."""
    made = []
    real = capturing.record

    def stand_in(run, inputs):
        memory = [one.data for one in inputs]
        outputs = []

        def replay():
            found = run(*memory)
            for place, one in enumerate(found):
                if len(outputs) == place:
                    outputs.append(one.clone())
                outputs[place].copy_(one)

        return replay, outputs

    def record(run, inputs):
        made.append(inputs)
        return (real if rt.device.type == "cuda" else stand_in)(run, inputs)

    monkeypatch.setattr(capturing, "record", record)
    monkeypatch.setattr(compiling, "CAPTURES", ("cuda", "cpu"))
    return made


def set_up(rt, cls=torch.optim.AdamW, **options):
    model = ff.setup_model(rt, make_net())
    return model, ff.setup_optimizer(rt, model, cls, lr=0.1, **options)


def batch_of(rt, seed):
    return ff.to_device(rt, tuple(make_batch(seed)))


def captured(rt, step):
    return ff.compile_step(rt, step, backend=BACKEND, capture=True)


def run_both(rt, step, compiled, one, other, numbers):
    """Both for these numbers of batches: they say the same at every step."""
    for number in numbers:
        arguments = (*batch_of(rt, number), 0.1 / (number + 1), ff.fold_in(ff.key(1), number))
        *one, told = step(*one, *arguments)
        *other, mine = compiled(*other, *arguments)
        torch.testing.assert_close(mine, told, rtol=0, atol=ATOL)
        assert_close(one, other)
    return one, other


@pytest.mark.parametrize("donate", [False, True])
def test_a_recorded_step_is_the_eager_step(rt, recordings, donate):
    step = make_step(rt, donate)
    compiled = captured(rt, step)
    start = set_up(rt)
    _, (model, _) = run_both(rt, step, compiled, copies(*start), copies(*start), range(6))
    assert (len(recordings), compiled.traces) == (1, 1)
    # what stays is recorded where it lies: nothing of the size of the parameters is copied into a slot
    lie = {value.data_ptr() for value in model.params.values()}
    assert lie.issubset({one.data_ptr() for one in recordings[0]}) is donate


def test_results_are_kept_after_later_steps(rt, recordings):
    compiled, (model, opt) = captured(rt, make_step(rt, True)), set_up(rt)
    found, seen = [], []
    for number in range(5):
        model, opt, told = compiled(model, opt, *batch_of(rt, number), 0.1, ff.key(number))
        found += [told["loss"], *model.buffers.values()]
        seen += [one.clone() for one in found[-4:]]
    torch.testing.assert_close(found, seen, rtol=0, atol=0)
    assert len(recordings) == 1


def test_records_that_lie_elsewhere_are_recorded_anew(rt, recordings):
    step = make_step(rt, True)
    compiled = captured(rt, step)
    start = set_up(rt)
    one, other = run_both(rt, step, compiled, copies(*start), copies(*start), range(3))
    moved = copies(*other)
    one, other = run_both(rt, step, compiled, one, moved, range(3, 6))
    assert len(recordings) == 2


def test_two_models_may_take_turns(rt, recordings):
    step = make_step(rt, True)
    compiled = captured(rt, step)
    start = set_up(rt)
    eager, mine = [copies(*start), copies(*start)], [copies(*start), copies(*start)]
    for number in range(6):
        turn = number % 2
        eager[turn], mine[turn] = run_both(rt, step, compiled, eager[turn], mine[turn], [number])
    assert len(recordings) == 1  # with slots for both, which are read back


def test_gradients_may_be_given_away_too(rt, recordings):
    model, opt = set_up(rt, torch.optim.SGD, momentum=0.9)
    grad_fn = ff.value_and_grad(rt, mse)
    compiled = captured(rt, lambda *records: ff.optimizer_step(rt, *records, donate=True))
    one, other = copies(model, opt), copies(model, opt)
    for number in range(4):
        batch = batch_of(rt, number)
        _, grads = grad_fn(one[0], *batch, rng=ff.key(number))
        one = ff.optimizer_step(rt, *one, grads, donate=True)
        _, grads = grad_fn(other[0], *batch, rng=ff.key(number))
        other = compiled(*other, grads)
        assert_close(one, other)
        with pytest.raises(ff.DonatedError):
            ff.clip_gradients(rt, grads, max_norm=1.0)
    assert len(recordings) == 1


def test_a_graph_over_values_that_a_replay_changed_fails_in_backward(rt, recordings):
    compiled, (model, opt) = captured(rt, make_step(rt, True)), set_up(rt)
    for number in range(4):
        weight = next(iter(model.params.values())).detach().requires_grad_()
        square = (weight * weight).sum()
        model, opt, *_ = compiled(model, opt, *batch_of(rt, number), 0.1, ff.key(number))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            square.backward()
    assert len(recordings) == 1


def test_a_recording_that_fails_loses_nothing(rt, recordings, monkeypatch):
    compiled, records = captured(rt, make_step(rt, True)), set_up(rt)
    arguments = (*batch_of(rt, 0), 0.1, ff.key(0))
    *records, _ = compiled(*records, *arguments)
    before = copies(*records)

    def refused(run, inputs):
        raise RuntimeError("operation not permitted when stream is capturing")

    with monkeypatch.context() as patch:
        patch.setattr(capturing, "record", refused)
        with pytest.raises(RuntimeError, match="not permitted") as caught:
            compiled(*records, *arguments)
    assert "nothing was computed" in caught.value.__notes__[-1]
    assert_close(before, records)
    compiled(*records, *arguments)


def test_what_another_device_computes_cannot_be_recorded(rt, recordings):
    other = "cpu" if rt.device.type == "cuda" else "meta"
    compiled = captured(rt, lambda x: (x * 2, torch.zeros(3, device=other)))
    with pytest.raises(ff.CapabilityError, match=rf"this step also works on the {other}: .*shape \(3,\)"):
        compiled(torch.ones(2, device=rt.device))


def test_where_nothing_can_be_recorded_it_is_said_at_once():
    rt = ff.init_runtime(accelerator="cpu", devices=1)
    with pytest.raises(ff.ConfigurationError, match="the device of rank 0 is cpu"):
        ff.compile_step(rt, lambda x: x, capture=True)


def refused(rt):
    with pytest.raises(ff.ConfigurationError, match="is for one rank, and there are 2"):
        ff.compile_step(rt, lambda x: x, capture=True)


def test_several_ranks_are_refused(rt, recordings):
    with ff.testing.threads(2) as world:
        world.run(refused, strategy="functional")


def test_two_recorders_are_refused(rt, recordings):
    with pytest.raises(ff.ConfigurationError, match="leave one out"):
        ff.compile_step(rt, lambda x: x, options={"triton.cudagraphs": True}, capture=True)
