"""From a teacher to an untrained student: scores, plan, surgery, through minitron's own rooms."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minitron.core.architecture import Architecture
from minitron.core.plan import PrunePlan, make_plan, select_layers
from minitron.core.scores import ImportanceScores
from minitron.evaluate import perplexity
from minitron.importance import DepthConfig, ImportanceConfig, build_observers
from minitron.importance.scoring import run_pass
from minitron.log import get_logger
from minitron.models import discover, load_causal_lm
from minitron.models.load import model_from_weights
from minitron.prune import prune_weights, target_config
from paper_claims.teachers import CPU, Laboratory, fresh_model

logger = get_logger(__name__)

#: Calibration windows on which sets of layers are compared.
_LAYER_WINDOWS = 32


@dataclass(frozen=True)
class Cut:
    """How a student comes to its weights.

    ``size`` is one of the suite's; ``metric`` ranks the units, ``scratch`` draws fresh weights of the same shape instead;
    ``rounds`` > 1 scores again after each equal share of the cut.
    """

    size: str
    metric: str = "activation"
    rounds: int = 1


class Knife:
    """Cuts the teachers of a laboratory; what several students need (scores, layer choices) is computed once."""

    def __init__(self, lab: Laboratory) -> None:
        self.lab = lab
        self._teachers: dict[str, nn.Module] = {}
        self._scores: dict[tuple[Any, ...], ImportanceScores] = {}
        self._layers: dict[tuple[Any, ...], list[int]] = {}

    def teacher(self, name: str) -> nn.Module:
        """A teacher in memory, without hooks: scoring works on a copy."""
        if name not in self._teachers:
            self._teachers[name] = load_causal_lm(self.lab.teacher(name), dtype=torch.float32, device=CPU)
        return self._teachers[name]

    def student(self, cut: Cut, *, teacher: str, text: str, seed: int) -> tuple[nn.Module, PrunePlan]:
        """The student before training and the last plan that made it.

        The seed draws calibration text, random scores and, from scratch, weights.
        """
        model = self.teacher(teacher)
        shape = discover(model.config).architecture
        target = shape.replace(**self.lab.suite.sizes[cut.size])
        if cut.metric == "scratch":
            kept = list(range(target.num_layers))
            plan = make_plan(self._score(model, "random", teacher, text, seed, use_cache=True, layers=False), shape, target, kept_layers=kept)
            return fresh_model(target_config(model.config, plan, discover(model.config)), seed=seed), plan
        for done in range(1, cut.rounds + 1):
            family = discover(model.config)
            scores = self._score(model, cut.metric, teacher, text, seed, use_cache=done == 1, layers=target.num_layers < shape.num_layers)
            step = _between(shape, target, done / cut.rounds)
            plan = make_plan(scores, family.architecture, step, kept_layers=self._kept(model, scores, step, teacher, text, seed))
            weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
            pruned = {name: tensor.clone() for name, tensor in prune_weights(weights.__getitem__, plan, family)}
            model = model_from_weights(target_config(model.config, plan, family), pruned, dtype=torch.float32, device=CPU).eval()
        return model, plan

    def _score(self, model: nn.Module, metric: str, teacher: str, text: str, seed: int, *, use_cache: bool, layers: bool) -> ImportanceScores:
        suite = self.lab.suite
        with_layers = layers and suite.layer_choice == "block_influence"
        key = (teacher, text, metric, seed, with_layers)
        if not use_cache or key not in self._scores:
            observers = build_observers(ImportanceConfig(name=metric), DepthConfig(), seed=seed)
            if not with_layers:
                observers = observers[:1]  # magnitude and random scores then need no forward pass
            samples = self.lab.corpus(text).calibration(suite.num_calibration, seed=seed)
            observed = copy.deepcopy(model)
            found = run_pass(observed, discover(model.config), samples, observers, batch_size=suite.calibration_batch)
            scores = ImportanceScores(found.scores, {"metric": metric})
            if not use_cache:
                return scores
            self._scores[key] = scores
        return self._scores[key]

    def _kept(self, model: nn.Module, scores: ImportanceScores, target: Architecture, teacher: str, text: str, seed: int) -> list[int]:
        total = discover(model.config).architecture.num_layers
        if target.num_layers == total:
            return list(range(total))
        if self.lab.suite.layer_choice == "block_influence":
            return select_layers(scores.of("layer"), target.num_layers)
        key = (teacher, text, target.num_layers, seed)
        if key not in self._layers:
            self._layers[key] = self._best_layers(model, target.num_layers, text, seed)
            logger.info("layers kept of %d: %s", total, self._layers[key])
        return self._layers[key]

    def _best_layers(self, model: nn.Module, keep: int, text: str, seed: int) -> list[int]:
        """The set of layers that loses least on calibration text: every set is tried, so that depth gets its best chance."""
        family = discover(model.config)
        shape = family.architecture
        windows = self.lab.corpus(text).calibration(_LAYER_WINDOWS, seed=seed)
        weights = {name: tensor.detach() for name, tensor in model.named_parameters()}

        def loss(layers: list[int]) -> float:
            plan = make_plan(ImportanceScores({}), shape, shape.replace(num_layers=keep), kept_layers=layers)
            pruned = dict(prune_weights(weights.__getitem__, plan, family))
            trial = model_from_weights(target_config(model.config, plan, family), pruned, dtype=torch.float32, device=CPU).eval()
            return perplexity(trial, windows, batch_size=8, what=f"layers {layers}", alone=True)["loss"]

        choices = [list(choice) for choice in itertools.combinations(range(shape.num_layers), keep)]
        return min(choices, key=loss)


def _between(shape: Architecture, target: Architecture, share: float) -> Architecture:
    """The shape that lies a share of the way from one to the other; only what differs moves."""
    if share >= 1:
        return target
    return shape.replace(ffn_size=round(shape.ffn_size + (target.ffn_size - shape.ffn_size) * share))
