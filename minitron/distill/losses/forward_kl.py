"""Forward KL divergence, the loss of the Minitron papers (arXiv 2407.14679, section 3)."""

from __future__ import annotations

import torch


def forward_kl(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor | None, labels: torch.Tensor, *, temperature: float, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """τ² · KL(P ‖ Q) = τ² · Σ_v P (log P − log Q) per row, with P and Q the softmax of teacher and student logits over τ.

    The gradient with respect to the student's logits is τ · (Q − P). Teacher entropy is included, so equal logits give 0.

    Args:
        student_logits, teacher_logits: [rows, vocab] float32.
        labels: [rows], not used.

    Returns:
        Values [rows] and, if asked for, gradients [rows, vocab].
    """
    assert teacher_logits is not None
    log_p = torch.log_softmax(teacher_logits / temperature, dim=-1)
    log_q = torch.log_softmax(student_logits / temperature, dim=-1)
    p = log_p.exp()
    # where P is 0 its term is 0, whatever log P (−inf) says
    value = (temperature**2 * torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dim=-1)).clamp_min(0.0)
    return value, log_q.exp_().sub_(p).mul_(temperature) if gradient else None


forward_kl.needs_teacher = True  # type: ignore[attr-defined]
