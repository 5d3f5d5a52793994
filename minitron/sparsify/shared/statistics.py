"""Statistics of the inputs of a block's matrices, whose sums do not depend on the number of ranks.

Every micro-batch runs alike on whichever rank, so what it adds is the same bits everywhere; what could differ is the order of the additions.

- Squares: the sums of each micro-batch lie in a slot of their own (with very many, of some in a row) until the ranks' slots, zero but on one
  rank, are added up; then the slots are summed from the first to the last.
- Hessians have no room for that. Columns are scaled by powers of two, chosen by the first micro-batch, so that what a micro-batch adds is about 1
  times its tokens' share, and rounded to multiples of 2^-24: finer than float32 would be. Sums of such numbers in float64 are exact, in any order,
  until one is 2^29, which takes some 2^27 micro-batches like the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from minitron import dist
from minitron.errors import DataError
from minitron.sparsify.shared.method import Inputs

#: At most so many slots; a rank without one has nothing to do.
MAX_SLOTS = 256
_QUANTA = 2.0**24
#: Rows of a Hessian that are computed at a time: bounds what that takes beside it.
_ROWS = 1024


class Sums:
    """Of several inputs, by their number: squares in slots, Hessians where they are asked for, and how many tokens there were."""

    def __init__(self, scales: Sequence[torch.Tensor], *, num_slots: int, hessian: bool) -> None:
        """``scales``: for every input [in] the power of two by which its columns are divided in a Hessian."""
        widths, device = [len(scale) for scale in scales], dist.device()
        self._slots = torch.zeros(num_slots, sum(widths), dtype=torch.float64, device=device)
        self._parts = self._slots.split(widths, dim=1)  # views, [slots, in] per input
        self._scales = scales
        self._hessians = [torch.zeros(n, n, dtype=torch.float64, device=device) if hessian else None for n in widths]
        self._num_tokens = torch.zeros(len(widths), dtype=torch.float64, device=device)

    def add(self, number: int, slot: int, rows: torch.Tensor) -> None:
        """What a micro-batch brings to an input: rows [tokens, in] float32."""
        self._parts[number][slot] += rows.square().sum(dim=0, dtype=torch.float64)
        self._num_tokens[number] += len(rows)
        hessian = self._hessians[number]
        if hessian is not None:
            scaled = rows / self._scales[number]
            for start in range(0, len(hessian), _ROWS):
                product = scaled[:, start : start + _ROWS].T @ scaled
                hessian[start : start + _ROWS] += product.double().mul_(_QUANTA).round_()

    def reduce(self, names: Sequence[str]) -> list[Inputs | None]:
        """Add up the ranks; None of an input that no token came to. Each is read once: Hessians are let go of as they are handed out.

        Raises:
            DataError: an input is not finite; it is named.
        """
        dist.all_reduce_sum(self._slots)
        dist.all_reduce_sum(self._num_tokens)
        found: list[Inputs | None] = []
        for number, (name, part, scale, count) in enumerate(zip(names, self._parts, self._scales, self._num_tokens.tolist(), strict=True)):
            total = part[0].clone()
            for slot in part[1:]:
                total += slot
            if not torch.isfinite(total).all():
                raise DataError(
                    f"an input of '{name}' is NaN or infinite on the calibration samples: "
                    "the model's activations overflow in this dtype (try teacher.dtype=float32), or its weights are damaged"
                )
            hessian, whole = self._hessians[number], None
            self._hessians[number] = None
            if hessian is not None and count:
                dist.all_reduce_sum(hessian)
                wide = scale.double()
                hessian *= wide * (2.0 / (count * _QUANTA))
                whole = hessian.mul_(wide.unsqueeze(1)).float()
            del hessian
            found.append(Inputs(total, whole) if count else None)
        return found


class InputStatistics:
    """Of one block's matrices, grouped by the tensor that they read (``groups``): queries, keys and values share one."""

    def __init__(self, matrices: Mapping[str, nn.Module], *, num_slots: int, hessian: bool, first: Callable[[], Any]) -> None:
        """``first`` runs the block on the first micro-batch, on every rank: it shows the groups, and the scale of the inputs."""
        self.groups: list[list[str]] = []
        self._matrices = matrices
        self._sums = Sums(self._look(first), num_slots=num_slots, hessian=hessian)
        self._slot = 0
        self._counted: torch.Tensor | None = None

    def _look(self, first: Callable[[], Any]) -> list[torch.Tensor]:
        """Fill ``groups``; gives the power of two by which each group's columns are divided, [in] float32."""
        seen: list[torch.Tensor] = []

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                if any(name in group for group in self.groups):
                    return
                known = next((number for number, tensor in enumerate(seen) if tensor is args[0]), len(seen))
                if known == len(seen):
                    seen.append(args[0])
                    self.groups.append([])
                self.groups[known].append(name)

            return hook

        with _hooked({module: note(name) for name, module in self._matrices.items()}):
            first()
        return [scale_of(rows_of(tensor)) for tensor in seen]

    @contextmanager
    def observing(self, slot: int, counted: torch.Tensor | None) -> Iterator[None]:
        """A context whose forward is a micro-batch; ``counted`` [batch, sequence] is False at tokens that do not count."""
        self._slot, self._counted = slot, counted
        with _hooked({self._matrices[group[0]]: self._add_to(number) for number, group in enumerate(self.groups)}):
            yield

    def _add_to(self, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            rows = rows_of(args[0])
            self._sums.add(number, self._slot, rows if self._counted is None else rows[self._counted.reshape(-1)])

        return hook

    def reduce(self) -> dict[str, Inputs]:
        """Add up the ranks; the statistics of every matrix's inputs, those of a group one object.

        Raises:
            DataError: an input is not finite; its matrix is named.
        """
        found = dict[str, Inputs]()
        for group, inputs in zip(self.groups, self._sums.reduce([group[0] for group in self.groups]), strict=True):
            assert inputs is not None, "some token counts"
            found.update(dict.fromkeys(group, inputs))
        return found


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """An input [..., in] as rows [tokens, in] in float32."""
    return tensor.reshape(-1, tensor.shape[-1]).float()


def scale_of(rows: torch.Tensor, *, share: float = 1.0) -> torch.Tensor:
    """[in]: the power of two near the norm of each column, or near their mean where a column is empty or not finite.

    ``share`` is how many of the rows come to one input.
    """
    norms = torch.linalg.vector_norm(rows, dim=0) * share**0.5
    good = torch.isfinite(norms) & (norms > 0)
    usual = norms[good].mean() if bool(good.any()) else norms.new_ones(())
    return torch.exp2(torch.where(good, norms, usual).log2().floor())


@contextmanager
def _hooked(hooks: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
