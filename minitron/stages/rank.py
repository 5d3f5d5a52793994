"""Rank the candidates by a short distillation each."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from minitron import dist
from minitron.core.candidate import Candidate
from minitron.core.manifest import write_text
from minitron.core.options import relevant
from minitron.errors import Interrupted
from minitron.log import get_logger
from minitron.prune.proof import require_proof
from minitron.search.placement import TASKS, Share, others_of, records_of_tasks, take_over
from minitron.search.race import Outcome
from minitron.search.ranking import cost_of, only_row, ranking_rows, ranking_summary, run_race, task_of
from minitron.search.trials import Record
from minitron.stages.context import StageContext
from minitron.stages.teachers import teacher_inputs
from minitron.stages.trials import open_trials

FOLDER = "ranking"
SECTIONS = ("teacher", "data", "depth", "prune", "ranking", "evaluate", "training", "loss", "engine", "tracking")
HELP = "train every candidate for a few steps on the same batches and rank them by held-out loss"

logger = get_logger(__name__)


def folders(context: StageContext) -> list[str]:
    """A task has a folder of its own, because tasks run at the same time."""
    return [FOLDER] if (task := context.sections.ranking.task) is None else ["{}/{}-of-{}".format(TASKS, *task_of(task))]


def inputs(context: StageContext) -> dict[str, Any]:
    """Teachers, scores, candidates and text."""
    return {**teacher_inputs(context), **{name: context.run_dir / name for name in ("scores", "candidates")}, "data": context.data_fingerprint()}


def effective(context: StageContext) -> dict[str, Any]:
    """The training settings that ranking really uses: a longer distillation does not undo a ranking."""
    ranking, sections = context.sections.ranking, context.sections
    return {"training": relevant(ranking.training(sections.training)), "ranking": ranking.deciding(), "evaluate": ranking.asking(sections.evaluate)}


def run(context: StageContext, out: Path) -> dict[str, Any]:
    """Write ``ranking.json``, best first; a task writes the records of its share."""
    candidates = context.candidates()
    if len(candidates) == 1:
        return _write(out, {"candidates": [only_row(candidates[0])]}) | {"tokens": 0}
    require_proof(context.teacher_config())
    ranking = context.sections.ranking
    apart = ranking.placement == "apart" and dist.world_size() > 1 and not ranking.from_tasks
    # with ranking.from_tasks no candidate is this process's own
    own = (len(candidates), 1) if ranking.from_tasks else (dist.rank(), dist.world_size()) if apart else (0, 1)
    number, count = task_of(ranking.task) if ranking.task is not None else own
    take_over([] if ranking.task else records_of_tasks(context.run_dir, out), out)
    dist.barrier()
    stopped: Interrupted | None = None
    with dist.alone() if apart else nullcontext():
        try:
            outcome, records, told = _race(context, candidates, out, number=number, count=count, apart=apart)
        except Interrupted as interruption:
            stopped = interruption
    if dist.any_rank(stopped is not None):  # also: nobody moves the records while another rank still reads them
        raise stopped or Interrupted("another rank was asked to stop; the same command goes on from there")
    if ranking.task is not None:
        return {"task": f"{number}/{count}", "tokens": sum(record.curve[-1]["tokens"] for record in records.values() if record.curve), **told}
    rows = ranking_rows(outcome, records)
    if (best := rows[0])["loss"] is not None:
        logger.info("  best: %s, held-out loss %.3f → %.3f", best["name"], best["zero_shot_loss"], best["loss"])
    return _write(out, {"candidates": rows, **told.pop("summary")}) | {"tokens": sum(row["tokens"] for row in rows), **told}


def _race(
    context: StageContext, candidates: list[Candidate], out: Path, *, number: int, count: int, apart: bool
) -> tuple[Outcome, dict[str, Record], dict[str, Any]]:
    """This worker's part in the race: candidates ``number``, ``number + count``, …"""
    ranking, task = context.sections.ranking, context.sections.ranking.task
    training, length = ranking.training(context.sections.training), context.sections.data.sequence_length
    names, shapes = [candidate.name for candidate in candidates], {candidate.name: candidate.architecture for candidate in candidates}
    rules = ranking.rules(len(names), num_warmup_steps=training.num_warmup_steps)
    trials, num_forwards = open_trials(context, candidates[number::count], candidates, out, apart=apart)
    elsewhere = others_of(context.run_dir, out, by_tasks=task is not None or ranking.from_tasks)
    what = "ranking.from_tasks=true" if ranking.from_tasks else f"task {task}" if task else f"worker {number}"
    share = Share(trials, elsewhere, ranking.wait if task or ranking.from_tasks else None, context.stop, what, needed=ranking.from_tasks)
    outcome, records = run_race(names, rules, share, only_mine=task is not None)
    trials.drop(names)
    sizes = {"tokens_per_step": training.batch_size * length, "held_out_tokens": trials.held_out_tokens, "sequence_length": length}
    cost = {} if task else {"cost": cost_of(shapes, context.family().architecture, records, share_head=ranking.share_head, **sizes)}
    summary = {} if task else ranking_summary(names, rules, ranking, outcome, records) | cost
    return outcome, records, {"teacher_forwards": num_forwards(), **({} if task else {"summary": summary})}


def _write(out: Path, document: dict[str, Any]) -> dict[str, Any]:
    if dist.is_main():
        write_text(out / "ranking.json", json.dumps(document, indent=1))
    return {"winner": document["candidates"][0]["name"]}
