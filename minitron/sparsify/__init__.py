"""Weights set to zero: methods that choose which, and the walk over a model's blocks that applies them."""

from __future__ import annotations

import importlib
from typing import cast

from minitron.errors import ConfigError, nearest
from minitron.sparsify.shared.config import SparsifyConfig
from minitron.sparsify.shared.method import Method

#: Method → module and class; ``sparsify=<name>`` on the command line.
METHODS = {
    "magnitude": "minitron.sparsify.magnitude:Magnitude",
    "wanda": "minitron.sparsify.wanda:Wanda",
    "sparsegpt": "minitron.sparsify.sparsegpt:SparseGPT",
    "ria": "minitron.sparsify.ria:RIA",
}


def build_method(config: SparsifyConfig) -> Method:
    """The method that the section names.

    Raises:
        ConfigError: an unknown method, an option out of range, or one that the method does not take.
    """
    if config.name not in METHODS:
        raise ConfigError(f"sparsify={config.name} is unknown; {nearest(config.name, METHODS)}")
    config.check()
    module, _, cls = METHODS[config.name].partition(":")
    method = cast(Method, getattr(importlib.import_module(module), cls)(config))
    if config.recover and not method.can_recover:
        raise ConfigError(
            f"sparsify.recover={config.recover:g} puts weights back by their scores, and {config.name} rewrites the others: use recover=0"
        )
    return method


__all__ = ["METHODS", "Method", "SparsifyConfig", "build_method"]
