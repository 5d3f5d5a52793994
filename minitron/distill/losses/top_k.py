"""Forward KL over the teacher's likeliest tokens, with all others as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from minitron.core.sparse import TopKTargets
from minitron.distill.losses.forward_kl import forward_kl
from minitron.errors import ConfigError
from minitron.ops.softmax import log_probabilities
from minitron.ops.sparse_kl import top_k_kl


@dataclass(frozen=True)
class TopK:
    """Forward KL over k + 1 outcomes: the teacher's k likeliest tokens, and "any other token" with the mass that is left on either side.

    Renormalising the k to 1 instead would let the student put any mass on the others unpunished. k ≥ vocabulary is the forward KL.

    Raises:
        ConfigError: k is not a whole number of at least 1.
    """

    k: int
    needs_teacher: ClassVar[bool] = True
    sparse_signals: ClassVar[tuple[str, ...]] = ("top_k",)
    sparse_is_exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise ConfigError(f"loss.k={self.k} must be a whole number of at least 1")

    def __call__(
        self, student_logits: torch.Tensor, teacher_logits: torch.Tensor | None, labels: torch.Tensor, *, temperature: float, gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """τ² · (Σ_{v in top} P (log P − log Q) + P_tail (log P_tail − log Q_tail)) per row, with softmax over τ on both sides.

        The gradient with respect to the student's logits is τ (Q − P) in the top and τ (Q − P_tail · Q / Q_tail) outside.

        Args:
            student_logits, teacher_logits: [rows, vocab] float32, finite.
            labels: [rows], not used.

        Returns:
            Values [rows] and, if asked for, gradients [rows, vocab].
        """
        assert teacher_logits is not None
        if self.k >= teacher_logits.shape[-1]:
            return forward_kl(student_logits, teacher_logits, labels, temperature=temperature, gradient=gradient)
        log_p = log_probabilities(teacher_logits, temperature)
        log_q = log_probabilities(student_logits, temperature)
        top_p, top = log_p.topk(self.k, dim=-1, sorted=False)  # [rows, k]
        top_q = log_q.gather(-1, top)
        # The tail's mass is summed over the tail: one minus the top would cancel where the teacher is sure.
        tail_p = log_p.scatter_(-1, top, -torch.inf).logsumexp(dim=-1, keepdim=True)  # [rows, 1]
        tail_q = log_q.scatter_(-1, top, -torch.inf).logsumexp(dim=-1, keepdim=True)
        excess = tail_p - tail_q
        p = top_p.exp()
        divergence = (p * (top_p - top_q)).sum(dim=-1) + (tail_p.exp() * excess)[:, 0]
        value = (temperature**2 * divergence).clamp_min(0.0)
        if not gradient:
            return value, None
        pull = torch.add(log_q, excess, out=log_p).exp_()  # P_tail · Q / Q_tail, 0 in the top
        slope = log_q.exp_().sub_(pull).scatter_(-1, top, top_q.exp_().sub_(p))
        return value, slope.mul_(temperature) if temperature != 1.0 else slope

    def from_sparse(
        self, student_logits: torch.Tensor, teacher: TopKTargets, labels: torch.Tensor, *, temperature: float, gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same, at temperature 1, from at least k stored tokens."""
        assert temperature == 1.0 and teacher.ids.shape[-1] >= min(self.k, teacher.num_tokens)
        return top_k_kl(student_logits, teacher, k=self.k, gradient=gradient)
