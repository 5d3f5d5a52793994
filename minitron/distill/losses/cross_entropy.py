"""Cross-entropy with the data's labels: plain language modelling, alone or mixed with a divergence."""

from __future__ import annotations

import torch

from minitron.ops.kd_rows import RowTerm


def cross_entropy(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor | None, labels: torch.Tensor, *, temperature: float, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """−log softmax(student)[label] per row, at temperature 1 whatever ``temperature`` says; gradient softmax − one-hot.

    Args:
        student_logits: [rows, vocab] float32.
        labels: [rows]; negative ones give a value that the caller must mask.

    Returns:
        Values [rows] and, if asked for, gradients [rows, vocab].
    """
    targets = labels.clamp_min(0)[:, None]  # [rows, 1]
    log_q = torch.log_softmax(student_logits, dim=-1)
    value = -log_q.gather(1, targets)[:, 0]
    if not gradient:
        return value, None
    return value, log_q.exp_().scatter_add_(1, targets, torch.full_like(value, -1.0)[:, None])


cross_entropy.needs_teacher = False  # type: ignore[attr-defined]
cross_entropy.row_term = RowTerm("cross_entropy")  # type: ignore[attr-defined]
