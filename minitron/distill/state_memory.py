"""What losses on intermediate states hold, found by running them on tensors without data: each loss keeps what it keeps, and no table says so."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from minitron.core.architecture import Architecture
from minitron.core.memory import Setup, StateSizes
from minitron.distill.losses import LossConfig, state_terms
from minitron.distill.states import StateLosses
from minitron.models.states import ATTENTION, Tap


class _Alive(TorchDispatchMode):
    """Bytes of the storages that are made inside and not yet freed, now and at the most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tree_iter((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known | given:
                    self._known.add(storage._cdata)
                    weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
        return result

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def state_sizes(config: LossConfig, teacher: Architecture, student: Architecture, setup: Setup) -> StateSizes:
    """Bytes of the losses on states of a section for a micro-batch of ``setup``; nothing where there are none.

    Raises:
        ConfigError: the shapes cannot have these losses.
    """
    if not state_terms(config):
        return StateSizes()
    dtypes = {2: torch.bfloat16, 4: torch.float32}
    with FakeTensorMode():
        losses = StateLosses(config, teacher=teacher, student=student, compute_dtype=dtypes[setup.width])
        theirs = _states(losses.teacher_taps, teacher, setup, dtypes[setup.teacher_width])
        ours = [state.requires_grad_() for state in _states(losses.student_taps, student, setup, dtypes[setup.width])]
        valid = torch.ones(setup.num_sequences, setup.sequence_length, dtype=torch.bool)
        scale, alpha = valid.float(), torch.ones(())
        with _Alive() as alive:
            total, _ = losses(theirs, ours, valid, scale, alpha)
        kept = alive.now
        del total
        return StateSizes(
            teacher_bytes=sum(state.nbytes for state in theirs),
            # What the taps of a decoder hand out is kept by the decoder itself, but for projections, which rotation lets go of.
            student_bytes=sum(state.nbytes for tap, state in zip(losses.student_taps, ours, strict=True) if tap.kind in ATTENTION),
            kept_bytes=kept,
            extra_bytes=alive.peak - kept,
            fixed_bytes=sum(tensor.nbytes for tensor in losses.extra_state().values()),
            num_parameters=sum(parameter.numel() for parameter in losses.parameters()),
        )


def _states(taps: Sequence[Tap], shape: Architecture, setup: Setup, dtype: torch.dtype) -> list[torch.Tensor]:
    heads = {"query": shape.num_heads, "key": shape.num_kv_heads, "value": shape.num_kv_heads}
    widths = [heads[tap.kind] * shape.head_dim if tap.kind in heads else shape.hidden_size for tap in taps]
    return [torch.empty(setup.num_sequences, setup.sequence_length, width, dtype=dtype) for width in widths]
