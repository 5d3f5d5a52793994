"""A stored teacher as the pair sees it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from minitron import dist
from minitron.core.sparse import with_tensors
from minitron.distill.cache.compress import decompress
from minitron.distill.cache.store import HEAD, CacheStore
from minitron.distill.signal import Said
from minitron.ops.head import Head, LogitTransform


class CachedSignal:
    """What a cache says about a batch: the teacher's hidden states and head, or sparse targets. No model is in memory."""

    def __init__(self, store: CacheStore) -> None:
        """Raises CheckpointError: the stored head is damaged."""
        self._store, header = store, store.header
        self.config: Any = None
        self.sparse = None if header.signal == "hidden_states" else header.signal
        self._head: Head | None = None
        if self.sparse is None:
            tensors = {name: tensor.to(dist.device()) for name, tensor in store.whole_file(HEAD).items()}
            self._head = Head(tensors["weight"], tensors.get("bias"), LogitTransform(header.scale, header.cap))

    def says(self, input_ids: torch.Tensor) -> Said:
        """About [batch, sequence] ids on the CPU.

        Raises:
            CheckpointError: a sequence is not in the cache, or its shard is damaged.
        """
        stored = {name: tensor.to(dist.device(), non_blocking=True) for name, tensor in self._store.read(input_ids).items()}
        if self.sparse is None:
            return Said(hidden=stored["hidden"])
        targets = decompress(stored, self._store.header.config, num_tokens=self._store.header.vocab_size)
        return Said(sparse=with_tensors(targets, lambda tensor: tensor.flatten(0, 1)))

    @contextmanager
    def head(self) -> Iterator[Head | None]:
        """The stored head."""
        yield self._head
