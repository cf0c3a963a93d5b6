"""DeepSpeed's configuration: what the user gives, checked, and what fabricfn settles."""

import json
import os
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch

from fabricfn.errors import CapabilityError, ConfigurationError
from fabricfn.precision import Precision
from fabricfn.world import World

Offload = Literal["cpu", "nvme"] | None
OFFLOADS = ("cpu",)

_OURS = {
    "train_batch_size": "DataLoader(batch_size=...) with ff.setup_dataloader",
    "train_micro_batch_size_per_gpu": "DataLoader(batch_size=...) with ff.setup_dataloader",
    "gradient_accumulation_steps": "ff.accumulate(rt, loss_fn)",
    "gradient_clipping": "grads, norm = ff.clip_gradients(rt, grads, max_norm=...)",
    "optimizer": "ff.setup_optimizer(rt, model, torch.optim.AdamW, ...)",
    "scheduler": "ff.schedule_from_torch(...)",
    "fp16": 'ff.init_runtime(precision="16-mixed")',
    "bf16": 'ff.init_runtime(precision="bf16-mixed")',
    "amp": 'ff.init_runtime(precision="16-mixed")',
    "torch_autocast": 'ff.init_runtime(precision="bf16-mixed")',
}
"""What fabricfn decides, and where it is said."""


def read_config(
    config: Mapping[str, Any] | str | os.PathLike[str] | None,
    stage: int | None,
    offload_optimizer: Offload,
    offload_param: Offload,
) -> tuple[dict[str, Any], int]:
    """(the user's configuration with the options in it, the stage), checked.

    Raises:
        CapabilityError: offloading to NVMe.
        ConfigurationError: a file that is no JSON object; a key that fabricfn decides; an unknown stage or offload.
    """
    given = dict(_opened(config))
    ours = [key for key, value in given.items() if key in _OURS and value not in (None, "auto")]
    if ours:
        instead = "; ".join(f"{key}: write {_OURS[key]}" for key in ours)
        raise ConfigurationError(
            f"the DeepSpeed configuration decides {', '.join(ours)}, which fabricfn does. Leave them out. {instead}."
        )
    for key in _OURS:
        given.pop(key, None)
    zero: dict[str, Any] = dict(given.get("zero_optimization") or {})
    said = zero.get("stage")
    if stage is not None and said not in (None, stage):
        raise ConfigurationError(f"deepspeed(stage={stage}) differs from the stage of its configuration, {said}.")
    chosen = stage if stage is not None else said if said is not None else 2
    if type(chosen) is not int or chosen not in range(4):
        raise ConfigurationError(f"deepspeed(stage={chosen!r}): there are 0, 1, 2 and 3.")
    zero["stage"] = chosen
    for key, wanted, least in (("offload_optimizer", offload_optimizer, 1), ("offload_param", offload_param, 3)):
        _offload(zero, key, wanted, least)
    return {**given, "zero_optimization": zero}, chosen


def _opened(config: Mapping[str, Any] | str | os.PathLike[str] | None) -> Mapping[str, Any]:
    if config is None or isinstance(config, Mapping):
        return config or {}
    try:
        with open(config, encoding="utf-8") as file:
            loaded = json.load(file)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"deepspeed(config={os.fspath(config)!r}) cannot be read as JSON: {error}. Pass a mapping or a JSON file."
        ) from error
    if not isinstance(loaded, dict):
        raise ConfigurationError(f"deepspeed(config={os.fspath(config)!r}) holds no JSON object.")
    return cast("dict[str, Any]", loaded)


def _offload(zero: dict[str, Any], key: str, wanted: Any, least: int) -> None:
    """Put one offload into the ZeRO part, checked."""
    own: dict[str, Any] = dict(zero.get(key) or {})
    device = wanted if wanted is not None else own.get("device", "none")
    if device == "nvme":
        raise CapabilityError(
            f"deepspeed({key}=\"nvme\"): the values and the optimizer's state are records in memory, which DeepSpeed's"
            f' swapping to disks does not see. Write {key}="cpu", or strategy="deepspeed_stage_3_offload".'
        )
    if device not in ("none", *OFFLOADS):
        raise ConfigurationError(f'deepspeed({key}={device!r}): there are None and "cpu".')
    if device in OFFLOADS and zero["stage"] < least:
        raise ConfigurationError(
            f'deepspeed({key}="cpu") needs stage {least} or higher, and this is stage {zero["stage"]}. Write'
            f' ff.strategies.deepspeed(stage=3, {key}="cpu").'
        )
    zero.pop(key, None)
    if device in OFFLOADS:
        zero[key] = {**own, "device": device}


def settled_config(given: dict[str, Any], precision: Precision, world: World) -> dict[str, Any]:
    """The whole configuration of an engine."""
    low = precision.compute_dtype is torch.bfloat16 and given["zero_optimization"]["stage"] > 0
    config: dict[str, Any] = {
        **given,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": low},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    if precision.reduce_dtype is not None:
        config["communication_data_type"] = names[precision.reduce_dtype]
    return config
