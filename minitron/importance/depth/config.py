"""The ``depth`` section, and what a depth metric is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from minitron.core.layers import SELECTIONS
from minitron.core.options import option
from minitron.errors import ConfigError, nearest
from minitron.importance.depth.walk import Tensors, Walk
from minitron.models.family import Family
from minitron.ops.head import LogitTransform
from minitron.prune.merge import LAYER_MERGES


@dataclass(frozen=True)
class LacoConfig:
    """Layer collapse (LaCo, arXiv 2402.11187): its parameters C, L, H, I and T by name, and how layers are merged."""

    merge: str = option("rdsc", "rdsc: the formula as printed; replace: what the authors' code computes; mean")
    num_merged: int = option(4, "C: layers that become one")
    lowest: int = option(0, "L: the lowest layer that may take others in")
    highest: int | None = option(None, "H: the first group begins C layers below it; null: the last layer")
    interval: int = option(2, "I: how far to go down after a merge")
    threshold: float = option(0.65, "T: least cosine similarity of the final states with the unmerged model's")
    num_samples: int = option(16, "calibration sequences for the similarity; their final states are kept on the device")

    def check(self, num_layers: int | None = None) -> None:
        """Refuse parameters out of range; what depends on the model's depth only once that is known.

        Raises:
            ConfigError: the first one, with its range.
        """
        if self.merge not in LAYER_MERGES:
            raise ConfigError(f"depth.laco.merge={self.merge} is unknown; {nearest(self.merge, LAYER_MERGES)}")
        least = {"num_merged": 2, "interval": 1, "lowest": 0, "num_samples": 1}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ConfigError(f"depth.laco.{name}={getattr(self, name)} must be at least {minimum}")
        if not -1.0 <= self.threshold < 1.0:
            raise ConfigError(f"depth.laco.threshold={self.threshold} is no cosine that can be exceeded: give a number from -1 to below 1")
        if num_layers is not None:
            highest = self.highest if self.highest is not None else num_layers - 1
            if not self.lowest + self.num_merged <= highest < num_layers:
                raise ConfigError(
                    f"depth.laco.lowest={self.lowest}, num_merged={self.num_merged} and highest={highest} leave nothing to merge in "
                    f"{num_layers} layers: lowest + num_merged must not exceed highest, which is at most {num_layers - 1}"
                )


@dataclass(frozen=True)
class DepthConfig:
    """Section ``depth``."""

    name: str = option("block_influence", "depth metric")
    selection: str = option("one_shot", "how layers to drop are chosen from the scores: one_shot, contiguous, greedy, greedy_lazy or laco")
    protect_first: int = option(0, "layers at the start that never go")
    protect_last: int = option(0, "layers at the end that never go")
    protect: list[int] = option([], "further layers that never go, by number from 0")
    windows: list[int] = option([], "also score every run of this many layers as one, for selection=contiguous")
    sublayers: bool = option(False, "lm_loss: also the loss without each attention and each MLP, for the report")
    max_removed: int | None = option(None, "greedy: layers to remove, one after another; null: half of them")
    num_rescored: int = option(4, "greedy_lazy: candidates scored again at a time")
    task: str | None = option(None, "accuracy: multiple-choice file, one JSON object a line (.jsonl, also .gz .xz)", recorded=True)
    num_items: int | None = option(None, "accuracy: items read from the task; null: all")
    laco: LacoConfig = option(LacoConfig(), "parameters of selection=laco")

    def check(self) -> None:
        """Refuse what cannot be chosen by or measured.

        Raises:
            ConfigError: the first such option.
        """
        if self.selection not in SELECTIONS:
            raise ConfigError(f"depth.selection={self.selection} is unknown; {nearest(self.selection, SELECTIONS)}")
        if self.selection in ("greedy", "greedy_lazy") and self.name != "lm_loss":
            raise ConfigError(
                f"depth.selection={self.selection} scores again after each removal, which depth={self.name} does not do: give depth=lm_loss"
            )
        if self.sublayers and self.name != "lm_loss":
            raise ConfigError(f"depth.sublayers=true needs depth=lm_loss; depth={self.name} does not score parts of layers")
        if self.windows and self.name not in WINDOWED:
            raise ConfigError(f"depth.windows is measured by {', '.join(WINDOWED)}; depth={self.name} scores single layers only")
        for name, minimum in {"protect_first": 0, "protect_last": 0, "num_rescored": 1, "max_removed": 1, "num_items": 1}.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ConfigError(f"depth.{name}={value} must be at least {minimum}")
        for size in self.windows:
            if size < 1:
                raise ConfigError(f"depth.windows has {size}: a run of layers has at least 1")
        self.laco.check()

    def check_layers(self, num_layers: int) -> None:
        """Refuse layers that a model of this depth does not have.

        Raises:
            ConfigError: a protected layer, window or group beyond the last layer.
        """
        for layer in self.protect:
            if not 0 <= layer < num_layers:
                raise ConfigError(f"depth.protect has layer {layer}; the teacher has layers 0 to {num_layers - 1}")
        for size in self.windows:
            if size >= num_layers:
                raise ConfigError(f"depth.windows has {size}; the teacher has {num_layers} layers, and one at least stays")
        if self.selection == "laco":
            self.laco.check(num_layers)

    def removable(self, num_layers: int) -> list[int]:
        """Layers that may go, ascending."""
        kept = {*range(self.protect_first), *range(num_layers - self.protect_last, num_layers), *self.protect}
        return [layer for layer in range(num_layers) if layer not in kept]


#: Metrics that score runs of layers too.
WINDOWED = ("block_influence", "angular_distance", "lm_loss", "accuracy")


@dataclass(frozen=True)
class Batch:
    """Samples of one forward, each [batch, sequence]: token ids, and where tokens count and where they are no padding (None: everywhere)."""

    number: int
    ids: torch.Tensor
    counted: torch.Tensor | None = None
    attended: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        parts = [None if part is None else part.to(device, non_blocking=True) for part in (self.counted, self.attended)]
        return Batch(self.number, self.ids.to(device, non_blocking=True), *parts)


@dataclass(frozen=True)
class PlacedTeacher:
    """A model whose weights an engine shards or offloads: ``root(ids, mask)`` runs its decoder, and ``transform`` is what its head does to products.

    Its forwards may need all ranks at once.
    """

    root: Callable[..., torch.Tensor]
    transform: LogitTransform


@dataclass(frozen=True)
class Subject:
    """What is scored, and on what: ``samples`` [num, sequence] are calibration tokens.

    ``counted`` and ``attended``, of the same shape, are False at tokens that do not count and at padding; None: there are none. ``separator``
    ends a document, which those after it in the row do not see; None: every row is one text. ``tokenizer`` is only asked for by metrics that
    read text of their own. ``placed`` is the model as an engine has put it; None: it is whole on its device.
    """

    model: nn.Module
    family: Family
    samples: torch.Tensor
    batch_size: int
    counted: torch.Tensor | None = None
    attended: torch.Tensor | None = None
    tokenizer: Any = None
    separator: int | None = None
    placed: PlacedTeacher | None = None

    def batches(self, num_samples: int | None = None) -> list[Batch]:
        """The samples, the first ``num_samples`` of them, in order."""
        masks = self.counted, self.attended
        if self.attended is not None:
            masks = (self.attended.bool() if self.counted is None else self.counted.bool() & self.attended.bool()), self.attended
        starts = range(0, len(self.samples[:num_samples]), self.batch_size)
        rows = [slice(start, min(start + self.batch_size, len(self.samples[:num_samples]))) for start in starts]
        return [Batch(i, self.samples[row], *(None if mask is None else mask[row] for mask in masks)) for i, row in enumerate(rows)]


class DepthPass(Protocol):
    """A depth metric with a pass of its own, because it runs layers in another order or needs gradients.

    ``details`` goes into the header of the scores once ``run`` is done.
    """

    aggregation: str
    details: dict[str, Any]

    def run(self, subject: Subject, walk: Walk) -> Tensors:
        """Score tensors by name; ``layer`` [layers] among them, high = important."""
