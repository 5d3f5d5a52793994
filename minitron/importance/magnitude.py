"""Weight magnitude: the data-free baseline (Li et al., arXiv 1608.08710)."""

from __future__ import annotations

import torch
from torch import nn

from minitron.importance.shared.forward import Forward
from minitron.importance.width.config import ImportanceConfig
from minitron.importance.width.groups import CoupledGroups
from minitron.models.family import Family


class MagnitudeObserver:
    """Per unit: Σ |w| in every matrix of its coupled group, put together by sum, max or product."""

    needs_forward = False
    reads_weights = True

    def __init__(self, config: ImportanceConfig | None = None, *, seed: int = 0) -> None:
        self._group = (config or ImportanceConfig()).group
        self.aggregation = f"sum of absolute weights in each matrix, group={self._group}"
        self.sums: dict[str, torch.Tensor] = {}

    def attach(self, model: nn.Module, family: Family, forward: Forward) -> None:
        """Read the weights once."""
        parameters, groups = dict(model.named_parameters()), CoupledGroups(family, self._group)
        for spec in family.layout.parameters:
            groups.take(spec, lambda: parameters[spec.name].detach().abs())  # noqa: B023 - called at once
        self.sums = groups.scores()

    def scores(self, family: Family, *, num_samples: int) -> dict[str, torch.Tensor]:
        """What was read."""
        return dict(self.sums)
