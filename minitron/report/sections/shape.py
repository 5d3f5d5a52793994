"""The model's shape before and after."""

from __future__ import annotations

from typing import Any

from minitron.core.architecture import Architecture
from minitron.report.formats import count, exact, finite, percent, size, words
from minitron.report.markup import Child, table, tag
from minitron.report.reader import Run, as_dict
from minitron.report.sections.body import Body, share_bar
from minitron.report.summary import Summary, evaluated

_SIZES = {
    "num_layers": "layers",
    "hidden_size": "hidden channels",
    "ffn_size": "feed-forward units",
    "num_heads": "query heads",
    "num_kv_heads": "key-value heads",
    "head_dim": "channels per head",
    "num_experts": "experts",
    "expert_ffn_size": "units per expert",
    "vocab_size": "vocabulary",
}


def _cache_bytes(shape: dict[str, Any]) -> float | None:
    """KV-cache bytes per token at two bytes a value; None for a shape that is not whole."""
    try:
        return float(Architecture.from_dict(shape).kv_cache_bytes(batch_size=1, sequence_length=1))
    except TypeError:
        return None


def _row(label: str, before: float | None, after: float | None, write: Any) -> list[Child]:
    known = before is not None and before > 0 and after is not None
    share = after / before if known and before and after is not None else None
    changed = "changed" if share is not None and share != 1 else "same"
    return [
        label,
        write(before),
        tag("b", write(after), class_=changed),
        tag("span", percent(share), class_=changed) if share is not None else None,
        share_bar(share) if share is not None else None,
    ]


def render(run: Run, summary: Summary) -> Body | None:
    """A table of every size, parameters and costs, with the share that is kept."""
    winner = run.winner
    candidate = run.candidate(run.winner_name)
    results = winner.results if winner else {}
    after = as_dict(results.get("architecture")) or as_dict(candidate.get("architecture"))
    before = as_dict(results.get("teacher_architecture"))
    if not after:
        return None
    rows, changed = [], []
    for key, label in _SIZES.items():
        old, new = finite(before.get(key)), finite(after.get(key))
        if (old or new) is None or not (old or new):
            continue
        rows.append(_row(label, old, new, exact))
        if old is not None and new is not None and new != old:
            changed.append(label)
    rows.append(_row("parameters", summary.parameters_before, summary.parameters_after, count))
    costs = as_dict(results.get("costs")) or as_dict(candidate.get("costs"))
    old_costs = as_dict(results.get("teacher_costs"))
    measured = evaluated(run)
    last = as_dict(measured.get("student") or measured.get("pruned"))
    flops = finite(old_costs.get("flops_per_token")), finite(costs.get("flops_per_token"))
    if None in flops:  # both of one sequence length, or none
        flops = finite(as_dict(measured.get("teacher")).get("flops_per_token")), finite(last.get("flops_per_token"))
    if flops != (None, None):
        rows.append(_row("forward FLOPs per token", *flops, count))
    cache = _cache_bytes(before), _cache_bytes(after)
    if cache != (None, None):
        rows.append(_row("KV cache per token (16 bit)", *cache, size))
    name = run.winner_name
    lead = f"{name}. " if name else ""
    if before:
        lead += f"Fewer {words(changed)}; the rest is as in the teacher." if changed else "The same sizes as the teacher."
    return Body(lead, table(["", "before", "after", "kept", ""], rows, classes=["", "n", "n", "n", "bar"]))
