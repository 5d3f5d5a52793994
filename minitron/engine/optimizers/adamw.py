"""AdamW (arXiv 1711.05101)."""

from __future__ import annotations

import torch
from torch import nn

from minitron.engine.optimizers import OptimizerConfig, parameter_groups


def build(root: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over a module; two moments for each weight."""
    groups = parameter_groups(root.parameters(), config.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True)
