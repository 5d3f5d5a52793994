"""The ``sparsify`` section."""

from __future__ import annotations

from dataclasses import dataclass

from minitron.core.options import option
from minitron.core.sparsity import Pattern
from minitron.errors import ConfigError, nearest

SCOPES = ("auto", "row", "matrix")
RATIOS = ("uniform", "owl")
#: Groups of M in which ratios per layer can differ by whole weights.
MIXED_GROUP = 8


@dataclass(frozen=True)
class SparsifyConfig:
    """Section ``sparsify``."""

    name: str = option("wanda", "method")
    pattern: float | str = option(0.5, "share of zeros between 0 and 1, or N:M, which keeps N of every M weights along the inputs: 2:4, 4:8")
    ratios: str = option("uniform", "the same pattern in every layer (uniform), or ratios by the layers' outliers (owl; share of zeros or N:8)")
    owl_lambda: float = option(0.08, "owl: how far a layer's ratio may be from the mean of all")
    owl_threshold: float = option(5.0, "owl: an outlier is this many times the mean score of its layer")
    dense: list[str] = option([], "parts of names of matrices that stay dense; embeddings, head, norms and routers always do")
    scope: str = option("auto", "weights of a row or of the whole matrix compete; auto: as the method's authors have it")
    recover: float = option(0.0, "N:M: pruned weights that are in this top share of their row come back (WRP); 0: none, 1: all")
    power: float = option(0.5, "ria: exponent of the inputs' norms")
    damping: float = option(0.01, "sparsegpt: share of the Hessian's mean diagonal that is added to it")
    block_size: int = option(128, "sparsegpt: columns that are chosen from and updated together")
    num_samples: int = option(128, "calibration sequences of data.sequence_length tokens")
    batch_size: int = option(4, "sequences per forward", recorded=True)

    def parsed(self) -> Pattern:
        """The pattern.

        Raises:
            ConfigError: it is neither a share between 0 and 1 nor an N:M with N below M.
        """
        return Pattern.parse(self.pattern, where="sparsify.pattern")

    def check(self) -> None:
        """Refuse unknown words, numbers out of range, and what does not go together.

        Raises:
            ConfigError: the first one, with what is accepted.
        """
        pattern = self.parsed()
        for name, word, known in (("ratios", self.ratios, RATIOS), ("scope", self.scope, SCOPES)):
            if word not in known:
                raise ConfigError(f"sparsify.{name}={word} is unknown; {nearest(word, known)}")
        for name in ("num_samples", "batch_size", "block_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"sparsify.{name}={getattr(self, name)} must be at least 1")
        if not 0.0 <= self.recover <= 1.0:
            raise ConfigError(f"sparsify.recover={self.recover:g} must be between 0 and 1")
        for name in ("damping", "owl_lambda", "owl_threshold"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"sparsify.{name}={getattr(self, name):g} must be above 0")
        if pattern.m is None and self.recover:
            raise ConfigError(f"sparsify.recover={self.recover:g} restores weights beside N:M groups, and sparsify.pattern={pattern} has none")
        if pattern.m is not None and self.scope == "matrix":
            raise ConfigError(f"sparsify.scope=matrix is for a share of zeros: in sparsify.pattern={pattern} the {pattern.m} of a group compete")
        if self.ratios == "owl" and pattern.m not in (None, MIXED_GROUP):
            raise ConfigError(
                f"sparsify.ratios=owl gives layers ratios of their own, which groups of {pattern.m} (sparsify.pattern={pattern}) cannot: "
                f"use a share of zeros, N:{MIXED_GROUP}, or ratios=uniform"
            )
        if pattern.m is not None and self.name == "sparsegpt" and self.block_size % pattern.m:
            raise ConfigError(f"sparsify.block_size={self.block_size} is no multiple of the {pattern.m} of sparsify.pattern={pattern}")
