"""The configuration, typed at the door: sections assembled here, validated once, handed out one by one."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from minitron.core.options import relevant
from minitron.data.config import DataConfig
from minitron.distill.cache import CacheConfig
from minitron.distill.losses import LossConfig
from minitron.distill.on_policy import OnPolicyConfig
from minitron.distill.settings import CorrectConfig, TrainingConfig
from minitron.engine import EngineConfig
from minitron.errors import ConfigError, nearest
from minitron.evaluate import EvaluateConfig, GenerateConfig
from minitron.importance import DepthConfig, ImportanceConfig
from minitron.models import TeacherConfig
from minitron.search import SearchConfig, TargetConfig
from minitron.search.cascade import CascadeConfig
from minitron.search.ranking import RankingConfig
from minitron.sparsify import SparsifyConfig
from minitron.stages.distill import StudentConfig
from minitron.stages.export import ExportConfig
from minitron.stages.prune import PruneConfig


@dataclass(frozen=True)
class RecipeConfig:
    """Section ``recipe``: an ordered list of stages."""

    name: str = "full"
    stages: list[str] = field(default_factory=list)


#: Section → its dataclass. ``tracking`` is open: tracker → its options.
SECTIONS: dict[str, type] = {
    "recipe": RecipeConfig,
    "teacher": TeacherConfig,
    "student": StudentConfig,
    "data": DataConfig,
    "importance": ImportanceConfig,
    "depth": DepthConfig,
    "target": TargetConfig,
    "search": SearchConfig,
    "ranking": RankingConfig,
    "cascade": CascadeConfig,
    "prune": PruneConfig,
    "sparsify": SparsifyConfig,
    "correct": CorrectConfig,
    "cache": CacheConfig,
    "training": TrainingConfig,
    "loss": LossConfig,
    "on_policy": OnPolicyConfig,
    "engine": EngineConfig,
    "export": ExportConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
}
#: Options outside sections: name → type, default, help.
TOP: dict[str, tuple[Any, Any, str]] = {
    "run_dir": (str | None, None, "folder of the run; null: runs/<experiment or recipe>"),
    "seed": (int, 0, "fixes data order, calibration samples and initialisation"),
    "rerun": (bool, False, "set folders aside that other settings made, and make them anew"),
    "experiment_name": (str | None, None, "title of the run; set by experiment=…"),
}
#: What a section's fingerprint leaves out because an input's content stands for it.
_RECORDED_SECTIONS = ("engine", "tracking", "recipe")


@dataclass(frozen=True)
class Config:
    """The whole configuration. Only the pipeline and the command line see it."""

    run_dir: str
    seed: int
    rerun: bool
    title: str
    recipe: RecipeConfig
    sections: dict[str, Any]
    tracking: dict[str, dict[str, Any]]

    def view(self, names: tuple[str, ...]) -> SimpleNamespace:
        """The named sections."""
        values = {name: self.tracking if name == "tracking" else self.sections[name] for name in names}
        return SimpleNamespace(**values)

    def settings(self, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
        """Result-relevant settings of the named sections, and the seed."""
        found = {name: relevant(self.sections[name]) for name in names if name not in _RECORDED_SECTIONS}
        return {**found, "": {"seed": self.seed}}

    def resolved(self) -> dict[str, Any]:
        """Everything as plain values, for the record."""
        plain = {name: dataclasses.asdict(section) for name, section in self.sections.items()}
        return {"run_dir": self.run_dir, "seed": self.seed, **plain, "recipe": dataclasses.asdict(self.recipe), "tracking": self.tracking}


def known_keys() -> dict[str, Any]:
    """Every option's dotted name → its type."""
    keys = {name: kind for name, (kind, _, _) in TOP.items()}
    for section, cls in SECTIONS.items():
        keys.update(_keys(section, cls))
    return keys


def _keys(prefix: str, cls: type) -> dict[str, Any]:
    """The dotted names of a section's options; a section inside a section is opened and also stands for itself."""
    keys: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        name, kind = f"{prefix}.{f.name}", hints[f.name]
        keys[name] = kind
        if dataclasses.is_dataclass(kind):
            keys.update(_keys(name, typing.cast(type, kind)))
    return keys


def build_config(raw: DictConfig) -> Config:
    """The typed configuration of a composed one.

    Raises:
        ConfigError: an unknown section or key, or a value of the wrong type; named with what is known.
    """
    values = typing.cast(dict[str, Any], OmegaConf.to_container(raw, resolve=True))
    tracking = {name: dict(options or {}) for name, options in (values.pop("tracking", None) or {}).items()}
    sections = {name: _section(name, cls, values.pop(name, None) or {}) for name, cls in SECTIONS.items()}
    top = {name: _value(name, values.pop(name, default), kind) for name, (kind, default, _) in TOP.items()}
    if values:
        name = next(iter(values))
        raise ConfigError(f"there is no section or option '{name}'; {nearest(name, [*SECTIONS, *TOP, 'tracking'])}")
    recipe = sections["recipe"]
    title = top["experiment_name"] or recipe.name
    return Config(top["run_dir"] or f"runs/{title}", top["seed"], top["rerun"], title, recipe, sections, tracking)


def _section(name: str, cls: type, values: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise ConfigError(f"section '{name}' has no key '{key}'; {nearest(key, hints)}")
    return cls(**{key: _value(f"{name}.{key}", value, hints[key]) for key, value in values.items()})


def _value(key: str, value: Any, kind: Any) -> Any:
    """A value as its declared type; integers pass as floats, whole floats as integers."""
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _section(key, typing.cast(type, kind), value)
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for option in options:
        if option is type(None) and value is None:
            return None
        origin = typing.get_origin(option) or option
        if origin is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if origin is int and isinstance(value, float) and value.is_integer():
            return int(value)
        if origin in (list, dict) and isinstance(value, origin):
            arguments = typing.get_args(option)
            if origin is list and arguments:
                return [_value(f"{key}[{i}]", item, arguments[0]) for i, item in enumerate(value)]
            return value
        if origin in (int, str, bool) and isinstance(value, origin) and not (origin is int and isinstance(value, bool)):
            return value
    names = " or ".join("null" if o is type(None) else getattr(o, "__name__", str(o)) for o in options)
    raise ConfigError(f"{key}={value!r} is not of type {names}")
