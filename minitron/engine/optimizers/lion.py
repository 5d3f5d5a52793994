"""Lion (arXiv 2302.06675, algorithm 2): the sign of an interpolated momentum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from minitron.engine.optimizers import OptimizerConfig, going_on, local, parameter_groups


class Lion(torch.optim.Optimizer):
    """c = β₁m + (1 − β₁)g, w ← (1 − ηλ)w − η·sign(c), m ← β₂m + (1 − β₂)g. One moment for each weight.

    Every number moves by itself, so shards are updated where they lie. With the flag ``found_inf`` a step changes nothing.
    """

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            rate, (beta1, beta2) = group["lr"], group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                weight, gradient, momentum = (local(tensor) for tensor in (parameter, parameter.grad, state["momentum"]))
                go = going_on(self, weight.device)
                gradient = torch.where(go, gradient, 0.0)  # NaN times 0 is NaN
                direction = momentum.lerp(gradient, 1.0 - beta1).sign_()
                weight.mul_(torch.where(go, 1.0 - rate * group["weight_decay"], 1.0)).sub_(direction.mul_(torch.where(go, rate, 0.0)))
                momentum.lerp_(gradient, torch.where(go, 1.0 - beta2, 0.0))


def build(root: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Lion over a module. Its learning rate is a third to a tenth of AdamW's (section 5 of the paper)."""
    return Lion(parameter_groups(root.parameters(), config.weight_decay), betas=(config.beta1, config.beta2))
