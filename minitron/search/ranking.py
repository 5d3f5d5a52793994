"""Ranking candidates by a short distillation each: every one sees the same tokens in the same order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from minitron.core.architecture import Architecture
from minitron.core.candidate import Candidate
from minitron.core.cost import ranking_flops
from minitron.core.options import option
from minitron.distill.settings import TrainingConfig
from minitron.errors import ConfigError, nearest
from minitron.evaluate import EvaluateConfig
from minitron.search.placement import Share
from minitron.search.race import Outcome, RaceRules, Rung, agreements, halving_rungs, losses_at, moved_to, race, replay, usual_steps
from minitron.search.statistics import kendall_tau, paired_gap
from minitron.search.trials import Record

METHODS = ("full", "halving")
PLACEMENTS = ("together", "apart")


@dataclass(frozen=True)
class RankingConfig:
    """Section ``ranking``. What is not given here follows ``training``."""

    method: str = option("full", "full: every candidate to the end; halving: the worst leave at every rung")
    num_steps: int = option(400, "optimiser steps of a candidate that stays to the end")
    learning_rate: float | None = option(None, "peak learning rate; null: as in training")
    batch_size: int | None = option(None, "sequences per step; null: as in training")
    num_warmup_steps: int | None = option(None, "warm-up steps; null: as in training")
    evaluate_every: int = option(50, "steps between held-out losses", recorded=True)
    num_validation_sequences: int = option(32, "held-out sequences of each")
    tasks: list[str] = option([], "tasks of the lm-eval harness that every candidate is asked at each evaluation, as evaluate.task_path, limit… say")
    eta: float = option(1.6, "halving: one candidate in so many stays at a rung")
    rungs: list[int] | None = option(
        None, "halving: steps of the rungs; null: a tenth, a fifth and two fifths of num_steps, none before the warm-up ends"
    )
    extrapolate: float = option(
        0.1, "halving: losses as they may be at the end, if each doubling of the steps brings this share of what the last one brought; 0: as they are"
    )
    rescue: float = option(0.0, "halving: share of the places that go to those whose loss falls fastest, beside extrapolate")
    stop_when_stable: bool = option(False, "stop when the order has settled: Kendall's tau of 0.9 three times, and a lead of two standard errors")
    placement: str = option(
        "together", "several processes: each candidate over all of them (together), or whole candidates shared out (apart)", recorded=True
    )
    task: str | None = option(
        None, "do a share of the candidates, e.g. 0/8; array: as the Slurm array says. Then once more without, to rank", recorded=True
    )
    from_tasks: bool = option(
        False, "rank what tasks have trained, and train nothing: a candidate that is not there after ranking.wait is named", recorded=True
    )
    wait: float = option(0.0, "seconds that a task waits for the others at a rung before it leaves; the same command goes on", recorded=True)
    together: int | None = option(None, "candidates trained side by side in one process; null: as many as fit into memory", recorded=True)
    share_head: int = option(
        4, "candidates for which the teacher's head is applied once, their activations in memory together; 1: each by itself", recorded=True
    )
    checkpoint_every: int = option(100, "steps between checkpoints of the candidates; 0: none", recorded=True)
    remember_teacher_bytes: float = option(
        2e9, "teacher states kept in memory, of the held-out text first, so that no group of candidates asks for them again", recorded=True
    )

    def training(self, base: TrainingConfig) -> TrainingConfig:
        """The training settings of one candidate."""
        given = {"learning_rate": self.learning_rate, "batch_size": self.batch_size, "num_warmup_steps": self.num_warmup_steps}
        changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        return replace(
            base,
            num_steps=self.num_steps,
            num_tokens=None,
            evaluate_every=self.evaluate_every,
            num_validation_sequences=self.num_validation_sequences,
            checkpoint_every=self.checkpoint_every,
            keep_checkpoints=1,
            keep_every=0,
            result="last",
            keep_best=False,
            phases=None,
            **changes,
        )

    def rules(self, num_candidates: int, *, num_warmup_steps: int, method: str | None = None) -> RaceRules:
        """How far candidates are trained and who goes on."""
        rungs: tuple[Rung, ...] = ()
        if (method or self.method) == "halving":
            steps = usual_steps(self.num_steps, first=num_warmup_steps) if self.rungs is None else self.rungs
            rungs = halving_rungs(num_candidates, steps, eta=self.eta)
        return RaceRules(self.num_steps, self.evaluate_every, rungs, self.rescue, self.stop_when_stable, self.extrapolate)

    def check(self, base: TrainingConfig) -> None:
        """Refuse what cannot work before anything is loaded.

        Raises:
            ConfigError: an unknown word, a number out of range, a rung inside the warm-up, a task that does not exist.
        """
        for name, value, known in (("method", self.method, METHODS), ("placement", self.placement, PLACEMENTS)):
            if value not in known:
                raise ConfigError(f"ranking.{name}={value} is unknown; {nearest(value, known)}")
        for name, number in (
            ("num_steps", self.num_steps),
            ("num_validation_sequences", self.num_validation_sequences),
            ("together", self.together),
            ("share_head", self.share_head),
        ):
            if number is not None and number < 1:
                raise ConfigError(f"ranking.{name}={number} must be at least 1")
        if self.eta <= 1.0:
            raise ConfigError(f"ranking.eta={self.eta} must be above 1: one candidate in eta stays at a rung")
        if not 0.0 <= self.extrapolate < 1.0:
            raise ConfigError(f"ranking.extrapolate={self.extrapolate} is not a share: give a number from 0 and below 1")
        if not 0.0 <= self.rescue < 1.0:
            raise ConfigError(f"ranking.rescue={self.rescue} is not a share: give a number from 0 and below 1")
        warmup = self.training(base).num_warmup_steps
        if self.rungs is not None:
            if not self.rungs or sorted(set(self.rungs)) != self.rungs or self.rungs[-1] >= self.num_steps or self.rungs[0] < 1:
                raise ConfigError(f"ranking.rungs={self.rungs} must rise and end below ranking.num_steps={self.num_steps}")
            if self.rungs[0] < warmup:
                raise ConfigError(f"ranking.rungs={self.rungs}: the first rung lies inside the warm-up of {warmup} steps, where losses say little")
        if self.task is not None:
            task_of(self.task)
            if self.from_tasks:
                raise ConfigError(f"ranking.task={self.task} trains a share, ranking.from_tasks=true ranks what all have come to: give one of them")

    def asking(self, evaluate: EvaluateConfig) -> dict[str, Any]:
        """What of the section ``evaluate`` decides the scores on tasks; nothing where none are asked."""
        return {"limit": evaluate.limit, "num_fewshot": evaluate.num_fewshot} if self.tasks else {}

    def deciding(self) -> dict[str, Any]:
        """What of this section decides the result beside the training settings."""
        found: dict[str, Any] = {"method": self.method, "num_validation_sequences": self.num_validation_sequences}
        if self.tasks:
            found |= {"tasks": self.tasks, "evaluate_every": self.evaluate_every}
        if self.method == "halving":
            found |= {"eta": self.eta, "rungs": self.rungs, "extrapolate": self.extrapolate, "rescue": self.rescue}
        if self.stop_when_stable or self.method == "halving":
            found |= {"stop_when_stable": self.stop_when_stable, "evaluate_every": self.evaluate_every}
        return found


def task_of(task: str) -> tuple[int, int]:
    """Number and count of a task, ``0/8`` or ``array`` (as Slurm's environment says).

    Raises:
        ConfigError: it cannot be read, or does not exist.
    """
    text = task
    if task == "array":
        names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")
        missing = [name for name in names if name not in os.environ]
        if missing:
            raise ConfigError(f"ranking.task=array needs {missing[0]} in the environment: submit a job array, or give a task such as 0/8")
        first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
        text = f"{int(os.environ[names[0]]) - first}/{os.environ[names[1]]}"
    number, slash, count = text.partition("/")
    if not (slash and number.isdigit() and count.isdigit()):
        raise ConfigError(f"ranking.task={task} is not of the form number/count, e.g. 0/8, or array")
    if not int(number) < int(count):
        raise ConfigError(f"ranking.task={task} does not exist: {count} tasks have the numbers 0 to {int(count) - 1}")
    return int(number), int(count)


def run_race(names: Sequence[str], rules: RaceRules, share: Share, *, only_mine: bool = False) -> tuple[Outcome, dict[str, Record]]:
    """The race as far as this worker can tell; ``only_mine`` leaves after the own share of the last decision.

    Raises:
        Interrupted: a signal asked for a stop, or the others are not there yet.
    """
    records: dict[str, Record] = {}
    curves = _Curves(records)

    def measure(alive: list[str], step: int) -> set[str]:
        hear = not (only_mine and step == rules.decisions[-1])
        return share.reach(alive, rules, step, records, hear=hear)

    return race(list(names), rules, curves=curves, measure=measure), records


class _Curves(dict[str, Any]):
    """The curves of records that are still being made."""

    def __init__(self, records: dict[str, Record]) -> None:
        super().__init__()
        self._records = records

    def __missing__(self, name: str) -> list[dict[str, Any]]:
        return self._records[name].curve if name in self._records else []


def ranking_rows(outcome: Outcome, records: dict[str, Record]) -> list[dict[str, Any]]:
    """One row a candidate, best first, failed ones last; curves without the losses of single sequences."""
    order = [*outcome.order, *(name for name in records if name not in outcome.order)]
    rows = []
    for name in order:
        record = records[name]
        points = [{key: value for key, value in point.items() if key != "sequences"} for point in record.curve]
        good, last = record.status == "ok", points[-1] if points else {"loss": None, "kl": None, "tokens": 0, "step": 0}
        rows.append(
            {
                **{key: value for key, value in asdict(record).items() if key != "curve"},
                "zero_shot_loss": points[0]["loss"] if points else None,
                "loss": last["loss"] if good else None,
                "kl": last["kl"] if good else None,
                "tokens": last["tokens"],
                "steps": last["step"],
                "curve": points,
            }
        )
    return rows


def only_row(candidate: Candidate) -> dict[str, Any]:
    """The row of a candidate that has no rival, and is not trained."""
    row = {"name": candidate.name, "num_parameters": candidate.num_parameters, "status": "ok", "reason": "the only candidate"}
    return row | {"zero_shot_loss": None, "loss": None, "kl": None, "tokens": 0, "steps": 0, "curve": []}


def ranking_summary(names: Sequence[str], rules: RaceRules, settings: RankingConfig, outcome: Outcome, records: dict[str, Record]) -> dict[str, Any]:
    """How the order came about: rungs, τ over the steps, the lead of the best, and what zero-shot ranking and halving would have said."""
    curves = {name: record.curve for name, record in records.items() if record.status == "ok"}
    finished = [name for name in outcome.order if outcome.steps[name] == max(outcome.steps.values())]
    reached = [step for step in rules.evaluations if finished and step <= outcome.steps[finished[0]]]
    summary: dict[str, Any] = {
        "method": settings.method,
        "rungs": [{"step": step, "kept": kept} for step, kept in outcome.survivors],
        "stopped_at": outcome.stopped_at,
        "tau": [{"step": step, "tau": tau} for step, tau in agreements(curves, finished, reached)],
    }
    if len(finished) > 1:
        last, first, second = reached[-1], *(_at(curves[name], reached[-1])["sequences"] for name in finished[:2])
        gap, error = paired_gap(first, second)
        zero = losses_at(curves, finished, 0)
        summary |= {"lead": {"gap": gap, "standard_error": error}, "zero_shot_tau": kendall_tau(zero, losses_at(curves, finished, last))}
    if settings.method == "full" and not rules.stop_when_stable and len(finished) == len(curves) > 2:
        summary["halving_replay"] = regret_of(list(curves), rules, curves, settings)
    return summary


def regret_of(names: Sequence[str], full: RaceRules, curves: dict[str, list[dict[str, Any]]], settings: RankingConfig) -> dict[str, Any]:
    """What halving would have chosen from the curves of a full run, at which share of its candidate-steps, and how much worse that is.

    Rungs lie at the evaluations that the full run made.
    """
    made = [step for step in full.evaluations if step > 0]
    rungs = halving_rungs(len(names), usual_steps(full.num_steps), eta=settings.eta) if len(made) > 1 else ()
    rules = replace(full, rungs=moved_to(made, rungs), rescue=settings.rescue, extrapolate=settings.extrapolate)
    outcome = replay(names, rules, curves=curves)
    ends = dict(zip(names, losses_at(curves, names, full.num_steps), strict=True))
    share = sum(outcome.steps.values()) / (len(names) * full.num_steps)
    return {"chosen": outcome.order[0], "regret": ends[outcome.order[0]] - min(ends.values()), "share_of_steps": share}


def _at(curve: Sequence[dict[str, Any]], step: int) -> dict[str, Any]:
    return next(point for point in curve if point["step"] == step)


def cost_of(
    shapes: dict[str, Architecture],
    teacher: Architecture,
    records: dict[str, Record],
    *,
    tokens_per_step: int,
    held_out_tokens: int,
    sequence_length: int,
    share_head: int,
) -> dict[str, float]:
    """FLOPs of the ranking as it went, side by side and with a teacher each, and of a full run with a teacher each."""
    done = [(shapes[name], max(record.reached, 0), len(record.curve)) for name, record in records.items()]
    options: dict[str, Any] = {"tokens_per_step": tokens_per_step, "held_out_tokens": held_out_tokens, "sequence_length": sequence_length}
    options["share_head"] = share_head
    most = max((steps, readings) for _, steps, readings in done)
    full = [(shape, *most) for shape, _, _ in done]
    return {
        **ranking_flops(teacher, done, **options),
        "full_independent": ranking_flops(teacher, full, **options)["independent"],
    }


def planned_cost(
    settings: RankingConfig, base: TrainingConfig, shapes: Sequence[Architecture], teacher: Architecture, *, sequence_length: int
) -> dict[str, float]:
    """FLOPs of a ranking before it is made, as :func:`cost_of`; ``tokens`` are those that candidates are trained on, all together.

    At a rung the shapes at the end of the list are taken to leave.
    """
    training = settings.training(base)
    rules = settings.rules(len(shapes), num_warmup_steps=training.num_warmup_steps)
    steps = [settings.num_steps] * len(shapes)
    for rung in reversed(rules.rungs):
        steps[rung.keep :] = [rung.step] * (len(shapes) - rung.keep)
    records = {
        str(number): Record(str(number), 0, curve=[{"step": at} for at in rules.evaluations if at <= most]) for number, most in enumerate(steps)
    }
    cost = cost_of(
        dict(zip(records, shapes, strict=True)),
        teacher,
        records,
        tokens_per_step=training.batch_size * sequence_length,
        held_out_tokens=settings.num_validation_sequences * sequence_length,
        sequence_length=sequence_length,
        share_head=settings.share_head,
    )
    return cost | {"tokens": float(sum(steps) * training.batch_size * sequence_length)}
