"""Who goes on: the full run, successive halving, and when an order is settled. Held-out losses alone decide, so it can be replayed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minitron.search.statistics import kendall_tau, paired_gap

#: An order is settled when it agreed this often in a row, so well, and the best leads by so many standard errors.
_AGREEMENTS, _AGREEMENT, _ERRORS = 3, 0.9, 2.0
#: Rungs lie after these shares of the steps.
RUNG_SHARES = (0.1, 0.2, 0.4)

#: One evaluation: ``step``, ``tokens``, ``loss``, ``kl`` and the loss of every held-out sequence (``sequences``).
Point = Mapping[str, Any]


@dataclass(frozen=True)
class Rung:
    """After ``step`` steps, ``keep`` candidates go on."""

    step: int
    keep: int


@dataclass(frozen=True)
class RaceRules:
    """How far candidates are trained and who goes on; ``rungs`` empty means that all do; ``rescue`` and ``extrapolate`` as :func:`promoted` says."""

    num_steps: int
    evaluate_every: int
    rungs: tuple[Rung, ...] = ()
    rescue: float = 0.0
    stop_when_stable: bool = False
    extrapolate: float = 0.0

    @property
    def evaluations(self) -> list[int]:
        """Steps at which held-out losses are measured: the start, every few steps, the rungs, half-way to them where that is asked for, the end."""
        regular = range(self.evaluate_every, self.num_steps, self.evaluate_every) if self.evaluate_every > 0 else ()
        halves = [rung.step // 2 for rung in self.rungs if self.extrapolate > 0.0]
        return sorted({0, *regular, *halves, *(rung.step for rung in self.rungs), self.num_steps})

    @property
    def decisions(self) -> list[int]:
        """Steps at which somebody may be told to stop."""
        return self.evaluations[1:] if self.stop_when_stable else sorted({*(rung.step for rung in self.rungs), self.num_steps})


@dataclass
class Outcome:
    """``order`` is best first; ``steps`` how far each was trained; ``stopped_at`` is set where the order settled before the end."""

    order: list[str] = field(default_factory=list)
    steps: dict[str, int] = field(default_factory=dict)
    survivors: list[tuple[int, list[str]]] = field(default_factory=list)
    stopped_at: int | None = None


def usual_steps(num_steps: int, *, first: int = 1) -> list[int]:
    """Steps of rungs: a tenth, a fifth and two fifths of all, none before ``first``.

    With one in 1.6 going on at each the best one is hardly ever lost on recorded searches (docs/benchmarks/search.md); where most are sent home by
    a sixth or a third of the steps it often is, since early orders turn.
    """
    return sorted({step for share in RUNG_SHARES if max(first, 1) <= (step := round(share * num_steps)) < num_steps})


def halving_rungs(num_candidates: int, steps: Sequence[int], *, eta: float) -> tuple[Rung, ...]:
    """Successive halving (Jamieson and Talwalkar 2016): one candidate in ``eta`` goes on at each of ``steps``, two at least.

    20 candidates, 400 steps, η = 1.6: 40 steps → 12, 80 → 8, 160 → 5.
    """
    return tuple(Rung(step, max(2, round(num_candidates / eta**number))) for number, step in enumerate(steps, start=1))


def moved_to(evaluations: Sequence[int], rungs: Sequence[Rung]) -> tuple[Rung, ...]:
    """The rungs at the nearest of ``evaluations`` before the last one, where only these were made."""
    return tuple(Rung(min(evaluations[:-1], key=lambda step: abs(step - rung.step)), rung.keep) for rung in rungs)


def losses_at(curves: Mapping[str, Sequence[Point]], names: Sequence[str], step: int) -> list[float]:
    """The held-out losses at an evaluation; infinite where a curve does not reach it."""
    found = [next((float(point["loss"]) for point in curves[name] if point["step"] == step), math.inf) for name in names]
    return [loss if math.isfinite(loss) else math.inf for loss in found]


def extrapolated(curves: Mapping[str, Sequence[Point]], names: Sequence[str], step: int, *, num_steps: int, share: float) -> list[float]:
    """The losses that candidates at ``step`` may end with: each doubling of the steps still to come brings ``share`` of what the last one brought.

    The last doubling is measured from the latest evaluation after the start and no later than half of ``step``; where there is none, losses stay
    as they are. Cut widths begin high and fall for long, cut depth begins low and stays: early losses alone favour the latter.
    """
    now = losses_at(curves, names, step)
    earlier = [point["step"] for point in curves[names[0]] if 0 < point["step"] <= step / 2] if names else []
    if not earlier or not share:
        return now
    doublings, before = math.log2(num_steps / step), losses_at(curves, names, max(earlier))
    return [loss - share * doublings * (then - loss) if math.isfinite(then) else loss for loss, then in zip(now, before, strict=True)]


def promoted(
    curves: Mapping[str, Sequence[Point]], alive: Sequence[str], rung: Rung, *, rescue: float, num_steps: int = 0, extrapolate: float = 0.0
) -> list[str]:
    """Who goes on after a rung: the lowest losses, extrapolated to ``num_steps`` with the share ``extrapolate`` (:func:`extrapolated`), and on the
    share ``rescue`` of the places whoever of the rest falls fastest."""
    now = dict(zip(alive, losses_at(curves, alive, rung.step), strict=True))
    ahead = dict(zip(alive, extrapolated(curves, alive, rung.step, num_steps=num_steps, share=extrapolate), strict=True))
    ranked = sorted(alive, key=lambda name: (ahead[name], name))
    keep = min(rung.keep, len(alive))
    num_rescued = min(round(rescue * keep), keep - 1)
    sure, rest = ranked[: keep - num_rescued], ranked[keep - num_rescued :]

    def fall(name: str) -> float:
        before = [point for point in curves[name] if 0 < point["step"] < rung.step] or [point for point in curves[name] if point["step"] < rung.step]
        return (now[name] - float(before[-1]["loss"])) / (rung.step - before[-1]["step"]) if before else 0.0

    late = sorted(rest, key=lambda name: (fall(name), now[name], name))[:num_rescued]
    return [name for name in alive if name in {*sure, *late}]


def agreements(curves: Mapping[str, Sequence[Point]], names: Sequence[str], evaluations: Sequence[int]) -> list[tuple[int, float]]:
    """Kendall's τ between every evaluation after the start and the one before it."""
    each = [losses_at(curves, names, step) for step in evaluations]
    return [(evaluations[i], kendall_tau(each[i - 1], each[i])) for i in range(1, len(evaluations)) if evaluations[i - 1] > 0]


def settled(curves: Mapping[str, Sequence[Point]], names: Sequence[str], evaluations: Sequence[int]) -> bool:
    """Whether the order of the last evaluations agrees and the best one's lead is no accident of the held-out text."""
    taus = [tau for _, tau in agreements(curves, names, evaluations)]
    if len(names) < 2 or len(taus) < _AGREEMENTS or min(taus[-_AGREEMENTS:]) < _AGREEMENT:
        return False
    last = losses_at(curves, names, evaluations[-1])
    first, second = sorted(range(len(names)), key=last.__getitem__)[:2]
    sequences = [next(point["sequences"] for point in curves[names[i]] if point["step"] == evaluations[-1]) for i in (first, second)]
    gap, error = paired_gap(*sequences)
    return gap > _ERRORS * error


def race(names: Sequence[str], rules: RaceRules, *, curves: Mapping[str, Sequence[Point]], measure: Callable[[list[str], int], set[str]]) -> Outcome:
    """Run the rules. ``measure(names, step)`` sees to it that the curves of these candidates reach a step, and returns those that failed."""
    outcome, alive = Outcome(), list(names)
    dropped: list[list[str]] = []
    rungs = {rung.step: rung for rung in rules.rungs}
    for step in rules.decisions:
        failed = measure(alive, step)
        alive = [name for name in alive if name not in failed]
        outcome.steps |= dict.fromkeys(alive, step)
        if step in rungs and len(alive) > rungs[step].keep:
            stay = promoted(curves, alive, rungs[step], rescue=rules.rescue, num_steps=rules.num_steps, extrapolate=rules.extrapolate)
            dropped.append(_by_loss(curves, [name for name in alive if name not in stay], step))
            alive = stay
            outcome.survivors.append((step, list(stay)))
        reached = [at for at in rules.evaluations if at <= step]
        if not alive or (rules.stop_when_stable and step < rules.num_steps and settled(curves, alive, reached)):
            outcome.stopped_at = step if alive else None
            break
    last = outcome.steps[alive[0]] if alive else 0
    outcome.order = [*_by_loss(curves, alive, last), *(name for group in reversed(dropped) for name in group)]
    return outcome


def _by_loss(curves: Mapping[str, Sequence[Point]], names: Sequence[str], step: int) -> list[str]:
    return [name for _, name in sorted(zip(losses_at(curves, names, step), names, strict=True))]


def replay(names: Sequence[str], rules: RaceRules, *, curves: Mapping[str, Sequence[Point]]) -> Outcome:
    """What the rules would have done, from curves that reach the end."""
    return race(names, rules, curves=curves, measure=lambda alive, step: set())
