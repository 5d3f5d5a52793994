"""The page of the search benchmark, from its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_TITLES = {
    "toy": "Candidates of a toy teacher, side by side",
    "smollm2": "Candidates of SmolLM2-135M",
}
_INTRODUCTION = """# Searching for a shape

Written by `benchmarks/search.py`. A candidate is cut from the teacher and distilled for a short while; all see the same tokens in the same order and
are measured on the same held-out sequences. τ is Kendall's, with the order at the end (1: the same order, 0: none, −1: the opposite one).
"""


def write_page(document: dict[str, Any], path: Path) -> None:
    """``document`` holds what was measured so far, by part."""
    lines = [_INTRODUCTION]
    for name, title in _TITLES.items():
        if name in document:
            lines += [f"## {title}", "", f"`{document[name]['command']}`", "", *_suite(document[name])]
    if "shared" in document:
        lines += _shared(document["shared"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _suite(part: dict[str, Any]) -> list[str]:
    rows, replay = part["result"], part["replay"]
    lines = [
        "| seed | candidates | steps | measured every | τ zero-shot | τ at 25% | τ at 50% | τ ≥ 0.9 from step | chosen by halving is the best "
        "| regret (nats) | standard error of the lead | FLOPs: all to the end, a teacher each ÷ halving |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        taus = {int(step): tau for step, tau in row["tau"].items()}
        at = [taus[min(taus, key=lambda step: abs(step - share * row["steps"]))] for share in (0.0, 0.25, 0.5)]
        lead = row["lead_of_the_best"]["standard_error"] if row["lead_of_the_best"] else float("nan")
        settled = "not before the end" if row["settled_at"] in (None, row["steps"]) else str(row["settled_at"])
        halved = ["", "", f"{lead:.4f}", ""]
        if "chosen" in row:
            same = ("yes" if row["best"] == row["chosen"] else "no") + (" (replayed)" if row.get("replayed") else "")
            halved = [same, f"{row['regret']:.4f}", f"{lead:.4f}", f"{row['flops_ratio']:.1f}"]
        start = [*(str(row[key]) for key in ("seed", "candidates", "steps")), str(sorted(taus)[1])]
        cells = [*start, *(f"{tau:.2f}" for tau in at), settled, *halved]
        lines.append(f"| {' | '.join(cells)} |")
    if replay:
        lines += [
            "",
            "Halving replayed on curves that were measured often enough for it, without every pair of candidates in turn; standard errors are "
            "those of the difference to the best, paired. Candidate-steps and FLOPs are shares of those of runs to the end, with a teacher for each.",
            "",
            *_replays(replay),
        ]
    lines += [
        "",
        *[line for row in rows for line in _ranks(row)],
    ]
    return lines


def _replays(rows: list[dict[str, Any]]) -> list[str]:
    """Every way of halving: the means over the seeds, and what it found with each."""
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(row["seed"] for row in rows))
    lines = [
        f"| way | subsets | finds the best | with seed {seeds} | or one within two standard errors | mean regret (nats) | candidate-steps | FLOPs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for way in dict.fromkeys(row["way"] for row in rows):
        own = [row for row in rows if row["way"] == way]
        mean = {name: sum(row[name] for row in own) / len(own) for name in own[0] if name not in ("way", "seed")}
        cells = [way, str(sum(row["subsets"] for row in own)), f"{mean['top_1']:.1%}", ", ".join(f"{100 * row['top_1']:.0f}" for row in own)]
        cells += [f"{mean['top_1_or_as_good']:.1%}", f"{mean['mean_regret']:.5f}", f"{mean['share_of_steps']:.0%}", f"{mean['share_of_flops']:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _ranks(row: dict[str, Any]) -> list[str]:
    """Everybody's rank on the way, best at the end first."""
    lines = [f"Seed {row['seed']}:", "", "| candidate | zero-shot | 25% | 50% | 100% | held-out loss |", "| --- | --- | --- | --- | --- | --- |"]
    for name in sorted(row["ranks"], key=lambda name: row["losses"][name]):
        ranks = " | ".join(map(str, row["ranks"][name]))
        lines.append(f"| {name} | {ranks} | {row['losses'][name]:.4f} |")
    return [*lines, ""]


def _shared(part: dict[str, Any]) -> list[str]:
    result = part["result"]
    seconds = {way: " and ".join(f"{value:.0f}" for value in values) for way, values in result["processor_seconds"].items()}
    return [
        "## One teacher for all",
        "",
        f"`{part['command']}`",
        "",
        f"{result['k']} candidates of SmolLM2-135M for {result['steps']} steps, side by side: {seconds['shared']} s of processor time; one by one, "
        f"with a teacher each: {seconds['independent']} s. That is {result['ratio']:.2f} times as much; by FLOPs it would be "
        f"{result['flops_ratio']:.2f} times. The teacher read {result['teacher_forwards']} batches for all of them.",
        "",
    ]
