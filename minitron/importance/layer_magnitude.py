"""Magnitude of a layer's weights (Shortened LLaMA, arXiv 2402.02834, section 2.2): the control that the other depth metrics must beat."""

from __future__ import annotations

import torch
from torch import nn

from minitron import dist
from minitron.importance.depth.config import DepthConfig
from minitron.importance.shared.forward import Forward
from minitron.models.family import Family


class LayerMagnitudeObserver:
    """Per layer: Σ |w| over all its weights, norms included. Early layers are small without being useless: see ``depth=layer_magnitude_plus``."""

    needs_forward = False
    reads_weights = True
    aggregation = "sum of absolute weights of the layer"

    def __init__(self, config: DepthConfig | None = None, *, seed: int = 0) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    def attach(self, model: nn.Module, family: Family, forward: Forward) -> None:
        """Read the weights once."""
        parameters = dict(model.named_parameters())
        sums = torch.zeros(family.architecture.num_layers, dtype=torch.float64, device=dist.device())
        for spec in family.layout.parameters:
            if spec.layer is not None and not spec.buffer:
                sums[spec.layer] += torch.linalg.vector_norm(parameters[spec.name].detach(), ord=1, dtype=torch.float64).to(sums.device)
        self.sums = {"magnitude": sums}

    def scores(self, family: Family, *, num_samples: int) -> dict[str, torch.Tensor]:
        """One score per layer."""
        return {"layer": self.sums["magnitude"]}
