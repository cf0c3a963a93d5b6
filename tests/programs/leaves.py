"""Rank 1 leaves before the step that rank 0 makes."""

import torch

import fabricfn as ff

rt = ff.init_runtime(accelerator="cpu", devices=2, timeout=60)
model = ff.setup_model(rt, torch.nn.Linear(2, 2))
if rt.rank == 0:
    ff.value_and_grad(rt, lambda net, x: net(x).sum())(model, torch.ones(1, 2))
