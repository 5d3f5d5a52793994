"""Skewed forward KL of DistiLLM (arXiv 2402.03898, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from minitron.errors import ConfigError
from minitron.ops.softmax import log_mixture_ratio, log_probabilities


@dataclass(frozen=True)
class SkewedKL:
    """KL(P ‖ α P + (1 − α) Q): the teacher's share α in the mixture bounds it by −log α. α = 0 is the forward KL.

    Raises:
        ConfigError: α is negative, or not less than 1.
    """

    skew: float
    needs_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.skew < 1.0:
            raise ConfigError(f"loss.skew={self.skew} must be at least 0 and less than 1: it is the teacher's share in the mixture")

    def __call__(
        self, student_logits: torch.Tensor, teacher_logits: torch.Tensor | None, labels: torch.Tensor, *, temperature: float, gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """τ² · Σ_v P (log P − log M), M = α P + (1 − α) Q, per row, with P and Q the softmax of teacher and student logits over τ.

        The gradient with respect to the student's logits is τ (1 − α) · (Q Σ_u Q P/M − Q P/M).

        Args:
            student_logits, teacher_logits: [rows, vocab] float32, finite.
            labels: [rows], not used.

        Returns:
            Values [rows] and, if asked for, gradients [rows, vocab].
        """
        assert teacher_logits is not None
        log_q = log_probabilities(student_logits, temperature)
        log_p = log_probabilities(teacher_logits, temperature)
        ratio, at_equality = log_mixture_ratio(log_q - log_p, self.skew)  # log M/P
        value = (temperature**2 * (at_equality - log_p.exp_().mul_(ratio).sum(dim=-1))).clamp_min(0.0)
        if not gradient:
            return value, None
        pull = torch.sub(log_q, ratio, out=ratio).exp_()  # Q P/M, bounded where P/M alone is not
        slope = log_q.exp_().mul_(pull.sum(dim=-1, keepdim=True)).sub_(pull)
        return value, slope.mul_(temperature * (1 - self.skew))
