"""Everything about a configuration that can be refused before a model is loaded."""

from __future__ import annotations

from minitron.config import Config
from minitron.data.config import source_configs
from minitron.distill.losses import build_losses
from minitron.engine import check_engine, resolve_dtype
from minitron.errors import ConfigError, nearest
from minitron.estimate import student_shape
from minitron.importance import build_observers
from minitron.models import config_of, discover, resolve_teacher
from minitron.models.family import resized_config
from minitron.models.load import PLACEMENTS
from minitron.stages import load_stage


def check_config(config: Config, stages: list[str]) -> None:
    """Validate the sections that the stages read.

    Raises:
        MinitronError: the first thing that cannot work, in one sentence.
    """
    used = {section for name in stages for section in load_stage(name).SECTIONS}
    sections = config.sections
    if "data" in used and any(name not in ("search", "prune") for name in stages):
        source_configs(sections["data"])
    if "importance" in stages:
        build_observers(sections["importance"], sections["depth"], seed=config.seed)
    if "depth" in used:
        sections["depth"].check()
    if "loss" in used:
        build_losses(sections["loss"])
    if "engine" in used:
        check_engine(sections["engine"])
        resolve_dtype_name(sections["training"].precision, "training.precision")
    if "teacher" in used:
        _check_teacher(config)
    if "distill" in stages:
        sections["training"].check()
    if "correct" in stages:
        sections["correct"].training(sections["training"]).check()
    if "rank" in stages:
        sections["ranking"].training(sections["training"]).check()


def check_target(config: Config, stages: list[str]) -> None:
    """Refuse a target that no shape of the teacher meets, before anything is scored. Every rank calls this: the teacher may have to be fetched.

    Raises:
        MinitronError: the teacher or the target cannot be used.
    """
    if "search" not in stages:
        return
    teacher = config.sections["teacher"]
    document = config_of(resolve_teacher(teacher), teacher)
    family = discover(document)
    shape, _ = student_shape(config, family.architecture)
    if config.sections["target"].name == "explicit":
        resized_config(document, family, shape)


def resolve_dtype_name(name: str, key: str) -> None:
    """Refuse an unknown dtype word without probing the machine."""
    if name not in ("auto", "float32", "bf16"):
        raise ConfigError(f"{key}={name} is not one of auto, float32, bf16")
    if name != "auto":
        resolve_dtype(name)


def _check_teacher(config: Config) -> None:
    teacher = config.sections["teacher"]
    if not teacher.path and not teacher.config:
        raise ConfigError("there is no teacher: give teacher.path=FOLDER_OR_HUB_ID")
    resolve_dtype_name(teacher.dtype, "teacher.dtype")
    if teacher.placement not in PLACEMENTS:
        raise ConfigError(f"teacher.placement={teacher.placement} is unknown; {nearest(teacher.placement, PLACEMENTS)}")
    if teacher.placement == "cached":
        raise ConfigError(
            "teacher.placement=cached needs a cache of the teacher's signal, which this version cannot make yet: use replicate, shard or offload"
        )
    if teacher.placement == "shard" and config.sections["engine"].name == "local":
        raise ConfigError("teacher.placement=shard needs several processes: use engine=fsdp or engine=deepspeed under a launcher")
