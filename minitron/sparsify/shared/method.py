"""The form of a method, and what most of them do: score every weight, and zero the lowest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from minitron.core.sparsity import Pattern
from minitron.sparsify.shared.config import SparsifyConfig
from minitron.sparsify.shared.selecting import pruned_mask, top_of_rows


@dataclass(frozen=True)
class Inputs:
    """What the inputs X [tokens, in] of a matrix were over the calibration tokens that count.

    ``squares`` [in] float64: Σ X_j². ``hessian`` [in, in] float32: 2/tokens · XᵀX; None where the method did not ask for it. ``derived`` is for
    what a method makes of them once for all matrices that read these inputs.
    """

    squares: torch.Tensor
    hessian: torch.Tensor | None = None
    derived: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Sparsified:
    """A matrix [out, in] float32 with its zeros, and how many weights were put back beside the pattern."""

    weight: torch.Tensor
    num_recovered: int = 0


class Method(Protocol):
    """One method. ``needs`` says which statistics of the inputs it reads: ``none``, ``squares`` or ``hessian``.

    ``can_recover``: it leaves the other weights as they are, so that some can be put back. Equal inputs must give equal results: ranks share the
    matrices out.
    """

    needs: str
    can_recover: bool

    def sparsify(self, name: str, weight: torch.Tensor, inputs: Inputs | None, pattern: Pattern) -> Sparsified:
        """The matrix ``weight`` [out, in] float32, which may be overwritten, after a pattern. ``inputs`` lie on its device."""


class ByScores:
    """A method that keeps weights as they are or zeroes them, by a score of each."""

    needs = "squares"
    can_recover = True
    #: Where weights compete when ``sparsify.scope=auto``.
    scope = "row"

    def __init__(self, config: SparsifyConfig) -> None:
        self.config = config

    def scores(self, weight: torch.Tensor, inputs: Inputs | None) -> torch.Tensor:
        """[out, in] float32, high = kept."""
        raise NotImplementedError

    def sparsify(self, name: str, weight: torch.Tensor, inputs: Inputs | None, pattern: Pattern) -> Sparsified:
        """Zero the lowest scores. WRP (weight recovery, its published code): what N:M removed although it is among the top share of its row
        stays; so none come back at 0, all at 1, and never fewer at a larger share."""
        scores, recover = self.scores(weight, inputs), self.config.recover
        scope = self.scope if self.config.scope == "auto" else self.config.scope
        mask = pruned_mask(scores, pattern, by_row=scope == "row")
        num_recovered = 0
        if recover:
            back = mask & top_of_rows(scores, recover)
            num_recovered = int(back.sum())
            mask &= ~back
        return Sparsified(weight.masked_fill_(mask, 0.0), num_recovered)
