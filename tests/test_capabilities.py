"""The table of docs/strategies.md is made from the records, and what it says is true.

`python tests/test_capabilities.py` writes the table anew.
"""

import functools
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fabricfn as ff
from fabricfn.accelerators import AUTO_ORDER
from fabricfn.errors import CapabilityError, ConfigurationError
from fabricfn.precision import NAMES as PRECISIONS, PACKAGED, check_name
from fabricfn.strategies import ACCELERATORS, EXTRAS, NAMES, NEED_MORE, PRESETS, model_parallel, pipeline
from tests.support.worlds import world_of

PAGE = Path(__file__).parent.parent / "docs" / "strategies.md"
BEGIN, END = "<!-- made by tests/test_capabilities.py -->", "<!-- end -->"

PLANNED = {
    "model_parallel": lambda: model_parallel({"*": "colwise_gathered"}, tensor_parallel=2),
    "pipeline": lambda: pipeline([["used"], ["unused"]]),
}
"""Strategies that take an argument, with one that fits the nets below."""


def without_package(name):
    """A strategy of an extra, made without its package: the table does not depend on what is installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fabricfn.strategies.deepspeed_zero.require", lambda: None)
        return EXTRAS[name]()


DEEPSPEEDS = [name for name in EXTRAS if name.startswith("deepspeed") and not name.endswith("nvme")]
ELSEWHERE = {
    "pipeline": "test_pipeline.py",
    **dict.fromkeys(DEEPSPEEDS, "test_deepspeed.py"),
    **{name: f"test_{name}.py" for name in ACCELERATORS},
}
"""Strategies whose cells are held by another test file, since threads cannot run them."""
MAKERS = {
    **NAMES,
    **PRESETS,
    **PLANNED,
    "ddp(shard_optimizer=True)": lambda: ff.strategies.ddp(shard_optimizer=True),
    **{name: functools.partial(without_package, name) for name in DEEPSPEEDS},
    **{name: EXTRAS[name] for name in ACCELERATORS},
}
SAME = {"ddp_spawn": "ddp", "ddp_fork": "ddp", "ddp_notebook": "ddp"}
HERE = {name: make for name, make in MAKERS.items() if name not in ELSEWHERE and name not in SAME}

JOBS = {
    "`allow_unused=True`": lambda strategy: strategy.check_unused(),
    '`reduce="canonical"`': lambda strategy: strategy.local_gradients(()),
    "`torch.func` over `ff.apply`": lambda strategy: strategy.check_transform(),
}


def cell(strategy, check):
    """Yes, or what to use instead, in the words of the strategy's own error."""
    try:
        check(strategy)
    except CapabilityError as error:
        return "no: " + re.search(r"Write (.*?)\.?$", str(error)).group(1).replace("\n", " ").replace("|", "or")
    return "yes"


def strategies_table():
    lines = ["| strategy | ranks | a rank holds | " + " | ".join(JOBS) + " | optimizers |"]
    lines.append("|---" * (len(JOBS) + 4) + "|")
    for name, make in MAKERS.items():
        strategy = make()
        ranks = "any" if strategy.max_ranks is None else str(strategy.max_ranks)
        holds = "all parameters" if strategy.shard is None else "a part of each"
        holds += ", a part of the optimizer's state" * strategy.shard_optimizer
        kinds = "any" if strategy.shard is None and not strategy.shard_optimizer else "those that work number by number"
        cells = [cell(strategy, check) for check in JOBS.values()]
        lines.append(f"| `{name}` | {ranks} | {holds} | {' | '.join(cells)} | {kinds} |")
    return lines


def precision_cell(name, accelerator):
    try:
        check_name(name, accelerator)
    except ConfigurationError:
        return "refused"
    return "yes" if accelerator == "cpu" else "yes, unverified"


def precisions_table():
    order = AUTO_ORDER[::-1]
    lines = ["| precision | " + " | ".join(f"`{accelerator}`" for accelerator in order) + " |", "|---" * 5 + "|"]
    for name in PRECISIONS:
        lines.append(f"| `{name}` | " + " | ".join(precision_cell(name, accelerator) for accelerator in order) + " |")
    for name, record in PACKAGED.items():  # tests/test_low_precision.py has their cells
        cells = ["refused" if one not in record.convert.runs_on else PACKAGE_CELL[one] for one in order]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return lines


PACKAGE_CELL = {"cpu": "yes, with its package", "cuda": "with its package, unverified"}


def page():
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    made = "\n".join([BEGIN, "", *strategies_table(), "", *precisions_table(), "", END])
    return before + made + after


def test_the_table_of_the_docs_is_that_of_the_records():
    assert PAGE.read_text() == page(), "run: python tests/test_capabilities.py"


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


def mean(net, x):
    return net(x).float().square().mean()


def jobs(rt):
    """Whether each job is done; where not, the error is a CapabilityError."""
    net = Two()
    model = ff.setup_model(rt, net)
    x = torch.ones(2, 4)

    def transform():
        return torch.func.vmap(lambda row: ff.apply(rt, model, row))(x)

    done = []
    for job in (
        lambda: ff.value_and_grad(rt, mean, allow_unused=True)(model, x),
        lambda: ff.accumulate(rt, mean, reduce="canonical", allow_unused=True)(model, [(x,), (x,)]),
        transform,
        lambda: ff.setup_optimizer(rt, model, torch.optim.LBFGS),
    ):
        try:
            job()
        except CapabilityError:
            done.append(False)
        else:
            done.append(True)
    whole = all(tuple(v.shape) == tuple(getattr(v, "_local_tensor", v).shape) for v in model.params.values())
    return [*done, whole]


ranks = world_of("threads", 2)


def size(strategy):
    return 2 if strategy.max_ranks is None else strategy.max_ranks


@pytest.mark.parametrize("name", HERE)
def test_every_cell_of_the_strategies_is_true(ranks, name):
    strategy = HERE[name]()
    said = [cell(strategy, check) == "yes" for check in JOBS.values()]
    whole = strategy.shard is None
    for found in ranks.run(jobs, strategy=strategy, world_size=size(strategy)):
        assert found == [*said, whole and not strategy.shard_optimizer, whole]
    if strategy.max_ranks is not None:
        with pytest.raises(ConfigurationError, match="serves at most"):
            ff.strategies.resolve(name, strategy.max_ranks + 1)


def step(rt):
    model = ff.setup_model(rt, nn.Sequential(nn.Linear(4, 4)))
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
    loss, grads = ff.value_and_grad(rt, mean)(model, torch.ones(2, 4))
    model, opt = ff.optimizer_step(rt, model, opt, grads)
    return opt.step, {value.dtype for value in model.params.values()}, bool(loss.isfinite())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", HERE)
def test_every_strategy_trains_in_every_precision_on_a_cpu(ranks, name, precision):
    strategy, record = HERE[name](), PRECISIONS[precision]
    for found in ranks.run(step, strategy=strategy, precision=record, world_size=size(strategy)):
        assert found == (1, {record.param_dtype}, True)


def test_every_strategy_is_held_by_some_test():
    for name, other in SAME.items():
        one, two = MAKERS[name](), MAKERS[other]()
        assert (one.name, one.max_ranks, one.forward) == (two.name, two.max_ranks, two.forward)
    assert PLANNED.keys() == NEED_MORE.keys()
    for file in ELSEWHERE.values():
        assert (Path(__file__).parent / file).exists()


if __name__ == "__main__":
    PAGE.write_text(page())
