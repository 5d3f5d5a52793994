"""What ranking needs of the run: candidates cut and put into training, held-out text, and teachers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minitron import dist
from minitron.core.candidate import Candidate
from minitron.distill.training import OpenTraining, TrainingRun
from minitron.distill.validation import validation_batches
from minitron.engine import build_engine
from minitron.evaluate import Tasks
from minitron.search.placement import free_bytes, group_size
from minitron.search.trials import Trials
from minitron.stages.context import StageContext, blocks_of
from minitron.stages.cut import cut_in_memory, plan_for
from minitron.stages.states import teacher_taps
from minitron.stages.teachers import place_teachers
from minitron.tracking import CompositeTracker

#: Share of the free memory that weights, gradients and moments of candidates may take; activations want the rest.
_ROOM = 0.7


def open_trials(
    context: StageContext, candidates: Sequence[Candidate], everyone: Sequence[Candidate], out: Path, *, apart: bool
) -> tuple[Trials, Callable[[], int]]:
    """The own candidates in a folder, and a count of the teacher's forwards. The teacher is placed when the first training is opened.

    ``everyone`` are all candidates: the teacher's states that the losses ask for must suit each. Ranks ``apart`` have an engine of their own.
    """
    sections, teachers = context.sections, list[Any]()
    training = sections.ranking.training(sections.training)
    engine_config = replace(sections.engine, name="local") if apart else sections.engine

    def open_training(candidate: Candidate, folder: Path) -> OpenTraining:
        if not teachers:
            taps = teacher_taps(context, [other.architecture for other in everyone])
            engine = build_engine(engine_config, optimizer=training.optimizer_config(), precision=training.precision)
            teachers.extend(place_teachers(context, engine, taps=taps, remember_bytes=int(sections.ranking.remember_teacher_bytes)))
        plan = plan_for(context, candidate)
        return TrainingRun(
            student=cut_in_memory(context, plan, dtype=torch.float32),
            teacher=None,
            signal=teachers[0][0],
            other_signals=teachers[1:],
            stream=context.text().stream(),
            validation=torch.empty(0),
            sequence_length=sections.data.sequence_length,
            training=training,
            loss=sections.loss,
            engine=engine_config,
            blocks_of=blocks_of,
            open_tracker=lambda step: CompositeTracker([]),
            what=f"rank {candidate.name}",
            folder=folder,
            stop=lambda: False,  # the trials ask, once for all of them
            seed=context.seed,
            separator=context.separator(),
            kept_hidden=plan.hidden,
            guided=True,
        ).open()

    held_out = validation_batches(context.held_out(training.num_validation_sequences), micro_batch_size=1, separator=context.separator())
    together = sections.ranking.together or _that_fit(context, candidates, apart=apart)
    sizes: dict[str, Any] = {"group_size": together, "share_head": sections.ranking.share_head, "ask": _asking(context)}
    trials = Trials(candidates, open_training=open_training, held_out=held_out, folder=out, **sizes, stop=context.stop)
    return trials, lambda: teachers[0][0].num_forwards if teachers else 0


def _asking(context: StageContext) -> Callable[[nn.Module, str], dict[str, Any]] | None:
    """How a candidate is scored on the tasks of the ranking, whose data is made ready here; None without any."""
    if not context.sections.ranking.tasks:
        return None
    tasks = Tasks(replace(context.sections.evaluate, tasks=context.sections.ranking.tasks), seed=context.seed)
    return lambda student, name: tasks.measure(student, context.tokenizer(), what=name)


def _that_fit(context: StageContext, candidates: Sequence[Candidate], *, apart: bool) -> int:
    """How many candidates fit side by side: 16 bytes a parameter for float32 weights, gradients and two moments, beside the teacher."""
    engine = context.sections.engine
    sharded = not apart and (engine.name == "fsdp" or (engine.name == "deepspeed" and engine.zero_stage == 3))
    shards = dist.world_size() if sharded else 1
    teacher = 2.0 * context.family().architecture.num_parameters
    return group_size([16.0 * candidate.num_parameters / shards for candidate in candidates], _ROOM * max(free_bytes() - teacher, 0.0))
