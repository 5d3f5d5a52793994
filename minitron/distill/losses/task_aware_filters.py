"""Task-aware layer-wise distillation, TED (arXiv 2210.01351): states are compared behind linear filters that know the task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from minitron import dist
from minitron.distill.losses.state import StatesConfig, StateSetup, lift, lifting_matrix, only_valid, weighted_sum
from minitron.models.states import Tap


class TaskAwareFilters(nn.Module):
    """Mean over mapped layers of the mean over tokens and channels of (g_teacher(h_teacher) − g_student(h_student))².

    Every mapped layer of either model has a linear filter g. A first stage (``distill.filters``) trains them while both models stand
    still; after it the teacher's are frozen, and the student's go on training with the student. ``start`` holds what the first stage
    found, plain tensors that no engine shards or updates; ``change`` is what the student's filters learn on top of it.
    """

    def __init__(self, setup: StateSetup) -> None:
        super().__init__()
        self.config, self.compute_dtype = setup.config, setup.compute_dtype
        sizes = {"teacher": setup.teacher.hidden_size, "student": setup.student.hidden_size}
        width = setup.config.filter_width or sizes["teacher"]
        kept = {"teacher": None, "student": setup.kept_hidden if width == sizes["teacher"] else None}
        count = len(setup.config.layers_of("teacher", setup.teacher.num_layers))
        first = {side: lifting_matrix(width, sizes[side], kept[side], seed=setup.seed).to(dist.device()) for side in sizes}
        self.start = {side: [weight] * count for side, weight in first.items()}
        self.change = nn.ParameterList([nn.Parameter(torch.zeros(width, sizes["student"])) for _ in range(count)])

    @staticmethod
    def taps(config: StatesConfig, layers: Sequence[int]) -> list[Tap]:
        """The mapped layers' outputs."""
        return [Tap("normed" if config.post_norm else "output", layer) for layer in layers]

    @staticmethod
    def check(setup: StateSetup) -> None:
        """Any two widths will do."""

    def forward(self, teacher: Sequence[torch.Tensor], student: Sequence[torch.Tensor], valid: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """See StateLoss; states [batch, sequence, hidden]."""
        total = torch.zeros((), device=valid.device)
        for index, (theirs, ours) in enumerate(zip(teacher, student, strict=True)):
            fixed, start = (self.start[side][index] for side in ("teacher", "student"))
            target = lift(only_valid(theirs, valid), fixed, self.compute_dtype)
            filtered = lift(only_valid(ours, valid), start + self.change[index], self.compute_dtype)
            total = total + weighted_sum((filtered - target).square().mean(dim=-1), valid, scale)
        return total / len(self.change)

    def extra_state(self) -> dict[str, torch.Tensor]:
        """What the first stage found, by name."""
        return {f"{side}/{index}": weight for side, weights in self.start.items() for index, weight in enumerate(weights)}

    def load_extra_state(self, state: dict[str, torch.Tensor]) -> None:
        """The inverse."""
        self.start = {side: [state[f"{side}/{index}"].to(dist.device()) for index in range(len(weights))] for side, weights in self.start.items()}
