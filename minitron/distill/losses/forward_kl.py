"""Forward KL divergence, the loss of the Minitron papers (arXiv 2407.14679, section 3)."""

from __future__ import annotations

import torch

from minitron.ops.kd_rows import RowTerm
from minitron.ops.softmax import log_probabilities
from minitron.ops.sparse_kl import sparse_kl


def forward_kl(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor | None, labels: torch.Tensor, *, temperature: float, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """τ² · KL(P ‖ Q) = τ² · Σ_v P (log P − log Q) per row, with P and Q the softmax of teacher and student logits over τ.

    The gradient with respect to the student's logits is τ · (Q − P). Teacher entropy is included, so equal logits give 0.

    Args:
        student_logits, teacher_logits: [rows, vocab] float32, finite.
        labels: [rows], not used.

    Returns:
        Values [rows] and, if asked for, gradients [rows, vocab].
    """
    assert teacher_logits is not None
    log_p, log_q = log_probabilities(teacher_logits, temperature), log_probabilities(student_logits, temperature)
    p = log_p.exp()
    value = (temperature**2 * log_p.sub_(log_q).mul_(p).sum(dim=-1)).clamp_min(0.0)  # log_p − log_q first: small divergences do not cancel
    if not gradient:
        return value, None
    slope = log_q.exp_().sub_(p)
    return value, slope.mul_(temperature) if temperature != 1.0 else slope


forward_kl.needs_teacher = True  # type: ignore[attr-defined]
forward_kl.row_term = RowTerm("forward_kl")  # type: ignore[attr-defined]
forward_kl.sparse_signals = ("top_k", "samples")  # type: ignore[attr-defined]
forward_kl.from_sparse = sparse_kl  # type: ignore[attr-defined]
