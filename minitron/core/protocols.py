"""What the rooms promise each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from minitron.core.share import Share


class Tracker(Protocol):
    """Receives metrics of a stage. Names are stable: ``loss``, ``tokens_per_second``, …"""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one step."""

    def close(self) -> None:
        """Flush and leave."""


class Engine(Protocol):
    """Owns precision, sharding and the optimiser step. The loop owns accumulation and the learning rate."""

    name: str
    compute_dtype: torch.dtype

    def prepare(self, root: nn.Module, *, blocks: list[nn.Module]) -> Callable[..., dict[str, torch.Tensor]]:
        """Wrap the trainable root module (whose forward returns the loss terms) and make its optimiser.

        ``blocks`` are the repeated layers inside it, the natural units of sharding. Parameters on the meta device are read from the source
        that is bound to their model, each rank its own share.
        """

    def prepare_frozen(self, teacher: nn.Module, *, blocks: list[nn.Module], placement: str) -> Callable[..., tuple[torch.Tensor, ...]]:
        """Place the frozen teacher: ``replicate`` it whole, ``shard`` it over the ranks and gather it block by block, or ``offload`` it."""

    def backward(self, loss: torch.Tensor, *, boundary: bool) -> None:
        """Add the gradient of a loss that is already divided by the global token count; ranks are *summed*, never averaged.

        ``boundary`` is True for the last micro-batch of an optimiser step.
        """

    def step(self, learning_rate: float) -> torch.Tensor:
        """Clip, update, clear the gradients. Returns the gradient norm before clipping as a 0-d tensor on the device.

        Where that is not finite nothing was updated; no host waits to find out.
        """

    def blame(self) -> str:
        """The parameter whose gradient was the first that is not finite in the last step, where that is known; waits for the device."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """This rank's share of weights and moments: ``weight/<parameter>`` and ``optimizer/<parameter>/<key>``, views of what is there."""

    def shares(self) -> dict[str, Share]:
        """Of every entry that any rank has in ``state_dict``, which numbers of the whole lie here; the same names on every rank."""

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """The inverse, from entries that hold the numbers which ``shares`` calls for, whichever engine has saved them."""

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole float32 weights of the root module by name, one at a time, on the CPU; every rank must iterate."""

    def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[list[torch.Tensor]]:
        """A context that yields these parameters, of the frozen or the trained module, whole, and lets go of them at its end."""


class WeightSource(Protocol):
    """Where the parameters of a model on the meta device come from; ``core/lazy.py`` binds one to its model."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows from ``start`` to ``stop`` (None: all that follow) of a parameter by its name in memory, on the CPU."""

    def close(self) -> None:
        """Let go of what is open; a later read opens it again."""


class RowLoss(Protocol):
    """A loss on logits, row by row; the chunked walk over the heads calls it."""

    needs_teacher: bool

    def __call__(
        self, student_logits: torch.Tensor, teacher_logits: torch.Tensor | None, labels: torch.Tensor, *, temperature: float, gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Value [rows] and gradient with respect to the student logits [rows, vocab] (None unless asked for), both float32."""


class StageModule(Protocol):
    """A module in ``minitron/stages/``: a verb that reads folders and writes one."""

    FOLDER: str
    SECTIONS: tuple[str, ...]
    HELP: str

    def inputs(self, context: Any) -> dict[str, Any]:
        """Name → folder (or fingerprint) that this stage reads."""

    def run(self, context: Any, out: Any) -> dict[str, Any]:
        """Do the work, write into the folder ``out`` and return the results for the manifest."""
