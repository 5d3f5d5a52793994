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
from torch import nn

from minitron import dist
from minitron.core.candidate import Candidate
from minitron.core.manifest import write_text
from minitron.distill.loop import Asked
from minitron.distill.pair import losses_together
from minitron.distill.training import OpenTraining
from minitron.errors import DivergenceError, Interrupted, LaunchError
from minitron.log import Progress, get_logger
from minitron.ops.kd_loss import IGNORE_INDEX

logger = get_logger(__name__)

#: Candidate and the folder for its checkpoints → its training, in place.
Open = Callable[[Candidate, Path], OpenTraining]
#: What fails one candidate and not the rest.
_FAILURES = (DivergenceError, MemoryError, torch.OutOfMemoryError)


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
        share_head: int = 1,
        ask: Callable[[nn.Module, str], dict[str, Any]] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """``held_out`` are this rank's batches of one sequence each; ``group_size`` candidates are in memory at a time, and for ``share_head`` of
        them the teacher's head is applied once, their activations being in memory together; ``ask`` scores a student at every evaluation."""
        self.candidates = {candidate.name: candidate for candidate in candidates}
        self._open_training, self._held_out, self._stop = open_training, held_out, stop
        self.folder, self._group_size, self._share_head = folder, group_size, share_head
        self._agreement, self._ask = dist.Agreement(), ask
        self.records = {name: self._read(candidate) for name, candidate in self.candidates.items()}
        self._open: dict[str, OpenTraining] = {}
        self.held_out_tokens = int(dist.all_reduce_sum(torch.tensor(sum(int((b["labels"] != IGNORE_INDEX).sum()) for b in held_out))))

    def _read(self, candidate: Candidate) -> Record:
        found = asdict(known) if dist.is_main() and (known := Record.read(self._path(candidate.name))) is not None else None
        found = dist.broadcast_object(found)
        return Record(**found) if found is not None else Record(candidate.name, candidate.num_parameters)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _write(self, name: str, *, whoever: bool = False) -> None:
        if dist.is_main() or whoever:
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
        """One optimiser step of each, in turn after every micro-batch; the losses of ``share_head`` of them are computed together."""
        asked = {name: item for name in names if isinstance(item := self._guard(name, lambda name=name: self._advance(name)), Asked)}  # type: ignore[misc]
        while asked:
            waiting, asked = asked, {}
            for group in self._shares(list(waiting)):
                answers = self._together(group, waiting[group[0]], validate=False) or {}
                for name in group:
                    item = self._guard(name, lambda name=name: self._advance(name, answers.pop(name, None)))  # type: ignore[misc]  # noqa: B023
                    if isinstance(item, Asked):
                        asked[name] = item

    def _advance(self, name: str, losses: dict[str, torch.Tensor] | None = None) -> Any:
        """Up to the next micro-batch or the end of the step, from the losses of the last one asked for where they are known."""
        return self._open[name].steps.send(losses)

    def _shares(self, names: list[str]) -> list[list[str]]:
        """Candidates as they meet at the teacher's head."""
        return [names[start : start + self._share_head] for start in range(0, len(names), self._share_head)]

    def _together(self, names: list[str], asked: Asked, *, validate: bool) -> dict[str, dict[str, torch.Tensor]] | None:
        """The losses of several candidates, the teacher's head applied once; None where each is to be computed by itself.

        So it is when they do not fit into memory together, from then on, and when one of them fails otherwise, to find out which.
        """
        if len(names) == 1:
            return None
        pairs = [self._open[name].pair for name in names]
        try:
            found, reason = self._attempt(lambda: losses_together(pairs, asked.batch, asked.denominator, validate=validate))
        except dist.NoAgreement as alone:
            told = f"{len(names)} candidates at once failed on rank {dist.rank()} alone ({alone}), where the other ranks cannot do without it"
            raise LaunchError(f"{told}; ranking.share_head=1 takes them one by one") from alone
        if reason is None:
            return dict(zip(names, found, strict=True))
        logger.warning("  %d candidates do not go together (%s): each by itself from here on", len(names), reason)
        self._share_head = 1
        self._free()
        return None

    def _attempt(self, work: Callable[[], Any]) -> tuple[Any, str | None]:
        """What work gives, and None; or why it has failed, here or on another rank."""
        try:
            result, reason = work(), None
        except _FAILURES as error:
            result, reason = None, str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = self._agreement.told(reason)
        return (result if reason is None else None), reason

    def _guard(self, name: str, work: Callable[[], Any]) -> Any:
        """Do something for one candidate; running out of memory or numbers, on any rank, fails it with its reason, and not the rest.

        Raises:
            LaunchError: it has failed on this rank in the middle of something that the others cannot leave.
        """
        try:
            result, reason = self._attempt(work)
        except dist.NoAgreement as alone:
            self.records[name].status, self.records[name].reason = "failed", str(alone)
            self._write(name, whoever=True)
            told = f"candidate {name} failed on rank {dist.rank()} alone ({alone}), where the other ranks cannot do without it"
            raise LaunchError(f"{told}; it is recorded as failed, and the same command goes on with the rest") from alone
        if reason is not None:
            self._fail(name, reason)
        return result

    def _fail(self, name: str, reason: str) -> None:
        record = self.records[name]
        record.status, record.reason = "failed", reason
        logger.warning("  candidate %s failed: %s", name, reason)
        self._write(name)
        self._close(name, forget=True)
        self._free()

    @staticmethod
    def _free() -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.no_grad()
    def _evaluate(self, names: list[str], step: int) -> None:
        """The held-out losses of several candidates, sequence by sequence, and of all ranks' sequences."""
        sums = {name: torch.zeros(3, len(self._held_out) * dist.world_size()) for name in names}
        first, one = dist.rank() * len(self._held_out), torch.ones((), device=dist.device())
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        for batch in self._held_out:
            for group in self._shares([name for name in names if name in self._open]):
                together = self._together(group, Asked(batch, one), validate=True)
                for name in group:
                    pair = self._open[name].pair
                    found = together[name] if together else self._guard(name, lambda: pair.losses(batch, one, validate=True))  # noqa: B023
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
        point: dict[str, Any] = {"step": step, "tokens": self._open[name].progress.tokens, "loss": mean, "kl": float(kl.sum() / tokens.sum())}
        if self._ask is not None:
            student = self._open[name].run.student
            point["tasks"] = self._ask(student.eval(), name)
            student.train()
        self.records[name].curve.append({**point, "sequences": [round(value, 6) for value in (loss / tokens).tolist()]})
        self._write(name)
