"""Sums of token losses from final hidden states, without a ``[tokens, vocab]`` tensor and without waiting for the device."""

from __future__ import annotations

import torch
from torch import nn

from minitron.models.head import head_of
from minitron.ops.kd_loss import IGNORE_INDEX
from minitron.ops.token_loss import token_losses


class TokenLosses:
    """The losses of a batch's tokens under a model's head."""

    def __init__(self, model: nn.Module) -> None:
        head = head_of(model).detached()
        self.head = head.ready(head.weight.dtype)

    def rows(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Summed loss of every row [batch], float64, of states [batch, sequence, hidden] for labels [batch, sequence - 1]."""
        losses = token_losses(hidden[:, :-1].flatten(0, 1), self.head, labels.flatten())
        return losses.view(len(labels), -1).sum(dim=1, dtype=torch.float64)


def labels_of(ids: torch.Tensor, counted: torch.Tensor | None, attended: torch.Tensor | None = None) -> torch.Tensor:
    """The token after each but the last [batch, sequence - 1]; ignored where it does not count, or where padding would have to predict it."""
    labels = ids[:, 1:]
    if counted is not None:
        labels = labels.masked_fill(~counted[:, 1:], IGNORE_INDEX)
    return labels if attended is None else labels.masked_fill(~attended[:, :-1].bool(), IGNORE_INDEX)
