"""Perplexity on held-out text: exp of the mean negative log-likelihood per predicted token of packed windows."""

from __future__ import annotations

import math

import torch
from torch import nn

from minitron import dist
from minitron.log import Progress
from minitron.models.head import head_of
from minitron.models.packing import hidden_states
from minitron.ops.documents import next_token_labels
from minitron.ops.kd_loss import IGNORE_INDEX
from minitron.ops.token_loss import token_losses


def perplexity(
    model: nn.Module, sequences: torch.Tensor, *, batch_size: int, what: str, alone: bool = False, separator: int | None = None
) -> dict[str, float]:
    """Loss and perplexity over ``sequences`` [num, length]; no ``[tokens, vocab]`` tensor is made.

    Ranks share the work, unless one rank does it ``alone``. Documents that end with a ``separator`` do not see each other, and the first token
    of one is predicted by nobody.

    Returns:
        ``loss`` (nats per token), ``perplexity``, ``num_tokens`` (predicted ones).
    """
    rank, world = (0, 1) if alone else (dist.rank(), dist.world_size())
    head, device = head_of(model), dist.device()
    batches = sequences.split(batch_size)
    total = torch.zeros(2, dtype=torch.float64, device=device)  # summed loss, tokens
    bar = Progress(f"evaluate {what}", total=len(sequences), unit="sequence")
    with torch.no_grad():
        for index, batch in enumerate(batches):
            if index % world == rank:
                ids = batch.to(device)
                labels = next_token_labels(ids, separator)
                hidden = hidden_states(model, ids, separator=separator)
                losses = token_losses(hidden.flatten(0, 1), head, labels.flatten())
                total += torch.stack([losses.double().sum(), (labels != IGNORE_INDEX).sum().double()])
            bar.advance(len(batch))
    loss_sum, tokens = (total if alone else dist.all_reduce_sum(total)).tolist()
    loss = loss_sum / max(tokens, 1)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "num_tokens": int(tokens)}
