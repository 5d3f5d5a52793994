"""The calibration samples on their way through a model's blocks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minitron import dist
from minitron.errors import DataError
from minitron.models.experts import run_grouped
from minitron.models.family import Family
from minitron.sparsify.shared.blocks import BlockWalk
from minitron.sparsify.shared.expert_statistics import Experts, ExpertStatistics
from minitron.sparsify.shared.method import Inputs
from minitron.sparsify.shared.statistics import MAX_SLOTS, InputStatistics


@dataclass(frozen=True)
class Samples:
    """Calibration ``ids`` [num, sequence] on the CPU; ``counted`` is False at tokens that do not count, ``attended`` at padding, which does not
    count either; documents of a row that end with a ``separator`` do not see each other."""

    ids: torch.Tensor
    counted: torch.Tensor | None = None
    attended: torch.Tensor | None = None
    separator: int | None = None

    def mask(self, rows: slice = slice(None)) -> torch.Tensor | None:
        """[batch, sequence] bool, True where a token counts; None: everywhere."""
        masks = [mask[rows].bool() for mask in (self.counted, self.attended) if mask is not None]
        return None if not masks else masks[0] if len(masks) == 1 else masks[0] & masks[1]

    def check(self) -> None:
        """Refuse samples of which nothing counts.

        Raises:
            DataError: none does.
        """
        mask = self.mask()
        if not self.ids.numel() or (mask is not None and not bool(mask.any())):
            raise DataError(f"none of the {self.ids.numel()} calibration tokens counts: all are padding or special tokens")


class SampleWalk:
    """Hidden states of micro-batches, dealt to the ranks in turn, in front of one block after another.

    Every rank also holds the first micro-batch, which shows what a block's matrices read and at what scale.
    """

    def __init__(self, model: nn.Module, family: Family, samples: Samples, *, batch_size: int) -> None:
        """
        Raises:
            DataError: no token counts.
        """
        samples.check()
        self._model, self._family, self._samples = model, family, samples
        self._blocks = BlockWalk(model, family, separator=samples.separator)
        count = len(samples.ids)
        self._rows = [slice(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]
        self._per_slot = -(-len(self._rows) // MAX_SLOTS)
        self._num_slots = -(-len(self._rows) // self._per_slot)
        self._hidden: dict[int, torch.Tensor] = {}

    def _own(self, index: int) -> bool:
        return (index // self._per_slot) % dist.world_size() == dist.rank()

    def begin(self) -> None:
        """Embed this rank's samples."""
        held = [index for index in range(len(self._rows)) if index == 0 or self._own(index)]
        self._hidden = {index: self._call(0, index).hidden for index in held}

    def load(self, layer: int) -> None:
        """Read a block's weights."""
        self._blocks.load(layer)

    def statistics(self, layer: int, matrices: Mapping[str, str], experts: Experts | None = None, *, hessian: bool) -> dict[str, Inputs]:
        """Of the inputs of a loaded block's matrices: name → module gives name → statistics, without those that nothing went through.

        Those of ``experts`` are found in the same pass.

        Raises:
            DataError: an input is not finite.
        """
        if not matrices and experts is None:
            return {}
        with ExitStack() as whole:
            if experts is not None:
                whole.callback(run_grouped(self._model, self._family.model_type).remove)
            options: dict[str, Any] = {"num_slots": self._num_slots, "hessian": hessian, "first": lambda: self._run(layer, 0)}
            sums: list[InputStatistics | ExpertStatistics] = []
            if matrices:
                modules = {name: self._model.get_submodule(module) for name, module in matrices.items()}
                sums.append(InputStatistics(modules, **options))
            if experts is not None:
                module, count = self._model.get_submodule(experts.module), self._family.architecture.num_experts
                sums.append(ExpertStatistics(module, experts, num_experts=count, **options))
            for index in filter(self._own, self._hidden):
                mask = self._samples.mask(self._rows[index])
                counted = None if mask is None else mask.to(dist.device())
                with ExitStack() as stack:
                    for some in sums:
                        stack.enter_context(some.observing(index // self._per_slot, counted))
                    self._run(layer, index)
        return {name: inputs for some in sums for name, inputs in some.reduce().items()}

    def advance(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put sparse matrices into a loaded block, take the samples through it, and let go of it."""
        for name, tensor in tensors.items():
            self._model.get_parameter(name).data.copy_(tensor)
        for index in self._hidden:
            self._hidden[index] = self._run(layer, index)
        self._blocks.release(layer)

    def _call(self, layer: int, index: int) -> Any:
        rows, attended = self._rows[index], self._samples.attended
        return self._blocks.call(layer, self._samples.ids[rows], None if attended is None else attended[rows])

    def _run(self, layer: int, index: int) -> torch.Tensor:
        return self._blocks.run(layer, self._call(layer, index), self._hidden[index])
