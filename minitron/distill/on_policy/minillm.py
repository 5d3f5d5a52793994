"""MiniLLM (arXiv 2306.08543v4, section 2.2): the reverse KL divergence of whole sequences, as weights of two losses per token.

With r_t = log p(y_t) − log q(y_t), p the teacher, q the student and samples y from p~ = α p + (1 − α) q, the paper's gradient is the sum of

* a single-step part (eq. 3, 7): Σ_t w_t ∇ KL(q(·|y_<t) ‖ p(·|y_<t)), the loss ``reverse_kl`` on the sampled text with weight w_t, and
* a long-term part (eq. 3, 7): −Σ_t w_t R_{t+1} ∇ log q(y_t), a cross-entropy with the sampled token, with the signed weight w_t R_{t+1};

w_t = q(y_t) / p~(y_t) stands for the product over all t' ≤ t, as in eq. 5, to keep its variance down. So at α = 0 the sum is the exact
gradient in expectation (but for the length normalisation), and at α > 0 it is the paper's approximation. The length normalisation (eq. 6)
is taken as the mean of the rewards after t: the printed divisor T − t − 1 is one less than their number and 0 at the last but one token.

What the paper has beside it, and what becomes of it here:

* L_PT, language modelling on a pretraining corpus: steps with the data's own text carry ``cross_entropy`` where the losses name it
  (and ``reverse_kl`` on that text), so ``on_policy.fraction`` sets the balance.
* PPO clipping: left out. Every sample is used for one update, so the ratio of new to old policy is 1 and the clip never acts.
* The mean over sequences becomes a sum over sequences divided by the number of sampled tokens, as for every loss here; for samples of equal
  length the two differ by that length.

The authors' code differs from the paper: its reward-to-go includes step t, is whitened over the batch, and r_t is scaled and clipped.
"""

from __future__ import annotations

from typing import cast

import torch

from minitron.core.protocols import RowLoss
from minitron.distill.losses.cross_entropy import cross_entropy
from minitron.ops.kd_loss import WeightedRowLoss

#: Name of the long-term part among the losses and in the metrics.
POLICY_GRADIENT = "policy_gradient"


def with_policy_gradient(losses: list[WeightedRowLoss]) -> list[WeightedRowLoss]:
    """The losses and the long-term part: cross-entropy with the sampled tokens, as heavy as ``reverse_kl``; the rest is weights per token."""
    weight = next(loss.weight for loss in losses if loss.name == "reverse_kl")
    return [*losses, WeightedRowLoss(POLICY_GRADIENT, weight, cast(RowLoss, cross_entropy))]


def token_weights(*, student: torch.Tensor, teacher: torch.Tensor, sampled: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of the single-step and of the long-term part.

    Args:
        student, teacher, sampled: log-probabilities of the sampled tokens under q, p and the distribution sampled from, [batch, n].
        valid: [batch, n], False after the end of a text.

    Returns:
        w_t and w_t R_{t+1}, [batch, n] float32; 0 where not valid.
    """
    reward = torch.where(valid, teacher - student, 0.0).double()
    later = reward.flip(1).cumsum(1).flip(1) - reward  # Σ_{t' > t} r_t'
    count = valid.flip(1).cumsum(1).flip(1) - valid.long()  # how many those are
    mean = torch.where(count > 0, later / count.clamp_min(1), 0.0)
    importance = torch.where(valid, (student - sampled).double().exp(), 0.0)
    return importance.float(), (importance * mean).float()
