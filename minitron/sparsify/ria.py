"""RIA (Zhang et al., Plug-and-Play, ICLR 2024): a weight's share of its row and of its column, times a power of its input's norm."""

from __future__ import annotations

import torch

from minitron.sparsify.shared.method import ByScores, Inputs


class RIA(ByScores):
    """(|W_ij| / Σ_i |W_ij| + |W_ij| / Σ_j |W_ij|) · ‖X_j‖₂^a, a = ``sparsify.power``.

    The authors' code compares over the whole matrix, the text within each row; the code's way is the default. Their reordering of channels for
    N:M is left out: it would have to be undone by whoever reads the weights.
    """

    scope = "matrix"

    def scores(self, weight: torch.Tensor, inputs: Inputs | None) -> torch.Tensor:
        """The formula above; a row or column of zeros counts 0."""
        assert inputs is not None
        size = weight.abs()
        tiny = torch.finfo(size.dtype).tiny
        relative = size / size.sum(dim=0).clamp_min(tiny) + size / size.sum(dim=1, keepdim=True).clamp_min(tiny)
        return relative * inputs.squares.sqrt().pow(self.config.power).float()
