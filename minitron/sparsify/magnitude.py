"""Magnitude pruning (Han et al., arXiv 1506.02626): small weights go, whatever they multiply."""

from __future__ import annotations

import torch

from minitron.sparsify.shared.method import ByScores, Inputs


class Magnitude(ByScores):
    """|W|, compared over the whole matrix as the baselines of Wanda and SparseGPT have it; ``scope=row`` compares within each row."""

    needs = "none"
    scope = "matrix"

    def scores(self, weight: torch.Tensor, inputs: Inputs | None) -> torch.Tensor:
        """|W_ij|."""
        return weight.abs()
