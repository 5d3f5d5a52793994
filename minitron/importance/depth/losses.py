"""Sums of token losses from final hidden states, without a ``[tokens, vocab]`` tensor and without waiting for the device."""

from __future__ import annotations

import torch
from torch import nn

from minitron.engine.frozen import gathered
from minitron.importance.depth.config import PlacedTeacher
from minitron.models.head import head_of, head_parameters
from minitron.ops.documents import next_token_labels
from minitron.ops.head import Head
from minitron.ops.kd_loss import IGNORE_INDEX
from minitron.ops.token_loss import token_losses


class TokenLosses:
    """The losses of a batch's tokens under a model's head."""

    def __init__(self, model: nn.Module, placed: PlacedTeacher | None = None) -> None:
        """The head of a ``placed`` model is gathered, and whole for as long as this lives."""
        if placed is None:
            head = head_of(model).detached()
        else:
            with gathered([parameter for parameter in head_parameters(model) if parameter is not None]) as (weight, *bias):
                head = Head(weight, bias[0] if bias else None, placed.transform)
        self.head = head.ready(head.weight.dtype)

    def rows(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Summed loss of every row [..., batch], float64, of states [..., batch, sequence, hidden] for labels [batch, sequence - 1]."""
        labels = labels.expand(*hidden.shape[:-2], -1)
        losses = token_losses(hidden[..., :-1, :].flatten(0, -2), self.head, labels.flatten())
        return losses.view(labels.shape).sum(dim=-1, dtype=torch.float64)


def labels_of(ids: torch.Tensor, counted: torch.Tensor | None, attended: torch.Tensor | None = None, *, separator: int | None = None) -> torch.Tensor:
    """The token after each but the last [batch, sequence - 1]; ignored where it does not count, and where padding or the ``separator`` that ends
    another document would have to predict it."""
    labels = next_token_labels(ids, separator)[:, :-1]
    if counted is not None:
        labels = labels.masked_fill(~counted[:, 1:], IGNORE_INDEX)
    return labels if attended is None else labels.masked_fill(~attended[:, :-1].bool(), IGNORE_INDEX)
