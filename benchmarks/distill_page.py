"""The page of ``distill.py``: one distillation step beside a plain loop and TRL, as tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_INTRODUCTION = """# A distillation step

Medians; all ways in turns in one process, so that ratios hold where seconds do not.
SmolLM2-135M teaches a student of 108M parameters forward KL on the same text, AdamW and clipping on all sides.

- **plain**: both logits whole, `F.kl_div`. **trl**: TRL's GKD trainer, off-policy, the same loss.
- **selective**: minitron with `engine.activation_checkpointing=selective`.
- **cross entropy**: the same student without a teacher. **cached**: its teacher's hidden states, or likeliest tokens, read from files.
- **bf16** on AVX2 alone has no units: some of torch's bf16 products take 50 times longer than those in float32, hence few tokens. Nobody should train
  there in bf16, and `auto` does not. Where there are units (AVX512-BF16) `auto` takes bf16.
"""
_NAMES = {
    "ours": "minitron",
    "selective": "selective",
    "plain": "plain",
    "trl": "trl",
    "cross_entropy": "cross entropy",
    "cached_hidden_states": "cached states",
    "cached_top_k": "cached top-k",
}
_PAIRS = (
    ("plain", "ours"),
    ("trl", "ours"),
    ("plain", "selective"),
    ("trl", "selective"),
    ("cached_hidden_states", "cross_entropy"),
    ("cached_top_k", "cross_entropy"),
)
_SHARES = ("teacher", "student", "loss", "backward", "optimizer", "outside")
_UNKNOWN = "not measured"


def write_page(out: Path) -> None:
    """Write ``<out>/distill.md`` from the ``distill.json`` of every CPU."""
    text = _INTRODUCTION
    for file in sorted(out.glob("cpu-*/distill.json")):
        text += f"\n## {file.parent.name}\n\n" + _tables(json.loads(file.read_text())["rows"])
    (out / "distill.md").write_text(text + "\n## GPU\n\nNot measured (`bash benchmarks/gpu.sh`).\n")


def _tables(rows: Sequence[dict[str, Any]]) -> str:
    parts = [
        "### Seconds a step\n",
        _table([*_NAMES.values(), "matrix products alone", "load"], [(row, _seconds(row)) for row in rows]),
        "### Ratios of processor time (of wall time)\n",
        _table([f"{_NAMES[a]} / {_NAMES[b]}" for a, b in _PAIRS], [(row, [_ratio(row, *pair) for pair in _PAIRS]) for row in rows]),
        "### Peak memory above weights and optimiser, gradients included, GB (share of plain)\n",
        _table(list(_NAMES.values())[:4], [(row, _peaks(row)) for row in rows]),
        "### Where the time of minitron's step goes\n",
        _table(list(_SHARES), [(row, [f"{row['shares'][name]:.1%}" for name in _SHARES]) for row in rows]),
        "### Losses after the same steps\n",
        _table(list(_NAMES.values())[:4], [(row, [_number(row["losses"].get(name), 4) for name in list(_NAMES)[:4]]) for row in rows]),
        "### Commands\n",
        _table(["command", "torch", "threads"], [(row, [f"`{row['command']}`", row["torch"], str(row["threads"])]) for row in rows]),
    ]
    return "\n".join(parts)


def _table(heads: Sequence[str], rows: Sequence[tuple[dict[str, Any], Sequence[str]]]) -> str:
    lines = ["| tokens, dtype | " + " | ".join(heads) + " |", "| --- " * (len(heads) + 1) + "|"]
    lines += [f"| {row['tokens']}, {row['dtype']} | " + " | ".join(cells) + " |" for row, cells in rows]
    return "\n".join(lines) + "\n"


def _number(value: float | None, digits: int = 2) -> str:
    return _UNKNOWN if value is None else f"{value:.{digits}f}"


def _seconds(row: dict[str, Any]) -> list[str]:
    return [_number(row["seconds"].get(name)) for name in _NAMES] + [_number(row["products_seconds"]), row["loadavg"][0]]


def _ratio(row: dict[str, Any], above: str, below: str) -> str:
    if above not in row["seconds"] or below not in row["seconds"]:
        return _UNKNOWN
    busy, wall = (row[key][above] / row[key][below] for key in ("processor_seconds", "seconds"))
    return f"{busy:.2f} ({wall:.2f})"


def _peaks(row: dict[str, Any]) -> list[str]:
    peaks = row.get("peak_bytes", {})
    return [f"{peaks[name] / 1e9:.2f} ({peaks[name] / peaks['plain']:.2f})" if name in peaks else _UNKNOWN for name in list(_NAMES)[:4]]
