"""One optimiser step, which changes nothing where its gradients are not finite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Step:
    """The norm of all gradients before clipping, 0-d, and of each parameter's, [parameters]; on the device and whole on every rank."""

    norm: torch.Tensor
    norms: torch.Tensor
    parameters: Sequence[nn.Parameter]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every group the same rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def clipped_step(optimizer: torch.optim.Optimizer, *, learning_rate: float, limit: float) -> Step:
    """Clip by the global norm (``limit`` 0: not at all), update, clear the gradients.

    A norm that is not finite makes the optimiser leave weights, moments and counts as they are: by a flag on the device, so that no host waits.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norms = _gradient_norms(parameters)
    norm = torch.linalg.vector_norm(norms)
    nn.utils.clip_grads_with_norm_(parameters, limit if limit > 0 else float("inf"), norm)
    set_learning_rate(optimizer, learning_rate)
    skip_if(optimizer, ~torch.isfinite(norm))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Step(norm, norms, parameters)


def skip_if(optimizer: torch.optim.Optimizer, bad: torch.Tensor) -> None:
    """Let the next steps of an optimiser do nothing where ``bad``, 0-d, is true. torch's fused updates know this flag of its gradient scaler."""
    optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
    optimizer.grad_scale = None  # type: ignore[attr-defined]


def first_bad(root: nn.Module, step: Step | None) -> str:
    """The first parameter whose gradient was not finite; empty when all were. Waits for the device."""
    if step is None:
        return ""
    finite = dict(zip(map(id, step.parameters), torch.isfinite(step.norms).tolist(), strict=True))
    return next((name for name, parameter in root.named_parameters() if not finite.get(id(parameter), True)), "")


def _gradient_norms(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """The norm of each gradient; of sharded ones over all ranks, in the one collective that their total would take."""
    if not parameters:
        return torch.zeros(0)
    gradients = [p.grad for p in parameters if p.grad is not None]
    stacked = torch.stack([norm.to(gradients[0].device) for norm in torch._foreach_norm(gradients)])
    return stacked.full_tensor() if isinstance(stacked, DTensor) else stacked
