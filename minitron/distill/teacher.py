"""What the teacher says about a batch: hidden states, and the head that turns them into logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from minitron import dist
from minitron.core.protocols import Engine
from minitron.distill.signal import Said
from minitron.models.head import decoder_of, head_of, head_parameters
from minitron.models.packing import continuing_arguments, hidden_states
from minitron.models.states import Tap, captured, find_spots
from minitron.ops.head import Head


class FrozenDecoder(nn.Module):
    """The teacher as its engine sees it: token ids in, hidden states out; its head lies beside, for the loss only.

    Documents of a row that end with a ``separator`` do not see each other.
    """

    def __init__(self, model: nn.Module, taps: Sequence[Tap] = (), *, separator: int | None = None) -> None:
        super().__init__()
        self.separator = separator
        self.model = model.eval().requires_grad_(False)
        self._spots = find_spots(model, taps) if taps else {}

    def forward(self, input_ids: torch.Tensor, cache: Any = None, so_far: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """[batch, sequence] → [batch, sequence, hidden], then the states of the taps in their order.

        With a ``cache`` of keys and values the ids follow those it holds; ``so_far`` [batch, total] are those and the new ones.
        """
        with captured(self.model, self._spots) as states:
            if cache is None:
                hidden = hidden_states(self.model, input_ids, separator=self.separator)
            else:
                more = continuing_arguments(so_far if so_far is not None else input_ids, input_ids.shape[1], self.separator)
                hidden = decoder_of(self.model)(input_ids=input_ids, past_key_values=cache, use_cache=True, **more).last_hidden_state
        return hidden, *(states[tap] for tap in self._spots)


class TeacherSignal:
    """What the teacher says about a batch: hidden states and the head that turns them into logits.

    ``taps`` name intermediate states to hand over too; documents that end with a ``separator`` do not see each other. With ``remember_bytes``
    the states of batches seen before are kept, up to that many bytes: several students that are trained on the same batches then cost one
    teacher forward per batch. A ``shared`` signal keeps the newest batch's states on the device, for students that are trained in turn,
    micro-batch by micro-batch.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: Engine,
        *,
        blocks: list[nn.Module],
        placement: str,
        remember_bytes: int = 0,
        taps: Sequence[Tap] = (),
        separator: int | None = None,
        shared: bool = False,
    ) -> None:
        self.sparse: str | None = None
        self._transform = head_of(model).transform
        self.config: Any = model.config
        decoder = FrozenDecoder(model, taps, separator=separator)
        self._engine = engine
        self._forward: Callable[..., tuple[torch.Tensor, ...]] = engine.prepare_frozen(decoder, blocks=blocks, placement=placement)
        self._head = [parameter for parameter in head_parameters(decoder.model) if parameter is not None]
        self._remembered: dict[bytes, tuple[torch.Tensor, ...]] = {}
        self._room = remember_bytes
        self._shared = shared
        self._newest: tuple[bytes, tuple[torch.Tensor, ...]] = (b"", ())
        self.num_forwards = 0

    def says(self, input_ids: torch.Tensor) -> Said:
        """Final states and those of the taps, of [batch, sequence] ids on the CPU."""
        hidden, *states = self.states(input_ids)
        return Said(hidden, tuple(states))

    def hidden(self, input_ids: torch.Tensor, *, cache: Any = None, so_far: torch.Tensor | None = None) -> torch.Tensor:
        """[batch, sequence] ids on the CPU → [batch, sequence, hidden] on the device.

        With a ``cache`` of keys and values the ids follow those that it holds, and nothing is remembered; ``so_far`` [batch, total] are all
        of them, on the device.
        """
        if cache is not None:
            with torch.no_grad():
                return self._forward(input_ids.to(dist.device()), cache=cache, so_far=so_far)[0]
        return self.states(input_ids)[0]

    def states(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[batch, sequence] ids on the CPU → the hidden states, then the states of the taps in their order, on the device."""
        key = input_ids.numpy().tobytes() if self._shared or self._room or self._remembered else b""
        if key and key == self._newest[0]:
            return self._newest[1]
        self._newest = (b"", ())  # given up before the forward that takes its place
        if key and key in self._remembered:
            states = tuple(state.to(dist.device()) for state in self._remembered[key])
        else:
            with torch.no_grad():
                states = self._forward(input_ids.to(dist.device()))
            self.num_forwards += 1
            num_bytes = sum(state.nbytes for state in states)
            if key and num_bytes <= self._room:
                self._room -= num_bytes
                self._remembered[key] = tuple(state.cpu() for state in states)
        if self._shared:
            self._newest = (key, states)
        return states

    @contextmanager
    def head(self) -> Iterator[Head]:
        """A context that yields the head, its tensors whole."""
        with self._engine.gathered(self._head) as (weight, *bias):
            yield Head(weight, bias[0] if bias else None, self._transform)
