"""Candidates in training, side by side: every micro-batch is taken by all of them before the next one is drawn, and held-out text likewise."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from minitron import dist
from minitron.core.candidate import Candidate
from minitron.core.manifest import write_text
from minitron.distill.training import OpenTraining
from minitron.errors import DivergenceError, Interrupted
from minitron.log import Progress, get_logger
from minitron.ops.kd_loss import IGNORE_INDEX

logger = get_logger(__name__)

#: Candidate and the folder for its checkpoints → its training, in place.
Open = Callable[[Candidate, Path], OpenTraining]


@dataclass
class Record:
    """What is known of a candidate; a file of its own. ``curve`` holds its evaluations."""

    name: str
    num_parameters: int
    status: str = "ok"
    reason: str | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)

    @property
    def reached(self) -> int:
        """The step of the last evaluation; -1 before the first."""
        return int(self.curve[-1]["step"]) if self.curve else -1

    @classmethod
    def read(cls, path: Path) -> Record | None:
        """The record in a file; None where there is none."""
        return cls(**json.loads(path.read_text())) if path.is_file() else None


class Trials:
    """The candidates that this process (or all ranks together) trains; records and checkpoints lie in a folder."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        *,
        open_training: Open,
        held_out: Sequence[dict[str, torch.Tensor]],
        folder: Path,
        group_size: int,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """``held_out`` are this rank's batches of one sequence each; ``group_size`` candidates are in memory at a time."""
        self.candidates = {candidate.name: candidate for candidate in candidates}
        self._open_training, self._held_out, self._stop = open_training, held_out, stop
        self.folder, self._group_size = folder, group_size
        self.records = {name: self._read(candidate) for name, candidate in self.candidates.items()}
        self._open: dict[str, OpenTraining] = {}
        self.held_out_tokens = int(dist.all_reduce_sum(torch.tensor(sum(int((b["labels"] != IGNORE_INDEX).sum()) for b in held_out))))

    def _read(self, candidate: Candidate) -> Record:
        found = asdict(known) if dist.is_main() and (known := Record.read(self._path(candidate.name))) is not None else None
        found = dist.broadcast_object(found)
        return Record(**found) if found is not None else Record(candidate.name, candidate.num_parameters)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _write(self, name: str) -> None:
        if dist.is_main():
            write_text(self._path(name), json.dumps(asdict(self.records[name])))

    def reach(self, names: Sequence[str], step: int, *, evaluations: Sequence[int], last: bool) -> None:
        """Train candidates until their evaluations up to ``step`` are there; after the ``last`` call for them nothing is kept but the records.

        Raises:
            Interrupted: a signal asked for a stop; what was reached is kept.
        """
        missing = [name for name in names if self.records[name].status == "ok" and self.records[name].reached < step]
        for start in range(0, len(missing), self._group_size):
            group = missing[start : start + self._group_size]
            self._train(group, step, [at for at in evaluations if at <= step])
            if last or len(missing) > self._group_size:
                for name in group:
                    self._close(name, forget=last)

    def drop(self, names: Sequence[str]) -> None:
        """Let go of candidates that will not go on, and of their checkpoints."""
        for name in names:
            self._close(name, forget=True)

    def _close(self, name: str, *, forget: bool) -> None:
        """Give a candidate's memory back; unless it is to be forgotten it goes on later from a checkpoint."""
        opened = self._open.pop(name, None)
        if opened is not None:
            if not forget and opened.progress.step > 0:
                opened.save()
        if forget and dist.is_main():
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _train(self, group: list[str], step: int, evaluations: list[int]) -> None:
        """One group, micro-batch by micro-batch. Those that a kill left behind catch up first."""
        for name in group:
            if name not in self._open:
                self._guard(name, lambda name=name: self._begin(name))  # type: ignore[misc]
        at_work = [name for name in group if name in self._open]
        if not at_work:
            return
        bar = Progress(f"rank {len(at_work)} candidates", total=step, done=min(self._open[name].progress.step for name in at_work))
        while at_work := [name for name in at_work if name in self._open]:
            now = min(self._open[name].progress.step for name in at_work)
            behind = [name for name in at_work if self._open[name].progress.step == now]
            due = [name for name in behind if now in evaluations and self.records[name].reached < now]
            if due:
                self._evaluate(due, now)
                losses = [self.records[name].curve[-1]["loss"] for name in due if self.records[name].status == "ok"]
                if now > bar.done and losses:
                    bar.advance(now - bar.done, f"best held-out loss {min(losses):.3f}")
                continue
            if now >= step:
                break
            self._take_step(behind)
            if self._stop() and now + 1 < step:
                self.save()
                raise Interrupted(f"ranking stopped at step {now + 1} of {step}; the same command goes on from there")

    def save(self) -> None:
        """Checkpoints of all that are at work, so that they can go on after a restart."""
        for opened in self._open.values():
            if opened.progress.step > 0:
                opened.save()

    def _begin(self, name: str) -> None:
        """Open a training; evaluations after its checkpoint will be made again."""
        record = self.records[name]
        self._open[name] = self._open_training(self.candidates[name], self.folder / name)
        record.curve = [point for point in record.curve if point["step"] <= self._open[name].progress.step]

    def _take_step(self, names: list[str]) -> None:
        """One optimiser step of each, in turn after every micro-batch."""
        waiting = list(names)
        while waiting:
            waiting = [name for name in waiting if self._guard(name, lambda name=name: self._advance(name))]  # type: ignore[misc]

    def _advance(self, name: str) -> bool:
        """Up to the next micro-batch or the end of the step; whether the step goes on."""
        return next(self._open[name].steps) is None

    def _guard(self, name: str, work: Callable[[], Any]) -> Any:
        """Do something for one candidate; running out of memory or numbers fails it, with its reason, and not the rest."""
        try:
            return work()
        except (DivergenceError, MemoryError, torch.OutOfMemoryError) as error:
            self._fail(name, str(error).splitlines()[0] if str(error) else type(error).__name__)
            return None

    def _fail(self, name: str, reason: str) -> None:
        record = self.records[name]
        record.status, record.reason = "failed", reason
        logger.warning("  candidate %s failed: %s", name, reason)
        self._write(name)
        self._close(name, forget=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.no_grad()
    def _evaluate(self, names: list[str], step: int) -> None:
        """The held-out losses of several candidates, sequence by sequence, and of all ranks' sequences."""
        sums = {name: torch.zeros(3, len(self._held_out) * dist.world_size()) for name in names}
        first, one = dist.rank() * len(self._held_out), torch.ones((), device=dist.device())
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        for batch in self._held_out:
            for name in names:
                if name in self._open:
                    found = self._guard(name, lambda name=name: self._open[name].pair.losses(batch, one, validate=True))  # type: ignore[misc]  # noqa: B023
                    if found is not None:
                        kl = next((value for term, value in found.items() if term.startswith("forward_kl")), torch.zeros_like(found["cross_entropy"]))
                        parts[name].append(torch.stack([found["cross_entropy"].float(), kl.float()]))
        for name in (name for name in names if name in self._open):
            if parts[name]:
                sums[name][:2, first : first + len(self._held_out)] = torch.stack(parts[name], dim=1).cpu()
            sums[name][2, first : first + len(self._held_out)] = torch.tensor([float((b["labels"] != IGNORE_INDEX).sum()) for b in self._held_out])
            self._note(name, step, dist.all_reduce_sum(sums[name]))

    def _note(self, name: str, step: int, sums: torch.Tensor) -> None:
        """One more point of a curve; a loss that is no number fails its candidate. ``sums``: loss, divergence and tokens [3, sequences]."""
        loss, kl, tokens = sums[:, sums[2] > 0].double()
        mean = float(loss.sum() / tokens.sum())
        if not math.isfinite(mean):
            self._fail(name, f"the held-out loss is {mean} after step {step}")
            return
        point = {"step": step, "tokens": self._open[name].progress.tokens, "loss": mean, "kl": float(kl.sum() / tokens.sum())}
        self.records[name].curve.append({**point, "sequences": [round(value, 6) for value in (loss / tokens).tolist()]})
        self._write(name)
