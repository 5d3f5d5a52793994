"""Which weights go, given a score of each: exact counts, and of equal scores the first go, as in Wanda's published code."""

from __future__ import annotations

import torch

from minitron.core.sparsity import Pattern

#: Scores that are sorted together: bounds the indices, 8 bytes each, that a sort makes.
_CHUNK = 1 << 22


def num_pruned(count: int, ratio: float) -> int:
    """How many of ``count`` go: rounded down, a product that misses a whole number by float rounding alone excepted."""
    return int(count * ratio + 1e-9)


def pruned_mask(scores: torch.Tensor, pattern: Pattern, *, by_row: bool = True) -> torch.Tensor:
    """[rows, columns] bool, True at the lowest: M − N of every group of M, or the pattern's share of every row, or of the whole matrix."""
    if pattern.m is None and not by_row:
        return _lowest_of_all(scores, num_pruned(scores.numel(), pattern.ratio))
    mask = torch.zeros_like(scores, dtype=torch.bool)
    step = max(1, _CHUNK // scores.shape[1])
    for first in range(0, len(scores), step):
        mask[first : first + step] = _lowest_of_rows(scores[first : first + step], pattern)
    return mask


def _lowest_of_rows(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    if pattern.m is not None and pattern.n is not None:
        groups = scores.reshape(len(scores), -1, pattern.m)
        return _lowest(groups, pattern.m - pattern.n).view_as(scores)
    return _lowest(scores, num_pruned(scores.shape[1], pattern.ratio))


def _lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The mask of ``count`` lowest along the last dimension."""
    order = scores.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def _lowest_of_all(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The mask of ``count`` lowest of a whole matrix: by their threshold, which needs no index for every weight."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.flatten()
    threshold = flat.kthvalue(count).values
    mask = flat < threshold
    ties = (flat == threshold).nonzero()[:, 0]
    mask[ties[: count - int(mask.sum())]] = True
    return mask.view_as(scores)


def top_of_rows(scores: torch.Tensor, share: float) -> torch.Tensor:
    """The mask of the highest share of every row; of equal scores the last stay."""
    return ~pruned_mask(scores, Pattern(1.0 - share)) if share < 1.0 else torch.ones_like(scores, dtype=torch.bool)
