"""Muon (Jordan et al. 2024; scaled as in arXiv 2502.16982): momentum made orthogonal for the matrices of the blocks, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from minitron.engine.optimizers import OptimizerConfig, going_on, local, parameter_groups

#: Coefficients of the quintic Newton-Schulz step and the number of steps, from Jordan et al.: singular values end between 0.7 and 1.2.
_QUINTIC, _NUM_STEPS = (3.4445, -4.7750, 2.0315), 5
#: The root mean square of AdamW's updates, which the orthogonal update is scaled to, so that one learning rate suits both (2502.16982, section 2.2).
_UPDATE_RMS = 0.2


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """A [..., rows, columns] matrix with its singular values brought near 1; products in bf16 on GPUs, as in the original, else in float32."""
    a, b, c = _QUINTIC
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x.bfloat16() if x.is_cuda else x.float()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_NUM_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(torch.optim.AdamW):
    """AdamW whose groups with ``orthogonal`` take Muon's step instead: Nesterov momentum β₁, orthogonal, times 0.2·√max(rows, columns).

    A sharded momentum is gathered for its update, one matrix at a time, and every rank makes the whole of it orthogonal: the communication of one
    more gather of the weights a step, and arithmetic that more ranks do not share. With the flag ``found_inf`` a step changes nothing.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient; gradients of orthogonal groups are used up. In groups that are ``sparse`` zeros stay zero."""
        for group in self.param_groups:
            for parameter in group["params"] if group["orthogonal"] else ():
                if parameter.grad is not None:
                    self._orthogonal_step(parameter, group)
                    parameter.grad = None  # AdamW passes over what has none
        super().step()

    def _orthogonal_step(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state, momentum = self.state[parameter], group["betas"][0]
        assert parameter.grad is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        go = going_on(self, local(parameter).device)
        gradient = local(parameter.grad)
        gradient.copy_(torch.where(go, gradient, 0.0))  # NaN times 0 is NaN
        local(state["momentum"]).mul_(torch.where(go, momentum, 1.0)).add_(gradient)
        wanted = parameter.grad + momentum * state["momentum"]
        whole = wanted.full_tensor() if isinstance(wanted, DTensor) else wanted
        update = orthogonalized(whole) * (_UPDATE_RMS * max(whole.shape[-2:]) ** 0.5)
        if isinstance(parameter, DTensor):
            # Every rank has the same whole; cutting its own part out of it needs no communication.
            update = distribute_tensor(update, parameter.device_mesh, parameter.placements, src_data_rank=None)
        mine = local(update)
        if group["sparse"]:  # the orthogonal update is dense, whatever the gradient
            mine = mine.masked_fill(local(parameter) == 0, 0.0)
        rate, decay = group["lr"], 1.0 - group["lr"] * group["weight_decay"]
        local(parameter).mul_(torch.where(go, decay, 1.0)).sub_(mine * torch.where(go, rate, 0.0))


def build(root: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Muon for matrices without a vocabulary dimension, AdamW for embedding, head and vectors."""
    vocabularies = {module.num_embeddings for module in root.modules() if isinstance(module, nn.Embedding)}
    trainable = [p for p in root.parameters() if p.requires_grad]
    hidden = [p for p in trainable if p.ndim >= 2 and vocabularies.isdisjoint(p.shape)]
    chosen = {id(p) for p in hidden}
    groups = [{**group, "orthogonal": False} for group in parameter_groups([p for p in trainable if id(p) not in chosen], config.weight_decay)]
    sparse = {id(parameter) for module in root.modules() for parameter in getattr(module, "kept_parameters", ())}
    for of_sparse in (False, True):
        alike = [p for p in hidden if (id(p) in sparse) == of_sparse]
        groups.insert(0, {"params": alike, "weight_decay": config.weight_decay, "orthogonal": True, "sparse": of_sparse})
    return Muon([group for group in groups if group["params"]], lr=0.0, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True)
