"""Batches of one optimiser step, shared out over ranks and cut into micro-batches."""

from __future__ import annotations

from typing import Any

import torch

from minitron.data.stream import SequenceStream
from minitron.errors import ConfigError
from minitron.ops.documents import next_token_labels


def check_share(batch_size: int, *, world_size: int, where: str) -> None:
    """Refuse a batch that the ranks cannot share equally; ``where`` is the section that gives it.

    Raises:
        ConfigError: the number of ranks does not divide the batch.
    """
    if batch_size % world_size:
        usable = max(1, round(batch_size / world_size)) * world_size
        raise ConfigError(
            f"{where}.batch_size={batch_size} sequences cannot be shared equally by {world_size} ranks: the nearest usable value is {usable}"
        )


class GlobalBatches:
    """Draws the sequences of one optimiser step and keeps this rank's share of them.

    Every rank walks the same stream and keeps a contiguous block, so the global batch is the same for any number of ranks.
    """

    def __init__(
        self,
        stream: SequenceStream,
        *,
        batch_size: int,
        micro_batch_size: int | None,
        rank: int,
        world_size: int,
        separator: int | None = None,
    ) -> None:
        """``batch_size`` counts sequences of all ranks; ``micro_batch_size`` those of one forward pass (None: the rank's whole share).

        With a ``separator`` nothing is predicted where a document ends.

        Raises:
            ConfigError: a size below 1, or a batch that the ranks cannot share equally.
        """
        if batch_size < 1:
            raise ConfigError(f"training.batch_size={batch_size} must be at least 1")
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ConfigError(f"training.micro_batch_size={micro_batch_size} must be at least 1, or null for a rank's whole share")
        check_share(batch_size, world_size=world_size, where="training")
        self._stream, self._batch_size, self._rank, self._separator = stream, batch_size, rank, separator
        self._share = batch_size // world_size
        self._micro = min(micro_batch_size or self._share, self._share)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one step, the same on every rank."""
        return -(-self._share // self._micro)

    def next(self) -> list[dict[str, torch.Tensor]]:
        """This rank's micro-batches of the next step: input_ids and already shifted labels, int64 [micro, sequence] each; the last may be smaller."""
        first = self._rank * self._share
        drawn = [self._stream.next() for _ in range(self._batch_size)]
        share = torch.stack(drawn[first : first + self._share])
        micro_batches = [share[start : start + self._micro] for start in range(0, self._share, self._micro)]
        return [{"input_ids": ids, "labels": next_token_labels(ids, self._separator)} for ids in micro_batches]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, plain JSON and equal on every rank."""
        return {"stream": self._stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the batch after the one the state was taken at."""
        self._stream.load_state_dict(state["stream"])
