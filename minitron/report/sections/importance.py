"""What the teacher's units are worth: layers, feed-forward units, heads and hidden channels."""

from __future__ import annotations

import torch

from minitron.core.scores import ImportanceScores
from minitron.report.charts import Bar, Key, Rule, Series, column_chart, figure, heat_map, line_chart
from minitron.report.formats import count, number, percent
from minitron.report.markup import Html, join
from minitron.report.reader import Run
from minitron.report.sections.body import Body
from minitron.report.summary import Summary

_BINS = 64


def _layers_of(scores: ImportanceScores, axis: str) -> list[int]:
    return sorted(int(name.rpartition(".")[2]) for name in scores.tensors if name.startswith(f"{axis}.") and name.rpartition(".")[2].isdigit())


def _gone(run: Run, layers: list[int]) -> set[int]:
    """Positions of dropped layers; none while nothing is chosen."""
    kept = run.kept_layers
    return {index for index, layer in enumerate(layers) if layer not in kept} if kept is not None else set()


def _layer_bars(run: Run, scores: ImportanceScores) -> Html | None:
    """Depth scores, with the layers that go in the colour of pruning."""
    if "layer" not in scores.tensors:
        return None
    values = torch.nan_to_num(scores.of("layer").double(), nan=0.0, posinf=0.0, neginf=0.0).tolist()
    gone = _gone(run, list(range(len(values))))
    bars = []
    for index, value in enumerate(values):
        fate = "" if run.kept_layers is None else ", dropped" if index in gone else ", kept"
        bars.append(Bar(value, "pruned" if index in gone else "student", f"layer {index}: {number(value)}{fate}"))
    keys = [Key("student", f"kept ({len(values) - len(gone)})"), Key("pruned", f"dropped ({len(gone)})")] if gone else []
    title = "Layers"
    return figure(
        title,
        lambda width: column_chart(bars, width=width, title="Importance of each layer", y_label="depth score", gone=gone),
        keys=keys,
        note="How much each layer changes what passes through it; a low column is a layer the model misses least.",
    )


def _num_leaves(value: object) -> int:
    """Units in a list, or in the lists of all experts."""
    return sum(map(_num_leaves, value)) if isinstance(value, list) else 1


def _binned(values: torch.Tensor) -> list[float]:
    """Scores sorted from high to low, as means of at most 64 equal bins."""
    ordered = torch.sort(torch.nan_to_num(values.double(), nan=0.0, posinf=0.0, neginf=0.0).flatten(), descending=True).values
    return [float(part.mean()) for part in torch.tensor_split(ordered, min(_BINS, len(ordered)))]


def _sorted_map(run: Run, scores: ImportanceScores, *, axis: str, title: str, unit: str) -> Html | None:
    """Many units per layer: each column is a layer's units from the best to the least."""
    layers = _layers_of(scores, axis)
    if not layers:
        return None
    columns = [_binned(scores.of(axis, layer)) for layer in layers]
    num_units = scores.of(axis, layers[0]).numel()  # of all experts, where they have some each
    plan = run.winner.kept_units(axis) if run.winner else {}
    kept = _num_leaves(next(iter(plan.values()))) / num_units if plan else None
    gone = _gone(run, layers)
    words = []
    for index, layer in enumerate(layers):
        values = scores.of(axis, layer).double()
        fate = ", layer dropped" if index in gone else ""
        best, middle, least = (number(float(value)) for value in (values.max(), values.median(), values.min()))
        words.append([f"layer {layer}: best {best}, median {middle}, least {least}{fate}"])
    note = f"{count(num_units)} {unit} per layer, best at the top."
    if kept is not None and kept < 1:
        note += f" The top {percent(kept)}, above the line, are kept."
    if gone:
        note += " Grey columns are dropped layers."
    return figure(
        title,
        lambda width: heat_map(
            columns, words, width=width, row_height=180 / len(columns[0]), title=title, y_label=unit, y_ends=("best", "least"), cut=kept, gone=gone
        ),
        note=note,
    )


def _cell_map(run: Run, scores: ImportanceScores, *, axis: str, title: str, unit: str) -> Html | None:
    """Few units per layer: each cell is one of them, crossed out when it goes."""
    layers = _layers_of(scores, axis)
    if not layers or max(len(scores.of(axis, layer)) for layer in layers) < 2:
        return None
    columns = [torch.nan_to_num(scores.of(axis, layer).double(), nan=0.0, posinf=0.0, neginf=0.0).tolist() for layer in layers]
    plan, gone = run.winner.kept_units(axis) if run.winner else {}, _gone(run, layers)
    crossed, words = set(), []
    for index, layer in enumerate(layers):
        kept = plan.get(str(layer))
        lost = [unit_index for unit_index in range(len(columns[index])) if kept is not None and unit_index not in kept]
        crossed |= {(index, unit_index) for unit_index in lost}
        fates = [", layer dropped" if index in gone else ", dropped" if i in lost else ", kept" if plan else "" for i in range(len(columns[index]))]
        words.append([f"layer {layer}, {unit} {i}: {number(value)}{fates[i]}" for i, value in enumerate(columns[index])])
    rows = max(len(column) for column in columns)
    note = f"One cell per {unit} and layer." + (" A cross marks one that goes." if crossed else "")
    note += " Grey columns are dropped layers." if gone else ""
    return figure(
        title,
        lambda width: heat_map(
            columns,
            words,
            width=width,
            row_height=max(4.0, min(14.0, 280 / rows)),
            title=title,
            y_label=unit,
            y_ends=("0", str(rows - 1)),
            gone=gone,
            crossed=crossed,
        ),
        note=note,
    )


def _hidden(run: Run, scores: ImportanceScores) -> Html | None:
    """Hidden channels from the best to the least, with the line at which they are cut."""
    if "hidden" not in scores.tensors or len(scores.of("hidden")) < 2:
        return None
    ordered = torch.sort(scores.of("hidden").double(), descending=True).values.tolist()
    picks = sorted({round(i * (len(ordered) - 1) / 199) for i in range(200)})
    values = [(float(i + 1), ordered[i]) for i in picks]
    low, high = ordered[-1], ordered[0]
    log = low > 0 and high / low > 10
    kept = run.winner.plan.get("hidden") if run.winner else None
    cut = isinstance(kept, list) and len(kept) < len(ordered)
    rule = Rule(float(len(kept)), f"{count(len(kept))} of {count(len(ordered))} kept") if cut and kept else None
    title = "Hidden channels"
    note = f"{count(len(ordered))} channels in the order of their score" + (", logarithmic." if log else ".")
    if isinstance(kept, list) and len(kept) == len(ordered):
        note += " All are kept."
    return figure(
        title,
        lambda width: line_chart(
            [Series("score", values, "student")], width=width, height=220, title=title, x_label="channels", y_label="score", y_log=log, rule=rule
        ),
        note=note,
    )


def render(run: Run, summary: Summary) -> Body | None:
    """All axes that were scored; the charts share one horizontal axis of layers."""
    scores = run.scores
    if scores is None:
        return None
    parts = [
        _layer_bars(run, scores),
        _sorted_map(run, scores, axis="ffn", title="Feed-forward units", unit="units"),
        _sorted_map(run, scores, axis="expert_ffn", title="Units of the experts", unit="units"),
        _sorted_map(run, scores, axis="shared_ffn", title="Units of the shared experts", unit="units"),
        _cell_map(run, scores, axis="expert", title="Experts", unit="expert"),
        _cell_map(run, scores, axis="head", title="Query heads", unit="head"),
        _cell_map(run, scores, axis="kv_head", title="Key-value heads", unit="kv head"),
        _hidden(run, scores),
    ]
    if not any(parts):
        return None
    short = {key: value for key, value in scores.metadata.items() if isinstance(value, (str, int, float)) and len(str(value)) <= 24}
    facts = [f"{key.removeprefix('num_').replace('_', ' ')} {count(value) if isinstance(value, int) else value}" for key, value in short.items()]
    lead = "Scores of the teacher's units. The charts share one axis of layers."
    return Body(lead + (f" Measured with {', '.join(facts[:6])}." if facts else ""), join(parts))
