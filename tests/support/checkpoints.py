"""What the tests of checkpoints share: equality to the bit, something trained to save, a folder's bytes, damage."""

import dataclasses
import struct
import types
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import fabricfn as ff


def bits(value):
    """A value such that equality means the same bits, classes, structure and order."""
    if isinstance(value, torch.Tensor):
        data = value.detach().resolve_conj().resolve_neg().contiguous()
        row = data.as_strided((data.numel(),), (1,)).view(torch.uint8).tolist()
        return type(value), value.dtype, value.shape, value.requires_grad, row
    if isinstance(value, np.ndarray | np.generic):
        return type(value), str(value.dtype), value.shape, np.asarray(value).tobytes()
    if isinstance(value, float):
        return struct.pack("d", value)
    if isinstance(value, dict | types.MappingProxyType):
        return type(value), [(key, bits(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [bits(item) for item in value]
    if isinstance(value, ff.Model):
        return bits(value.params), bits(value.buffers), value.training
    if isinstance(value, ff.Optimizer):
        return bits(value.state), bits(value.shared), bits(value.hyperparams), value.step
    if dataclasses.is_dataclass(value):
        return type(value), [bits(getattr(value, field.name)) for field in dataclasses.fields(value)]
    return type(value), value


def loss_fn(net, x, y):
    return F.mse_loss(net(x), y)


def trained(rt, optimizer=torch.optim.AdamW, steps=2, state=None, donate=False, **hyperparams):
    """(model, opt) after `steps` more steps, on data that depends on the step alone."""
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for i, param in enumerate(module.parameters()):
            param.copy_(torch.linspace(-1, 1, param.numel(), dtype=param.dtype).reshape(param.shape) * (i + 1))
    if state is None:
        model = ff.setup_model(rt, module)
        state = model, ff.setup_optimizer(rt, model, optimizer, **{"lr": 0.1, **hyperparams})
    model, opt = state
    grad_fn = ff.value_and_grad(rt, loss_fn)
    for _ in range(steps):
        data = torch.linspace(-1, 1, 30, dtype=rt.precision.param_dtype).reshape(6, 5) * (opt.step + 1)
        _, grads = grad_fn(model, data[:, :3], data[:, 3:])
        model, opt = ff.optimizer_step(rt, model, opt, grads, donate=donate)
    return model, opt


def folder_of(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(Path(path).rglob("*")) if p.is_file()}


def common(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "tensors": [torch.randn(size, 3, generator=generator) for size in (7, 1, 0, 50, 9)],
        "ints": torch.arange(5),
        "epoch": seed,
    }


def save_common(rt, path, seed):
    return ff.save(rt, path, common(seed))


def damage(path, position, mask=1):
    data = bytearray(Path(path).read_bytes())
    data[position] ^= mask
    Path(path).write_bytes(data)
