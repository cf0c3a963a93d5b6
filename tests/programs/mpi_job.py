"""A program for mpirun: every rank says where it is, after a collective."""

import torch

import fabricfn as ff

rt = ff.init_runtime(accelerator="cpu", strategy="ddp")
total = ff.all_reduce(rt, torch.tensor([rt.rank + 1.0]), "sum")
print(f"rank {rt.rank} of {rt.world_size} on node {rt.node_rank} of {rt.num_nodes}: {total.item()}, {rt.environment}")
