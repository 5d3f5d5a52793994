"""Cosine distance of logits, a baseline of the Minitron papers (arXiv 2407.14679, table 15)."""

from __future__ import annotations

import torch

#: Logits that are all zero have no direction: their distance is ½ and their gradient finite.
_TINY = 1e-12


def cosine(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor | None, labels: torch.Tensor, *, temperature: float, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """1 − cos(student, teacher) over the V logits of a row.

    Temperature changes nothing: the angle between two vectors does not see their length, and there is no τ² to add. Computed as
    ½ |s − t|² of the unit vectors s and t, which does not cancel where they are close. The gradient is (s − t − value · s) / |student|.

    Args:
        student_logits, teacher_logits: [rows, vocab] float32, finite.
        labels: [rows], not used.

    Returns:
        Values [rows] and, if asked for, gradients [rows, vocab].
    """
    assert teacher_logits is not None
    length = torch.linalg.vector_norm(student_logits, dim=-1, keepdim=True).clamp_min(_TINY)  # [rows, 1]
    unit = student_logits / length
    difference = teacher_logits / torch.linalg.vector_norm(teacher_logits, dim=-1, keepdim=True).clamp_min(_TINY)
    torch.sub(unit, difference, out=difference)
    value = 0.5 * torch.linalg.vector_norm(difference, dim=-1, keepdim=True).square_()
    if not gradient:
        return value[:, 0], None
    return value[:, 0], difference.addcmul_(unit, value, value=-1.0).div_(length)


cosine.needs_teacher = True  # type: ignore[attr-defined]
