"""Engines own precision, sharding and the optimiser step. One file a member, one row here."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import cast

from minitron import dist
from minitron.core.options import option
from minitron.core.protocols import Engine
from minitron.engine.optimizers import OptimizerConfig, check_optimizer
from minitron.engine.precision import resolve_dtype
from minitron.errors import ConfigError, nearest

#: Name → module and class. The conf file ``engine/<name>.yaml`` carries the same name.
ENGINES = {
    "local": "minitron.engine.local:LocalEngine",
    "fsdp": "minitron.engine.fsdp:FsdpEngine",
    "deepspeed": "minitron.engine.deepspeed:DeepSpeedEngine",
}


@dataclass(frozen=True)
class EngineConfig:
    """Section ``engine``."""

    name: str = option("local", "who owns sharding and the optimiser step", recorded=True)
    zero_stage: int = option(2, "deepspeed: what is sharded; 1 optimiser, 2 and gradients, 3 and weights (0 nothing)", recorded=True)
    activation_checkpointing: bool = option(False, "recompute activations in the backward pass instead of storing them", recorded=True)


def check_engine(config: EngineConfig) -> None:
    """Refuse what cannot work before any model is loaded.

    Raises:
        ConfigError: an unknown engine, a stage out of range, or one process's engine under several processes.
    """
    if config.name not in ENGINES:
        raise ConfigError(f"engine={config.name} is unknown; {nearest(config.name, ENGINES)}")
    if config.zero_stage not in (0, 1, 2, 3):
        raise ConfigError(f"engine.zero_stage={config.zero_stage} is not one of 0, 1, 2, 3")
    if config.name == "local" and dist.world_size() > 1:
        raise ConfigError(f"engine=local is for one process, but the launcher started {dist.world_size()}: use engine=fsdp or engine=deepspeed")
    if config.name == "deepspeed":
        import importlib.util

        if importlib.util.find_spec("deepspeed") is None:
            raise ConfigError("engine=deepspeed needs the package deepspeed: pip install deepspeed")


def build_engine(config: EngineConfig, *, optimizer: OptimizerConfig, precision: str) -> Engine:
    """The engine that a section names."""
    check_engine(config)
    check_optimizer(optimizer.name, engine=config.name, zero_stage=config.zero_stage)
    module, _, cls = ENGINES[config.name].partition(":")
    return cast(Engine, getattr(importlib.import_module(module), cls)(config, optimizer=optimizer, compute_dtype=resolve_dtype(precision)))


__all__ = ["ENGINES", "EngineConfig", "OptimizerConfig", "build_engine", "check_engine", "check_optimizer", "resolve_dtype"]
