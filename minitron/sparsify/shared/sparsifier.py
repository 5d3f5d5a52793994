"""Block after block: statistics of its inputs with its weights still dense, zeros, and its outputs with them, which the next block sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

import torch
from torch import nn

from minitron import dist
from minitron.core.architecture import Architecture
from minitron.core.axes import ParameterSpec
from minitron.core.sparsity import Pattern, SparsityRecord, share_of_zeros
from minitron.errors import DataError, Interrupted
from minitron.log import Progress, get_logger
from minitron.models.experts import outputs_first, transposed_matrices
from minitron.models.family import Family
from minitron.sparsify import SparsifyConfig, build_method
from minitron.sparsify.magnitude import Magnitude
from minitron.sparsify.shared.blocks import require_blocks_alone
from minitron.sparsify.shared.expert_statistics import Experts, expert_name, in_a_pass
from minitron.sparsify.shared.matrices import experts_of, matrices_of
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


def sample_passes(config: SparsifyConfig, shape: Architecture) -> int:
    """How often the samples go through every block: for OWL's walk, for statistics (one group of experts after the other, where their Hessians are
    many) and on to the next block."""
    if not needs_text(config):
        return 0
    needs, passes = build_method(config).needs, 3 if config.ratios == "owl" else 1
    if needs != "hessian" or not shape.num_experts or any(part in "mlp.experts.gate_up_proj" for part in config.dense):
        return passes + (needs != "none")
    return passes + math.ceil(shape.num_experts / in_a_pass((shape.hidden_size, shape.expert_ffn_size)))


@dataclass
class _Block:
    """A block's sparse matrices on the CPU in the dtype that they are stored in, and how many weights were put back.

    ``unreached``: experts that no calibration token came to. ``turn`` counts the groups of matrices that ranks share out.
    """

    tensors: Tensors = field(default_factory=dict)
    recovered: int = 0
    unreached: int = 0
    turn: int = 0


@dataclass(frozen=True)
class _Matrix:
    """One matrix [out, in] as it is stored, the statistics of its inputs, and which turn of the ranks it is."""

    name: str
    stored: torch.Tensor
    inputs: Inputs | None
    turn: int


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
        scope = getattr(self._method, "scope", "matrix") if config.scope == "auto" else config.scope
        self._by_magnitude = Magnitude(replace(config, scope=scope))
        self._matrices = matrices_of(model, family, dense=config.dense, pattern=config.parsed())
        self._transposed = transposed_matrices(family)
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
        shares, num_recovered, num_weights, num_unreached = dict[str, float](), 0, 0, 0
        bar = Progress("sparsify", total=len(self._matrices), unit="block")
        walk = self._walk if not all(self._store.has(_part(layer)) for layer in range(len(self._matrices))) else None
        if walk is not None:
            walk.begin()
        for layer, specs in enumerate(self._matrices):
            if walk is not None:
                walk.load(layer)
            known = self._store.load(_part(layer))
            if known is None:
                block = self._sparsify_block(layer, specs, patterns[layer])
                self._store.save(_part(layer), block.tensors, recovered=block.recovered, unreached=block.unreached)
            else:
                block = _Block(known[0], int(known[1]["recovered"]), int(known[1].get("unreached", 0)))
            shares |= {name: share_of_zeros(tensor) for name, tensor in block.tensors.items()}
            num_recovered, num_weights = num_recovered + block.recovered, num_weights + sum(tensor.numel() for tensor in block.tensors.values())
            num_unreached += block.unreached
            bar.advance()
            if layer + 1 < len(self._matrices):
                if known is None and self._stop():
                    raise Interrupted(f"sparsify stopped after {layer + 1} of {len(self._matrices)} blocks; the same command goes on from there")
                if walk is not None:
                    walk.advance(layer, block.tensors)
        if num_unreached:
            every = sum(len(experts.numbers) for experts in (experts_of(specs, self._family) for specs in self._matrices) if experts is not None)
            logger.warning("  no calibration token came to %d of %d experts: their zeros were chosen by magnitude", num_unreached, every)
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
            inputs = self._walk.statistics(layer, _modules(specs), experts_of(specs, self._family), hessian=False)
            found.append(outlier_share(self._scored(specs, inputs), self._config.owl_threshold) if inputs else 0.0)
            self._walk.advance(layer, {})
            bar.advance()
        return found

    def _scored(self, specs: list[ParameterSpec], inputs: dict[str, Inputs]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Matrices [out, in] that something went through, experts one by one, with the squares of their inputs' norms."""
        for spec in specs:
            stored = outputs_first(spec.name, self._read(spec.name), self._transposed)
            named = [(spec.name, stored)] if stored.ndim == 2 else [(expert_name(spec.name, e), weight) for e, weight in enumerate(stored)]
            for name, weight in named:
                if name in inputs:
                    yield weight.to(dist.device(), torch.float32), inputs[name].squares

    def _sparsify_block(self, layer: int, specs: list[ParameterSpec], pattern: Pattern) -> _Block:
        """Ranks share out the groups of matrices that read one input; every expert's are groups of their own."""
        block, needs = _Block(), self._method.needs
        experts = experts_of(specs, self._family)
        plain = [spec for spec in specs if len(spec.dims) == 2]
        shapes = {spec.name: spec.shape(self._family.architecture.size) for spec in specs if len(spec.dims) == 3}
        widths = [shape[-2 if name in self._transposed else -1] for name, shape in shapes.items()]
        parts: list[Experts | None] = [experts] if experts is None or needs != "hessian" else [*experts.split(widths)]
        for part in parts:
            inputs = dict[str, Inputs]()
            if needs != "none":
                assert self._walk is not None
                inputs = self._walk.statistics(layer, _modules(plain), part, hessian=needs == "hessian")
            self._sparsify_plain(block, [spec.name for spec in plain], inputs, pattern)
            if part is not None:
                self._sparsify_experts(block, part, inputs, pattern)
            plain = []  # they are done with the first experts
            inputs.clear()  # before the next pass takes memory
        block.recovered = int(dist.all_reduce_sum(torch.tensor(block.recovered, device=dist.device())))
        return block

    def _sparsify_plain(self, block: _Block, names: list[str], inputs: dict[str, Inputs], pattern: Pattern) -> None:
        """The matrices of linear modules."""
        if self._method.needs != "none":
            for name in names:
                if name not in inputs:
                    logger.warning("'%s' stays dense: nothing goes through it", name)
            names = [name for name in names if name in inputs]
        groups = {key: number for number, key in enumerate(dict.fromkeys(id(inputs.get(name, name)) for name in names), block.turn)}
        block.turn += len(groups)
        matrices = (_Matrix(name, self._read(name), inputs.get(name), groups[id(inputs.get(name, name))]) for name in names)
        block.tensors |= self._shared_out(block, matrices, pattern)

    def _sparsify_experts(self, block: _Block, experts: Experts, inputs: dict[str, Inputs], pattern: Pattern) -> None:
        """Some experts of the layer, each as if no other shared its parameter; by magnitude where no token came to it."""
        if self._method.needs != "none":
            block.unreached += sum(expert_name(experts.names[0], number) not in inputs for number in experts.numbers)
        for name in experts.names:
            if name not in block.tensors:
                block.tensors[name] = self._read(name).clone()
            stack = outputs_first(name, block.tensors[name], self._transposed)
            own = {expert_name(name, number): number for number in experts.numbers}
            matrices = (_Matrix(key, stack[e], inputs.pop(key, None), turn) for turn, (key, e) in enumerate(own.items(), block.turn))
            for key, weight in self._shared_out(block, matrices, pattern):
                stack[own[key]] = weight
            block.turn += len(own)

    def _shared_out(self, block: _Block, matrices: Iterable[_Matrix], pattern: Pattern) -> Iterator[tuple[str, torch.Tensor]]:
        """Matrices with their zeros, on the CPU, by name. Every rank does its own of as many turns as there are ranks; then they tell each other:
        a sum with the zeros of the others hands a result on unchanged."""
        world = dist.world_size()
        for _, together in groupby(matrices, key=lambda matrix: matrix.turn // world):
            batch = list(together)
            done = {matrix.name: self._sparse(block, matrix, pattern) for matrix in batch if matrix.turn % world == dist.rank()}
            for matrix in batch:
                weight = done.pop(matrix.name, None)
                weight = torch.zeros(matrix.stored.shape, device=dist.device()) if weight is None else weight
                result = dist.all_reduce_sum(weight).to(matrix.stored.dtype).cpu()
                if not torch.isfinite(result).all():
                    raise DataError(
                        f"the sparse '{matrix.name}' is not finite: its weights are damaged, or its updates overflow the dtype of the checkpoint"
                    )
                yield matrix.name, result

    def _sparse(self, block: _Block, matrix: _Matrix, pattern: Pattern) -> torch.Tensor:
        """One matrix in float32 with its zeros; by magnitude where nothing is known of its inputs."""
        method = self._method if matrix.inputs is not None else self._by_magnitude
        weight = matrix.stored.to(dist.device(), torch.float32, copy=True).contiguous()
        done = method.sparsify(matrix.name, weight, matrix.inputs, pattern)
        block.recovered += done.num_recovered
        return done.weight


def _part(layer: int) -> str:
    return f"block-{layer:05d}"


def _modules(specs: Iterable[ParameterSpec]) -> dict[str, str]:
    return {spec.name: spec.module for spec in specs if len(spec.dims) == 2}
