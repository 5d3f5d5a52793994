"""Generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from minitron.distill.losses.forward_kl import forward_kl
from minitron.distill.losses.reverse_kl import reverse_kl
from minitron.errors import ConfigError
from minitron.ops.kd_rows import RowTerm
from minitron.ops.softmax import log_mixture_ratio, log_probabilities


@dataclass(frozen=True)
class GeneralisedJSD:
    """JSD(β) with the mixture M = β P + (1 − β) Q; GKD's convention.

    β tends to 0 or 1 and the divergence to 0, in proportion; as in GKD those two ends are instead the whole forward (0) and reverse (1) KL,
    so the scale of the loss jumps there.

    Raises:
        ConfigError: β lies outside 0 … 1.
    """

    beta: float
    needs_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta <= 1.0:
            raise ConfigError(f"loss.beta={self.beta} must lie between 0 (forward KL) and 1 (reverse KL)")

    @property
    def row_term(self) -> RowTerm:
        """What the kernels call it."""
        ends = {0.0: "forward_kl", 1.0: "reverse_kl"}
        return RowTerm(ends.get(self.beta, "jsd"), self.beta)

    def __call__(
        self, student_logits: torch.Tensor, teacher_logits: torch.Tensor | None, labels: torch.Tensor, *, temperature: float, gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """τ² · (β KL(P ‖ M) + (1 − β) KL(Q ‖ M)) per row, with P and Q the softmax of teacher and student logits over τ.

        The gradient with respect to the student's logits is τ (1 − β) · Q (log Q/M − KL(Q ‖ M)).

        Args:
            student_logits, teacher_logits: [rows, vocab] float32, finite.
            labels: [rows], not used.

        Returns:
            Values [rows] and, if asked for, gradients [rows, vocab].
        """
        assert teacher_logits is not None
        beta = self.beta
        if beta in (0.0, 1.0):
            end = reverse_kl if beta == 1.0 else forward_kl
            return end(student_logits, teacher_logits, labels, temperature=temperature, gradient=gradient)
        log_q = log_probabilities(student_logits, temperature)
        log_p = log_probabilities(teacher_logits, temperature)
        difference = log_q - log_p
        over_q, equal_q = log_mixture_ratio(-difference, 1.0 - beta)  # log M/Q
        over_p, equal_p = log_mixture_ratio(difference, beta)  # log M/P
        teacher_part = equal_p - log_p.exp_().mul_(over_p).sum(dim=-1)  # KL(P ‖ M) [rows]
        q = log_q.exp_()
        student_part = equal_q - torch.mul(q, over_q, out=log_p).sum(dim=-1)  # KL(Q ‖ M) [rows]
        value = (temperature**2 * (beta * teacher_part + (1.0 - beta) * student_part)).clamp_min(0.0)
        if not gradient:
            return value, None
        slope = over_q.add_((student_part - equal_q)[:, None]).mul_(q)  # minus Q (log Q/M − KL)
        return value, slope.mul_(-temperature * (1.0 - beta))
