"""Wanda (Sun et al., arXiv 2306.11695): weights times the norm of what they multiply, compared within each output row."""

from __future__ import annotations

import torch

from minitron.sparsify.shared.method import ByScores, Inputs


class Wanda(ByScores):
    """|W_ij| · ‖X_j‖₂, X_j the j-th input at all calibration tokens that count.

    The authors' code takes the mean of squared norms over sequences in place of the sum, which ranks the same.
    """

    def scores(self, weight: torch.Tensor, inputs: Inputs | None) -> torch.Tensor:
        """|W_ij| · ‖X_j‖₂."""
        assert inputs is not None
        return weight.abs() * inputs.squares.sqrt().float()
