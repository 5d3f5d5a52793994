"""Mean squared error of logits, a baseline of the Minitron papers (arXiv 2407.14679, table 15)."""

from __future__ import annotations

import torch


def mse(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor | None, labels: torch.Tensor, *, temperature: float, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """1/V · Σ_v (student − teacher)² per row: the mean over the V logits, not their sum, and shifts by a constant count.

    Temperature changes nothing: τ² times the square of a difference that τ divides. The gradient is 2/V · (student − teacher).

    Args:
        student_logits, teacher_logits: [rows, vocab] float32, finite.
        labels: [rows], not used.

    Returns:
        Values [rows] and, if asked for, gradients [rows, vocab].
    """
    assert teacher_logits is not None
    difference = student_logits - teacher_logits
    vocab = student_logits.shape[-1]
    value = torch.linalg.vector_norm(difference, dim=-1).square_().div_(vocab)
    return value, difference.mul_(2.0 / vocab) if gradient else None


mse.needs_teacher = True  # type: ignore[attr-defined]
