"""Losses on logits: row functions that the chunked walk over the heads calls. One file a member, one row here."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import cast

from minitron.core.options import option
from minitron.core.protocols import RowLoss
from minitron.errors import ConfigError, nearest
from minitron.ops.kd_loss import WeightedRowLoss

#: Name → module and function. The conf file ``loss/<name>.yaml`` and the metric carry the same name.
LOSSES = {
    "forward_kl": "minitron.distill.losses.forward_kl:forward_kl",
    "cross_entropy": "minitron.distill.losses.cross_entropy:cross_entropy",
}


@dataclass(frozen=True)
class LossConfig:
    """Section ``loss``."""

    name: str = option("forward_kl", "the loss when no mixture is given")
    terms: dict[str, float] | None = option(None, "a mixture, name → weight, e.g. {forward_kl: 1.0, cross_entropy: 0.1}")
    temperature: float = option(1.0, "softens both distributions; divergences carry its square in value and gradient")


def build_losses(config: LossConfig) -> list[WeightedRowLoss]:
    """The weighted row losses of a section.

    Raises:
        ConfigError: an unknown name, a weight or temperature that is not positive, or weights that sum to nothing.
    """
    terms = config.terms if config.terms is not None else {config.name: 1.0}
    if config.temperature <= 0 or not math.isfinite(config.temperature):
        raise ConfigError(f"loss.temperature={config.temperature} must be positive")
    losses = []
    for name, weight in terms.items():
        if name not in LOSSES:
            raise ConfigError(f"loss '{name}' is unknown; {nearest(name, LOSSES)}")
        if not isinstance(weight, int | float) or weight < 0 or not math.isfinite(weight):
            raise ConfigError(f"loss.terms.{name}={weight} must be a number that is not negative")
        module, _, function = LOSSES[name].partition(":")
        losses.append(WeightedRowLoss(name, float(weight), cast(RowLoss, getattr(importlib.import_module(module), function))))
    if not sum(loss.weight for loss in losses) > 0:
        raise ConfigError(f"the weights in loss.terms={terms} sum to nothing")
    return losses
