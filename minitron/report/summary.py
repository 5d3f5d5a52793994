"""The few numbers that tell the story: size before and after, quality lost and won back, what it took."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from minitron.report.formats import count, finite, number, percent
from minitron.report.reader import Run, as_dict

#: The models of a run, in the order in which they come to be.
MODELS = ("teacher", "pruned", "student")


@dataclass(frozen=True)
class Summary:
    """Headline numbers; None where the run does not know."""

    parameters_before: float | None
    parameters_after: float | None
    tokens: float | None
    wall_seconds: float | None
    losses: dict[str, float] = field(default_factory=dict)
    perplexities: dict[str, float] = field(default_factory=dict)
    speedup: float | None = None

    @property
    def kept(self) -> float | None:
        """Share of the parameters that is left."""
        if not self.parameters_before or self.parameters_after is None:
            return None
        return self.parameters_after / self.parameters_before

    @property
    def repaired(self) -> float | None:
        """(pruned loss − student loss) / (pruned loss − teacher loss); None when pruning did no damage worth the name."""
        if not all(model in self.losses for model in MODELS):
            return None
        damage = self.losses["pruned"] - self.losses["teacher"]
        return (self.losses["pruned"] - self.losses["student"]) / damage if damage > 1e-3 else None

    def to_dict(self) -> dict[str, Any]:
        """The numbers as plain JSON."""
        return {**asdict(self), "kept": self.kept, "repaired": self.repaired}

    def sentences(self) -> str:
        """The story in two or three sentences; empty when there is nothing to tell."""
        told: list[str] = []
        last = "student" if "student" in self.perplexities or self.repaired is not None else "model"
        if self.kept is not None:
            told.append(
                f"A teacher of {count(self.parameters_before)} parameters became a {last} of {count(self.parameters_after)}, "
                f"{percent(self.kept)} of its size."
            )
        elif self.parameters_after is not None:
            told.append(f"The new model has {count(self.parameters_after)} parameters.")
        values = {model: number(value) for model, value in self.perplexities.items()}
        if "teacher" in values and "pruned" in values:
            verb = "raised" if self.perplexities["pruned"] >= self.perplexities["teacher"] else "lowered"
            stop = ";" if "student" in values else "."
            told.append(f"Pruning {verb} its held-out perplexity from {values['teacher']} to {values['pruned']}{stop}")
            if "student" in values:
                told.append(self._outcome(values["student"]))
        elif "teacher" in values and "student" in values:
            told.append(f"Held-out perplexity went from {values['teacher']} to {values['student']}.")
        if self.speedup is not None and "student" in self.perplexities and abs(self.speedup - 1) >= 0.05:
            told.append(
                f"It writes {self.speedup:.1f} times as fast." if self.speedup >= 1 else f"It writes at {percent(self.speedup)} of the speed."
            )
        return " ".join(told)

    def _outcome(self, student: str) -> str:
        share = self.repaired
        if share is None:
            return f"after distillation it is {student}."
        if share < 0:
            return f"distillation made it worse, {student}."
        if share > 1:
            return f"distillation brought it to {student}, better than the teacher."
        return f"distillation brought it to {student} and repaired {percent(share, digits=0)} of the damage."


def evaluated(run: Run) -> dict[str, dict[str, Any]]:
    """Evaluation results per model, in the order in which models come to be; unknown ones last."""
    found = {name: as_dict(value) for name, value in run.evaluation.items() if as_dict(value)}
    order = ("teacher", "corrected_teacher", "pruned", "sparse", "student")
    return {name: found[name] for name in sorted(found, key=lambda name: order.index(name) if name in order else len(order))}


def style_of(model: str) -> str:
    """The colour class of a model; any kind of teacher is a teacher."""
    return "teacher" if model.endswith("teacher") else model if model in ("pruned", "student", "sparse") else "other"


def batches_of(speed: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Batch size → what was timed with it."""
    rows = speed.get("batches")
    known = [as_dict(row) for row in rows] if isinstance(rows, list) else []
    return {int(size): row for row in known if (size := finite(row.get("batch_size"))) is not None}


def _speedup(models: dict[str, dict[str, Any]]) -> float | None:
    """How many times as fast as the first timed model the last one writes, in the smallest batch."""
    timed = [batches_of(as_dict(row.get("speed"))) for row in models.values() if row.get("speed")]
    if len(timed) < 2 or not timed[0]:
        return None
    size = min(timed[0])
    first, last = (finite(as_dict(rows.get(size)).get("tokens_per_second")) for rows in (timed[0], timed[-1]))
    return last / first if first and last else None


def _total(run: Run, key: str) -> float | None:
    values = [finite(stage.manifest.get(key)) for stage in run.stages]
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def summarise(run: Run) -> Summary:
    """The headline numbers of a run."""
    models = evaluated(run)
    losses, perplexities = {}, {}
    for name, values in models.items():
        loss, perplexity = finite(values.get("loss")), finite(values.get("perplexity"))
        if loss is None and perplexity is not None and perplexity > 0:
            loss = math.log(perplexity)
        if perplexity is None and loss is not None and loss < 700:
            perplexity = math.exp(loss)
        if loss is not None:
            losses[name] = loss
        if perplexity is not None:
            perplexities[name] = perplexity
    results = run.winner.results if run.winner else {}
    before = models.get("teacher", {}).get("num_parameters", results.get("teacher_num_parameters"))
    after = [models.get(name, {}).get("num_parameters") for name in ("student", "pruned")]
    after += [results.get("num_parameters"), run.candidate(run.winner_name).get("num_parameters")]
    return Summary(
        parameters_before=finite(before),
        parameters_after=next((value for value in map(finite, after) if value is not None), None),
        tokens=_total(run, "tokens"),
        wall_seconds=_total(run, "wall_seconds"),
        losses=losses,
        perplexities=perplexities,
        speedup=_speedup(models),
    )
