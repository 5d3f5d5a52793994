"""The tables that the command line prints: what became of the model, and what a run will take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minitron.config import Config
from minitron.core.manifest import Manifest
from minitron.estimate import Estimate
from minitron.footprint import Footprint
from minitron.log import duration
from minitron.scaling import scaling_table


def summary(run_dir: Path, config: Config) -> str:
    """One table of a finished run: parameters, perplexity, tokens, time, where things lie, what to try next."""
    path = run_dir / "evaluation" / "metrics.json"
    metrics: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    lines = ["", f"  {'':<20}{'parameters':>15}{'perplexity':>13}{'loss':>9}"] if metrics else []
    for name, row in metrics.items():
        if isinstance(row, dict):
            lines.append(f"  {name.replace('_', ' '):<20}{row['num_parameters']:>15,}{row['perplexity']:>13.2f}{row['loss']:>9.3f}")
    if {"teacher", "pruned", "student"} <= metrics.keys():
        harm = metrics["pruned"]["loss"] - metrics["teacher"]["loss"]
        if harm > 0:
            lines.append(f"  distillation undid {(metrics['pruned']['loss'] - metrics['student']['loss']) / harm:.0%} of the harm that pruning did")
    if "note" in metrics:
        lines.append(f"  teacher: {metrics['note']}")
    tokens, seconds = 0, 0.0
    for manifest in _manifests(run_dir):
        tokens, seconds = tokens + manifest.tokens, seconds + manifest.wall_seconds
    lines += ["", f"  {tokens:,} tokens in {duration(seconds)}"]
    for label, relative in (("model", "export"), ("report", "report/index.html"), ("metrics", "student/metrics.jsonl")):
        if (run_dir / relative).exists():
            lines.append(f"  {label:<9}{run_dir / relative}")
    steps = config.sections["training"].num_steps
    if steps and config.title == "quickstart":
        lines += ["", f"  next: bash launch/quickstart.sh training.num_steps={steps * 10} rerun=true   (scores and ranking are kept)"]
    elif (run_dir / "export").is_dir():
        lines += ["", f"  next: python -c \"from transformers import pipeline; print(pipeline('text-generation', '{run_dir / 'export'}')('The'))\""]
    return "\n".join(lines)


def _manifests(run_dir: Path) -> list[Manifest]:
    paths = [*run_dir.glob("*/manifest.json"), *run_dir.glob("pruned/*/manifest.json")]
    found = [Manifest.read(path.parent) for path in paths if ".old-" not in str(path)]
    return [manifest for manifest in found if manifest is not None]


def plan_table(estimate: Estimate) -> str:
    """An estimate for people."""
    teacher, student = estimate.teacher, estimate.student
    lines = [
        f"  teacher   {teacher.name:<32}{teacher.num_parameters:>18,} parameters",
        f"  student   {student.name:<32}{student.num_parameters:>18,} parameters ({student.num_parameters / teacher.num_parameters:.1%})",
        "",
        f"  {'stage':<12}{'tokens':>14}{'FLOPs':>12}{'time':>12}",
    ]
    for stage, seconds in estimate.seconds.items():
        lines.append(f"  {stage:<12}{estimate.tokens[stage]:>14,.0f}{estimate.flops[stage]:>12.2e}{duration(seconds):>12}")
    lines.append(
        f"  {'total':<12}{sum(estimate.tokens.values()):>14,.0f}{sum(estimate.flops.values()):>12.2e}{duration(sum(estimate.seconds.values())):>12}"
    )
    if estimate.num_devices > 1:
        lines.append(f"  {'':<12}{estimate.num_devices} devices: {estimate.device_hours:,.0f} device-hours")
    lines += ["", *_comparison(estimate)]
    if estimate.num_steps and estimate.footprint is not None:
        lines += ["", f"  distillation: {estimate.num_steps:,} steps; memory per rank while it runs:", *_footprint_rows(estimate.footprint)]
    if estimate.scaling is not None:
        lines += ["", *scaling_table(estimate.scaling)]
    return "\n".join(lines)


def _comparison(estimate: Estimate) -> list[str]:
    """What the student costs beside training it from scratch, what a device gains by it, and what was measured of this one."""
    ratio = estimate.scratch_flops / max(sum(estimate.flops.values()), 1.0)
    lines = [
        f"  from scratch {estimate.scratch_tokens:,.0f} tokens and {estimate.scratch_flops:.2e} FLOPs for this student: {ratio:.2g} times this recipe"
    ]
    if estimate.decode:
        teacher, student = estimate.decode["teacher"], estimate.decode["student"]
        lines.append(
            f"  decoding     {1e3 * teacher:.2f} ms a token for the teacher, {1e3 * student:.2f} ms for the student, at least (bf16, one sequence)"
        )
    if estimate.measured:
        flops, bandwidth = estimate.measured["flops"], estimate.measured["bandwidth"]
        lines.append(f"  measured     {flops:.2e} FLOP/s in a matrix product, {bandwidth / 1e9:.1f} GB/s in memory, on this machine")
    return lines


def _footprint_rows(footprint: Footprint) -> list[str]:
    """Memory by part, the peak, what lies in CPU memory, and traffic by link."""
    memory = footprint.memory
    rows = [f"    {part:<24}{size / 1e9:>9.2f} GB" for part, size in memory.parts.items()]
    fullest = max(memory.moments, key=lambda moment: memory.moments[moment])
    rows.append(f"    {'most at once':<24}{memory.peak / 1e9:>9.2f} GB  ({fullest})")
    rows += [f"    {part:<24}{size / 1e9:>9.2f} GB in CPU memory" for part, size in memory.host.items()]
    if footprint.traffic:
        rows += ["", f"  {'received per rank and step':<26}{'in the node':>14}{'between nodes':>16}"]
        rows += [f"    {what:<24}{row.node / 1e9:>11.2f} GB{row.network / 1e9:>13.2f} GB" for what, row in footprint.traffic.items()]
    return rows
