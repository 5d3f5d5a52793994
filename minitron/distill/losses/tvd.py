"""Total variation distance between the two distributions."""

from __future__ import annotations

import torch

from minitron.ops.softmax import log_probabilities


def tvd(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor | None, labels: torch.Tensor, *, temperature: float, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """τ² · ½ Σ_v |P − Q| per row, with P and Q the softmax of teacher and student logits over τ.

    The gradient with respect to the student's logits is τ · Q (g − Σ_u Q g) with g = ½ sign(Q − P), 0 where they tie. The distance is of
    first order in the logits and the divergences are of second, so that with τ² it grows like τ where they tend to a limit.

    Args:
        student_logits, teacher_logits: [rows, vocab] float32, finite.
        labels: [rows], not used.

    Returns:
        Values [rows] and, if asked for, gradients [rows, vocab].
    """
    assert teacher_logits is not None
    q = log_probabilities(student_logits, temperature).exp_()
    difference = log_probabilities(teacher_logits, temperature).exp_()
    torch.sub(q, difference, out=difference)  # Q − P
    value = (0.5 * temperature**2) * torch.linalg.vector_norm(difference, ord=1, dim=-1)
    if not gradient:
        return value, None
    slope = difference.sign_().mul_(0.5)
    slope.sub_((q * slope).sum(dim=-1, keepdim=True)).mul_(q)
    return value, slope.mul_(temperature) if temperature != 1.0 else slope


tvd.needs_teacher = True  # type: ignore[attr-defined]
