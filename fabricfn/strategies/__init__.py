"""The strategies, by name. One factory a file; to add one, write it and put it into `NAMES`."""

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fabricfn.errors import ConfigurationError
from fabricfn.strategies.ddp import ddp as ddp
from fabricfn.strategies.dp import dp as dp
from fabricfn.strategies.flat_buckets import flat as flat
from fabricfn.strategies.functional import functional as functional
from fabricfn.strategies.single import single as single
from fabricfn.strategies.xla import xla as xla
from fabricfn.strategies.xla_fsdp import xla_fsdp as xla_fsdp
from fabricfn.strategy import Strategy

if TYPE_CHECKING:
    from fabricfn.strategies.deepspeed_zero import deepspeed as deepspeed
    from fabricfn.strategies.flat_shards import flat_sharded as flat_sharded
    from fabricfn.strategies.pipeline_parallel import pipeline as pipeline
    from fabricfn.strategies.sharded import fsdp as fsdp
    from fabricfn.strategies.tensor_parallel import model_parallel as model_parallel

_LATE = {
    "fsdp": "fabricfn.strategies.sharded",
    "flat_sharded": "fabricfn.strategies.flat_shards",
    "deepspeed": "fabricfn.strategies.deepspeed_zero",
    "model_parallel": "fabricfn.strategies.tensor_parallel",
    "pipeline": "fabricfn.strategies.pipeline_parallel",
}
"""Not imported at the top: importing DTensor takes 0.7 s."""


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATE[name]), name)


def _late(name: str, **options: Any) -> Callable[[], Strategy]:
    """A strategy of `_LATE`, imported when it is wanted."""
    return lambda: __getattr__(name)(**options)


NAMES: dict[str, Callable[[], Strategy]] = {
    "single": single,
    "ddp": ddp,
    "functional": functional,
    "flat": flat,
    "fsdp": _late("fsdp"),
    "flat_sharded": _late("flat_sharded"),
}


PRESETS: dict[str, Callable[[], Strategy]] = {
    "dp": dp,
    **dict.fromkeys(("ddp_spawn", "ddp_fork", "ddp_notebook"), ddp),
    "ddp_find_unused_parameters_true": partial(ddp, find_unused_parameters=True),
    "fsdp_cpu_offload": _late("fsdp", cpu_offload=True),
}
"""Strategies with options, by the names that Fabric gave them."""

STARTS = {"ddp_spawn": "spawn", "ddp_fork": "fork", "ddp_notebook": "fork"}
"""The names that say by which method `launch` starts ranks. A script is run again, as for ddp."""

ACCELERATORS = {"xla": "xla", "xla_fsdp": "xla"}
"""The names that say on which accelerator; under all others `accelerator="auto"` takes what there is."""


_HOST = {"offload_optimizer": "cpu"}
EXTRAS: dict[str, Callable[[], Strategy]] = {
    "deepspeed": _late("deepspeed", stage=2),
    "deepspeed_stage_1": _late("deepspeed", stage=1),
    "deepspeed_stage_2": _late("deepspeed", stage=2),
    "deepspeed_stage_3": _late("deepspeed", stage=3),
    "deepspeed_stage_1_offload": _late("deepspeed", stage=1, **_HOST),
    "deepspeed_stage_2_offload": _late("deepspeed", stage=2, **_HOST),
    "deepspeed_stage_3_offload": _late("deepspeed", stage=3, **_HOST, offload_param="cpu"),
    "deepspeed_stage_3_offload_nvme": _late("deepspeed", stage=3, offload_optimizer="nvme", offload_param="nvme"),
    "xla": xla,
    "xla_fsdp": xla_fsdp,
}
"""Names whose packages are extras: known as the others are, but no law is checked over them unless they are named."""


NEED_MORE = {
    "model_parallel": 'a plan that says which layers are cut. Write strategy=ff.strategies.model_parallel({"*.up":'
    ' "colwise", "*.down": "rowwise"}, tensor_parallel=2)',
    "pipeline": "a list of stages. Write strategy="
    'ff.strategies.pipeline([["embed", "blocks.0"], ["blocks.1", "head"]])',
}
"""Names of strategies that are no use without an argument, and which one."""


def resolve(strategy: str | Strategy, world_size: int) -> Strategy:
    """The record that `init_runtime(strategy=...)` means.

    Args:
        strategy: a name of `NAMES` or `PRESETS`; "auto", which is `single` for one rank and `ddp` for more; a record,
            which is returned as it is; or "package.module:factory" for a function without arguments that returns one.
        world_size: the number of ranks that it must serve.

    Raises:
        ConfigurationError: the name is unknown (the message lists what there is), the factory cannot be imported or
            returns something else, or the strategy does not serve so many ranks.

    Example:
        >>> resolve("auto", 1).name, resolve("auto", 2).name
        ('single', 'ddp')
    """
    found = _named(strategy, world_size) if isinstance(strategy, str) else strategy
    if not isinstance(found, Strategy):  # pyright: ignore[reportUnnecessaryIsInstance]  # what users pass is unchecked
        raise ConfigurationError(
            f"strategy={strategy!r} is no Strategy record but a {type(found).__name__}. {_THERE_IS}"
        )
    if found.max_ranks is not None and world_size > found.max_ranks:
        raise ConfigurationError(
            f"strategy={found.name!r} serves at most {found.max_ranks} rank{'s' * (found.max_ranks > 1)}, but there are"
            f' {world_size}. Write strategy="ddp", or devices=1.'
        )
    return found


_THERE_IS = (
    f"There are {', '.join(map(repr, ('auto', *NAMES, *PRESETS, *EXTRAS, *NEED_MORE)))}, a Strategy record such as"
    ' ff.strategies.ddp(...), and "package.module:factory".'
)


def _named(name: str, world_size: int) -> Any:
    if name == "auto":
        return single() if world_size == 1 else ddp()
    known = NAMES | PRESETS | EXTRAS
    if name in known:
        return known[name]()
    if name in NEED_MORE:
        raise ConfigurationError(f"strategy={name!r} needs {NEED_MORE[name]}.")
    module, colon, factory = name.partition(":")
    if not colon:
        near = get_close_matches(name.lower(), ["auto", *known, *NEED_MORE], 1)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        raise ConfigurationError(f"strategy={name!r} is unknown.{hint} {_THERE_IS}")
    try:
        make: Any = getattr(import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"strategy={name!r} cannot be imported: {error}. {_THERE_IS}") from error
    return make()
