"""What each claim compares, and whether it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from paper_claims.arms import Result
from paper_claims.statistics import Interval, paired, rank_correlation

#: A difference that "as good as" and "does not help" leave room for, in nats per token (2 % of perplexity).
MARGIN = 0.02
#: A ranking has settled when its correlation with the last one stays at or above this.
SETTLED = 0.9

Results = Mapping[str, Mapping[int, Result]]


@dataclass(frozen=True)
class Claim:
    """One comparison. ``first`` is what the paper prefers; ``kind`` is ``better`` or ``as_good`` (no worse than by the margin)."""

    group: str
    statement: str
    first: str
    second: str
    suite: str = "toy"
    kind: str = "better"
    moment: str = "after training"


@dataclass(frozen=True)
class Row:
    """A claim with what was measured."""

    claim: Claim
    first_loss: float | None
    second_loss: float | None
    difference: Interval | None
    verdict: str


_LOGITS = "forward KL beats {} as the loss on logits"
#: Group → where the papers say it. P1 is arXiv 2407.14679, P2 is arXiv 2408.11796.
SOURCES = {
    "start": "P1 table 14: a pruned 4B model after 100 B tokens of distillation is ahead of one from random weights after 400 B",
    "distillation": "P1 tables 14 and 15: distillation beats training on labels",
    "loss": "P1 tables 15, 16: forward KL has the lowest loss, and is better without cross-entropy",
    "correction": "P2 section 4: a teacher first fine-tuned on the distillation data gives students with more than 6 % less loss",
    "states": "P1 tables 17, 18: a loss on hidden states helps after a hard cut in depth, not after a cut in width",
    "width": "P1 tables 1, 13: after retraining width pruning is ahead of depth pruning",
    "importance": "P1 section 2.2: activation scores choose what to keep; magnitude and random choices are the usual controls",
    "rounds": "P1 table 12: scoring once is as good as scoring in rounds once the model is retrained",
    "ranking": "P1 figure 9: the order of candidates changes during the first 300 steps and stays after them",
}

CLAIMS = [
    Claim("start", "pruned + distilled beats the same shape from scratch on labels", "width/forward_kl", "scratch/cross_entropy"),
    Claim("start", "pruned + distilled beats the same shape from scratch, distilled", "width/forward_kl", "scratch/forward_kl"),
    Claim("start", "pruned + distilled beats the same shape from scratch on labels", "width/forward_kl", "scratch/cross_entropy", "smollm2"),
    Claim("distillation", "distillation beats training on labels", "width/forward_kl", "width/cross_entropy"),
    Claim("distillation", "distillation (corrected teacher) beats training on labels", "width/forward_kl", "width/cross_entropy", "smollm2"),
    Claim("loss", _LOGITS.format("reverse KL"), "width/forward_kl", "width/reverse_kl"),
    Claim("loss", _LOGITS.format("reverse KL"), "width/forward_kl", "width/reverse_kl", "smollm2"),
    Claim("loss", _LOGITS.format("MSE"), "width/forward_kl", "width/mse"),
    Claim("loss", _LOGITS.format("cosine"), "width/forward_kl", "width/cosine"),
    Claim("loss", "KL alone beats KL + cross-entropy", "width/forward_kl", "width/kl+ce"),
    Claim("loss", "KL alone beats KL + cross-entropy", "width/forward_kl", "width/kl+ce", "smollm2"),
    Claim(
        "correction",
        "on a text new to the teacher, a corrected one is the better guide",
        "other_text/corrected/forward_kl",
        "other_text/original/forward_kl",
    ),
    Claim(
        "correction",
        "correcting the teacher before pruning and distilling pays",
        "width/forward_kl",
        "uncorrected/width/forward_kl",
        "smollm2",
    ),
    Claim("states", "half the layers gone: hidden states beside KL beat KL alone", "half_depth/kl+hidden", "half_depth/forward_kl"),
    Claim("states", "width cut: KL alone is as good as with hidden states", "width/forward_kl", "width/kl+hidden", kind="as_good"),
    Claim("width", "width beats depth at equal parameters", "width/forward_kl", "depth/forward_kl"),
    Claim("width", "width beats depth at nearly equal parameters", "width/forward_kl", "depth/forward_kl", "smollm2"),
]
CLAIMS += [
    Claim("importance", f"{better} beats {worse}", f"cut/{better}", f"cut/{worse}", suite, moment="right after the cut")
    for suite in ("toy", "smollm2")
    for better, worse in (("activation", "magnitude"), ("magnitude", "random"), ("activation", "random"))
]
CLAIMS += [
    Claim("importance", "activation beats random", "width/forward_kl", "random/forward_kl"),
    Claim("rounds", "one round is as good as 2", "cut/activation", "cut/rounds=2", kind="as_good", moment="right after the cut"),
    Claim("rounds", "one round is as good as 4", "cut/activation", "cut/rounds=4", kind="as_good", moment="right after the cut"),
    Claim("rounds", "one round is as good as 4", "width/forward_kl", "rounds=4/forward_kl", kind="as_good"),
]


def verdict(kind: str, difference: Interval | None) -> str:
    """``holds``, ``does not hold``, ``not separable here`` or ``not measured``, from an interval of first minus second (low is good).

    ``better`` holds when the interval lies below zero. ``as_good`` holds when it lies below the margin, and does not when it lies
    above zero and reaches over the margin.
    """
    if difference is None:
        return "not measured"
    bound = MARGIN if kind == "as_good" else 0.0
    if difference.high < bound:
        return "holds"
    return "does not hold" if difference.low > 0 else "not separable here"


def judge(claim: Claim, results: Results) -> Row:
    """One claim against the results of its suite."""
    sides = [{seed: result for seed, result in results.get(name, {}).items()} for name in (claim.first, claim.second)]
    seeds = sorted(set(sides[0]) & set(sides[1]))
    difference = paired(*({seed: side[seed].windows for seed in seeds} for side in sides))
    means = [sum(side[seed].loss for seed in seeds) / len(seeds) if seeds else None for side in sides]
    return Row(claim, means[0], means[1], difference, verdict(claim.kind, difference))


@dataclass(frozen=True)
class Ranking:
    """How the order of several shapes develops in one seed.

    ``correlation`` holds, per validation, Spearman's with the last order; ``settled`` is the step from which it stays high.
    """

    seed: int
    steps: list[int]
    losses: dict[str, list[float]]
    correlation: list[float]
    settled: int


def rankings(results: Results) -> list[Ranking]:
    """The development of the order of all ``shape/…`` arms, for every seed in which all of them are there."""
    shapes = sorted(name for name in results if name.startswith("shape/"))
    found = []
    for seed in sorted(set.intersection(*(set(results[name]) for name in shapes))) if len(shapes) > 2 else []:
        curves = {name.removeprefix("shape/"): results[name][seed].curve for name in shapes}
        steps = [int(point["step"]) for point in next(iter(curves.values()))]
        losses = {name: [point["loss"] for point in curve] for name, curve in curves.items()}
        orders = list(zip(*losses.values(), strict=True))
        correlation = [rank_correlation(order, orders[-1]) for order in orders]
        settled = len(steps) - 1
        while settled > 0 and correlation[settled - 1] >= SETTLED:
            settled -= 1
        found.append(Ranking(seed, steps, losses, correlation, steps[settled]))
    return found


def ranking_verdict(found: list[Ranking]) -> str:
    """Holds when in every seed the order before training was another one and settled in the first four fifths of the training.

    The last order agrees with itself by definition, hence the bound.
    """
    if not found:
        return "not measured"
    changed = [ranking.correlation[0] < SETTLED for ranking in found]
    early = [ranking.settled <= 0.8 * ranking.steps[-1] for ranking in found]
    if all(changed) and all(early):
        return "holds"
    return "does not hold" if not any(changed) or not any(early) else "not separable here"
