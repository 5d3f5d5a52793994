"""Layer collapse: neighbouring layers become one as long as the model's final states stay similar (LaCo, arXiv 2402.11187, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from minitron import dist
from minitron.core.axes import ParameterSpec
from minitron.core.layers import write_merges
from minitron.errors import ArchitectureError, DataError
from minitron.importance.depth.blocks import BlockRunner
from minitron.importance.depth.config import Batch, DepthConfig, Subject
from minitron.importance.depth.walk import Tensors, Walk
from minitron.log import get_logger
from minitron.prune.merge import is_merged, merge_layers

logger = get_logger(__name__)


class LacoPass:
    """The merges that LaCo accepts, from the top down.

    The layer at l takes in the C - 1 that follow it, if the mean over samples of the cosine between the final states [sequence x hidden] of the
    merged and of the whole model exceeds T; then l goes down by I, otherwise by 1. How many layers remain is an outcome of T: all accepted
    merges are written in order, and pruning uses as many of the first as the target needs. The model is as before at the end.

    One collective per candidate. The whole model's final states of ``depth.laco.num_samples`` sequences stay on the device.
    """

    aggregation = "merges accepted by cosine similarity of final states"

    def __init__(self, config: DepthConfig) -> None:
        self.config = config
        self.details: dict[str, Any] = {}

    def run(self, subject: Subject, walk: Walk) -> Tensors:
        """``layer_merges`` [merges, most layers in one].

        Raises:
            ArchitectureError: layers of different kinds.
            DataError: final states that are not finite.
        """
        laco, layers = self.config.laco, subject.family.architecture.num_layers
        if not subject.family.layout.uniform:
            raise ArchitectureError(f"depth.selection=laco merges layers of one kind; '{subject.family.model_type}' has several")
        merging = _Merging(subject, laco.merge, laco.num_samples, walk)
        removable = set(self.config.removable(layers))
        merges: list[tuple[int, list[int]]] = []
        similarities: list[float] = []
        alive = list(range(layers))
        place = (laco.highest if laco.highest is not None else layers - 1) - laco.num_merged
        with torch.no_grad():
            try:
                while place >= laco.lowest:
                    group = alive[place : place + laco.num_merged]
                    accepted = False
                    if len(group) > 1 and removable.issuperset(group[1:]):
                        rest = [layer for layer in alive if layer not in group[1:]]
                        similarity = merging.try_merge(group, rest)
                        accepted = similarity > laco.threshold
                        logger.info(
                            "depth: layer %d takes in %s: similarity %.4f%s", group[0], group[1:], similarity, "" if accepted else ", refused"
                        )
                    if accepted:
                        merges.append((group[0], group[1:]))
                        similarities.append(similarity)
                        alive = rest
                        place -= laco.interval
                    else:
                        merging.undo()
                        place -= 1
            finally:
                merging.restore()
        self.details = {
            "variant": laco.merge,
            "threshold": laco.threshold,
            "num_merged": laco.num_merged,
            "similarities": similarities,
            "remaining": len(alive),
        }
        return {"layer_merges": write_merges(merges)}


class _Merging:
    """A model whose layers are merged in place, tried, and put back."""

    def __init__(self, subject: Subject, variant: str, num_samples: int, walk: Walk) -> None:
        self.variant, self.walk, self.separator = variant, walk, subject.separator
        self.runner = BlockRunner(subject.model, subject.family)
        self.parameters = dict(subject.model.named_parameters())
        layout = subject.family.layout
        self.specs: list[list[ParameterSpec]] = [[spec for spec in layer if is_merged(spec, subject.family)] for layer in layout.by_layer]
        self.renamed = layout.renamed
        self.batches = subject.batches(num_samples)
        self.device = next(subject.model.parameters()).device
        self.originals: dict[str, torch.Tensor] = {}
        self.before: dict[str, torch.Tensor] = {}
        self.references = {
            batch.number: self._final(batch.to(self.device), range(len(self.runner.blocks)))
            for batch in self.batches
            if batch.number % dist.world_size() == dist.rank()
        }

    def try_merge(self, group: Sequence[int], alive: Sequence[int]) -> float:
        """Merge the group into its first layer; the similarity of the model that is left."""
        self.before = {}
        for spec in self.specs[group[0]]:
            parameter = self.parameters[spec.name]
            self.before[spec.name] = parameter.detach().clone()
            tensors = [self.parameters[self.renamed(spec, layer, spec.expert)].detach() for layer in group]
            parameter.data.copy_(merge_layers(tensors, variant=self.variant))
        for name, tensor in self.before.items():
            self.originals.setdefault(name, tensor)
        sums = {"cosine": torch.zeros(2, dtype=torch.float64, device=self.device)}  # sum, samples

        def step(batch: Batch) -> None:
            final, reference = self._final(batch.to(self.device), alive), self.references[batch.number]
            dot = (final * reference).flatten(1).sum(1)
            norms = torch.linalg.vector_norm(final.flatten(1), dim=1) * torch.linalg.vector_norm(reference.flatten(1), dim=1)
            sums["cosine"] += torch.stack([(dot / norms).sum(), torch.full_like(dot[0], len(dot))])

        total, count = self.walk.total(f"depth, {len(alive)} layers", self.batches, step, sums)["cosine"].tolist()
        if not total == total:
            raise DataError("the final states are not finite: try teacher.dtype=float32")
        return total / count

    def undo(self) -> None:
        """Take the last merge back."""
        for name, tensor in self.before.items():
            self.parameters[name].data.copy_(tensor)
        self.before = {}

    def restore(self) -> None:
        """The whole model's weights."""
        for name, tensor in self.originals.items():
            self.parameters[name].data.copy_(tensor)

    @torch.no_grad()
    def _final(self, batch: Batch, layers: Sequence[int]) -> torch.Tensor:
        """Final states through some layers [batch, sequence, hidden] in float64, zero where a token does not count."""
        opening = self.runner.open(batch.ids, batch.attended, separator=self.separator)
        hidden = opening.hidden
        for layer in layers:
            hidden = self.runner.run(opening, hidden, layer)
        final = self.runner.close(hidden).double()
        return final if batch.counted is None else final.where(batch.counted.unsqueeze(-1), 0.0)
