"""Block after block: statistics of its inputs with its weights still dense, zeros, and its outputs with them, which the next block sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from minitron import dist
from minitron.core.axes import ParameterSpec
from minitron.core.sparsity import Pattern, SparsityRecord, share_of_zeros
from minitron.errors import DataError, Interrupted
from minitron.log import Progress, get_logger
from minitron.models.family import Family
from minitron.sparsify import SparsifyConfig, build_method
from minitron.sparsify.shared.blocks import require_blocks_alone
from minitron.sparsify.shared.matrices import matrices_of
from minitron.sparsify.shared.method import Inputs
from minitron.sparsify.shared.ratios import layer_patterns, outlier_share
from minitron.sparsify.shared.samples import Samples, SampleWalk
from minitron.sparsify.shared.store import Store, Tensors

logger = get_logger(__name__)


def needs_text(config: SparsifyConfig) -> bool:
    """Whether the method or the ratios look at inputs of matrices; otherwise nothing is run and no text is read.

    Raises:
        ConfigError: the section cannot be used.
    """
    return build_method(config).needs != "none" or config.ratios == "owl"


class Sparsifier:
    """One sparsification of a model. Finished blocks lie in files, from which it goes on where it was cut short."""

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        config: SparsifyConfig,
        samples: Samples | None,
        *,
        read: Callable[[str], torch.Tensor],
        folder: Path,
        origin: str = "",
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            model: as :func:`minitron.models.lazy.load_lazily` gives it, in the dtype that forwards are to run in; its blocks are changed.
            samples: None where :func:`needs_text` says no.
            read: gives a parameter by its name in memory as it is stored; what stays of it keeps its bits.
            folder: where finished blocks are kept.
            origin: what the result depends on beside the configuration.

        Raises:
            ConfigError, ArchitectureError: what cannot work with this model, before a weight is read.
            DataError: no token of the samples counts.
        """
        self._method, self._config, self._family, self._read, self._stop = build_method(config), config, family, read, stop
        self._matrices = matrices_of(model, family, dense=config.dense, pattern=config.parsed())
        self._store = Store(folder, origin)
        self._walk: SampleWalk | None = None
        if needs_text(config):
            assert samples is not None
            require_blocks_alone(model.config, family)
            self._walk = SampleWalk(model, family, samples, batch_size=config.batch_size)

    @torch.no_grad()
    def run(self) -> SparsityRecord:
        """Sparsify every block that no file holds. All ranks call it, and all have the same blocks afterwards.

        Raises:
            DataError: an input or a result is not finite.
            Interrupted: a signal asked for a stop; finished blocks are kept.
        """
        patterns = self._patterns()
        shares, num_recovered, num_weights = dict[str, float](), 0, 0
        bar = Progress("sparsify", total=len(self._matrices), unit="block")
        walk = self._walk if not all(self._store.has(_part(layer)) for layer in range(len(self._matrices))) else None
        if walk is not None:
            walk.begin()
        for layer, specs in enumerate(self._matrices):
            if walk is not None:
                walk.load(layer)
            known = self._store.load(_part(layer))
            if known is None:
                tensors, recovered = self._sparsify_block(layer, specs, patterns[layer])
                self._store.save(_part(layer), tensors, recovered=recovered)
            else:
                tensors, recovered = known[0], int(known[1]["recovered"])
            shares |= {name: share_of_zeros(tensor) for name, tensor in tensors.items()}
            num_recovered, num_weights = num_recovered + recovered, num_weights + sum(tensor.numel() for tensor in tensors.values())
            bar.advance()
            if layer + 1 < len(self._matrices):
                if known is None and self._stop():
                    raise Interrupted(f"sparsify stopped after {layer + 1} of {len(self._matrices)} blocks; the same command goes on from there")
                if walk is not None:
                    walk.advance(layer, tensors)
        return SparsityRecord(self._config.name, self._recorded_pattern(), shares, num_recovered / max(1, num_weights))

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter by its name in memory, one block's sparse ones at a time, once ``run`` has come to its end. For one process alone."""
        held: Tensors = {}
        layer = None
        for spec in self._family.layout.parameters:
            if spec.layer is not None and spec.layer != layer:
                layer = spec.layer
                found = self._store.load(_part(layer))
                assert found is not None, f"block {layer} is not finished"
                held = found[0]
            yield spec.name, held.pop(spec.name) if spec.name in held else self._read(spec.name)

    def _recorded_pattern(self) -> str:
        """With N:8 and OWL the N differs from layer to layer: what holds for the whole is the share of zeros."""
        pattern = self._config.parsed()
        return str(Pattern(pattern.ratio) if self._config.ratios == "owl" else pattern)

    def _patterns(self) -> list[Pattern]:
        """The pattern of every layer; OWL takes a walk over the dense model for it, whose result is kept."""
        if self._config.ratios != "owl":
            return [self._config.parsed()] * len(self._matrices)
        known = self._store.load("outliers")
        shares = known[0]["shares"] if known is not None else torch.tensor(self._outliers(), dtype=torch.float64)
        if known is None:
            self._store.save("outliers", {"shares": shares})
        patterns = layer_patterns(shares.tolist(), self._config)
        logger.info("  owl: zeros per layer %s", " ".join(f"{pattern.ratio:.3f}" for pattern in patterns))
        return patterns

    def _outliers(self) -> list[float]:
        """Every layer's share of outliers, the whole model being dense."""
        assert self._walk is not None
        bar, found = Progress("outliers", total=len(self._matrices), unit="block"), []
        self._walk.begin()
        for layer, specs in enumerate(self._matrices):
            self._walk.load(layer)
            inputs = self._walk.statistics(layer, _modules(specs), hessian=False)
            scored = ((self._read(name).to(dist.device(), torch.float32), known.squares) for name, known in inputs.items())
            found.append(outlier_share(scored, self._config.owl_threshold) if inputs else 0.0)
            self._walk.advance(layer, {})
            bar.advance()
        return found

    def _sparsify_block(self, layer: int, specs: list[ParameterSpec], pattern: Pattern) -> tuple[Tensors, int]:
        """The block's sparse matrices on the CPU in the dtype that they are stored in, and how many weights were put back.

        Ranks share out the groups of matrices that read one input. A sum with the zeros of the others hands a result on unchanged.
        """
        inputs: dict[str, Inputs] = {}
        names = [spec.name for spec in specs]
        if self._method.needs != "none":
            assert self._walk is not None
            inputs = self._walk.statistics(layer, _modules(specs), hessian=self._method.needs == "hessian")
            for name in names:
                if name not in inputs:
                    logger.warning("'%s' stays dense: nothing goes through it", name)
            names = [name for name in names if name in inputs]
        groups = {key: number for number, key in enumerate(dict.fromkeys(id(inputs.get(name, name)) for name in names))}
        recovered = torch.zeros((), dtype=torch.int64, device=dist.device())
        tensors: Tensors = {}
        for name in names:
            stored = self._read(name)
            weight = stored.to(dist.device(), torch.float32, copy=True)
            if groups[id(inputs.get(name, name))] % dist.world_size() == dist.rank():
                done = self._method.sparsify(name, weight, inputs.get(name), pattern)
                weight, recovered = done.weight, recovered + done.num_recovered
            else:
                weight.zero_()
            result = dist.all_reduce_sum(weight).to(stored.dtype).cpu()
            if not torch.isfinite(result).all():
                raise DataError(f"the sparse '{name}' is not finite: its weights are damaged, or its updates overflow the dtype of the checkpoint")
            tensors[name] = result
        return tensors, int(dist.all_reduce_sum(recovered))


def _part(layer: int) -> str:
    return f"block-{layer:05d}"


def _modules(specs: list[ParameterSpec]) -> dict[str, str]:
    return {spec.name: spec.module for spec in specs}
