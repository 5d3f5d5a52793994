"""One teacher to several sizes: a run of the recipe for each, in a folder below the cascade's, and one account of what they cost."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron import dist
from minitron.cascade_costs import CascadeCosts, MemberCost, member_cost
from minitron.checks import check_config, check_target
from minitron.config import Config
from minitron.core.architecture import Architecture
from minitron.core.manifest import Manifest, write_text
from minitron.errors import ConfigError, MinitronError
from minitron.estimate import student_shape, teacher_shape
from minitron.finished import CASCADE_FILE
from minitron.log import get_logger
from minitron.models import config_of, discover
from minitron.pipeline import run_stages
from minitron.search.cascade import CascadeConfig, narrowed, require_falling, target_of
from minitron.stages.context import StageContext

logger = get_logger(__name__)

#: Stages that work on what a size is cut from; all others on what it is distilled from.
_CUTTING = ("importance", "search", "rank", "prune")


@dataclass(frozen=True)
class Source:
    """A model that a size is cut from or taught by: its name in the account, its folder (None: what ``teacher`` says) and its shape."""

    name: str
    folder: Path | None
    shape: Architecture


def plan_cascade(config: Config, *, device_name: str | None = None) -> CascadeCosts:
    """What the cascade will take, from configs alone.

    Raises:
        MinitronError: sizes that do not fall, that nothing reaches, or a recipe without a distillation.
    """
    section: CascadeConfig = config.sections["cascade"]
    section.check()
    if "distill" not in config.recipe.stages:
        raise ConfigError(f"recipe={config.recipe.name} has no distill: each size of a cascade is distilled, e.g. recipe=full")
    for key, given in (("student.path", config.sections["student"].path), ("prune.plan", config.sections["prune"].plan)):
        if given:
            raise ConfigError(f"{key}={given} cannot go with a cascade, which cuts every size itself: leave it out")
    original = Source("original", None, teacher_shape(config))
    members, previous = [], original
    for number, name in enumerate(section.names):
        cut, guide = _sources(section, original, previous)
        made = _config_of_size(config, number, original.shape, cut)
        try:
            shape, num_candidates = student_shape(made, cut.shape)
        except MinitronError as error:
            raise type(error)(f"size {name} of the cascade: {error}") from error
        stages = _stages(config, number)
        members.append(_member(made, name, shape, cut, guide, stages, num_candidates))
        previous = Source(name, None, shape)
    require_falling(section.names, [member.shape for member in members], original.shape)
    return CascadeCosts(
        original.shape,
        members,
        section.scratch_tokens,
        config.sections["data"].sequence_length,
        device_name or "h100",
    )


def run_cascade(config: Config, *, command: str, experiment: str | None = None, device_name: str | None = None) -> CascadeCosts:
    """Make every size, the largest first; what is complete is passed over, as in any run. Writes ``cascade.json`` before the first and after each.

    Raises:
        MinitronError: bad input, in one sentence.
        Interrupted: a signal asked for a stop; what was done is kept.
    """
    section: CascadeConfig = config.sections["cascade"]
    costs = plan_cascade(config, device_name=device_name)
    folder = Path(config.run_dir).expanduser()
    first = folder / section.names[0]
    _write(costs, folder)
    previous: Source | None = None
    for number, name in enumerate(section.names):
        original = Source("original", _corrected(first) if number else None, costs.original)
        cut, guide = _sources(section, original, previous or original)
        logger.info("size %s (%d of %d), cut from %s, taught by %s", name, number + 1, len(section.names), cut.name, guide.name)
        made = _config_of_size(config, number, costs.original, cut)
        stages = _stages(config, number)
        if cut.name == guide.name:
            _run(made, stages, command, experiment)
        else:
            _run(made, [stage for stage in stages if stage in _CUTTING], command, experiment)
            pruned = Path(made.run_dir) / "pruned" / StageContext(Path(made.run_dir), made.title, made.seed, made.view(("teacher",))).winner()
            taught = _with(_of_teacher(made, config, guide), student=dataclasses.replace(made.sections["student"], path=str(pruned)))
            _run(taught, [stage for stage in stages if stage not in _CUTTING], command, experiment)
        student = Path(made.run_dir) / "student"
        shape = discover(config_of(student, config.sections["teacher"])).architecture
        previous = Source(name, student, shape)
        member = _member(made, name, shape, cut, guide, stages, costs.members[number].num_candidates)
        costs.members[number] = dataclasses.replace(member, measured=measured(Path(made.run_dir)))
        _write(costs, folder)
    return costs


def _write(costs: CascadeCosts, folder: Path) -> None:
    """The account so far, beside the sizes' folders."""
    if dist.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CASCADE_FILE, json.dumps(costs.to_dict(), indent=1))


def _run(config: Config, stages: list[str], command: str, experiment: str | None) -> None:
    if stages:
        check_config(config, stages)
        check_target(config, stages)
        run_stages(config, stages, command=command, experiment=experiment)


def _sources(section: CascadeConfig, original: Source, previous: Source) -> tuple[Source, Source]:
    """What a size is cut from, and what teaches it."""
    return tuple(previous if word == "previous" else original for word in (section.cut_from, section.distill_from))  # type: ignore[return-value]


def _stages(config: Config, number: int) -> list[str]:
    """The recipe's stages for a size: the original is corrected once, with the first."""
    return [stage for stage in config.recipe.stages if stage != "correct" or number == 0]


def _corrected(first: Path) -> Path | None:
    """The corrected original, where the first size has made one."""
    return first / "teacher" if Manifest.read(first / "teacher") is not None else None


def _config_of_size(config: Config, number: int, original: Architecture, cut: Source) -> Config:
    """The configuration of one size's run, its teacher being what it is cut from."""
    section: CascadeConfig = config.sections["cascade"]
    name, sections = section.names[number], config.sections
    made = dataclasses.replace(config, run_dir=str(Path(config.run_dir).expanduser() / name), title=f"{config.title}-{name}")
    made = _with(made, target=target_of(section.sizes[number], sections["target"], original), search=narrowed(sections["search"], cut.shape))
    return _of_teacher(made, config, cut)


def _of_teacher(made: Config, config: Config, source: Source) -> Config:
    """The same with another teacher: the given one, or a model of this cascade."""
    teacher = config.sections["teacher"]
    if source.folder is not None:
        teacher = dataclasses.replace(teacher, path=str(source.folder), config=None, revision=None, note=None)
    return _with(made, teacher=teacher)


def _with(config: Config, **sections: Any) -> Config:
    return dataclasses.replace(config, sections={**config.sections, **sections})


def _member(made: Config, name: str, shape: Architecture, cut: Source, guide: Source, stages: list[str], num_candidates: int) -> MemberCost:
    """The predicted cost of a size."""
    teachers = {stage: cut.shape if stage in _CUTTING else guide.shape for stage in stages}
    return member_cost(made, name, shape, teachers, cut_from=cut.name, distill_from=guide.name, num_candidates=num_candidates)


def measured(run_dir: Path) -> dict[str, float]:
    """What a finished run took and came to: tokens, hours of all its processes, the held-out loss of its student."""
    paths = [*run_dir.glob("*/manifest.json"), *run_dir.glob("pruned/*/manifest.json")]
    manifests = [made for path in paths if ".old-" not in str(path) and (made := Manifest.read(path.parent)) is not None]
    found = {
        "tokens": float(sum(made.tokens for made in manifests)),
        "process_hours": sum(made.wall_seconds * int(made.recorded.get("num_processes", 1)) for made in manifests) / 3600,
    }
    student = Manifest.read(run_dir / "student")
    loss = student.results.get("validation_loss") if student is not None else None
    return found | ({"held_out_loss": float(loss)} if loss is not None else {})
