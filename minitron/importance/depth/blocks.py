"""Running decoder blocks one by one, so that layers can be left out and what comes before them is computed once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minitron.engine.frozen import gathered
from minitron.errors import ArchitectureError
from minitron.importance.depth.config import PlacedTeacher
from minitron.models.family import Family
from minitron.models.packing import hidden_states

#: How far the blocks run by hand may be from the model's own forward, relative to the largest state; they are the same operations.
_TOLERANCE = 1e-3
#: Tokens that go through a block at once, so many streams of one batch are joined for that.
_TOGETHER = 4096


@dataclass(frozen=True)
class Call:
    """What a decoder passes to one of its blocks beside the hidden states: masks, positions, rotary tables."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool


@dataclass(frozen=True)
class Opening:
    """One batch at the door of the first block: ``hidden`` [batch, sequence, hidden] and every block's own call."""

    hidden: torch.Tensor
    calls: tuple[Call, ...]


class BlockRunner:
    """The blocks of a decoder, called in any order with the arguments that the decoder itself gives each of them.

    The arguments are seen, not known: the decoder runs once per batch with every block replaced by one that notes its arguments and hands
    its input on. So layers keep their own kind of mask. ``num_runs`` counts blocks run, once a stream.

    Raises:
        ArchitectureError: blocks run by hand do not give what the model gives (arguments that depend on earlier layers' results).
    """

    def __init__(self, model: nn.Module, family: Family, placed: PlacedTeacher | None = None) -> None:
        """``placed`` is the model as an engine has put it: its own forward runs what lies outside of the blocks, and blocks gather themselves."""
        self.model, self._placed = model, placed
        self.blocks = [model.get_submodule(name) for name in family.taps.blocks]
        self._list = model.get_submodule(family.layout.layer_prefix.rstrip("."))
        self.norm = model.get_submodule(family.final_norm)
        self.num_runs = 0
        self._outputs = [0] * len(self.blocks)  # entries of a block's output tuple; 0: a bare tensor
        self._norm_weights: dict[str, torch.Tensor] = {}
        self._check(next(model.parameters()).device, family)
        self.num_runs = 0

    def _decode(self, ids: torch.Tensor, attended: torch.Tensor | None = None, *, separator: int | None = None) -> torch.Tensor:
        """The decoder's own forward. A placed one has been told of the separator before."""
        if self._placed is not None:
            return self._placed.root(ids, *(() if attended is None else (attended.long(),)))
        return hidden_states(self.model, ids, separator=separator, attended=attended)

    def open(self, ids: torch.Tensor, attended: torch.Tensor | None = None, *, separator: int | None = None) -> Opening:
        """Embed a batch [batch, sequence] and collect the blocks' arguments; no block runs. ``attended`` is False at padding; documents that end
        with a ``separator`` do not see each other."""
        calls: list[Call] = []
        first: list[torch.Tensor] = []

        def note(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            first.append(hidden)
            calls.append(Call(args[1:], {name: value for name, value in kwargs.items() if args or name != "hidden_states"}, not args))
            return (hidden, *[None] * (self._outputs[layer] - 1)) if self._outputs[layer] else hidden

        try:
            for layer, block in enumerate(self.blocks):
                self._list._modules[str(layer)] = _StandIn(block, functools.partial(note, layer))
            self._decode(ids, attended, separator=separator)
        finally:
            for layer, block in enumerate(self.blocks):
                self._list._modules[str(layer)] = block
        return Opening(first[0], tuple(calls))

    def run(self, opening: Opening, hidden: torch.Tensor, layer: int) -> torch.Tensor:
        """One block on hidden states [streams * batch, sequence, hidden]: several streams of the opening's batch one after the other."""
        streams, left = divmod(len(hidden), len(opening.hidden))
        assert left == 0
        self.num_runs += streams
        call = opening.calls[layer]
        args, kwargs = _repeated((call.args, call.kwargs), len(opening.hidden), streams)
        output = self.blocks[layer](**kwargs, hidden_states=hidden) if call.by_name else self.blocks[layer](hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def close(self, hidden: torch.Tensor) -> torch.Tensor:
        """The final norm."""
        return torch.func.functional_call(self.norm, self._norm_weights, (hidden,))  # type: ignore[no-any-return]

    def without(
        self, opening: Opening, alive: Sequence[int], windows: Sequence[tuple[int, int]], *, base: bool = False
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Final states with positions ``start`` to ``stop`` - 1 of the ``alive`` layers left out, for every window.

        What comes before a window is run once: n layers one by one cost n (n - 1) / 2 + n blocks with the base. A window becomes a stream of
        its own where it ends, and from there on all streams go through a block together, as many at a time as hold some thousand tokens:
        products of more rows are faster (two CPU cores, 256 tokens a stream: a third). :func:`num_held_states` says what is held.

        Yields:
            Indices of windows, -1 standing for nothing left out when ``base`` is asked for, and their states [indices, batch, sequence, hidden].
        """
        together = _streams_together(opening.hidden.shape[:2].numel())
        last_base = len(alive) if base else max((start for start, _ in windows), default=0)
        streams = {-1: opening.hidden}
        starting: dict[int, torch.Tensor] = {}
        for position in range(len(alive) + 1):
            for index, (start, stop) in enumerate(windows):
                if start == position:
                    starting[index] = streams[-1].clone()  # not a view that keeps all that was joined with it
                if stop == position:
                    streams[index] = starting.pop(index)
            if position == last_base and not base:
                del streams[-1]
            if position < len(alive):
                for some in _batched(list(streams), together):
                    joined = torch.cat([streams[index] for index in some]) if len(some) > 1 else streams[some[0]]
                    outputs = self.run(opening, joined, alive[position]).chunk(len(some))
                    streams.update(zip(some, outputs, strict=True))
        for some in _batched(list(streams), together):
            yield some, torch.stack([self.close(streams.pop(index)) for index in some])

    @torch.no_grad()
    def _check(self, device: torch.device, family: Family) -> None:
        """Note what the blocks return, and compare a run block by block with the model's own."""
        ids = torch.arange(1, 17, device=device).view(2, 8) % family.architecture.vocab_size

        def note(layer: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                self._outputs[layer] = len(output) if isinstance(output, tuple) else 0

            return hook

        handles = [block.register_forward_hook(note(layer)) for layer, block in enumerate(self.blocks)]
        expected = self._decode(ids)
        if self._placed is not None:
            names, weights = zip(*self.norm.named_parameters(), strict=True)
            with gathered(weights) as whole:
                self._norm_weights = dict(zip(names, whole, strict=True))
        for handle in handles:
            handle.remove()
        opening = self.open(ids)
        found = None
        if len(opening.calls) == len(self.blocks):
            nothing = [(1, 1)]  # a stream of its own, beside the base
            found = torch.cat([hidden for _, hidden in self.without(opening, range(len(self.blocks)), nothing, base=True)])
        if found is None or float((found - expected).abs().max()) > _TOLERANCE * float(expected.abs().max()):
            raise ArchitectureError(
                f"the layers of '{family.model_type}' cannot be run one by one: they pass each other more than hidden states; "
                "use depth=block_influence, which only watches the model's own forward"
            )


def num_held_states(num_windows: int, num_tokens: int) -> int:
    """How many states of one batch of ``num_tokens`` tokens are held at most while windows are left out: each window's and the whole model's,
    and twice those that go through a block together, joined before it and fresh behind it."""
    return 1 + num_windows + 2 * min(1 + num_windows, _streams_together(num_tokens))


def _streams_together(num_tokens: int) -> int:
    return max(1, _TOGETHER // num_tokens)


def _repeated(value: Any, batch: int, streams: int) -> Any:
    """Arguments of a block for several streams: what has a row for each of the batch's samples has one for each of every stream's."""
    if streams == 1:
        return value
    if isinstance(value, tuple | list):
        return type(value)(_repeated(part, batch, streams) for part in value)
    if isinstance(value, dict):
        return {
            name: _more_bounds(part, streams) if name.startswith("cu_seq_lens") else _repeated(part, batch, streams) for name, part in value.items()
        }
    if isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == batch > 1:  # a single row is broadcast
        return value.repeat(streams, *[1] * (value.ndim - 1))
    return value


def _more_bounds(bounds: torch.Tensor, streams: int) -> torch.Tensor:
    """Where documents begin in all rows laid end to end, [documents + 1] → [streams * documents + 1]; the last entry is where they end."""
    shifts = bounds[-1] * torch.arange(streams, device=bounds.device, dtype=bounds.dtype)
    return torch.cat([(bounds[:-1] + shifts[:, None]).flatten(), bounds[-1:] * streams])


def _batched(items: list[int], size: int) -> list[list[int]]:
    return [items[first : first + size] for first in range(0, len(items), size)]


class _StandIn(nn.Module):
    """Takes a block's place without running it or its hooks; a decoder may ask it for the block's attributes."""

    def __init__(self, block: nn.Module, note: Callable[[tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        self.__dict__["block"], self.__dict__["note"] = block, note

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Note the arguments."""
        return self.__dict__["note"](args, kwargs)


@contextmanager
def silenced(model: nn.Module, modules: Sequence[str]) -> Iterator[None]:
    """Modules whose output is zero for a while: what they would add to the residual stream is left out."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    handles = [model.get_submodule(name).register_forward_hook(hook) for name in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
