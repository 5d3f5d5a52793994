"""Negative log-likelihood of every token without materialising ``[tokens, vocab]``."""

from __future__ import annotations

import torch

from minitron.ops.head import Head
from minitron.ops.kd_loss import IGNORE_INDEX, default_chunk_size


def token_losses(hidden: torch.Tensor, head: Head, labels: torch.Tensor, *, chunk_size: int | None = None) -> torch.Tensor:
    """−log p(label) of every row; 0 where the label is ignored.

    Args:
        hidden: [tokens, hidden], after the final norm.
        head: of the same model.
        labels: [tokens] int64.

    Returns:
        [tokens] float32.
    """
    step = chunk_size or default_chunk_size(hidden.device)
    head = head.ready(head.weight.dtype)  # once, not once a chunk
    losses = []
    for start in range(0, hidden.shape[0], step):
        rows = slice(start, start + step)
        logits = head.logits(hidden[rows].to(head.weight.dtype))
        losses.append(torch.nn.functional.cross_entropy(logits, labels[rows], reduction="none", ignore_index=IGNORE_INDEX))
    return torch.cat(losses) if losses else torch.zeros(0, device=hidden.device)
