"""Training under masks: which weights of a sparse student stay zero while it learns, and from when on.

The masks are applied inside the student's forward, where its weights are whole under every engine. They are functions of the weights and of the
step alone, so that checkpoints hold nothing of them and resuming is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from minitron import dist
from minitron.core.sparsity import Pattern, SparsityRecord, num_kept
from minitron.distill.loop import StepReport
from minitron.distill.masked_modules import mask_linear, mask_parameter
from minitron.errors import CheckpointError, ConfigError
from minitron.models import Family
from minitron.models.experts import can_be_seen, expert_matrices, outputs_first
from minitron.models.sparse_folder import check_sparse
from minitron.ops.kd_loss import IGNORE_INDEX
from minitron.ops.masked_linear import Magnitudes, mask_of

#: From named tensors to named tensors.
Form = Callable[[Iterator[tuple[str, torch.Tensor]]], Iterator[tuple[str, torch.Tensor]]]

if TYPE_CHECKING:
    from minitron.distill.settings import TrainingConfig

MODES = ("keep", "refresh", "gradual", "free")
#: λ of SR-STE, as in its authors' code.
DECAY = 2e-4
#: Share of all steps over which zeros come in, where nothing else is said; in the rest the model learns with all of them.
RAMP = 0.75


def check_mask_options(
    mode: str | None, *, pattern: str | None, steps: int | None, decay: float | None, optimizer: str, keeps_best: bool, num_steps: int | None
) -> None:
    """Refuse settings ``training.sparse*`` that cannot work.

    Raises:
        ConfigError: an unknown word, a value out of range, or an option of another mode.
    """
    if mode is not None and mode not in MODES:
        raise ConfigError(f"training.sparse={mode} is not one of {', '.join(MODES)}")
    given = {"sparse_pattern": (pattern, ("refresh", "gradual")), "sparse_steps": (steps, ("gradual",)), "sparse_decay": (decay, ("refresh",))}
    for name, (value, modes) in given.items():
        if value is not None and mode not in modes:
            raise ConfigError(f"training.{name}={value} is for training.sparse={' or '.join(modes)}, and training.sparse={mode or 'null'}")
    if pattern is not None:
        Pattern.parse(pattern, where="training.sparse_pattern")
    if steps is not None and (steps < 1 or (num_steps is not None and steps > num_steps)):
        raise ConfigError(f"training.sparse_steps={steps} must be from 1 to the number of steps of the training")
    if decay is not None and decay < 0:
        raise ConfigError(f"training.sparse_decay={decay} must be 0 or more")
    if mode == "gradual" and optimizer == "muon":
        raise ConfigError("training.optimizer=muon moves every weight of a matrix, also those that training.sparse=gradual has let go: use adamw")
    if mode == "gradual" and keeps_best:
        raise ConfigError(
            "training.sparse=gradual reaches its pattern late, and the best validation may come before: leave out keep_best and result=best"
        )


def cubic_ratio(step: int, *, start: float, end: float, num_steps: int) -> float:
    """The share of zeros after ``step`` steps: from ``start`` to ``end`` in ``num_steps``, fast first (arXiv 1710.01878, equation 1)."""
    left = 1.0 - min(step, num_steps) / num_steps
    return end + (start - end) * left**3


@dataclass
class Masks:
    """The masks of a student's matrices: ``start`` has the share of zeros of each where training begins, by its name in memory.

    ``keep``: what is zero stays zero. ``refresh``: dense weights are trained, and at every forward the largest of now, after ``pattern``, stand for
    them (SR-STE, arXiv 2102.04010). ``gradual``: the same with a share of zeros that grows over ``num_steps``, and weights that are let go have
    no gradient.
    """

    mode: str
    pattern: Pattern
    start: dict[str, float]
    num_steps: int = 1
    decay: float = DECAY
    method: str = ""
    recovered: float = 0.0
    step: int = 0
    _transposed: set[str] = field(default_factory=set, init=False, repr=False)
    _sizes: dict[str, int] = field(default_factory=dict, init=False, repr=False)
    _decay_now: torch.Tensor | None = field(default=None, init=False, repr=False)

    def install(self, student: nn.Module) -> None:
        """Put the masks into the linear layers and the experts of a student, before an engine gets it.

        Raises:
            CheckpointError: a listed matrix is neither the weight of a linear layer nor that of experts.
            ConfigError: a matrix that the pattern cannot divide.
        """
        modules = dict(student.named_modules())
        for name, start in self.start.items():
            owner, _, attribute = name.rpartition(".")
            module = modules.get(owner)
            weight = module._parameters.get(attribute) if module is not None else None
            linear = type(module) is nn.Linear and attribute == "weight"
            if module is None or weight is None or not (linear or (weight.ndim == 3 and can_be_seen(module))):
                raise CheckpointError(
                    f"'{name}' is sparse and no weight of a linear layer or of experts, so that its zeros cannot be kept: "
                    "give training.sparse=free to let them go"
                )
            if not linear and getattr(module, "is_transposed", False):
                self._transposed.add(name)
            if self.mode != "keep":
                self.pattern.check_width(name, outputs_first(name, weight, self._transposed).shape[-1])
            self._sizes[name] = weight.numel()
            if isinstance(module, nn.Linear):
                mask_linear(module, self, start)
            else:
                mask_parameter(module, attribute, self, start, transposed=name in self._transposed)

    def watch(self, root: nn.Module) -> None:
        """Learn from every forward of a root which share of the step's tokens it has: SR-STE's decay is shared out by it."""
        if self.mode == "refresh":
            root.register_forward_pre_hook(self._share_out)

    def hook(self, report: StepReport) -> None:
        """After every step: the masks of the next."""
        self.step = report.step

    def magnitudes(self, start: float, width: int) -> Magnitudes | None:
        """What makes the mask of a matrix with ``width`` inputs now; None: its own zeros."""
        if self.mode == "keep":
            return None
        if self.mode == "refresh":
            decay = self._decay_now if self._decay_now is not None else torch.zeros((), device=dist.device())
            return Magnitudes(self._kept(self.pattern.ratio, width), self.pattern.m, decay)
        return Magnitudes(self._kept(self.ratio(start), width), self.pattern.m)

    def ratio(self, start: float) -> float:
        """The share of zeros wanted now of a matrix that began with ``start``."""
        if self.mode == "gradual":
            return max(start, cubic_ratio(self.step, start=start, end=self.pattern.ratio, num_steps=self.num_steps))
        return start if self.mode == "keep" else self.pattern.ratio

    def _kept(self, ratio: float, width: int) -> int:
        return num_kept(ratio, self.pattern.m or width)

    def finished(self, weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole weights of the student as they count: what no mask uses is zero."""
        for name, tensor in weights:
            if name in self.start:
                weight = outputs_first(name, tensor, self._transposed)
                magnitudes = self.magnitudes(self.start[name], weight.shape[-1])
                if magnitudes is not None:
                    tensor = outputs_first(name, weight.masked_fill(~mask_of(weight, magnitudes), 0.0), self._transposed).contiguous()
                del weight
            yield name, tensor
            del tensor  # or it would stay while the next one is gathered

    def form(self, form: Form) -> Form:
        """From the weights in memory to what ``form`` makes of them as they count."""
        return lambda weights: form(self.finished(weights))

    def record(self) -> SparsityRecord:
        """What stands beside the finished weights; the shares are counted when they are written."""
        return SparsityRecord(self.method, str(self.pattern), dict(self.start), self.recovered)

    def share(self) -> float:
        """The share of zeros of now in all sparse matrices together, as a metric."""
        return sum(self.ratio(self.start[name]) * size for name, size in self._sizes.items()) / max(1, sum(self._sizes.values()))

    def _share_out(self, root: nn.Module, arguments: Sequence[Any]) -> None:
        if len(arguments) < 3:  # no losses are asked for
            return
        labels, denominator = arguments[1], arguments[2]
        # Engines average over ranks what the shares of all ranks are to add up to.
        self._decay_now = self.decay * dist.world_size() * (labels != IGNORE_INDEX).sum() / denominator


def open_masks(folder: Path, training: TrainingConfig, *, family: Family, num_steps: int) -> Masks | None:
    """The masks for a training that starts from a folder; None where it is to be dense.

    Raises:
        ConfigError: the settings ask for zeros, or for a pattern, that the folder does not have.
        CheckpointError: ``sparsity.json`` does not belong to the weights beside it.
    """
    record, mode = SparsityRecord.load(folder), training.sparse
    if mode == "free" or (mode is None and record is None):
        return None
    if mode == "keep" and record is None:
        raise ConfigError(f"training.sparse=keep, but {folder} has no sparsity.json: leave the option out, or sparsify the model first")
    if record is None and training.sparse_pattern is None:
        raise ConfigError(f"training.sparse={mode} needs training.sparse_pattern (0.5 or 2:4, say), because {folder} has no sparsity.json")
    if record is not None:
        _check_on_main(folder, record, family)
    pattern = Pattern.parse(training.sparse_pattern or (record.pattern if record is not None else ""), where="training.sparse_pattern")
    start = dict(record.matrices) if record is not None else dict.fromkeys(_matrices(family), 0.0)
    if mode in (None, "keep"):
        assert record is not None
        return Masks("keep", pattern, start, method=record.method, recovered=record.recovered)
    assert mode is not None
    steps = training.sparse_steps if training.sparse_steps is not None else max(1, round(RAMP * num_steps))
    if steps > num_steps:
        raise ConfigError(f"training.sparse_steps={steps} is more than the {num_steps} steps of the training")
    decay = DECAY if training.sparse_decay is None else training.sparse_decay
    return Masks(mode, pattern, start, num_steps=steps, decay=decay, method={"refresh": "sr_ste"}.get(mode, mode))


def _matrices(family: Family) -> list[str]:
    """The matrices inside the layers, those of experts too; routers are left out."""
    stacks = {spec.name for layer in expert_matrices(family) for spec in layer}
    specs = (spec for layer in family.layout.by_layer for spec in layer)
    return [spec.name for spec in specs if spec.name in stacks or (len(spec.dims) == 2 and "expert" not in spec.axes() and not spec.buffer)]


def _check_on_main(folder: Path, record: SparsityRecord, family: Family) -> None:
    """:func:`check_sparse` by rank 0 for all."""
    failure = ""
    if dist.is_main():
        try:
            check_sparse(folder, record, family)
        except CheckpointError as error:
            failure = str(error)
    failure = dist.broadcast_object(failure)
    if failure:
        raise CheckpointError(failure)
