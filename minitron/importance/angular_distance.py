"""Angular distance (Gromov et al., arXiv 2403.17887, section 3.2): the angle by which layers turn the residual stream."""

from __future__ import annotations

import torch
from torch import nn

from minitron.importance.block_influence import StreamCosines
from minitron.importance.depth.config import DepthConfig
from minitron.importance.shared.forward import Forward
from minitron.models.family import Family


class AngularDistanceObserver:
    """Per layer, and per run of layers: mean over tokens of arccos(cos(its input, its output)) / pi.

    The paper averages over the last tokens of its samples; here every token counts, as in block influence.
    """

    needs_forward = True
    aggregation = "mean angle over tokens / pi"

    def __init__(self, config: DepthConfig | None = None, *, seed: int = 0) -> None:
        self._cosines = StreamCosines(config, lambda cosine: torch.arccos(cosine.clamp(-1.0, 1.0)) / torch.pi)
        self.sums = self._cosines.sums

    def attach(self, model: nn.Module, family: Family, forward: Forward) -> None:
        """Hook every block."""
        self._cosines.attach(model, family, forward)

    def scores(self, family: Family, *, num_samples: int) -> dict[str, torch.Tensor]:
        """``layer`` [layers] and ``layer_window.<n>`` [layers - n + 1]."""
        return self._cosines.means()
