"""Everything about a configuration that can be refused before a model is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from minitron import dist
from minitron.config import Config
from minitron.core.architecture import Architecture
from minitron.core.manifest import fingerprint_folder
from minitron.core.plan import PrunePlan
from minitron.data.batches import check_share
from minitron.data.config import source_configs
from minitron.distill.cache import CacheHeader, check_loss
from minitron.distill.losses import build_losses, state_terms
from minitron.distill.settings import TrainingConfig, later_blends
from minitron.distill.states import check_states, state_taps
from minitron.engine import check_engine, check_optimizer, resolve_dtype
from minitron.errors import ArchitectureError, ConfigError, nearest
from minitron.estimate import student_shape
from minitron.evaluate import check_tasks
from minitron.importance import build_observers, check_placement
from minitron.log import get_logger
from minitron.models import Family, config_of, discover, further_teachers, resolve_teacher
from minitron.models.family import resized_config
from minitron.models.load import PLACEMENTS, check_attention, check_further_teachers, check_shard_group
from minitron.prune import target_config
from minitron.sparsify import build_method
from minitron.stages import load_stage
from minitron.stages.cached import cache_folder
from minitron.stages.cut import check_plan_is_for
from minitron.tracking import check_trackers

logger = get_logger(__name__)


def check_config(config: Config, stages: list[str]) -> None:
    """Validate the sections that the stages read.

    Raises:
        MinitronError: the first thing that cannot work, in one sentence.
    """
    sections = config.sections
    whole = sections["teacher"].placement in ("replicate", "cached")  # then scoring asks nothing of an engine, and runs on any number of processes
    used = {section for name in stages for section in load_stage(name).SECTIONS if not (section == "engine" and name == "importance" and whole)}
    if "data" in used and any(name not in ("search", "prune") for name in stages):
        source_configs(sections["data"])
    if "importance" in stages:
        build_observers(sections["importance"], sections["depth"], seed=config.seed)
        check_placement(sections["importance"], sections["depth"], sections["teacher"].placement)
    if "depth" in used:
        sections["depth"].check()
    if "prune" in stages:
        _check_plan(config, stages)
    if "sparsify" in stages:
        build_method(sections["sparsify"])
    if "rank" in stages:
        sections["ranking"].check(sections["training"])
        _check_ranking_tasks(config)
    if "export" in stages:
        sections["export"].check()
    if "evaluate" in stages:
        sections["evaluate"].check()
        if sections["evaluate"].tasks:
            check_tasks(sections["evaluate"])
    if "tracking" in used:
        check_trackers(config.tracking)
    if "loss" in used:
        build_losses(sections["loss"])
        _check_state_source(config)
    if "engine" in used:
        check_engine(sections["engine"])
        resolve_dtype_name(sections["training"].precision, "training.precision")
    if "teacher" in used:
        check_teacher(config)
    for settings in _trainings(config, stages):
        _check_training(settings, config)
    if "distill" in stages:
        _check_on_policy(config)
    if "cache" in stages:
        sections["cache"].check()
        _check_training(sections["training"], config, shared=False)
    if sections["teacher"].placement == "cached":
        _check_cached(config, stages)


def _check_ranking_tasks(config: Config) -> None:
    """Tasks that exist, and candidates that are whole where they are asked."""
    ranking, engine = config.sections["ranking"], config.sections["engine"].name
    if not ranking.tasks:
        return
    if engine != "local" and ranking.placement != "apart":
        raise ConfigError(f"ranking.tasks={ranking.tasks} asks whole candidates, and engine={engine} shards them: use ranking.placement=apart")
    try:
        check_tasks(replace(config.sections["evaluate"], tasks=ranking.tasks))
    except ConfigError as error:
        raise ConfigError(str(error).replace("evaluate.tasks", "ranking.tasks")) from error


def _check_plan(config: Config, stages: list[str]) -> None:
    """A plan to replay is a file, and stands alone."""
    prune = config.sections["prune"]
    if not prune.plan:
        return
    if not Path(prune.plan).expanduser().is_file():
        raise ConfigError(f"prune.plan={prune.plan} is no file: give the plan.json of a pruned model or the minitron.json of an export")
    if prune.candidates or {"search", "rank"} & set(stages):
        raise ConfigError(
            f"prune.plan={prune.plan} says what to cut, without candidates: use recipe=replay, or the commands prune, distill and export"
        )


def _trainings(config: Config, stages: list[str]) -> list[TrainingConfig]:
    """The settings that the training stages really use."""
    sections = config.sections
    training = sections["training"]
    made = {
        "distill": lambda: training,
        "correct": lambda: sections["correct"].training(training),
        "rank": lambda: sections["ranking"].training(training),
    }
    return [make() for name, make in made.items() if name in stages]


def _check_training(settings: TrainingConfig, config: Config, *, shared: bool = True) -> None:
    """Budget, phases and their text, batches that the ranks can share, and an optimiser that the engine can feed."""
    engine, data = config.sections["engine"], config.sections["data"]
    settings.check()
    check_optimizer(settings.optimizer, engine=engine.name, zero_stage=engine.zero_stage)
    later_blends(settings, data)
    for number, phase in enumerate(settings.phase_table(data.sequence_length)):
        where = f"training.phases[{number - 1}]" if number else "training"
        if shared:
            check_share(phase.batch_size, world_size=dist.world_size(), where=where)


def _check_on_policy(config: Config) -> None:
    sections = config.sections
    teacher, phases = sections["teacher"], sections["training"].phase_table(sections["data"].sequence_length)
    sections["on_policy"].check(
        loss=sections["loss"],
        sequence_length=min(phase.sequence_length for phase in phases),
        placement=teacher.placement,
        num_teachers=1 + len(check_further_teachers(teacher)),
    )


def _check_cached(config: Config, stages: list[str]) -> None:
    """Refuse what a stored teacher cannot serve; where there is a cache already, by what it holds."""
    sections = config.sections
    running = [name for name in stages if name in ("importance", "rank")]
    if running and dist.is_main():
        logger.info("teacher.placement=cached: %s run the teacher itself, replicated", " and ".join(running))
    if "distill" not in stages or not any(loss.function.needs_teacher for loss in build_losses(sections["loss"])):
        return
    cache = sections["cache"]
    if sections["teacher"].more:
        raise ConfigError("teacher.placement=cached stores one teacher, and teacher.more names further ones: use replicate, shard or offload")
    if "cache" in stages and cache.path:
        raise ConfigError(
            f"cache.path={cache.path} is read in place of the cache that the recipe makes: leave it out, or take a recipe without cache"
        )
    held = cache if "cache" in stages else CacheHeader.read(cache_folder(Path(config.run_dir).expanduser(), cache.path))
    check_loss(sections["loss"], signal=held.signal, k=held.k)


def check_target(config: Config, stages: list[str]) -> None:
    """Refuse a target that no shape of the teacher meets, and sequences that are longer than a model's positions, before anything is loaded.

    Every rank calls this: a teacher may have to be fetched.

    Raises:
        MinitronError: the teacher or the target cannot be used.
    """
    _check_positions(config, stages)
    states = bool({"rank", "distill"} & set(stages)) and bool(state_terms(config.sections["loss"]))
    if not {"correct", "importance", "search", "rank", "prune", "cache", "distill", "export"} & set(stages):
        return
    teacher = config.sections["teacher"]
    document = config_of(resolve_teacher(teacher), teacher)
    family = discover(document)
    if "cache" in stages:
        config.sections["cache"].check_vocabulary(family.architecture.vocab_size)
    if "prune" in stages and config.sections["prune"].plan:
        _check_replay(config, document, corrected="correct" in stages)
    if states:
        state_taps(config.sections["loss"], "teacher", family.architecture.num_layers)
        given = config.sections["student"].path
        if "distill" in stages and given:
            check_states(config.sections["loss"], family.architecture, discover(config_of(Path(given).expanduser())).architecture)
    if "search" in stages:
        shape, _ = student_shape(config, family.architecture)
        if config.sections["target"].name == "explicit":
            _check_shape(document, family, shape)
            if states:
                check_states(config.sections["loss"], family.architecture, shape)


def _check_shape(document: Any, family: Family, shape: Architecture) -> None:
    """Refuse a shape that the family's config class does not take, with the nearest hidden sizes that it does."""

    def fits(size: int) -> bool:
        try:
            resized_config(document, family, shape.with_coupled(hidden_size=size))
        except ArchitectureError:
            return False
        return True

    try:
        resized_config(document, family, shape)
    except ArchitectureError as error:
        most = family.architecture.hidden_size
        around = (range(shape.hidden_size - 1, 0, -1), range(shape.hidden_size + 1, most + 1))
        nearest_sizes = [size for sizes in around if (size := next(filter(fits, sizes), None)) is not None]
        told = f"; target.hidden_size={' or '.join(map(str, nearest_sizes))} would do" if nearest_sizes else ""
        raise ArchitectureError(f"{error}{told}") from error


def _check_replay(config: Config, document: Any, *, corrected: bool) -> None:
    """Refuse a plan that the teacher's family cannot carry out, or that is for another teacher."""
    path, family, folder = config.sections["prune"].plan, discover(document), resolve_teacher(config.sections["teacher"])
    plan = PrunePlan.load(Path(path).expanduser(), family.architecture)
    target_config(document, plan, family)
    if folder is not None and not corrected and not (Path(config.run_dir).expanduser() / "teacher").is_dir():
        fingerprint = dist.broadcast_object(fingerprint_folder(folder) if dist.is_main() else "")
        check_plan_is_for(plan, path, folder=folder, fingerprint=fingerprint)


def _check_state_source(config: Config) -> None:
    """Refuse losses on intermediate states where the teacher's signal holds none."""
    names = list(state_terms(config.sections["loss"]))
    if names and config.sections["teacher"].placement == "cached":
        raise ConfigError(
            f"loss '{names[0]}' needs intermediate states of the teacher, and teacher.placement=cached stores none: use replicate, shard or offload"
        )
    if names and config.sections["engine"].compile:
        raise ConfigError(f"loss '{names[0]}' reads states by hooks inside the blocks, which engine.compile=true would not see: leave it off")


def _check_positions(config: Config, stages: list[str]) -> None:
    sections = config.sections
    if not {"importance", "rank", "correct", "cache", "distill", "evaluate"} & set(stages):
        return
    teacher, student = sections["teacher"], sections["student"].path
    documents = {teacher.path: config_of(resolve_teacher(teacher), teacher)}
    documents |= {str(folder): config_of(folder, teacher) for folder, _ in further_teachers(teacher)}
    if "distill" in stages and student and (Path(student).expanduser() / "config.json").is_file():
        documents[student] = config_of(Path(student).expanduser(), teacher)
    lengths = {"data.sequence_length": sections["data"].sequence_length}
    if {"cache", "distill"} & set(stages):
        for number, entry in enumerate(sections["training"].phases or ()):
            lengths[f"training.phases[{number}].sequence_length"] = entry.get("sequence_length", 0)
    for name, document in documents.items():
        limit = getattr(document, "max_position_embeddings", None)
        for key, length in lengths.items():
            if limit is not None and length > limit:
                raise ConfigError(f"{key}={length} is longer than the {limit} positions of {name} (max_position_embeddings): give at most {limit}")


def resolve_dtype_name(name: str, key: str) -> None:
    """Refuse an unknown dtype word without probing the machine."""
    if name not in ("auto", "float32", "bf16"):
        raise ConfigError(f"{key}={name} is not one of auto, float32, bf16")
    if name != "auto":
        resolve_dtype(name)


def check_teacher(config: Config) -> None:
    """Refuse a section ``teacher`` that cannot work.

    Raises:
        ConfigError: no teacher, an unknown word, or a placement that the engine or the ranks cannot have.
    """
    teacher = config.sections["teacher"]
    if not teacher.path and not teacher.config:
        raise ConfigError("there is no teacher: give teacher.path=FOLDER_OR_HUB_ID")
    resolve_dtype_name(teacher.dtype, "teacher.dtype")
    check_attention(teacher.attention)
    check_further_teachers(teacher)
    if teacher.placement not in PLACEMENTS:
        raise ConfigError(f"teacher.placement={teacher.placement} is unknown; {nearest(teacher.placement, PLACEMENTS)}")
    check_shard_group(teacher)
    if teacher.placement == "shard" and config.sections["engine"].name == "local":
        raise ConfigError("teacher.placement=shard needs several processes: use engine=fsdp or engine=deepspeed under a launcher")
