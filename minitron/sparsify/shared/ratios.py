"""A ratio for every layer: OWL (Yin et al., arXiv 2310.05175), which keeps more where more weights are outliers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from minitron.core.sparsity import Pattern
from minitron.errors import ConfigError
from minitron.sparsify.shared.config import SparsifyConfig


def outlier_share(scored: Iterable[tuple[torch.Tensor, torch.Tensor]], threshold: float) -> float:
    """The share of a layer's weights whose score |W| · ‖X‖ is above ``threshold`` times the mean over all its matrices.

    ``scored`` has each matrix [out, in] float32 and the squares of its inputs' norms [in].
    """
    scores = [weight.abs() * squares.sqrt().float() for weight, squares in scored]
    count = sum(score.numel() for score in scores)
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
    return sum(int((score > threshold * mean).sum()) for score in scores) / count


def layer_patterns(outliers: Sequence[float], config: SparsifyConfig) -> list[Pattern]:
    """The pattern of every layer, from its share of outliers.

    Densities are spread over 2 · ``owl_lambda`` in proportion to the outliers and moved so that their mean is the wanted one. With N:8 each
    is rounded to a whole N, 1 to 7, so that the mean may be missed by rounding.

    Raises:
        ConfigError: a layer would have no zeros, or nothing else.
    """
    pattern = config.parsed()
    low, high = min(outliers), max(outliers)
    if high == low:
        return [pattern] * len(outliers)
    spread = [2 * config.owl_lambda * (share - low) / (high - low) for share in outliers]
    mean = sum(spread) / len(spread)
    densities = [value - mean + 1.0 - pattern.ratio for value in spread]
    if pattern.m is not None:
        kept = [min(max(round(pattern.m * density), 1), pattern.m - 1) for density in densities]
        return [Pattern.parse(f"{n}:{pattern.m}") for n in kept]
    for layer, density in enumerate(densities):
        if not 0.0 < density < 1.0:
            raise ConfigError(
                f"sparsify.owl_lambda={config.owl_lambda:g} gives layer {layer} {1 - density:.3f} of zeros, which must be between 0 and 1: lower it"
            )
    return [Pattern(1.0 - density) for density in densities]
