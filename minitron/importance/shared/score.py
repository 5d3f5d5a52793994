"""All that one scoring of a teacher does: passes of their own, the shared pass, rounds of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minitron.checkpoint import Checkpointer
from minitron.importance import build_depth, build_width, check_placement
from minitron.importance.depth import DepthConfig, Subject, Walk, run_depth_passes
from minitron.importance.depth.config import PlacedTeacher
from minitron.importance.depth.passes import needs_own_pass
from minitron.importance.scoring import Decoder, Observer, Prepare, run_pass
from minitron.importance.width.config import ImportanceConfig
from minitron.importance.width.rounds import check_sizes, score_in_rounds
from minitron.models.head import head_of

Tensors = dict[str, torch.Tensor]


@dataclass
class Scored:
    """Scores, what they were made from where that adds up, header entries, and the tokens that counted."""

    tensors: Tensors
    sums: Tensors | None
    details: dict[str, Any] = field(default_factory=dict)


class Scoring:
    """The width and the depth metric of two sections, run on one subject.

    Checkpoints lie in ``folder``, one folder a pass; None: none are kept. ``prepare`` is what an engine makes of the decoder (:func:`run_pass`).
    """

    def __init__(
        self,
        width: ImportanceConfig,
        depth: DepthConfig,
        *,
        seed: int,
        placement: str = "replicate",
        prepare: Prepare | None = None,
        folder: Path | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        check_placement(width, depth, placement)
        self._width, self._depth, self._seed = width, depth, seed
        self._prepare, self._folder, self._stop = prepare, folder, stop
        self._metric = build_depth(depth, seed=seed)
        self._result = Scored({}, None)
        self._root: Any = None

    def run(self, subject: Subject) -> Scored:
        """Scores of every axis and layer.

        Raises:
            ConfigError: sizes or layers that the model does not have.
            DataError: no token counts, or something is not finite.
            Interrupted: a signal asked for a stop.
        """
        check_sizes(self._width, subject.family.architecture)
        self._result = Scored({}, None, {"aggregation": {self._depth.name: self._metric.aggregation}})
        own_pass = needs_own_pass(self._depth, self._metric)
        transform = head_of(subject.model).transform if own_pass and self._prepare is not None else None  # while the weights are whole
        if transform is None:  # before rounds, which mask the model's own weights
            own, details = self._depth_passes(subject)
        width = score_in_rounds(self._width, subject.model, subject.family, lambda number: self._round(subject, number), folder=self._folder)
        if transform is not None:  # after width metrics that read whole weights; there are no rounds here
            root = self._place(Decoder(subject.model, separator=subject.separator))
            own, details = self._depth_passes(replace(subject, placed=PlacedTeacher(root, transform)))
        self._result.details |= details
        self._result.tensors = {**width, **own}
        if self._width.rounds > 1:
            self._result.sums = None
        return self._result

    def _depth_passes(self, subject: Subject) -> tuple[Tensors, dict[str, Any]]:
        every = self._width.checkpoint_every
        return run_depth_passes(self._depth, self._metric, subject, folder=self._folder, checkpoint_every=every, stop=self._stop)

    def _place(self, decoder: nn.Module) -> Any:
        """The decoder where the engine puts it, once for all passes: there is one model inside."""
        assert self._prepare is not None
        if self._root is None:
            self._root = self._prepare(decoder)
        return self._root

    def _round(self, subject: Subject, number: int) -> Tensors:
        """One scoring of the units, in the first round together with a depth metric that shares its pass."""
        metric: Any = build_width(self._width, seed=self._seed)
        checkpoints = Checkpointer(self._folder / f"width-{number}") if self._folder is not None else None
        every = self._width.checkpoint_every
        self._result.details["aggregation"][self._width.name] = metric.aggregation
        observers: list[Observer] = [] if hasattr(self._metric, "run") or number else [self._metric]
        found: Tensors = {}
        if hasattr(metric, "run"):
            walk = Walk(checkpointer=checkpoints, checkpoint_every=every, stop=self._stop)
            found = {name: tensor.float().cpu() for name, tensor in metric.run(subject, walk).items()}
            self._result.details["width"] = metric.details
            checkpoints = Checkpointer(self._folder / "layers") if self._folder is not None else None
        else:
            observers.insert(0, metric)
        if not observers:
            return found
        done = run_pass(
            subject.model,
            subject.family,
            subject.samples,
            observers,
            batch_size=subject.batch_size,
            counted=subject.counted,
            separator=subject.separator,
            prepare=self._place if self._prepare is not None else None,
            checkpointer=checkpoints,
            checkpoint_every=every,
            stop=self._stop,
        )
        self._result.sums = done.sums if not found else None
        return found | done.scores
