"""The first screen: what became of the model, in ten seconds."""

from __future__ import annotations

from minitron.report.charts import Point, damage_scale
from minitron.report.charts.frame import NARROW, WIDE
from minitron.report.formats import count, number, percent, seconds
from minitron.report.markup import Child, Html, join, tag
from minitron.report.reader import Run
from minitron.report.sections.body import share_bar
from minitron.report.summary import MODELS, Summary


def _fact(label: str, value: Child, below: Child = None) -> Html:
    return tag("div", tag("dt", label), tag("dd", value), tag("dd", below, class_="below") if below else None, class_="fact")


def _parameters(summary: Summary) -> Html | None:
    if summary.parameters_after is None:
        return _fact("Parameters", count(summary.parameters_before)) if summary.parameters_before is not None else None
    if summary.kept is None:
        return _fact("Parameters", count(summary.parameters_after))
    change = join(tag("span", count(summary.parameters_before), class_="was"), tag("span", " → ", class_="to"), count(summary.parameters_after))
    return _fact("Parameters", change, join(share_bar(summary.kept), f"{percent(summary.kept)} kept"))


def _perplexity(summary: Summary) -> Html | None:
    """The last model's perplexity large, where it comes from below."""
    known = [model for model in MODELS if model in summary.perplexities]
    if not known:
        return None
    last = known[-1]
    steps = [tag("span", tag("i", class_=f"key dot {model}"), f"{model} ", tag("b", number(summary.perplexities[model]))) for model in known]
    whose = "pruned model" if last == "pruned" else last
    return _fact(f"Perplexity of the {whose}", number(summary.perplexities[last]), tag("span", steps, class_="steps"))


def facts(summary: Summary) -> Html | None:
    """The strip of large numbers."""
    read = _fact("Tokens used", count(summary.tokens), "all stages") if summary.tokens else None
    fast = _fact("Writing speed", f"{summary.speedup:.2f}×", "the teacher's") if summary.speedup is not None else None
    below = f"all stages, {count(summary.tokens)} tokens" if fast is not None and summary.tokens else "all stages"
    took = _fact("Wall time", seconds(summary.wall_seconds), below) if summary.wall_seconds is not None else None
    made = [
        _parameters(summary),
        _perplexity(summary),
        _fact("Damage repaired", percent(summary.repaired), "share of the loss that pruning cost") if summary.repaired is not None else None,
        fast or read,
        took,
    ]
    return tag("dl", [fact for fact in made if fact is not None], class_="facts") if any(made) else None


def _scale(summary: Summary) -> Html | None:
    """Teacher, pruned and student on one line of loss."""
    if "teacher" not in summary.losses or "pruned" not in summary.losses:
        return None
    points = {model: Point(model, model, summary.losses[model]) for model in MODELS if model in summary.losses}
    share = summary.repaired
    words = f"{percent(share)} repaired" if share is not None and 0 <= share <= 1 else ""

    def draw(width: int) -> Html:
        title = "Held-out loss of teacher, pruned model and student"
        return damage_scale(points["teacher"], points["pruned"], points.get("student"), width=width, title=title, repaired=words)

    return tag("div", tag("div", draw(WIDE + 100), class_="wide"), tag("div", draw(NARROW), class_="narrow"), class_="damage")


def hero(run: Run, summary: Summary, *, title: str) -> Html:
    """Title, the story in words, the large numbers and the damage scale."""
    about = [str(run.about[key]) for key in ("recipe", "experiment", "device") if run.about.get(key)]
    first = next((str(stage.manifest["started"])[:10] for stage in run.stages if stage.manifest.get("started")), None)
    meta = " · ".join([*([f"recipe {about[0]}", *about[1:]] if run.about.get("recipe") else about), *([first] if first else [])])
    story = summary.sentences()
    running = f"Not finished yet: {', '.join(run.unfinished)}." if run.unfinished else ""
    return tag(
        "header",
        tag("h1", title),
        tag("p", meta, class_="meta") if meta else None,
        tag("p", story, class_="story") if story else None,
        tag("p", running, class_="remark") if running else None,
        facts(summary),
        _scale(summary),
    )
