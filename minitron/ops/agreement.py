"""Top-1 agreement: how often the student's likeliest token is the teacher's."""

from __future__ import annotations

from typing import cast

import torch

from minitron.core.protocols import RowLoss
from minitron.core.sparse import TopKTargets
from minitron.ops.kd_loss import WeightedRowLoss
from minitron.ops.kd_rows import RowTerm


def agreement(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor | None, labels: torch.Tensor, *, temperature: float, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """1 per row where both likeliest tokens are the same, else 0. A measurement in the form of a row loss: it has no gradient.

    Args:
        student_logits, teacher_logits: [rows, vocab].
        labels: [rows], not used; nor is ``temperature``, which moves no maximum.

    Returns:
        Values [rows] and None.
    """
    assert teacher_logits is not None
    return (student_logits.argmax(dim=-1) == teacher_logits.argmax(dim=-1)).float(), None


def _agreement_with_likeliest(
    student_logits: torch.Tensor, teacher: TopKTargets, labels: torch.Tensor, *, temperature: float, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return (student_logits.argmax(dim=-1) == teacher.ids[:, 0]).float(), None


agreement.needs_teacher = True  # type: ignore[attr-defined]
agreement.row_term = RowTerm("agreement")  # type: ignore[attr-defined]
agreement.sparse_signals = ("top_k",)  # type: ignore[attr-defined]
agreement.sparse_is_exact = True  # type: ignore[attr-defined]
agreement.from_sparse = _agreement_with_likeliest  # type: ignore[attr-defined]

#: The measurement as a term that adds nothing to the total.
AGREEMENT = WeightedRowLoss("agreement", 0.0, cast(RowLoss, agreement))
