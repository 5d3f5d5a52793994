"""Running decoder blocks one by one, so that layers can be left out and what comes before them is computed once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minitron.errors import ArchitectureError
from minitron.models.family import Family
from minitron.models.head import decoder_of

#: How far the blocks run by hand may be from the model's own forward, relative to the largest state; they are the same operations.
_TOLERANCE = 1e-3


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
    its input on. So layers keep their own kind of mask. ``num_runs`` counts blocks run.

    Raises:
        ArchitectureError: blocks run by hand do not give what the model gives (arguments that depend on earlier layers' results).
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.decoder = decoder_of(model)
        self.blocks = [model.get_submodule(name) for name in family.taps.blocks]
        self._list = model.get_submodule(family.layout.layer_prefix.rstrip("."))
        self.norm = model.get_submodule(family.final_norm)
        self.num_runs = 0
        self._outputs = [0] * len(self.blocks)  # entries of a block's output tuple; 0: a bare tensor
        self._check(next(model.parameters()).device, family)
        self.num_runs = 0

    def open(self, ids: torch.Tensor, attended: torch.Tensor | None = None) -> Opening:
        """Embed a batch [batch, sequence] and collect the blocks' arguments; no block runs. ``attended`` is False at padding."""
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
            self.decoder(input_ids=ids, use_cache=False, **padding_arguments(attended))
        finally:
            for layer, block in enumerate(self.blocks):
                self._list._modules[str(layer)] = block
        return Opening(first[0], tuple(calls))

    def run(self, opening: Opening, hidden: torch.Tensor, layer: int) -> torch.Tensor:
        """One block on hidden states [batch, sequence, hidden]."""
        self.num_runs += 1
        call = opening.calls[layer]
        output = self.blocks[layer](**call.kwargs, hidden_states=hidden) if call.by_name else self.blocks[layer](hidden, *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def close(self, hidden: torch.Tensor) -> torch.Tensor:
        """The final norm."""
        return self.norm(hidden)  # type: ignore[no-any-return]

    def without(
        self, opening: Opening, alive: Sequence[int], windows: Sequence[tuple[int, int]], *, base: bool = False
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Final states [batch, sequence, hidden] with positions ``start`` to ``stop`` - 1 of the ``alive`` layers left out, for every window.

        Yields the window's index, or -1 for nothing left out when ``base`` is asked for. What comes before a window is run once and kept: n
        layers one by one cost n (n - 1) / 2 + n blocks with the base, and at most n + 1 stored states of one batch.
        """
        states = [opening.hidden]
        for layer in alive[: len(alive) if base else max((start for start, _ in windows), default=0)]:
            states.append(self.run(opening, states[-1], layer))
        if base:
            yield -1, self.close(states.pop())
        for index in sorted(range(len(windows)), key=lambda i: windows[i][0], reverse=True):
            start, stop = windows[index]
            del states[start + 1 :]  # windows that follow begin earlier
            hidden = states[start]
            for layer in alive[stop:]:
                hidden = self.run(opening, hidden, layer)
            yield index, self.close(hidden)

    @torch.no_grad()
    def _check(self, device: torch.device, family: Family) -> None:
        """Note what the blocks return, and compare a run block by block with the model's own."""
        ids = torch.arange(1, 9, device=device)[None] % family.architecture.vocab_size

        def note(layer: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                self._outputs[layer] = len(output) if isinstance(output, tuple) else 0

            return hook

        handles = [block.register_forward_hook(note(layer)) for layer, block in enumerate(self.blocks)]
        expected = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        for handle in handles:
            handle.remove()
        opening = self.open(ids)
        found = None
        if len(opening.calls) == len(self.blocks):
            found = next(hidden for _, hidden in self.without(opening, range(len(self.blocks)), [], base=True))
        if found is None or float((found - expected).abs().max()) > _TOLERANCE * float(expected.abs().max()):
            raise ArchitectureError(
                f"the layers of '{family.model_type}' cannot be run one by one: they pass each other more than hidden states; "
                "use depth=block_influence, which only watches the model's own forward"
            )


def padding_arguments(attended: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What a decoder is told of padding: the mask [batch, sequence], and positions that count the attended tokens only."""
    if attended is None:
        return {}
    mask = attended.long()
    return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


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
