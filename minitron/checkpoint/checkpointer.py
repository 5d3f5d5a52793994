"""Training checkpoints: one folder a step, one safetensors file a rank, checksummed, renamed into place when whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minitron import dist
from minitron.errors import CheckpointError
from minitron.log import get_logger

logger = get_logger(__name__)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.sha256(handle.read()).hexdigest()


def random_state() -> dict[str, torch.Tensor]:
    """This rank's random generators as tensors."""
    state = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random/cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, torch.Tensor]) -> None:
    """Put this rank's random generators back."""
    if "random/cpu" in state:
        torch.set_rng_state(state["random/cpu"])
    if "random/cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random/cuda"])


class Checkpointer:
    """Saves and finds checkpoints ``step-<n>`` below a folder; keeps the newest ``keep``."""

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def _rank_file(self) -> str:
        return f"rank-{dist.rank():05d}-of-{dist.world_size():05d}.safetensors"

    def save(self, step: int, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        """Write a checkpoint beside its final place and rename it; every rank calls this with its own tensors.

        Raises:
            CheckpointError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        final, partial = self.folder / f"step-{step}", self.folder / f"step-{step}.partial"

        def make_room() -> None:
            if dist.is_main():
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)

        def write_share() -> None:
            path = partial / self._rank_file()
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, str(path))
            path.with_suffix(".sha256").write_text(file_digest(path))

        def finish() -> None:
            if dist.is_main():
                (partial / "state.json").write_text(json.dumps({"step": step, "world_size": dist.world_size(), **meta}))
                shutil.rmtree(final, ignore_errors=True)
                os.replace(partial, final)

        for part in (make_room, write_share, finish):
            failure = ""
            try:
                part()
            except (OSError, SafetensorError) as error:
                failure = str(error)
            if dist.any_rank(bool(failure)):  # also the barrier between the parts, so that one rank's failure stops all
                if dist.is_main():
                    shutil.rmtree(partial, ignore_errors=True)
                raise CheckpointError(f"the checkpoint of step {step} cannot be written to {self.folder}: {failure or 'another rank failed'}")
        if dist.is_main():
            self._drop_old(step)
        dist.barrier()

    def _drop_old(self, newest: int) -> None:
        """Keep the newest few. A later step than the newest is an unsound one that training has gone back behind."""
        earlier = [step for step in self.steps() if step <= newest]
        for step in self.steps():
            if step not in earlier[-self.keep :]:
                shutil.rmtree(self.folder / f"step-{step}", ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps of all whole checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        found = [re.fullmatch(r"step-(\d+)", entry.name) for entry in self.folder.iterdir()]
        return sorted(int(match.group(1)) for match in found if match)

    def metas(self) -> list[dict[str, Any]]:
        """What is written beside the tensors of all whole checkpoints; damaged ones are passed over."""
        found = []
        for step in self.steps():
            try:
                found.append(dict(json.loads((self.folder / f"step-{step}" / "state.json").read_text())))
            except (OSError, ValueError, TypeError):
                continue
        return found

    def load_latest(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The newest sound checkpoint of this rank, or None. Unsound ones are named in the log and passed over.

        Raises:
            CheckpointError: checkpoints exist, but were made on another number of ranks, or none of them is sound.
        """
        steps = self.steps()
        for step in reversed(steps):
            folder = self.folder / f"step-{step}"
            try:
                meta = json.loads((folder / "state.json").read_text())
                if meta["world_size"] != dist.world_size():
                    raise CheckpointError(
                        f"{folder} needs {meta['world_size']} processes, this run has {dist.world_size()}: start as many, or remove it"
                    )
                path = folder / self._rank_file()
                sound = path.with_suffix(".sha256").read_text() == file_digest(path)
                tensors = load_file(str(path)) if sound else {}
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                logger.warning("checkpoint %s is damaged (%s)", folder, error)
                sound, tensors, meta = False, {}, {}
            if not dist.any_rank(not sound):
                return tensors, meta
            logger.warning("checkpoint %s does not match its checksum; trying an older one", folder)
        if steps:
            raise CheckpointError(f"none of the checkpoints in {self.folder} is sound; remove that folder to start over")
        return None
