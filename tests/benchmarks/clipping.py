"""What folding a clipping factor into AdamW's fused kernel would gain: `python -m tests.benchmarks.clipping`.

The figures of docs/decisions/0023-clipping-stays-a-function.md.
"""

from typing import Any

import torch

from tests.benchmarks.jobs import job
from tests.benchmarks.timing import interleaved

OPTIONS = dict.fromkeys(("amsgrad", "maximize"), False) | {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999}
OPTIONS |= {"weight_decay": 0.01, "eps": 1e-8}


def measure(kind: str, rounds: int) -> dict[str, float]:
    """Median seconds of CPU of one update of AdamW, and of the norm of its gradients."""
    kernels: Any = torch
    params = [param.detach() for param in job(kind).net.parameters()]
    grads, first, second = ([torch.rand_like(param) for param in params] for _ in range(3))
    steps, factor = [torch.ones(())] * len(params), torch.tensor(0.999)

    def update(gradients: list[torch.Tensor], **options: Any) -> None:
        kernels._fused_adamw_(params, gradients, first, second, [], steps, **OPTIONS, **options)

    def in_place() -> None:
        kernels._foreach_mul_(grads, factor)
        update(grads)

    contenders = {
        "multiply, update": lambda: update(kernels._foreach_mul(grads, factor)),
        "multiply in place, update": in_place,
        "update with grad_scale": lambda: update(grads, grad_scale=1 / factor),
        "update": lambda: update(grads),
        "norm": lambda: torch.linalg.vector_norm(torch.stack(kernels._foreach_norm(grads, 2.0))),
    }
    return interleaved(contenders, rounds, again=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for kind, rounds in (("4 layers", 1000), ("40 layers", 300), ("GPT", 20)):
        found = measure(kind, rounds)
        print(kind, {name: f"{seconds * 1e6:,.0f} us" for name, seconds in found.items()})
