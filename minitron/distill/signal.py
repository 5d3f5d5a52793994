"""What a teacher says about a batch, whoever says it for him: the teacher himself, or what was stored of him."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from minitron.core.sparse import SparseTargets
from minitron.ops.head import Head


@dataclass(frozen=True)
class Said:
    """About a batch of [batch, sequence] tokens, on the device: ``hidden`` [batch, sequence, hidden], for the head, or ``sparse`` targets of its
    batch · sequence rows; and intermediate ``states`` where some were asked for."""

    hidden: torch.Tensor | None = None
    states: tuple[torch.Tensor, ...] = ()
    sparse: SparseTargets | None = None


class Signal(Protocol):
    """A teacher as the pair sees it."""

    #: The teacher's Hugging Face config; None where no loss that would ask for it is possible.
    config: Any
    #: The kind of sparse targets; None where hidden states are said.
    sparse: str | None

    def says(self, input_ids: torch.Tensor) -> Said:
        """About [batch, sequence] ids on the CPU."""

    def head(self) -> AbstractContextManager[Head | None]:
        """A context that yields the head for hidden states, its tensors whole; None where none is needed."""
