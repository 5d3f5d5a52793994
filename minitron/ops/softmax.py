"""What divergences between two softmax distributions share: log-probabilities, the log of a mixture, the way back to logits."""

from __future__ import annotations

import math

import torch


def log_probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """log softmax(logits / τ) [rows, vocab], a fresh tensor; the pass that divides is left out where it does nothing."""
    return torch.log_softmax(logits / temperature if temperature != 1.0 else logits, dim=-1)


def log_mixture_ratio(difference: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """log(M / P) for M = share · P + (1 − share) · Q, in place of ``difference`` = log Q − log P [rows, vocab]; 0 ≤ share < 1.

    Written in the ratio Q / P it neither overflows nor cancels: log(share + (1 − share) · e^difference). Rounded, the two shares do not
    sum to exactly 1, so that P = Q gives a number of about 1e-8 rather than 0. That number comes second, 0-d, for callers to subtract.
    """
    log_share = torch.full((), math.log(share) if share > 0 else -math.inf, dtype=difference.dtype, device=difference.device)
    log_rest = math.log1p(-share)
    # as many elements as the vectorised code takes at once, which rounds differently from the code for a single one
    at_equality = torch.logaddexp(difference.new_full((64,), log_rest), log_share)[0]
    ratio = torch.logaddexp(difference.add_(log_rest), log_share, out=difference)
    return ratio, at_equality
