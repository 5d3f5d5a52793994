"""Gradient descent with momentum."""

from __future__ import annotations

import torch
from torch import nn

from minitron.engine.optimizers import OptimizerConfig, parameter_groups


def build(root: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """SGD whose momentum is ``beta1``; one moment for each weight. Its decay is part of the gradient, as torch has it."""
    groups = parameter_groups(root.parameters(), config.weight_decay)
    plain = all(type(p.data) is torch.Tensor for group in groups for p in group["params"])  # torch cannot fuse it over DTensors
    return torch.optim.SGD(groups, lr=0.0, momentum=config.beta1, fused=True if plain else None)
