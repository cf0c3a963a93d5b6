"""What one call of a public function costs, beside what one writes without it: microseconds of CPU on one process."""

from collections.abc import Callable

import optree
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fabricfn as ff
from tests.benchmarks.jobs import Job, job
from tests.benchmarks.loops import LEARNING_RATE
from tests.benchmarks.timing import interleaved

Call = Callable[[], object]


def by_hand(work: Job) -> dict[str, Call]:
    """What one writes without fabricfn, by the name of the function that it stands for."""
    net, (x, y) = work.net, work.batch
    params = list(net.parameters())
    fused = torch.optim.AdamW(params, lr=LEARNING_RATE, fused=True)
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    batch = {"x": x, "y": [y, y]}

    def backward(times: int = 1) -> None:
        for param in params:
            param.grad = None
        for _ in range(times):
            loss = work.loss_fn(net, x, y)
            (loss / times if times > 1 else loss).backward()

    def step() -> None:
        backward()
        fused.step()

    return {
        "value_and_grad": backward,
        "value_and_grad, optimizer_step(donate=True)": step,
        "value_and_grad, optimizer_step": step,
        "accumulate, 4 micro-batches": lambda: backward(4),
        "value": torch.no_grad()(lambda: work.loss_fn(net, x, y)),
        "apply": torch.no_grad()(lambda: net(x)),
        "clip_gradients(max_norm=1.0)": lambda: nn.utils.clip_grad_norm_(params, 1.0),
        "ema(donate=True)": lambda: averaged.update_parameters(net),
        "to_device": lambda: optree.tree_map(lambda tensor: tensor.to("cpu"), batch),
    }


def with_fabricfn(work: Job) -> dict[str, Call]:
    """The functions that stand in a loop, by name."""
    x, y = work.batch
    rt = ff.init_runtime(accelerator="cpu", devices=1)
    model = ff.setup_model(rt, work.net)
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=LEARNING_RATE)
    grad_fn, several, value_fn = (make(rt, work.loss_fn) for make in (ff.value_and_grad, ff.accumulate, ff.value))
    _, grads = grad_fn(model, x, y)
    batch, key = {"x": x, "y": [y, y]}, ff.key(0)
    schedule = ff.schedule_from_torch(torch.optim.lr_scheduler.CosineAnnealingLR, LEARNING_RATE, T_max=1000)
    meter, stopper, guard = ff.Throughput(), ff.EarlyStopping(), ff.SpikeGuard()
    # what is given away at every call
    ours, theirs = ff.tree_map(torch.clone, (model, opt)), [ff.tree_map(torch.clone, model)]

    def donated() -> None:
        nonlocal ours
        ours = ff.optimizer_step(rt, *ours, grad_fn(ours[0], x, y)[1], donate=True)

    def average() -> None:
        theirs[:] = [ff.ema(theirs[0], model, 0.999, donate=True)]

    return {
        "value_and_grad": lambda: grad_fn(model, x, y),
        "value_and_grad, optimizer_step(donate=True)": donated,
        "value_and_grad, optimizer_step": lambda: ff.optimizer_step(rt, model, opt, grad_fn(model, x, y)[1]),
        "accumulate, 4 micro-batches": lambda: several(model, [(x, y)] * 4),
        "value": lambda: value_fn(model, x, y),
        "apply": lambda: ff.apply(rt, model, x),
        "clip_gradients(max_norm=1.0)": lambda: ff.clip_gradients(rt, grads, max_norm=1.0),
        "ema(donate=True)": average,
        "to_device": lambda: ff.to_device(rt, batch),
        "ema": lambda: ff.ema(theirs[0], model, 0.999),
        "tree_map(torch.clone)": lambda: ff.tree_map(torch.clone, model),
        "map_params(torch.clone)": lambda: ff.map_params(torch.clone, model),
        "eval_mode": lambda: ff.eval_mode(model),
        "gather_params": lambda: ff.gather_params(rt, model),
        "all_reduce": lambda: ff.all_reduce(rt, batch),
        "broadcast": lambda: ff.broadcast(rt, batch),
        "barrier": lambda: ff.barrier(rt),
        "key": lambda: ff.key(3),
        "fold_in": lambda: ff.fold_in(key, 3),
        "split": lambda: ff.split(key, 2),
        "schedule_from_torch, a value": lambda: schedule(500),
        "throughput": lambda: ff.throughput(meter, samples=8),
        "rates": lambda: ff.rates(rt, meter),
        "early_stopping": lambda: ff.early_stopping(rt, stopper, 0.5),
        "spike_guard": lambda: ff.spike_guard(rt, guard, 0.5, model),
        "should_stop": lambda: ff.should_stop(rt),
        "log, without a logger": lambda: ff.log(rt, "loss", 0.5),
        "call, without a callback": lambda: ff.call(rt, "on_step", 1),
    }


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """function -> {"by hand": seconds, "fabricfn": seconds}, for 4 layers of `Linear(32, 32)`."""
    torch.set_num_threads(1)
    hand, ours = by_hand(job("4 layers")), with_fabricfn(job("4 layers"))
    pairs = {
        name: {"by hand": hand[name], "fabricfn": call} if name in hand else {"fabricfn": call}
        for name, call in ours.items()
    }
    return {name: interleaved(pair, rounds, warmup=20, again=True) for name, pair in pairs.items()}
