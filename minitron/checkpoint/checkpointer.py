"""Training checkpoints: one folder a step, one safetensors file a rank, checksummed, renamed into place when whole."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from minitron import dist
from minitron.checkpoint.files import read_document, sync_folder, write_document
from minitron.checkpoint.reading import Damaged, Wanted, read_checkpoint
from minitron.checkpoint.writing import HostCopies, Save
from minitron.core.share import Share
from minitron.errors import CheckpointError
from minitron.log import get_logger

logger = get_logger(__name__)

STATE = "state.json"
#: In a checkpoint that stays for good.
KEPT = "kept"

Foreign = Callable[[dict[str, Any], dict[str, tuple[int, ...]]], str]


def rank_file(rank: int, world_size: int) -> str:
    """The name of one rank's file."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


class Checkpointer:
    """Saves and finds checkpoints ``step-<n>`` below a folder; keeps the newest ``keep``, and every ``keep_every``-th step for good.

    A save returns when the state has been copied to host memory; ``poll`` after every step lets the ranks agree that it stands. All ranks call every
    method together.
    """

    def __init__(self, folder: Path, *, keep: int = 2, keep_every: int = 0) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self._copies = HostCopies()
        self._save: Save | None = None

    def save(
        self, step: int, tensors: dict[str, torch.Tensor], meta: dict[str, Any], *, shares: Mapping[str, Share] | None = None, wait: bool = True
    ) -> None:
        """Write a checkpoint beside its final place and rename it when every rank has written its own tensors.

        Args:
            shares: of every tensor that is a part of a whole, which part; a checkpoint of such tensors alone loads on any number of ranks. It has
                the same names on every rank, those too of which this one has nothing.
            wait: return only when the checkpoint stands. Otherwise errors are raised by a later call.

        Raises:
            CheckpointError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        self.finish()
        partial, shares = self.folder / f"step-{step}.partial", dict(shares or {})
        failure = ""
        if dist.is_main():
            try:
                self._make_room(partial)
            except OSError as error:
                failure = str(error)
        if dist.any_rank(bool(failure)):  # also the barrier before others write
            raise CheckpointError(f"the checkpoint of step {step} cannot be written to {self.folder}: {failure or 'another rank failed'}")
        kept = self.keep_every > 0 and step % self.keep_every == 0
        save = Save(step, dict(meta), partial, self._commit if dist.is_main() else None, kept)
        save.meta |= {"step": step, "world_size": dist.world_size()}
        save.tensors = {name: list(share.shape) for name, share in shares.items()}
        if dist.world_size() == 1:
            save.agreed.set()
        self._save = save
        save.start(partial / rank_file(dist.rank(), dist.world_size()), self._copies.take(tensors, shares), shares)
        if wait:
            self.finish()

    def poll(self) -> bool:
        """Whether a save has come to its end since the last call; one small collective while there is one, and no waiting.

        Raises:
            CheckpointError: it failed on some rank; earlier checkpoints are untouched.
        """
        save = self._save
        if save is None:
            return False
        told = dist.all_reduce_sum(torch.tensor([int(flag) for flag in (save.error is not None, save.wrote.is_set(), save.done.is_set())]))
        failed, wrote, done = told.tolist()
        if failed:
            self._give_up(save)
        if wrote == dist.world_size():
            save.agreed.set()
        if done == dist.world_size():
            self._save = None
        return self._save is None

    def finish(self) -> None:
        """Wait until the save at work stands.

        Raises:
            CheckpointError: as :meth:`poll`.
        """
        while self._save is not None:
            self._save.wait()
            self.poll()

    def _give_up(self, save: Save) -> None:
        save.abandon()
        self._save = None
        dist.barrier()
        if dist.is_main():
            shutil.rmtree(save.partial, ignore_errors=True)
        if save.error is not None and not isinstance(save.error, OSError):
            raise save.error
        reason = str(save.error) if save.error is not None else "another rank failed"
        raise CheckpointError(f"the checkpoint of step {save.step} cannot be written to {self.folder}: {reason}") from save.error

    def _make_room(self, partial: Path) -> None:
        """Remove what a killed process left, and make the folder to write into."""
        for entry in self.folder.glob("step-*.partial"):
            shutil.rmtree(entry, ignore_errors=True)
        partial.mkdir(parents=True)

    def _commit(self, save: Save) -> None:
        """Put a checkpoint that every rank has written in place. Runs in rank 0's thread."""
        final = self.folder / f"step-{save.step}"
        write_document(save.partial / STATE, {**save.meta, "tensors": save.tensors})
        if save.kept:
            (save.partial / KEPT).touch()
        sync_folder(save.partial)
        replaced = self.folder / f"step-{save.step}.replaced"
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(final, replaced)
        os.replace(save.partial, final)
        sync_folder(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)
        self._drop_old(save.step)

    def _drop_old(self, newest: int) -> None:
        """Keep the newest few. A later step than the newest is one that training has gone back behind."""
        passing = [step for step in self.steps() if not (self.folder / f"step-{step}" / KEPT).exists() or step > newest]
        earlier = [step for step in passing if step <= newest]
        for step in passing:
            if step not in earlier[-self.keep :]:
                shutil.rmtree(self.folder / f"step-{step}", ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps of all whole checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        found = [re.fullmatch(r"step-(\d+)", entry.name) for entry in self.folder.iterdir()]
        return sorted(int(match.group(1)) for match in found if match)

    def metas(self) -> list[dict[str, Any]]:
        """What is written beside the tensors of all whole checkpoints and of the one at work; damaged ones are passed over."""
        found = [self._save.meta] if self._save is not None else []
        for step in self.steps():
            try:
                found.append(read_document(self.folder / f"step-{step}" / STATE))
            except (OSError, ValueError):
                continue
        return found

    def load_latest(
        self, *, wanted: Wanted | None = None, foreign: Foreign = lambda meta, shapes: ""
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The newest sound checkpoint, as much of it as is this rank's, or None. Others are named in the log and passed over.

        Args:
            wanted: which numbers of a whole tensor, given its name and shape, this rank needs; they come in the shape of rows where they are whole
                ones. None: every rank gets what it has saved, and the number of ranks must be the same.
            foreign: why a checkpoint, given what was written beside its tensors and the shapes of these, does not belong here; empty when it does.

        Raises:
            CheckpointError: checkpoints exist, but were made on another number of ranks, or none of them can be used.
        """
        self.finish()
        steps, reasons = self.steps(), {}
        for step in reversed(steps):
            folder, reason, refusal = self.folder / f"step-{step}", "", ""
            tensors: dict[str, torch.Tensor] = {}
            meta: dict[str, Any] = {}
            try:
                meta = read_document(folder / STATE)
                shapes = {name: tuple(shape) for name, shape in meta.pop("tensors").items()}
                reason, saved = foreign(meta, shapes), int(meta["world_size"])
                if not reason and saved != dist.world_size() and (wanted is None or not shapes):
                    refusal = f"{folder} needs {saved} processes, this run has {dist.world_size()}: start as many, or remove it"
                elif not reason:
                    tensors = read_checkpoint([folder / rank_file(rank, saved) for rank in range(saved)], shapes, wanted)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, Damaged) as error:
                reason = f"damaged: {error}"
            if not dist.any_rank(bool(reason)):
                if refusal:
                    raise CheckpointError(refusal)
                return tensors, meta
            reasons[step] = reason or "damaged: another rank cannot read its share"
            logger.warning("checkpoint %s is passed over: %s", folder, reasons[step])
        if steps:
            told = "; ".join(f"step-{step}: {reason}" for step, reason in reasons.items())
            raise CheckpointError(f"none of the checkpoints in {self.folder} is sound ({told}); remove that folder to start over")
        return None


def discard(folder: Path) -> None:
    """Remove the checkpoints of a finished training, except those that are kept for good."""
    kept = {path.parent for path in folder.glob(f"step-*/{KEPT}")}
    for entry in _entries(folder):
        if entry not in kept:
            shutil.rmtree(entry, ignore_errors=True)
    if not kept:
        shutil.rmtree(folder, ignore_errors=True)


def _entries(folder: Path) -> Iterable[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
