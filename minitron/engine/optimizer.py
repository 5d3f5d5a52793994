"""The optimiser and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW's settings; the learning rate is given anew at every step."""

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    gradient_clipping: float = 1.0


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay, vectors (norms, biases) without."""
    trainable = [p for _, p in named_parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_adamw(root: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over a module, fused on GPUs and for plain CPU tensors."""
    groups = parameter_groups(root.named_parameters(), config.weight_decay)
    plain = all(type(p.data) is torch.Tensor for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True if plain else None)


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


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step: linear warm-up, then ``cosine``, ``linear`` or ``constant`` down to ``minimum``."""

    peak: float
    minimum: float
    num_warmup_steps: int
    num_steps: int
    shape: str = "cosine"

    def at(self, step: int) -> float:
        """The rate of optimiser step ``step``, counted from 0."""
        if step < self.num_warmup_steps:
            return self.peak * (step + 1) / self.num_warmup_steps
        if self.shape == "constant":
            return self.peak
        span = max(1, self.num_steps - self.num_warmup_steps)
        progress = min(1.0, (step - self.num_warmup_steps) / span)
        fraction = 0.5 * (1.0 + math.cos(math.pi * progress)) if self.shape == "cosine" else 1.0 - progress
        return self.minimum + (self.peak - self.minimum) * fraction
