"""Documents that lie one after another in a row of tokens: where each begins, and what each of its tokens predicts.

Everything follows from the token ids: a document begins at the start of a row and after every separator, the end-of-text token that closes each
document. Nothing here waits for the device.
"""

from __future__ import annotations

import torch

from minitron.ops.kd_loss import IGNORE_INDEX


def document_starts(input_ids: torch.Tensor, separator: int) -> torch.Tensor:
    """Where each token's document begins in its row, [batch, sequence] int64: two tokens of a row share a document when these are equal."""
    index = torch.arange(input_ids.shape[1], device=input_ids.device)
    first = torch.zeros_like(input_ids, dtype=torch.bool)
    first[:, 1:] = input_ids[:, :-1] == separator
    return torch.where(first, index, 0).cummax(dim=1).values


def document_positions(input_ids: torch.Tensor, separator: int) -> torch.Tensor:
    """Positions that start again at 0 in every document, [batch, sequence] int64; the separator is the last token of its document."""
    return torch.arange(input_ids.shape[1], device=input_ids.device) - document_starts(input_ids, separator)


def next_token_labels(input_ids: torch.Tensor, separator: int | None = None) -> torch.Tensor:
    """The next token of every position, [..., sequence]; ignored at the last one and, with a ``separator``, wherever a document ends."""
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    labels[..., :-1] = input_ids[..., 1:]
    return labels if separator is None else labels.masked_fill_(input_ids == separator, IGNORE_INDEX)
