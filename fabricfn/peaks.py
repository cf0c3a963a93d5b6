"""Floating-point operations: how many a function makes, and how many a device could."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fabricfn.runtimes import Runtime

# 1e12 operations a second: (float64, float32, float32 as TF32, bfloat16, float16), as the makers' data sheets have them
# for dense matrices (their headlines with sparsity are twice that) and sums in float32; 0 where there is no such mode.
# Matrix units count, as they are what a matmul uses. A name without a form (SXM, PCIe) is that of the fastest one.
PEAKS: dict[str, tuple[float, float, float, float, float]] = {
    "gb200": (40, 80, 1250, 2500, 2500),
    "b200": (37, 75, 1100, 2250, 2250),
    "gh200": (67, 67, 494.5, 989.5, 989.5),
    "h200": (67, 67, 494.5, 989.5, 989.5),
    "h200 nvl": (60, 60, 417.5, 835.5, 835.5),
    "h100": (67, 67, 494.5, 989.5, 989.5),
    "h100 nvl": (60, 60, 417.5, 835.5, 835.5),
    "h100 pcie": (51.2, 51.2, 378, 756, 756),
    "a100": (19.5, 19.5, 156, 312, 312),
    "a40": (0.58, 37.4, 74.8, 149.7, 149.7),
    "a30": (10.3, 10.3, 82, 165, 165),
    "a10": (0.49, 31.2, 62.5, 125, 125),
    "a10g": (0.49, 31.5, 35, 70, 70),
    "a6000": (0.6, 38.7, 77.4, 154.8, 154.8),
    "6000 ada": (1.4, 91.1, 182.1, 364.2, 364.2),
    "l40s": (1.4, 91.6, 183, 362, 362),
    "l40": (1.4, 90.5, 90.5, 181, 181),
    "l4": (0.47, 30.3, 60, 121, 121),
    "5090": (1.6, 104.8, 104.8, 209.5, 209.5),
    "4090": (1.3, 82.6, 82.6, 165.2, 165.2),
    "4080 super": (0.8, 52.2, 52.2, 104.4, 104.4),
    "4080": (0.76, 48.7, 48.7, 97.5, 97.5),
    "3090 ti": (0.63, 40, 40, 80, 80),
    "3090": (0.56, 35.6, 35.6, 71, 71),
    "3080 ti": (0.53, 34.1, 34.1, 68.2, 68.2),
    "3080": (0.47, 29.8, 29.8, 59.5, 59.5),
    "3070": (0.32, 20.3, 20.3, 40.6, 40.6),
    "titan rtx": (0.51, 16.3, 0, 0, 130.5),
    "quadro rtx 5000": (0.35, 11.2, 0, 0, 89.2),
    "2080 ti": (0.42, 13.4, 0, 0, 53.8),
    "t4": (0.25, 8.1, 0, 0, 65),
    "v100": (7.8, 15.7, 0, 0, 125),
    "v100 pcie": (7, 14, 0, 0, 112),
    "v100s": (8.2, 16.4, 0, 0, 130),
    "mi300x": (163.4, 163.4, 653.7, 1307.4, 1307.4),
    "tpu v2": (0, 45, 0, 45, 0),  # TPUs multiply float32 as bfloat16
    "tpu v3": (0, 123, 0, 123, 0),
    "tpu v4": (0, 275, 0, 275, 0),
    "tpu v5e": (0, 197, 0, 197, 0),
    "tpu v5litepod": (0, 197, 0, 197, 0),
    "tpu v5p": (0, 459, 0, 459, 0),
    "tpu v6e": (0, 918, 0, 918, 0),
}
COLUMNS = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 3, torch.float16: 4}
TF32 = 2
SLOWER = {"laptop", "mobile", "max", "mig"}
"""Words of names whose devices do less than those that the table has under the rest of the name."""


def measure_flops(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """How many floating-point operations a call makes on this rank, by torch's `FlopCounterMode`: the function is run.

    Products count (matrices, convolutions, attention; a multiply-add is 2), the rest is left out. Under a sharding
    strategy or one with several ranks every rank must call it, as the function is collective there.

    Args:
        function: as `loss_fn`, or what `value_and_grad` returned: then the backward pass counts, too. Tensors on the
            meta device will do where it does: nothing is computed then.
        args, kwargs: its arguments.

    Returns:
        The number.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> model = ff.setup_model(rt, torch.nn.Linear(8, 4, bias=False))
        >>> ff.measure_flops(ff.value_and_grad(rt, lambda net, x: net(x).sum()), model, torch.zeros(2, 8))
        256
    """
    with FlopCounterMode(display=False) as counter:
        function(*args, **kwargs)
    return int(counter.get_total_flops())


def available_flops(rt: Runtime, *, name: str | None = None, dtype: torch.dtype | None = None) -> float | None:
    """How many floating-point operations a second the device could make at best, from its maker's data sheet.

    Args:
        rt: the runtime. Not collective.
        name: of another device: "NVIDIA H100 PCIe", "TPU v5e".
        dtype: of the products; None is `rt.precision.compute_dtype`. float32 means TF32 where the device has it and
            `torch.get_float32_matmul_precision()` is not "highest".

    Returns:
        A number for dense products, or None: always on a CPU, and with a warning for a device or a dtype that is not in
        the table. Then there is no "device/mfu", unless you pass `ff.rates(..., available_flops=...)` a number.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> ff.available_flops(rt), ff.available_flops(rt, name="NVIDIA A100-SXM4-80GB", dtype=torch.bfloat16)
        (None, 312000000000000.0)
    """
    if name is None and rt.device.type == "cpu":
        return None
    if name is None:
        name = torch.cuda.get_device_name(rt.device) if rt.device.type == "cuda" else rt.device.type
    dtype = rt.precision.compute_dtype if dtype is None else dtype
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    fitting = [] if words & SLOWER else [key for key in PEAKS if words.issuperset(key.split())]
    row = PEAKS[max(fitting, key=len)] if fitting else (0,) * 5
    peak = row[COLUMNS[dtype]] if dtype in COLUMNS else 0
    if dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest":
        peak = row[TF32] or peak
    if peak:
        return peak * 1e12
    if rt.global_rank == 0:
        text = f"ff.available_flops: the peak of {name!r} in {dtype} is not known. Pass yours to ff.rates."
        warnings.warn(text, stacklevel=2)
    return None
