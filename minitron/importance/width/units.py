"""Sums per unit of many places in a model, laid side by side: one reduction of an activation in its hook, one fold for all of them a forward."""

from __future__ import annotations

import torch

from minitron import dist
from minitron.importance.shared.forward import Forward

#: Powers of the per-sample values that an aggregation over samples needs the sums of.
_POWERS = {"mean": (1,), "l2": (2,), "variance": (1, 2)}


class UnitSums:
    """Absolute values aggregated over the sequence in float32, then over samples in float64.

    Over the n positions of a sample that count: mean |a|, sqrt(Σ a²), or the variance Σ (a - mean)² / n. The result v of every sample then
    enters Σ v, Σ v² or both, from which come over N samples mean v, sqrt(Σ v²) or Σ v² / N - (Σ v / N)². Any split of the samples gives the
    same sums. ``sums`` maps a place to [powers, units], views of one buffer.
    """

    def __init__(self, *, samples: str = "l2", sequence: str = "mean") -> None:
        self.samples, self.sequence = samples, sequence
        self.sums: dict[str, torch.Tensor] = {}
        self._columns: dict[str, slice] = {}
        self._layers: list[torch.Tensor] = []
        self._staged = self._buffer = self._layer_of_column = torch.zeros(0)
        self._forward = Forward(0)

    def place(self, name: str, num_units: int, *, layer: int | None) -> None:
        """Make room for a place; ``layer`` None: after the last one."""
        start = self._width
        self._columns[name] = slice(start, start + num_units)
        self._layers.append(torch.full((num_units,), -1.0 if layer is None else float(layer), dtype=torch.float64))

    @property
    def _width(self) -> int:
        return max((columns.stop for columns in self._columns.values()), default=0)

    def start(self, forward: Forward) -> None:
        """Make the accumulators, once all places are known."""
        device, powers = dist.device(), _POWERS[self.samples]
        self._forward = forward
        layers = torch.cat(self._layers)
        self._layer_of_column = torch.where(layers < 0, float(forward.num_layers), layers).to(device)
        self._buffer = torch.zeros(len(powers), self._width, dtype=torch.float64, device=device)
        self.sums.update({name: self._buffer[:, columns] for name, columns in self._columns.items()})
        forward.at_end(self._fold)

    def write(self, name: str, activation: torch.Tensor) -> None:
        """Take in [batch, sequence, units], the whole of this forward."""
        self.write_values(name, self.over_sequence(activation))

    def over_sequence(self, activation: torch.Tensor) -> torch.Tensor:
        """[batch, sequence, units] → [batch, units] in float32, over the tokens that count."""
        with self._forward.only_counted(activation) as counted:
            return _over_sequence(counted, self.sequence, self._forward)

    def write_values(self, name: str, values: torch.Tensor) -> None:
        """Take in [batch, units] that are aggregated over the sequence already."""
        if self._staged.shape[0] < self._forward.batch:
            self._staged = torch.empty(self._forward.batch, self._width, dtype=torch.float32, device=self._buffer.device)
        self._staged[: self._forward.batch, self._columns[name]].copy_(values)

    def _fold(self) -> None:
        """Add the forward's samples to the sums, one by one: the temporary is one row in float64."""
        staged = self._staged[: self._forward.batch]
        for row in staged:
            for power, sums in zip(_POWERS[self.samples], self._buffer, strict=True):
                if power == 1:
                    sums.add_(row)
                else:
                    wide = row.double()
                    sums.addcmul_(wide, wide)
        self._forward.note(staged, self._layer_of_column)

    def scores(self, *, num_samples: int) -> dict[str, torch.Tensor]:
        """[units] of every place."""
        return {name: self._over_samples(sums, num_samples) for name, sums in self.sums.items()}

    def _over_samples(self, sums: torch.Tensor, num_samples: int) -> torch.Tensor:
        if self.samples == "mean":
            return sums[0] / num_samples
        if self.samples == "l2":
            return sums[0].sqrt()
        return (sums[1] / num_samples - (sums[0] / num_samples).square()).clamp_min(0.0)


def _over_sequence(activation: torch.Tensor, aggregation: str, forward: Forward) -> torch.Tensor:
    """[batch, sequence, units] with zeros where a token does not count → [batch, units] in float32."""
    lengths: torch.Tensor | int = forward.sequence
    if forward.lengths is not None:
        lengths = forward.lengths.float().unsqueeze(1)
    if aggregation == "mean":
        return _norm(activation, 1) / lengths
    if aggregation == "l2":
        return _norm(activation, 2)
    mean = activation.sum(dim=1, dtype=torch.float32) / lengths
    centred = activation - mean.unsqueeze(1)  # one pass more than Σ a² - (Σ a)² / n, which cancels where the mean is large
    if forward.skipped is not None:
        centred[forward.skipped] = 0.0
    return _norm(centred, 2).square() / lengths


def _norm(activation: torch.Tensor, order: int) -> torch.Tensor:
    """Norm over dimension 1 in float32. CUDA has one kernel for it; on CPUs its stride makes it ten times slower than two plain passes."""
    if activation.device.type != "cpu":
        return torch.linalg.vector_norm(activation, ord=order, dim=1, dtype=torch.float32)
    if order == 1:
        return activation.abs().sum(dim=1, dtype=torch.float32)
    return activation.float().square().sum(dim=1).sqrt()
