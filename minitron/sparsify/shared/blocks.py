"""A decoder run block by block, one block's weights in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minitron import dist
from minitron.engine.lazy import LazyWeights, parts_of
from minitron.errors import ArchitectureError
from minitron.models.family import Family, discover
from minitron.models.head import decoder_of
from minitron.models.packing import hidden_states
from minitron.prune.proof import tiny_config, tiny_teacher

#: How far blocks run by hand may be from the model's own forward, relative to the largest state; they are the same operations.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Call:
    """What a decoder hands to one of its blocks: hidden states, and masks, positions or rotary tables beside them."""

    hidden: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool


class _Seen(Exception):
    """Carries a block's call out of the decoder's forward."""


class _StandIn(nn.Module):
    """Takes a block's place: hands its input on, or stops the forward at the one that is asked about."""

    def __init__(self, block: nn.Module, *, wanted: bool, num_outputs: int) -> None:
        super().__init__()
        self.__dict__.update(block=block, wanted=wanted, num_outputs=num_outputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first argument, in the form of the block's output."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if self.wanted:
            raise _Seen(Call(hidden, args[1:], {name: value for name, value in kwargs.items() if args or name != "hidden_states"}, not args))
        return (hidden, *[None] * (self.num_outputs - 1)) if self.num_outputs else hidden


class BlockWalk:
    """The blocks of a model whose weights may still lie in files: outside of them the embedding stays in memory, the head is never read.

    A block's arguments are seen, not known: the decoder runs with stand-ins in the blocks' places, up to the block that is asked about.
    """

    def __init__(self, model: nn.Module, family: Family, *, separator: int | None = None) -> None:
        self._model, self._separator = model, separator
        self._list = model.get_submodule(family.layout.layer_prefix.rstrip("."))
        self.blocks = [model.get_submodule(name) for name in family.taps.blocks]
        self._weights, self._device = LazyWeights(model), dist.device()
        self._lazy = {id(parameter) for block in self.blocks for parameter in block.parameters() if parameter.is_meta}
        self._num_outputs = [0] * len(self.blocks)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(self._device)
        own = set(map(id, self.blocks))
        for part in parts_of(decoder_of(model), self.blocks):
            if id(part) not in own:
                self._weights.fill(part, device=self._device)
                for parameter in part.parameters(recurse=False):
                    parameter.data = parameter.data.to(self._device)

    def load(self, layer: int) -> nn.Module:
        """A block with its weights on the device."""
        self._weights.fill(self.blocks[layer], device=self._device)
        return self.blocks[layer].to(self._device)

    def release(self, layer: int) -> None:
        """Let go of a block's weights: those from files are forgotten, others go back to the CPU."""
        for parameter in self.blocks[layer].parameters():
            if id(parameter) in self._lazy:
                torch.utils.swap_tensors(parameter, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))
            else:
                parameter.data = parameter.data.cpu()

    def call(self, layer: int, ids: torch.Tensor, attended: torch.Tensor | None = None) -> Call:
        """What the decoder hands to a block for a batch [batch, sequence] if those before it do nothing: all but the states is right."""
        before = dict(self._list._modules)
        try:
            for number, block in enumerate(self.blocks[: layer + 1]):
                stand_in = _StandIn(block, wanted=number == layer, num_outputs=self._num_outputs[number])
                self._list._modules[str(number)] = stand_in
            hidden_states(
                self._model, ids.to(self._device), separator=self._separator, attended=None if attended is None else attended.to(self._device)
            )
        except _Seen as seen:
            return seen.args[0]  # type: ignore[no-any-return]
        finally:
            self._list._modules.update(before)
        raise AssertionError(f"the decoder never came to block {layer}")

    def run(self, layer: int, call: Call, hidden: torch.Tensor) -> torch.Tensor:
        """One block on hidden states [batch, sequence, hidden]."""
        block = self.blocks[layer]
        output = block(**call.kwargs, hidden_states=hidden) if call.by_name else block(hidden, *call.args, **call.kwargs)
        self._num_outputs[layer] = len(output) if isinstance(output, tuple) else 0
        return output[0] if isinstance(output, tuple) else output


_proved: set[str] = set()


@torch.no_grad()
def require_blocks_alone(config: Any, family: Family) -> None:
    """Refuse a family whose blocks do not give one by one what the model gives, on a random instance of 64 channels; tried once per process.

    Raises:
        ArchitectureError: blocks pass each other more than hidden states.
    """
    key = config.to_json_string(use_diff=False)
    if key in _proved:
        return
    with dist.alone():
        small = tiny_config(config, family)
        model = tiny_teacher(small, seed=0, attention=None).to(dist.device())
        ids = torch.arange(1, 17).view(2, 8) % int(small.vocab_size)
        expected = []
        handle = model.get_submodule(family.final_norm).register_forward_pre_hook(lambda module, args: expected.append(args[0].clone()))
        hidden_states(model, ids.to(dist.device()))
        handle.remove()
        difference = _difference(BlockWalk(model, discover(small)), ids, expected[0])
    if not difference <= _TOLERANCE:
        raise ArchitectureError(f"the layers of '{family.model_type}' cannot be run one by one: they pass each other more than hidden states")
    _proved.add(key)


def _difference(walk: BlockWalk, ids: torch.Tensor, expected: torch.Tensor) -> float:
    """Between the states before the final norm block by block and the model's own, relative to the largest."""
    hidden = walk.call(0, ids).hidden
    for layer in range(len(walk.blocks)):
        hidden = walk.run(layer, walk.call(layer, ids), hidden)
    return float((hidden - expected).abs().max() / expected.abs().max())
