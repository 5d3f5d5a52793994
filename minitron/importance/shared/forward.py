"""The forward at work, as the hooks of metrics see it: which samples it carries, which of their tokens count, and what was not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from minitron import dist
from minitron.errors import DataError


class Uncounted:
    """The tokens of all samples that do not count, found once on the CPU, so that nothing is searched for while the pass runs."""

    def __init__(self, counted: torch.Tensor) -> None:
        """``counted`` [num, sequence], False at those tokens."""
        self._rows, self._positions = (~counted).nonzero(as_tuple=True)
        self._lengths = counted.sum(dim=1)
        self._starts = [0, *(counted.shape[1] - self._lengths).cumsum(0).tolist()]
        self._lengths = self._lengths.clamp_min(1).double()

    def any_in(self, first: int, count: int) -> bool:
        """Whether some of ``count`` samples from ``first`` on have such tokens."""
        return bool(self._starts[first + count] > self._starts[first])

    def of(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Their rows within the batch and positions, and [batch] how many tokens count, at least 1."""
        inside = slice(self._starts[first], self._starts[first + count])
        return self._rows[inside] - first, self._positions[inside], self._lengths[first : first + count]


class Forward:
    """One object for all forwards of a pass; hooks are put on through it, so that they can be taken off together.

    ``first_bad`` [ranks] float64 on the device: each rank's slot holds 1 + the number of the first (sample, layer) with a value that is not
    finite, 0 while there is none. Slots of other ranks are 0, so that the same sum which reduces the accumulators reduces these.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.batch, self.sequence = 0, 0
        #: True while a forward runs for other ranks' sake alone, which gather sharded weights together: no hook sees it.
        self.idle = False
        #: [batch] float64: tokens that count, at least 1; None: every position of every sample does.
        self.lengths: torch.Tensor | None = None
        #: Rows and positions of the tokens that do not count; None: there are none.
        self.skipped: tuple[torch.Tensor, torch.Tensor] | None = None
        #: [batch, sequence], True where a token counts; None as above.
        self.counted: torch.Tensor | None = None
        self.first_bad = torch.zeros(dist.world_size(), dtype=torch.float64, device=dist.device())
        self._numbers = torch.zeros(0)
        self._handles: list[Any] = []
        self._at_end: list[Callable[[], None]] = []

    def before(self, module: nn.Module, hook: Callable[..., Any], *, with_kwargs: bool = False) -> None:
        """A forward pre-hook."""
        self._handles.append(module.register_forward_pre_hook(self._unless_idle(hook), with_kwargs=with_kwargs))

    def after(self, module: nn.Module, hook: Callable[..., Any], *, with_kwargs: bool = False) -> None:
        """A forward hook."""
        self._handles.append(module.register_forward_hook(self._unless_idle(hook), with_kwargs=with_kwargs))

    def _unless_idle(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: None if self.idle else hook(*args)

    def on_removal(self, handle: Any) -> None:
        """Anything else with a ``remove`` method."""
        self._handles.append(handle)

    def at_end(self, function: Callable[[], None]) -> None:
        """Call this after every forward."""
        self._at_end.append(function)

    def remove_hooks(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._at_end.clear()

    def begin(self, first_sample: int, shape: tuple[int, ...], uncounted: Uncounted | None = None) -> None:
        """A forward of samples from number ``first_sample`` on, ``shape`` (batch, sequence)."""
        device = dist.device()
        self.batch, self.sequence = shape
        self.lengths = self.skipped = self.counted = None
        self._numbers = torch.arange(first_sample, first_sample + self.batch, dtype=torch.float64, device=device).unsqueeze(1)
        if uncounted is not None and uncounted.any_in(first_sample, self.batch):
            rows, positions, lengths = uncounted.of(first_sample, self.batch)
            self.skipped = rows.to(device, non_blocking=True), positions.to(device, non_blocking=True)
            self.lengths = lengths.to(device, non_blocking=True)
            self.counted = torch.ones(shape, dtype=torch.bool, device=device)
            self.counted[self.skipped] = False

    def end(self) -> None:
        """The forward is over."""
        for function in self._at_end:
            function()

    @contextmanager
    def only_counted(self, activation: torch.Tensor) -> Iterator[torch.Tensor]:
        """An activation [batch, sequence, …] with zeros at the tokens that do not count, for the length of the context.

        They are few: writing zeros over them and putting them back costs less than a masked copy of the whole.
        """
        if self.skipped is None:
            yield activation
            return
        kept = activation[self.skipped]
        activation[self.skipped] = 0.0
        yield activation
        activation[self.skipped] = kept

    def note(self, values: torch.Tensor, layers: torch.Tensor) -> None:
        """Remember where ``values`` [batch, n] are not finite; ``layers`` [n] float64 says which layer each column is of."""
        key = self._numbers * (self.num_layers + 1) + layers + 1.0  # exact in float64
        first = torch.where(torch.isfinite(values), float("inf"), key).amin()
        slot = self.first_bad[dist.rank()]
        known = torch.where(slot > 0, slot, float("inf"))
        first = torch.minimum(first, known)
        slot.copy_(torch.where(torch.isinf(first), 0.0, first))

    def check(self, *, gather: bool = False) -> None:
        """Read the flags, of all ranks once they are summed; ``gather`` sums a copy first. Waits for the device.

        Raises:
            DataError: something was not finite.
        """
        flags = self.first_bad.cpu()
        found = [int(flag) - 1 for flag in (dist.all_reduce_sum(flags.clone()) if gather else flags).tolist() if flag > 0]
        if found:
            sample, layer = divmod(min(found), self.num_layers + 1)
            where = f"layer {layer}" if layer < self.num_layers else "the final norm"
            raise DataError(
                f"an activation of {where} is NaN or infinite in calibration sample {sample} (the first such place): "
                "the teacher's activations overflow in this dtype (try teacher.dtype=float32), or its weights are damaged"
            )
