"""Accuracy on a multiple-choice task without a layer (LLM Pruning and Distillation in Practice, arXiv 2408.11796, section 3.2: Winogrande)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from minitron.errors import ConfigError
from minitron.importance.depth.blocks import BlockRunner
from minitron.importance.depth.config import DepthConfig, Subject
from minitron.importance.depth.losses import TokenLosses, labels_of
from minitron.importance.depth.tasks import accuracy_of, batches_of, encode, read_items
from minitron.importance.depth.walk import Tensors, Walk


class AccuracyPass:
    """Per layer, and per run of layers: 1 - accuracy of the model without it, so that high = important.

    An option's score is the sum of its tokens' log-likelihoods. The calibration samples are not used. Few items make coarse scores: the standard
    error at n items is about sqrt(a (1 - a) / n).
    """

    aggregation = "1 - accuracy without the layer"

    def __init__(self, config: DepthConfig, *, seed: int = 0) -> None:
        if config.task is None or not Path(config.task).expanduser().is_file():
            raise ConfigError(f"depth.task={config.task} is no file: depth=accuracy needs a multiple-choice task with one JSON object a line")
        self.config, self.path = config, Path(config.task).expanduser()
        self.details: dict[str, Any] = {}

    def run(self, subject: Subject, walk: Walk) -> Tensors:
        """``layer`` [layers] and ``layer_window.<n>`` [layers - n + 1].

        Raises:
            DataError: the task cannot be read, or does not fit the model.
        """
        layers = subject.family.architecture.num_layers
        items = read_items(self.path, self.config.num_items)
        longest = getattr(subject.model.config, "max_position_embeddings", None)
        rows = encode(items, subject.tokenizer, longest=longest)
        runner, head = BlockRunner(subject.model, subject.family, subject.placed), TokenLosses(subject.model, subject.placed)
        device = next(subject.model.parameters()).device
        windows = [(start, start + size) for size in (1, *self.config.windows) for start in range(layers - size + 1)]
        losses = torch.zeros(1 + len(windows), len(rows), dtype=torch.float64, device=device)  # the whole model, then every window

        def step(batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
            numbers, ids, counted = (part.to(device) for part in batch)
            with torch.no_grad():
                opening, labels = runner.open(ids), labels_of(ids, counted)
                for indices, hidden in runner.without(opening, range(layers), windows, base=True):
                    for index, rows_of in zip(indices, head.rows(hidden, labels), strict=True):
                        losses[index + 1].index_add_(0, numbers, rows_of)

        total = walk.total("depth", batches_of(rows, subject.batch_size), step, {"losses": losses}, forwards=1 + len(windows) // 2)
        accuracy = accuracy_of(total["losses"], items)
        self.details = {"accuracy": float(accuracy[0]), "num_items": len(items), "task": self.path.name}
        result, start = {}, 1
        for size in (1, *self.config.windows):
            stop = start + layers - size + 1
            result["layer" if start == 1 else f"layer_window.{size}"] = 1.0 - accuracy[start:stop]
            start = stop
        return result
