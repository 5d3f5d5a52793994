"""The page and the figures behind it, from whatever results are there."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from minitron.core.manifest import write_text
from paper_claims import pictures
from paper_claims.arms import arms_of
from paper_claims.prose import CAVEATS, HEAD, METHOD, budgets
from paper_claims.running import Bench
from paper_claims.teachers import given
from paper_claims.verdicts import CLAIMS, MARGIN, SETTLED, SOURCES, Ranking, Results, Row, judge, ranking_verdict, rankings

_TITLES = {"toy": "small teacher", "smollm2": "SmolLM2-135M"}


def collect(bench: Bench) -> Results:
    """Arm → seed → result of what is done."""
    found: dict[str, dict[int, Any]] = {}
    for arm in arms_of(bench.lab.suite):
        results = {seed: bench.result(arm, seed) for seed in arm.seeds}
        found[arm.name] = {seed: result for seed, result in results.items() if result is not None}
    return found


def write_page(benches: Mapping[str, Bench], out: Path, *, threads: int) -> None:
    """Write ``claims.md`` with its pictures into ``out``, and ``<machine>/claims.json`` below it."""
    results = {name: collect(bench) for name, bench in benches.items()}
    rows = [judge(claim, results[claim.suite]) for claim in CLAIMS]
    found = rankings(results["toy"])
    machine = out / f"cpu-{platform.machine()}"
    machine.mkdir(parents=True, exist_ok=True)
    write_text(machine / "claims.json", json.dumps(_figures(benches, results, rows, found, threads), indent=1) + "\n")
    write_text(out / "claims.md", _page(results, rows, found, _pictures(out, results, rows, found), machine.name, threads))


def _figures(benches: Mapping[str, Bench], results: Mapping[str, Results], rows: list[Row], found: list[Ranking], threads: int) -> dict[str, Any]:
    suites: dict[str, Any] = {}
    for name, bench in benches.items():
        arms: dict[str, Any] = {}
        for arm, by_seed in results[name].items():
            keep = ("num_parameters", "tokens", "seconds", "kept_layers", "curve")
            arms[arm] = {str(seed): {"loss": round(r.loss, 5)} | {key: getattr(r, key) for key in keep} for seed, r in by_seed.items()}
        suites[name] = {"settings": given(bench.lab.suite), "teachers": _teacher_records(bench), "arms": arms}
    claims = [
        {
            "group": row.claim.group,
            "statement": row.claim.statement,
            "suite": row.claim.suite,
            "moment": row.claim.moment,
            "first": row.claim.first,
            "second": row.claim.second,
            "losses": [row.first_loss, row.second_loss],
            "difference": vars(row.difference) if row.difference else None,
            "verdict": row.verdict,
        }
        for row in rows
    ]
    return {
        "command": "python benchmarks/claims.py --data FOLDER",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": threads,
        "claims": claims,
        "ranking": [vars(ranking) for ranking in found],
        "suites": suites,
    }


def _teacher_records(bench: Bench) -> dict[str, Any]:
    """Tokens and seconds of the teachers that were trained here."""
    records = {}
    for name in bench.lab.suite.teachers:
        path = bench.lab.work / f"teacher-{name}" / "claims.json"
        if path.is_file():
            record = json.loads(path.read_text())
            records[name] = {key: record[key] for key in ("tokens", "seconds", "curve")}
    return records


#: Larger differences stand in the table alone: beside them the others could not be told apart in a picture.
_PICTURED = 0.5


def _pictures(out: Path, results: Mapping[str, Results], rows: list[Row], found: list[Ranking]) -> dict[str, str]:
    """Name → file of the pictures for which there are results."""
    files = {}
    for suite, title in _TITLES.items():
        mine = [row for row in rows if row.claim.suite == suite and row.difference is not None]
        trained = [row for row in mine if row.claim.group != "start" and row.claim.moment == "after training"]
        small = [row for row in trained if row.difference is not None and abs(row.difference.mean) < _PICTURED]
        if small:
            drawing = pictures.differences(small, title=f"Differences of held-out loss, {title}")
            files[f"differences-{suite}"] = pictures.write(out, f"claims_differences_{suite}", drawing, pictures.difference_height(small))
    if results["toy"].get("scratch/cross_entropy"):
        arms = {"width/forward_kl": "pruned, KL", "scratch/forward_kl": "scratch, KL", "scratch/cross_entropy": "scratch, labels"}
        arms = {arm: label for arm, label in arms.items() if results["toy"].get(arm)}
        files["start"] = pictures.write(out, "claims_start", pictures.curves(results["toy"], arms, title="Pruned against from scratch"), 300)
    if found:
        files["ranking"] = pictures.write(out, "claims_ranking", pictures.ranking_chart(found, title="Does the order of the shapes settle?"), 240)
        files["shapes"] = pictures.write(out, "claims_shapes", pictures.shape_curves(found[0], title="Loss above the best shape"), 280)
    return files


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _page(results: Mapping[str, Results], rows: list[Row], found: list[Ranking], files: dict[str, str], machine: str, threads: int) -> str:
    verdict = ranking_verdict(found)
    verdicts = [row.verdict for row in rows] + [verdict]
    plural = {"holds": "hold", "does not hold": "do not hold"}
    tally = ", ".join(f"{verdicts.count(word)} {plural.get(word, word)}" for word in dict.fromkeys(sorted(verdicts)))
    parts = [HEAD.format(machine=machine, tally=tally, num=len(verdicts)), *_tables(rows)]
    parts += ["## Does the order of the shapes settle?", f"{SOURCES['ranking']}.", _ranking_text(found, verdict)]
    parts += [f"![{name}]({files[name]})" for name in ("ranking", "shapes") if name in files]
    parts += ["## Pictures"]
    if "start" in files:
        parts += ["Held-out loss of a pruned student and of the same shape from random weights, mean over seeds:", f"![start]({files['start']})"]
    for suite, title in _TITLES.items():
        if f"differences-{suite}" in files:
            parts += [
                f"Differences of held-out loss after training with their intervals, {title}; left of zero is the papers' direction "
                "(blue holds, orange does not, grey cannot be told apart; differences above 0.5 are in the table only):",
                f"![differences]({files[f'differences-{suite}']})",
            ]
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    parts += [METHOD.format(margin=MARGIN, settled=SETTLED, threads=threads, **versions, **budgets())]
    parts += [*_arm_tables(results), CAVEATS]
    return "\n\n".join(parts) + "\n"


def _tables(rows: list[Row]) -> list[str]:
    parts = ["## The table"]
    lines = ["| the papers say | on | when | loss | instead of | difference | over | here |", "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        claim, interval = row.claim, row.difference
        shown = [interval.shown(), interval.over] if interval else ["", ""]
        losses = [_number(row.first_loss), _number(row.second_loss)]
        lines.append("| " + " | ".join([claim.statement, _TITLES[claim.suite], claim.moment, *losses, *shown, _strong(row.verdict)]) + " |")
    parts.append("\n".join(lines))
    used = list(dict.fromkeys(row.claim.group for row in rows))
    parts.append("Where the papers say it:\n\n" + "\n".join(f"- {SOURCES[group]}" for group in used))
    return parts


def _strong(verdict: str) -> str:
    return f"**{verdict}**" if verdict == "does not hold" else verdict


def _ranking_text(found: list[Ranking], verdict: str) -> str:
    if not found:
        return "Not measured."
    lines = ["| seed | order before training against the last | settled from step | of | best before training | best at the end |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for ranking in found:
        first = min(ranking.losses, key=lambda name: ranking.losses[name][0])
        last = min(ranking.losses, key=lambda name: ranking.losses[name][-1])
        lines.append(f"| {ranking.seed} | {ranking.correlation[0]:+.2f} | {ranking.settled} | {ranking.steps[-1]} | {first} | {last} |")
    return f"Here: {_strong(verdict)}.\n\n" + "\n".join(lines)


def _arm_tables(results: Mapping[str, Results]) -> list[str]:
    parts = ["## All arms"]
    for suite, by_arm in results.items():
        lines = [f"### {_TITLES[suite]}", "", "| arm | parameters | tokens | seconds | held-out loss by seed |", "| --- | --- | --- | --- | --- |"]
        for arm, by_seed in by_arm.items():
            if not by_seed:
                lines.append(f"| {arm} | | | | not measured |")
                continue
            one = next(iter(by_seed.values()))
            seconds = sum(result.seconds for result in by_seed.values()) / len(by_seed)
            losses = " · ".join(_number(result.loss) for result in by_seed.values())
            lines.append(f"| {arm} | {one.num_parameters:,} | {one.tokens:,} | {seconds:.0f} | {losses} |")
        parts.append("\n".join(lines))
    return parts
