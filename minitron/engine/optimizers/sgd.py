"""Gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from minitron.engine.optimizers import OptimizerConfig, going_on, local, parameter_groups


class Sgd(torch.optim.Optimizer):
    """g ← g + λw, m ← μm + g, w ← w − ηm, as torch has it: decay is part of the gradient. One moment for each weight.

    torch's own fused form cannot read shards, and forgets to begin its momentum when the first step is skipped. With the flag ``found_inf`` a step
    changes nothing.
    """

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float) -> None:
        super().__init__(groups, {"lr": 0.0, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                weight, gradient, buffer = (local(tensor) for tensor in (parameter, parameter.grad, state["momentum_buffer"]))
                go = going_on(self, weight.device)
                gradient = torch.where(go, gradient, 0.0)  # NaN times 0 is NaN
                if group["weight_decay"]:
                    gradient = gradient + weight * torch.where(go, group["weight_decay"], 0.0)
                buffer.mul_(torch.where(go, group["momentum"], 1.0)).add_(gradient)
                weight.sub_(buffer * torch.where(go, group["lr"], 0.0))


def build(root: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """SGD whose momentum is ``beta1``."""
    return Sgd(parameter_groups(root.parameters(), config.weight_decay), momentum=config.beta1)
