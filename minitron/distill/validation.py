"""Held-out loss and divergence of a student in training, through the same root as the training loss."""

from __future__ import annotations

import torch

from minitron import dist
from minitron.distill.pair import TeacherStudent
from minitron.ops.documents import next_token_labels
from minitron.ops.kd_loss import IGNORE_INDEX

#: Validation term → metric.
_METRICS = {
    "cross_entropy": "validation_loss",
    "forward_kl": "validation_kl",
    "forward_kl_top_k": "validation_kl_top_k",
    "forward_kl_samples": "validation_kl_samples",
    "agreement": "validation_agreement",
}


def validation_batches(sequences: torch.Tensor, *, micro_batch_size: int, separator: int | None = None) -> list[dict[str, torch.Tensor]]:
    """This rank's micro-batches of held-out sequences [num, length]; every rank gets equally many, inert ones fill up.

    With a ``separator`` nothing is predicted where a document ends.
    """
    world, rank = dist.world_size(), dist.rank()
    labels = next_token_labels(sequences, separator)
    missing = -len(sequences) % world
    if missing:
        sequences = torch.cat([sequences, sequences[:1].expand(missing, -1)])
        labels = torch.cat([labels, torch.full_like(labels[:1], IGNORE_INDEX).expand(missing, -1)])
    share = len(sequences) // world
    mine = slice(rank * share, (rank + 1) * share)
    pairs = zip(sequences[mine].split(micro_batch_size), labels[mine].split(micro_batch_size), strict=True)
    return [{"input_ids": ids, "labels": label} for ids, label in pairs]


def validate(pair: TeacherStudent, batches: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """``validation_loss``; with a teacher ``validation_kl`` and ``validation_agreement``, the share of tokens on which both models' first
    choices are the same. Means over all held-out tokens of all ranks."""
    tokens = torch.tensor(float(sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)))
    denominator = dist.all_reduce_sum(tokens).to(dist.device())
    sums: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for batch in batches:
            for name, value in pair.losses(batch, denominator, validate=True).items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value
    names = [name for name in _METRICS if name in sums]
    values = dist.all_reduce_sum(torch.stack([sums[name].float() for name in names])).tolist()
    return {_METRICS[name]: value for name, value in zip(names, values, strict=True)}
