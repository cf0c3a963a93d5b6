"""What one call of a public function costs, beside what one writes without it: microseconds of CPU on one process."""

import optree
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fabricfn as ff
from tests.benchmarks.jobs import job
from tests.benchmarks.loops import LEARNING_RATE
from tests.benchmarks.timing import interleaved


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """function -> {"by hand": seconds, "fabricfn": seconds}, for 4 layers of `Linear(32, 32)`."""
    torch.set_num_threads(1)
    work = job("4 layers")
    net, (x, y) = job("4 layers").net, work.batch
    params = list(net.parameters())
    fused = torch.optim.AdamW(params, lr=LEARNING_RATE, fused=True)
    rt = ff.init_runtime(accelerator="cpu", devices=1)
    state = [ff.setup_model(rt, work.net)]
    state.append(ff.setup_optimizer(rt, state[0], torch.optim.AdamW, lr=LEARNING_RATE))
    grad_fn, several = ff.value_and_grad(rt, work.loss_fn), ff.accumulate(rt, work.loss_fn)
    value_fn = ff.value(rt, work.loss_fn)
    _, grads = grad_fn(state[0], x, y)
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    average = [ff.tree_map(torch.clone, state[0])]
    batch = {"x": x, "y": [y, y]}
    key = ff.key(0)

    def backward(times: int = 1) -> None:
        for param in params:
            param.grad = None
        for _ in range(times):
            loss = work.loss_fn(net, x, y)
            (loss / times if times > 1 else loss).backward()

    def without_gradients() -> None:
        with torch.no_grad():
            work.loss_fn(net, x, y)

    def forward() -> None:
        with torch.no_grad():
            net(x)

    def donated() -> None:
        state[:] = ff.optimizer_step(rt, *state, grad_fn(state[0], x, y)[1], donate=True)

    def ema() -> None:
        average[:] = [ff.ema(average[0], state[0], 0.999, donate=True)]

    def hand_step() -> None:
        backward()
        fused.step()

    pairs = {
        "value_and_grad": (backward, lambda: grad_fn(state[0], x, y)),
        "value_and_grad, optimizer_step(donate=True)": (hand_step, donated),
        "value_and_grad, optimizer_step": (
            hand_step,
            lambda: ff.optimizer_step(rt, *state, grad_fn(state[0], x, y)[1]),
        ),
        "accumulate, 4 micro-batches": (lambda: backward(4), lambda: several(state[0], [(x, y)] * 4)),
        "value": (without_gradients, lambda: value_fn(state[0], x, y)),
        "apply": (forward, lambda: ff.apply(rt, state[0], x)),
        "clip_gradients(max_norm=1.0)": (
            lambda: nn.utils.clip_grad_norm_(params, 1.0),
            lambda: ff.clip_gradients(rt, grads, max_norm=1.0),
        ),
        "ema(donate=True)": (lambda: averaged.update_parameters(net), ema),
        "to_device": (lambda: optree.tree_map(lambda t: t.to("cpu"), batch), lambda: ff.to_device(rt, batch)),
        "all_reduce": (lambda: None, lambda: ff.all_reduce(rt, batch)),
        "fold_in": (lambda: None, lambda: ff.fold_in(key, 3)),
        "log, without a logger": (lambda: None, lambda: ff.log(rt, "loss", 0.5)),
    }
    return {
        name: interleaved({"by hand": hand, "fabricfn": ours}, rounds, warmup=20, again=True)
        for name, (hand, ours) in pairs.items()
    }
