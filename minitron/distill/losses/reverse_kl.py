"""Reverse KL divergence, which seeks the teacher's modes (MiniLLM, arXiv 2306.08543, per token)."""

from __future__ import annotations

import torch

from minitron.ops.kd_rows import RowTerm
from minitron.ops.softmax import log_probabilities


def reverse_kl(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor | None, labels: torch.Tensor, *, temperature: float, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """τ² · KL(Q ‖ P) = τ² · Σ_v Q (log Q − log P) per row, with P and Q the softmax of teacher and student logits over τ.

    The gradient with respect to the student's logits is τ · Q (log Q − log P − KL(Q ‖ P)).

    Args:
        student_logits, teacher_logits: [rows, vocab] float32, finite.
        labels: [rows], not used.

    Returns:
        Values [rows] and, if asked for, gradients [rows, vocab].
    """
    assert teacher_logits is not None
    log_q = log_probabilities(student_logits, temperature)
    difference = log_probabilities(teacher_logits, temperature)
    torch.sub(log_q, difference, out=difference)  # log Q − log P
    q = log_q.exp_()
    divergence = (q * difference).sum(dim=-1, keepdim=True)  # [rows, 1]
    value = (temperature**2 * divergence[:, 0]).clamp_min(0.0)
    if not gradient:
        return value, None
    slope = difference.sub_(divergence).mul_(q)
    return value, slope.mul_(temperature) if temperature != 1.0 else slope


reverse_kl.needs_teacher = True  # type: ignore[attr-defined]
reverse_kl.row_term = RowTerm("reverse_kl")  # type: ignore[attr-defined]
