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


SHARDINGS = ("full", "hybrid")
OFFLOADS = ("none", "optimizer", "parameters")
#: What is computed again in the backward pass: nothing, all but matrix products and attention, all but a block's input (``engine/recompute.py``).
CHECKPOINTING = ("none", "selective", "full")


@dataclass(frozen=True)
class EngineConfig:
    """Section ``engine``."""

    name: str = option("local", "who owns sharding and the optimiser step", recorded=True)
    zero_stage: int = option(2, "deepspeed: what is sharded; 1 optimiser, 2 and gradients, 3 and weights (0 nothing)", recorded=True)
    sharding: str = option(
        "full", "fsdp: full, over all ranks, or hybrid, over groups of ranks that hold copies of each other's shards", recorded=True
    )
    shard_size: int | None = option(None, "ranks that share one copy under sharding=hybrid; null: those of a node", recorded=True)
    offload: str = option("none", "what lies in CPU memory: none, optimizer (deepspeed: with the update), or parameters (both)", recorded=True)
    activation_checkpointing: str = option(
        "none", "computed again in the backward pass: none, selective (all but products and attention), or full (whole blocks)", recorded=True
    )
    compile: bool = option(False, "torch.compile every block of student and teacher", recorded=True)
    timeout: float = option(1800.0, "seconds that ranks wait for one that does not answer, before they stop and name it", recorded=True)


def check_engine(config: EngineConfig) -> None:
    """Refuse what cannot work before any model is loaded.

    Raises:
        ConfigError: an unknown word, a number out of range, one process's engine under several processes, an option that the engine does not
            have, or a package that is missing.
    """
    if config.name not in ENGINES:
        raise ConfigError(f"engine={config.name} is unknown; {nearest(config.name, ENGINES)}")
    words = {"sharding": SHARDINGS, "offload": OFFLOADS, "activation_checkpointing": CHECKPOINTING}
    for key, known in words.items():
        value = getattr(config, key)
        if value not in known:
            raise ConfigError(f"engine.{key}={value} is unknown; {nearest(str(value), known)}")
    if config.timeout <= 0:
        raise ConfigError(f"engine.timeout={config.timeout} must be a positive number of seconds")
    if config.zero_stage not in (0, 1, 2, 3):
        raise ConfigError(f"engine.zero_stage={config.zero_stage} is not one of 0, 1, 2, 3")
    if config.name == "local" and dist.world_size() > 1:
        raise ConfigError(f"engine=local is for one process, but the launcher started {dist.world_size()}: use engine=fsdp or engine=deepspeed")
    _check_sharding(config)
    _check_offload(config)
    if config.activation_checkpointing == "selective" and (config.compile or (config.name == "deepspeed" and config.zero_stage == 3)):
        other = "compile=true, which chooses by itself" if config.compile else "zero_stage=3, whose hooks gather weights inside a block"
        raise ConfigError(f"engine.activation_checkpointing=selective does not go with engine.{other}: use none or full")
    if config.compile and config.name == "deepspeed" and config.zero_stage == 3:
        raise ConfigError("engine.compile=true does not go with engine.zero_stage=3, whose hooks gather weights inside a block: use engine=fsdp")
    if config.name == "deepspeed":
        import importlib.util

        if importlib.util.find_spec("deepspeed") is None:
            raise ConfigError("engine=deepspeed needs the package deepspeed: pip install deepspeed")


def _check_sharding(config: EngineConfig) -> None:
    if config.sharding == "hybrid" and config.name != "fsdp":
        raise ConfigError(f"engine.sharding=hybrid is for engine=fsdp, not engine={config.name}")
    if config.shard_size is None:
        size, where = dist.local_world_size(), "the ranks of a node"
    elif config.sharding != "hybrid":
        raise ConfigError(f"engine.shard_size={config.shard_size} needs engine.sharding=hybrid")
    else:
        size, where = config.shard_size, f"engine.shard_size={config.shard_size}"
    if config.sharding == "hybrid" and (size < 1 or dist.world_size() % size):
        raise ConfigError(f"engine.sharding=hybrid cannot divide {dist.world_size()} ranks into groups of {size} ({where}): give a divisor")


def _check_offload(config: EngineConfig) -> None:
    if config.offload == "none":
        return
    given = f"engine.offload={config.offload}"
    if config.name == "local":
        raise ConfigError(f"{given} is not for engine=local: use engine=fsdp or engine=deepspeed, on one process too")
    if config.name == "fsdp" and config.offload == "optimizer":
        raise ConfigError(f"{given}: FSDP keeps the optimiser's state beside the weights; use engine.offload=parameters")
    if config.name == "deepspeed":
        least = 1 if config.offload == "optimizer" else 3
        if config.zero_stage < least:
            raise ConfigError(f"{given} needs engine.zero_stage={least}{' or higher' if least < 3 else ''}, and it is {config.zero_stage}")


def build_engine(config: EngineConfig, *, optimizer: OptimizerConfig, precision: str) -> Engine:
    """The engine that a section names."""
    check_engine(config)
    check_optimizer(optimizer.name, engine=config.name, zero_stage=config.zero_stage)
    module, _, cls = ENGINES[config.name].partition(":")
    return cast(Engine, getattr(importlib.import_module(module), cls)(config, optimizer=optimizer, compute_dtype=resolve_dtype(precision)))


__all__ = ["ENGINES", "EngineConfig", "OptimizerConfig", "build_engine", "check_engine", "check_optimizer", "resolve_dtype"]
