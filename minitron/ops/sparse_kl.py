"""Forward KL from a teacher that is known at a few tokens only. Row losses whose teacher is ``SparseTargets`` instead of logits."""

from __future__ import annotations

import torch

from minitron.core.sparse import SampledTargets, SparseTargets, TopKTargets
from minitron.ops.softmax import log_probabilities


def sparse_kl(
    student_logits: torch.Tensor, teacher: SparseTargets, labels: torch.Tensor, *, temperature: float, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What can be said of KL(P ‖ Q) per row, at temperature 1: over k + 1 outcomes of :class:`TopKTargets`, estimated from :class:`SampledTargets`.

    Args:
        student_logits: [rows, vocab] float32, of the vocabulary of the targets.
        labels: [rows], not used.

    Returns:
        Values [rows] and, if asked for, gradients [rows, vocab].
    """
    assert temperature == 1.0, "stored targets are of temperature 1"
    assert student_logits.shape[-1] == teacher.num_tokens
    if isinstance(teacher, TopKTargets):
        return top_k_kl(student_logits, teacher, k=teacher.ids.shape[-1], gradient=gradient)
    return _sampled_kl(student_logits, teacher, gradient=gradient)


def top_k_kl(student_logits: torch.Tensor, teacher: TopKTargets, *, k: int, gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Σ_{v in top} P (log P − log Q) + P_tail (log P_tail − log Q_tail) per row, with the likeliest ``k`` of the stored tokens as the top.

    Merging outcomes can only lower a divergence: this is at most KL(P ‖ Q). The gradient with respect to the student's logits is Q − P in the
    top and Q − P_tail · Q / Q_tail outside.

    Returns:
        Values [rows] and, if asked for, gradients [rows, vocab].
    """
    top, top_p, log_q = teacher.ids[:, :k], teacher.log_p[:, :k], log_probabilities(student_logits, 1.0)
    top_q = log_q.gather(-1, top)
    p = top_p.exp()
    inside = (p * (top_p - top_q)).sum(dim=-1)
    if k >= teacher.num_tokens:  # nothing is left for a tail
        return inside.clamp_min(0.0), log_q.exp_().scatter_add_(-1, top, -p) if gradient else None
    rest = torch.cat([teacher.log_p[:, k:], teacher.log_tail[:, None]], dim=-1)
    tail_p = rest.logsumexp(dim=-1, keepdim=True)  # [rows, 1]
    tail_q = log_q.scatter_(-1, top, -torch.inf).logsumexp(dim=-1, keepdim=True)
    excess = tail_p - tail_q
    value = (inside + (tail_p.exp() * excess)[:, 0]).clamp_min(0.0)
    if not gradient:
        return value, None
    pull = (log_q + excess).exp_()  # P_tail · Q / Q_tail, 0 in the top
    return value, log_q.exp_().sub_(pull).scatter_(-1, top, top_q.exp_().sub_(p))


def _sampled_kl(student_logits: torch.Tensor, teacher: SampledTargets, *, gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Σ w (log P − log Q) over the drawn tokens per row: an unbiased estimate of KL(P ‖ Q) that is 0 where P = Q, and may be negative.

    The gradient with respect to the student's logits is Q Σ w − w, whose expectation is that of the whole divergence, Q − P (Random Sampling
    Knowledge Distillation, arXiv 2503.16870).
    """
    log_q = log_probabilities(student_logits, 1.0)
    value = (teacher.weights * (teacher.log_p - log_q.gather(-1, teacher.ids))).sum(dim=-1)
    if not gradient:
        return value, None
    slope = log_q.exp_().mul_(teacher.weights.sum(dim=-1, keepdim=True))
    return value, slope.scatter_add_(-1, teacher.ids, -teacher.weights)
