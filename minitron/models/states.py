"""Where the states of a model can be read, and reading them while it runs: only those asked for, never a list of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minitron.errors import ArchitectureError
from minitron.models.family import Family, discover
from minitron.models.head import decoder_of, stand_in

#: The layer number of the embedding's output.
EMBEDDING = -1
ATTENTION = ("query", "key", "value")


@dataclass(frozen=True)
class Tap:
    """A state of one layer.

    ``output`` is what the block adds up to; ``normed`` the same after the norm that follows it (the first norm of the next block, or
    the final one), and equal to ``output`` in families that have no norm there. ``query``, ``key`` and ``value`` are the attention's
    projections, heads side by side, before rotation and before any norm over heads. Layer :data:`EMBEDDING` is the embedding.
    """

    kind: str
    layer: int


@dataclass(frozen=True)
class Spot:
    """A module whose output holds a state, and which columns of it."""

    module: str
    start: int = 0
    stop: int | None = None


def find_spots(model: nn.Module, taps: Sequence[Tap]) -> dict[Tap, Spot]:
    """The modules at which states can be read, by running an unwrapped model on a few tokens; one without its weights has a narrow stand-in run.

    Raises:
        ArchitectureError: the attention's projections are not three of known order.
    """
    family = discover(model.config)
    after = _norms_after(model, family) if any(tap.kind == "normed" for tap in taps) else {}
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())  # type: ignore[operator]
    found = {}
    for tap in taps:
        raw = embedding if tap.layer == EMBEDDING else family.taps.blocks[tap.layer]
        if tap.kind in ATTENTION:
            found[tap] = _projections(family, tap.layer)[ATTENTION.index(tap.kind)]
        else:
            found[tap] = Spot(after.get(tap.layer, raw) if tap.kind == "normed" else raw)
    return found


@contextmanager
def captured(model: nn.Module, spots: dict[Tap, Spot]) -> Iterator[dict[Tap, torch.Tensor]]:
    """States of the forward that runs inside, each [batch, sequence, width].

    The hooks live only as long as the context: what activation checkpointing recomputes later is not seen twice, and they come after
    those of engines, so that the states carry the gradient hooks which gather sharded weights.
    """
    states: dict[Tap, torch.Tensor] = {}

    def keep(tap: Tap, spot: Spot) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            states[tap] = (output[0] if isinstance(output, tuple) else output)[..., spot.start : spot.stop]

        return hook

    handles = [model.get_submodule(spot.module).register_forward_hook(keep(tap, spot)) for tap, spot in spots.items()]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _norms_after(model: nn.Module, family: Family) -> dict[int, str]:
    """Layer → the first norm that takes this very layer's output as its input, found by running the model on five tokens."""
    if next(model.parameters()).is_meta:
        model = stand_in(model.config, range(family.architecture.num_layers))
    blocks = {name: index for index, name in enumerate(family.taps.blocks)}
    streams: dict[int, torch.Tensor] = {}  # layer → its output
    inputs: list[tuple[str, torch.Tensor]] = []  # of norms, in the order in which they run

    def before_block(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            streams[index - 1] = args[0] if args else kwargs["hidden_states"]

        return hook

    def after_last(module: nn.Module, args: Any, output: Any) -> None:
        streams[len(blocks) - 1] = output[0] if isinstance(output, tuple) else output

    def before_norm(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            inputs.append((name, args[0] if args else next(iter(kwargs.values()))))

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(before_block(i), with_kwargs=True) for name, i in blocks.items()]
    handles.append(model.get_submodule(family.taps.blocks[-1]).register_forward_hook(after_last))
    handles += [model.get_submodule(name).register_forward_pre_hook(before_norm(name), with_kwargs=True) for name in family.taps.norms]
    device = next(model.parameters()).device
    with torch.no_grad():
        decoder_of(model)(input_ids=torch.arange(1, 6, device=device)[None] % family.architecture.vocab_size, use_cache=False)
    for handle in handles:
        handle.remove()
    # the same tensor object, not an equal one: two tensors may be equal by chance, as zeros are
    return {layer: name for layer, state in streams.items() for name, taken in reversed(inputs) if taken is state}


def _projections(family: Family, layer: int) -> list[Spot]:
    """Query, key and value of a layer: three modules, or three parts of one, in the family's order."""
    found = []
    for spec in family.layout.parameters:
        if spec.layer != layer or len(spec.dims) != 2:
            continue
        start = 0
        for segment in spec.dims[0]:
            stop = start + segment.size(family.architecture.size)
            if segment.axis in ("head", "kv_head"):
                found.append((segment.axis != "head", Spot(spec.name.rpartition(".")[0], start, stop)))
            start = stop
    if len(found) != 3:
        raise ArchitectureError(
            f"loss 'attention_relation' needs query, key and value of layer {layer}, but '{family.model_type}' has {len(found)} projections there"
        )
    return [spot for _, spot in sorted(found, key=lambda row: row[0])]  # stable: the query first, then key and value as they stand
