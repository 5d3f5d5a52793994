"""One optimiser step."""

from __future__ import annotations

import torch
from torch import nn


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every group the same rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def clipped_step(optimizer: torch.optim.Optimizer, *, learning_rate: float, limit: float) -> torch.Tensor:
    """Clip by the global norm (``limit`` 0: not at all), update, clear the gradients. Returns the norm before clipping, 0-d."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else float("inf"))
    set_learning_rate(optimizer, learning_rate)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
