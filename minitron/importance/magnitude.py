"""Weight magnitude: the data-free baseline (Li et al., arXiv 1608.08710)."""

from __future__ import annotations

import torch
from torch import nn

from minitron.core.axes import LAYER_AXES, ParameterSpec
from minitron.models.family import Family


class MagnitudeObserver:
    """Per unit: Σ |w| over its coupled group, that is over every parameter slice that carries the unit's axis."""

    needs_forward = False
    aggregation = "sum of absolute weights over the coupled group"

    def __init__(self, *, seed: int = 0) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    def attach(self, model: nn.Module, family: Family) -> None:
        """Read the weights once."""
        parameters = dict(model.named_parameters())
        for spec in family.layout.parameters:
            if spec.buffer:
                continue
            weight = parameters[spec.name].detach().double().abs()
            for axis in spec.axes() & {"hidden", *LAYER_AXES}:
                name = axis if axis == "hidden" else f"{axis}.{spec.layer}"
                sums = _sum_along(weight, spec, axis, family)
                self.sums[name] = self.sums[name] + sums if name in self.sums else sums

    def scores(self, family: Family, *, num_samples: int) -> dict[str, torch.Tensor]:
        """The sums; a kv group also counts its query heads."""
        result = dict(self.sums)
        for layer in family.layout.layers_with("head"):
            heads = result[f"head.{layer}"].view(family.architecture.num_kv_heads, -1).sum(dim=1)
            result[f"kv_head.{layer}"] = heads + result.get(f"kv_head.{layer}", torch.zeros_like(heads))
        return result


def _sum_along(weight: torch.Tensor, spec: ParameterSpec, axis: str, family: Family) -> torch.Tensor:
    """Σ of ``weight`` per unit of an axis, over all dimensions and segments that carry it. [units], neurons of experts [experts, units]."""
    shape = family.architecture
    per_expert = axis == "expert_ffn"
    total = torch.zeros(*([shape.num_experts] if per_expert else []), shape.size(axis), dtype=torch.float64, device=weight.device)
    for position, dim in enumerate(spec.dims):
        kept = {0, position} if per_expert else {position}
        others = [d for d in range(weight.ndim) if d not in kept]
        flat = weight.sum(dim=others) if others else weight  # [(experts,) elements]
        offset = 0
        for segment in dim:
            size = segment.size(shape.size)
            if segment.axis == axis:
                total += flat[..., offset : offset + size].unflatten(-1, (-1, segment.width)).sum(dim=-1)
            offset += size
    return total
