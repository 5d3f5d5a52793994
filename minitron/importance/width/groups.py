"""Scores of weights put together over a unit's coupled group: every slice of every parameter that goes when the unit goes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from minitron.core.axes import LAYER_AXES, ParameterSpec
from minitron.models.family import Family


class CoupledGroups:
    """Sums within each matrix, then sum, max or product over the matrices of a unit's group (LLM-Pruner, arXiv 2305.11627, section 3.3).

    The product is given as the geometric mean, which ranks alike: the plain product of the 270 matrices that share a hidden channel of a
    30-layer Llama overflows float64. A kv group's matrices are its keys, its values, and those of its query heads, each summed over the heads.
    """

    def __init__(self, family: Family, how: str) -> None:
        self._family, self._how = family, how
        self._totals: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}

    def take(self, spec: ParameterSpec, elements: Callable[[], torch.Tensor]) -> None:
        """One parameter; ``elements`` makes its elements' scores, not negative, and is called only if it carries an axis."""
        axes = spec.axes() & {"hidden", *LAYER_AXES}
        if spec.buffer or not axes:
            return
        weight = elements()
        for axis in axes:
            name = axis if axis == "hidden" else f"{axis}.{spec.layer}"
            for values in sums_along(weight, spec, axis, self._family):
                self._join(name, values)
                if axis == "head":
                    self._join(f"kv_head.{spec.layer}", values.view(self._family.architecture.num_kv_heads, -1).sum(dim=1))

    def _join(self, name: str, values: torch.Tensor) -> None:
        values = values.log() if self._how == "product" else values
        known = self._totals.get(name)
        self._counts[name] = self._counts.get(name, 0) + 1
        if known is None:
            self._totals[name] = values
        else:
            self._totals[name] = torch.maximum(known, values) if self._how == "max" else known + values

    def scores(self) -> dict[str, torch.Tensor]:
        """One tensor per axis and layer."""
        if self._how != "product":
            return dict(self._totals)
        return {name: (total / self._counts[name]).exp() for name, total in self._totals.items()}


def sums_along(weight: torch.Tensor, spec: ParameterSpec, axis: str, family: Family) -> list[torch.Tensor]:
    """Σ of ``weight`` per unit of an axis in float64, one tensor for every dimension and segment that carries it: a fused matrix counts as several.

    [units], neurons of experts [experts, units].
    """
    shape = family.architecture
    found = []
    for position, dim in enumerate(spec.dims):
        kept = {0, position} if axis == "expert_ffn" else {position}
        others = [d for d in range(weight.ndim) if d not in kept]
        flat = weight.sum(dim=others, dtype=torch.float64) if others else weight.double()  # [(experts,) elements]
        offset = 0
        for segment in dim:
            size = segment.size(shape.size)
            if segment.axis == axis:
                found.append(flat[..., offset : offset + size].unflatten(-1, (-1, segment.width)).sum(dim=-1))
            offset += size
    return found
