"""Finished parts of a sparsification on disk: checkpoints with checksums, which any number of ranks reads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from minitron import dist
from minitron.checkpoint import Checkpointer
from minitron.core.share import whole

Tensors = dict[str, torch.Tensor]


class Store:
    """Parts by name below a folder. Every rank has every part; they share the writing out."""

    def __init__(self, folder: Path, origin: str) -> None:
        """``origin``: what the parts depend on; those of another one are passed over with a line in the log."""
        self._folder, self._origin = folder, origin

    def save(self, name: str, tensors: Tensors, **meta: Any) -> None:
        """Keep a part, alike on all ranks.

        Raises:
            CheckpointError: the disk is full or not writable.
        """
        shares = {key: whole(tensor.shape, copy=dist.rank(), num_copies=dist.world_size()) for key, tensor in tensors.items()}
        Checkpointer(self._folder / name, keep=1).save(1, tensors, {**meta, "origin": self._origin}, shares=shares)

    def has(self, name: str) -> bool:
        """Whether there is such a part, sound or not."""
        return bool(Checkpointer(self._folder / name).steps())

    def load(self, name: str) -> tuple[Tensors, dict[str, Any]] | None:
        """A part and what was written beside it; None where there is none yet.

        Raises:
            CheckpointError: it is damaged, or of another origin.
        """
        return Checkpointer(self._folder / name, keep=1).load_latest(
            wanted=lambda key, shape: (0, math.prod(shape)),
            foreign=lambda meta, shapes: "" if meta.get("origin") == self._origin else "it was made from another model, text or configuration",
        )
