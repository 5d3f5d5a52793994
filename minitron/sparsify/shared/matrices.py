"""Which parameters of a model are made sparse."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from minitron.core.axes import ParameterSpec
from minitron.core.sparsity import Pattern
from minitron.errors import ArchitectureError, ConfigError
from minitron.log import get_logger
from minitron.models.experts import can_be_seen, expert_matrices, transposed_matrices
from minitron.models.family import Family
from minitron.sparsify.shared.expert_statistics import Experts

logger = get_logger(__name__)


def matrices_of(model: nn.Module, family: Family, *, dense: Sequence[str], pattern: Pattern) -> list[list[ParameterSpec]]:
    """Per layer the weights of its linear modules, without routers, gates of one output, and names that hold a part in ``dense``.

    Experts that share one parameter are in it, each expert a matrix. Those that transformers does not run by its usual grouped products stay
    dense, which one line says. Embeddings, head and norms are in no layer or are no matrices.

    Raises:
        ConfigError: a part that is in no name, or a width that the groups of the pattern do not divide (the matrix named).
        ArchitectureError: nothing is left.
    """
    size_of = family.architecture.size
    stacks = {spec.name for layer in expert_matrices(family) for spec in layer if can_be_seen(model.get_submodule(spec.module))}

    def fits(spec: ParameterSpec) -> bool:
        return spec.name in stacks or (_is_matrix(spec, model) and spec.shape(size_of)[0] > 1)

    found = [[spec for spec in layer if fits(spec)] for layer in family.layout.by_layer]
    names = [spec.name for layer in found for spec in layer]
    for part in dense:
        if not any(part in name for name in names):
            raise ConfigError(f"sparsify.dense names '{part}', which is in no name of a matrix; names are like {_examples(names)}")
    chosen = [[spec for spec in layer if not any(part in spec.name for part in dense)] for layer in found]
    specs = (spec for layer in family.layout.by_layer for spec in layer)
    others = [spec.name for spec in specs if len(spec.dims) == 3 and "expert" in spec.axes() and spec.name not in stacks]
    if others:
        logger.info("  experts stay dense: '%s' and others are not run by transformers' grouped products", others[0])
    if not any(chosen):
        raise ArchitectureError(f"no matrix of '{family.model_type}' can be made sparse: none is left that is the weight of a linear module")
    transposed = transposed_matrices(family)
    for layer in chosen:
        for spec in layer:
            pattern.check_width(spec.name, spec.shape(size_of)[-2 if spec.name in transposed else -1])
    return chosen


def experts_of(specs: Sequence[ParameterSpec], family: Family) -> Experts | None:
    """Those of a layer's matrices that hold experts, all of its experts; None where there are none."""
    names = tuple(spec.name for spec in specs if len(spec.dims) == 3)
    if not names:
        return None
    return Experts(next(spec.module for spec in specs if spec.name in names), names, range(family.architecture.num_experts))


def _is_matrix(spec: ParameterSpec, model: nn.Module) -> bool:
    if spec.buffer or len(spec.dims) != 2 or spec.axes() == {"expert", "hidden"} or not spec.name.endswith(".weight"):
        return False
    return isinstance(model.get_submodule(spec.module), nn.Linear)


def _examples(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:2])
