"""Hidden states of mapped layers, the loss on intermediate states of the Minitron paper (arXiv 2407.14679, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from minitron.distill.losses.state import StatesConfig, StateSetup, lift, lifting_matrix, only_valid, weighted_sum
from minitron.models.states import EMBEDDING, Tap


class HiddenStates(nn.Module):
    """Σ over mapped states k of the mean over tokens of d(h_teacher, W h_student).

    W is one learned linear map from student to teacher width without a bias, shared by all states. The distance d is ``cosine``
    (1 − cos), ``mse`` or ``smooth_l1`` (both means over channels).
    """

    def __init__(self, setup: StateSetup) -> None:
        super().__init__()
        self.distance, self.compute_dtype = setup.config.distance, setup.compute_dtype
        self.map = nn.Parameter(lifting_matrix(setup.teacher.hidden_size, setup.student.hidden_size, setup.kept_hidden, seed=setup.seed))

    @staticmethod
    def taps(config: StatesConfig, layers: Sequence[int]) -> list[Tap]:
        """The mapped layers' outputs and, if asked for, the embedding's."""
        kind = "normed" if config.post_norm else "output"
        return [Tap(kind, layer) for layer in ([EMBEDDING] if config.embedding else []) + list(layers)]

    @staticmethod
    def check(setup: StateSetup) -> None:
        """Any two widths will do."""

    def forward(self, teacher: Sequence[torch.Tensor], student: Sequence[torch.Tensor], valid: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """See StateLoss; states [batch, sequence, hidden]."""
        total = torch.zeros((), device=valid.device)
        for theirs, ours in zip(teacher, student, strict=True):
            lifted = lift(only_valid(ours, valid), self.map, self.compute_dtype)
            total = total + weighted_sum(self._distance(lifted, only_valid(theirs, valid).float()), valid, scale)
        return total

    def _distance(self, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        """[batch, sequence, hidden] twice → [batch, sequence]."""
        if self.distance == "cosine":
            # 1 − cos = ½ |û − v̂|²: never negative, and exact where 1 − cos would be lost in the rounding of 1
            return 0.5 * (F.normalize(ours, dim=-1) - F.normalize(theirs, dim=-1)).square().sum(dim=-1)
        if self.distance == "mse":
            return (ours - theirs).square().mean(dim=-1)
        return F.smooth_l1_loss(ours, theirs, reduction="none").mean(dim=-1)
