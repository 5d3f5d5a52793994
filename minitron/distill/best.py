"""The best weights of a training by its validations, kept on disk through kills and restarts."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from minitron import dist
from minitron.checkpoint import Checkpointer
from minitron.errors import CheckpointError
from minitron.log import get_logger
from minitron.models.weights import write_weights

logger = get_logger(__name__)


def write_shared_weights(folder: Path, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Write whole weights on rank 0 while every rank iterates, because gathering a sharded one takes them all.

    Raises:
        CheckpointError: on every rank, when rank 0 cannot write.
    """
    failure = ""
    if dist.is_main():
        try:
            write_weights(folder, weights)
        except CheckpointError as error:
            failure = str(error)
    for weight in weights:  # all of them on other ranks, the rest after a failure
        del weight  # or it would stay while the next one is gathered
    if dist.any_rank(bool(failure)):
        raise CheckpointError(failure or f"weights cannot be written to {folder}: another rank failed")


class BestWeights:
    """Weights of the validation with the lowest divergence from the teacher, or the lowest loss where there is no teacher.

    They lie in ``best-<step>`` beside the checkpoints. What a kept checkpoint calls the best stays, so that a training that goes on from it has it.
    """

    def __init__(
        self, checkpointer: Checkpointer, weights: Callable[[], Iterator[tuple[str, torch.Tensor]]], *, describe: Callable[[Path], None]
    ) -> None:
        """``weights`` yields the whole weights of now; ``describe`` puts a config and a tokenizer beside them, so that any tool loads them."""
        self._checkpointer, self._weights, self._describe = checkpointer, weights, describe
        self.step: int | None = None
        self.metrics: dict[str, float] = {}

    def offer(self, step: int, metrics: dict[str, float]) -> None:
        """Keep the weights of now if their validation beats all before; every rank calls this with the same metrics."""
        if not _criterion(metrics) < _criterion(self.metrics):
            return
        final = self._folder(step)
        partial = final.with_name(f"{final.name}.partial")
        if dist.is_main():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        write_shared_weights(partial, self._weights())
        if dist.is_main():
            self._describe(partial)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
        self.step, self.metrics = step, dict(metrics)
        self.drop_old()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the step of the best validation and its metrics."""
        return {"step": self.step, "metrics": self.metrics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what a checkpoint called the best; an empty state begins anew.

        Raises:
            CheckpointError: its weights are gone.
        """
        self.step, self.metrics = state.get("step"), dict(state.get("metrics", {}))
        if self.step is not None and not self._folder(self.step).is_dir():
            raise CheckpointError(f"{self._folder(self.step)}, the best weights so far, is gone: remove {self._checkpointer.folder} to start over")
        self.drop_old()

    def drop_old(self) -> None:
        """Remove the weights that neither this training nor a kept checkpoint calls the best."""
        if not dist.is_main() or not self._checkpointer.folder.is_dir():
            return
        named = {self.step, *(meta.get("best", {}).get("step") for meta in self._checkpointer.metas())}
        for entry in self._checkpointer.folder.iterdir():
            found = re.fullmatch(r"best-(\d+)(\.partial)?", entry.name)
            if found and (found.group(2) or int(found.group(1)) not in named):
                shutil.rmtree(entry, ignore_errors=True)

    def copy_to(self, folder: Path) -> None:
        """A copy of the best model in a folder.

        Raises:
            CheckpointError: no validation gave a number.
        """
        if self.step is None:
            raise CheckpointError(
                "no validation of this training gave a finite loss, so that there are no best weights: lower training.learning_rate"
            )
        if dist.is_main():
            shutil.copytree(self._folder(self.step), folder, dirs_exist_ok=True)

    def _folder(self, step: int) -> Path:
        return self._checkpointer.folder / f"best-{step}"


def _criterion(metrics: dict[str, float]) -> float:
    """Lower is better; what is not a number beats nothing."""
    value = metrics.get("validation_kl", metrics.get("validation_loss", math.inf))
    return value if math.isfinite(value) else math.inf
