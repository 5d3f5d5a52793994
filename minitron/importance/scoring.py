"""The pass over the calibration samples: sharded over ranks, one reduction at the end, resumable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from minitron import dist
from minitron.checkpoint import Checkpointer
from minitron.errors import DataError, Interrupted
from minitron.importance.shared.forward import Forward, Uncounted
from minitron.log import Progress
from minitron.models.family import Family
from minitron.models.packing import hidden_states

Tensors = dict[str, torch.Tensor]
Prepare = Callable[[nn.Module], Callable[..., Any]]


class Observer(Protocol):
    """One metric. ``sums`` are float64 and additive over samples and ranks; ``scores`` turns the global sums into scores."""

    sums: Tensors
    needs_forward: bool
    aggregation: str

    def attach(self, model: nn.Module, family: Family, forward: Forward) -> None:
        """Hook the model through ``forward``, or read its weights, which are whole at this moment; accumulators lie on ``dist.device()``."""

    def scores(self, family: Family, *, num_samples: int) -> Tensors:
        """Score tensors by name (``ffn.<i>``, ``hidden``, …), high = important; ``num_samples`` have a token that counts."""


@dataclass(frozen=True)
class PassResult:
    """Scores (float32, on the CPU), the sums they were made from by ``<number of the observer>/<name>``, and how many samples and tokens counted."""

    scores: Tensors
    sums: Tensors
    num_samples: int
    num_tokens: int


class Decoder(nn.Module):
    """A causal LM without its head, as engines wrap it: calls of an engine enter here and nowhere else.

    Documents of a row that end with a ``separator`` do not see each other.
    """

    def __init__(self, model: nn.Module, *, separator: int | None = None) -> None:
        super().__init__()
        self.separator = separator
        self.model = model.eval().requires_grad_(False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """[batch, sequence] → [batch, sequence, hidden]; with a mask, positions count the attended tokens only."""
        return hidden_states(self.model, input_ids, separator=self.separator, attended=attention_mask)


def run_pass(
    model: nn.Module,
    family: Family,
    samples: torch.Tensor,
    observers: Sequence[Observer],
    *,
    batch_size: int,
    counted: torch.Tensor | None = None,
    attended: torch.Tensor | None = None,
    separator: int | None = None,
    prepare: Prepare | None = None,
    checkpointer: Checkpointer | None = None,
    checkpoint_every: int = 64,
    stop: Callable[[], bool] = lambda: False,
) -> PassResult:
    """Scores of all observers from one pass over ``samples`` [num, sequence].

    Batches go to the ranks in turn, so every forward has the same shape on any number of them. Accumulators stay on the device, and nothing
    waits for it before a checkpoint or the end. The hooks are taken off again.

    Args:
        counted: [num, sequence], True where a token counts; None: every one does.
        attended: [num, sequence], False at padding, which must not count either; None: there is none.
        separator: the token that ends a document, which none after it sees; None: every row is one text.
        prepare: what an engine makes of the decoder (``prepare_frozen``), once weights have been read and hooks are on. Its forwards may need
            all ranks at once: one without a batch runs along. None: every rank has the whole model on its device.

    Raises:
        DataError: no token counts, or an activation is NaN or infinite (layer and sample named).
        Interrupted: a signal asked for a stop; the pass goes on from its checkpoint.
    """
    if attended is not None:
        counted = attended.bool() if counted is None else counted.bool() & attended.bool()
    num_tokens = samples.numel() if counted is None else int(counted.sum())
    num_samples = len(samples) if counted is None else int(counted.any(dim=1).sum())
    if num_tokens == 0:
        raise DataError(f"none of the {samples.numel()} calibration tokens counts: all are padding or special tokens")
    forward = Forward(family.architecture.num_layers)
    walking = [observer for observer in observers if observer.needs_forward]
    try:
        for observer in observers:
            observer.attach(model, family, forward)
        if walking:
            walk = _Walk(samples, counted, attended, forward, walking, batch_size)
            decoder = Decoder(model, separator=separator)
            walk.run(prepare(decoder) if prepare else decoder, checkpointer, checkpoint_every, stop, together=prepare is not None)
            _reduce([*(tensor for observer in walking for tensor in observer.sums.values()), forward.first_bad])
            forward.check()
    finally:
        forward.remove_hooks()
    scores: Tensors = {}
    for observer in observers:
        scores.update(observer.scores(family, num_samples=num_samples))
    for name, tensor in scores.items():
        if not torch.isfinite(tensor).all():
            raise DataError(f"the scores of '{name}' are not finite: the teacher's weights or activations overflow (try teacher.dtype=float32)")
    sums = {f"{i}/{name}": tensor.cpu() for i, observer in enumerate(observers) for name, tensor in observer.sums.items()}
    return PassResult({name: tensor.float().cpu() for name, tensor in scores.items()}, sums, num_samples, num_tokens)


class _Walk:
    """The batches of one pass, dealt to the ranks in turn."""

    def __init__(
        self,
        samples: torch.Tensor,
        counted: torch.Tensor | None,
        attended: torch.Tensor | None,
        forward: Forward,
        observers: Sequence[Observer],
        batch_size: int,
    ) -> None:
        self._samples, self._forward, self._batch_size = samples, forward, batch_size
        self._uncounted, self._attended = Uncounted(counted) if counted is not None else None, attended
        self._state = {f"{i}/{name}": tensor for i, observer in enumerate(observers) for name, tensor in observer.sums.items()}
        self._state["first_bad"] = forward.first_bad

    def run(
        self, decoder: Callable[..., Any], checkpointer: Checkpointer | None, checkpoint_every: int, stop: Callable[[], bool], *, together: bool
    ) -> None:
        """All batches of this rank that no checkpoint holds."""
        world, total = dist.world_size(), len(self._samples)
        num_batches = -(-total // self._batch_size)
        rounds, first = -(-num_batches // world), self._restore(checkpointer)
        bar = Progress("importance", total=total, unit="sample", done=min(total, first * self._batch_size * world))
        for number in range(first, rounds):
            index = number * world + dist.rank()
            if index < num_batches:
                self._step(decoder, index * self._batch_size)
            elif together:
                self._run_along(decoder)
            bar.advance(min(self._batch_size * world, total - bar.done))
            finished, stopping = number + 1, stop()
            if checkpointer is not None and finished < rounds and (stopping or finished % checkpoint_every == 0):
                self._forward.check(gather=True)
                # Views of one buffer are copied: a file holds every tensor by itself.
                checkpointer.save(finished, {name: tensor.clone() for name, tensor in self._state.items()}, {})
                if stopping:
                    raise Interrupted(f"importance stopped after {bar.done} of {total} samples; the same command goes on from there")

    def _step(self, decoder: Callable[..., Any], start: int) -> None:
        rows, device = slice(start, start + self._batch_size), dist.device()
        ids = self._samples[rows]
        self._forward.begin(start, ids.shape, self._uncounted)
        mask = () if self._attended is None else (self._attended[rows].to(device, torch.long, non_blocking=True),)
        with torch.no_grad():
            decoder(ids.to(device, non_blocking=True), *mask)
            self._forward.end()

    def _run_along(self, decoder: Callable[..., Any]) -> None:
        """A forward that nobody looks at, so that the ranks which have a batch can gather their weights."""
        self._forward.idle = True
        with torch.no_grad():
            decoder(self._samples[:1].to(dist.device()))
        self._forward.idle = False

    def _restore(self, checkpointer: Checkpointer | None) -> int:
        """Put checkpointed sums back; returns the number of rounds that are done."""
        found = checkpointer.load_latest() if checkpointer is not None else None
        if found is None:
            return 0
        tensors, meta = found
        for name, tensor in tensors.items():
            self._state[name].copy_(tensor)
        return int(meta["step"])


def _reduce(parts: list[torch.Tensor]) -> None:
    """Sum accumulators over the ranks in one collective."""
    if dist.world_size() == 1:
        return
    flat = dist.all_reduce_sum(torch.cat([part.flatten() for part in parts]))
    for part, piece in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        part.copy_(piece.view_as(part))
