"""The shape of a decoder. It counts parameters, FLOPs and cache bytes, and knows no model names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from minitron.core.axes import Coupling, Layout, ParameterSpec
from minitron.errors import ArchitectureError

_SIZE_OF_AXIS = {
    "layer": "num_layers",
    "hidden": "hidden_size",
    "ffn": "ffn_size",
    "head": "num_heads",
    "kv_head": "num_kv_heads",
    "expert": "num_experts",
    "expert_ffn": "expert_ffn_size",
    "shared_ffn": "shared_ffn_size",
    "vocab": "vocab_size",
}


@dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder-only transformer, with the parameter layout of its family.

    Equality and serialisation look at the sizes alone.
    """

    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    num_experts: int = 0
    expert_ffn_size: int = 0
    shared_ffn_size: int = 0
    num_experts_per_token: int = 0
    kept_layers: tuple[int, ...] | None = field(default=None, compare=False)
    layout: Layout | None = field(default=None, repr=False, compare=False)

    def size(self, axis: str) -> int:
        """Number of units on an axis."""
        return int(getattr(self, _SIZE_OF_AXIS[axis]))

    @staticmethod
    def option(axis: str) -> str:
        """The option and field name of an axis's size (``hidden`` → ``hidden_size``)."""
        return _SIZE_OF_AXIS[axis]

    def replace(self, **changes: Any) -> Architecture:
        """A copy with some sizes changed; a changed number of layers forgets which ones were kept."""
        if "num_layers" in changes and "kept_layers" not in changes:
            changes["kept_layers"] = None
        return dataclasses.replace(self, **changes)

    @property
    def name(self) -> str:
        """A short unique name made of the sizes: ``l30-h576-f1024-a9-k3``."""
        parts = [f"l{self.num_layers}", f"h{self.hidden_size}", f"f{self.ffn_size}", f"a{self.num_heads}", f"k{self.num_kv_heads}"]
        if self.num_experts:
            parts += [f"e{self.num_experts}", f"x{self.expert_ffn_size}"]
        if self.shared_ffn_size:
            parts.append(f"s{self.shared_ffn_size}")
        return "-".join(parts)

    def _count(self, weigh: Callable[[ParameterSpec], float] | None = None) -> int:
        if self.layout is None:
            raise ArchitectureError("this shape has no parameter layout: make it from a teacher's configuration to count parameters")
        return self.layout.count(self.size, self.num_layers, self.kept_layers, weigh)

    def _active_share(self, spec: ParameterSpec) -> float:
        """The share of a parameter that one token uses: of the experts' weights only those it is routed to."""
        if self.num_experts and spec.axes() >= {"expert"} and spec.axes() & {"expert_ffn"}:
            return self.num_experts_per_token / self.num_experts
        return 1.0

    @property
    def num_parameters(self) -> int:
        """Exact number of parameters; tied weights count once."""
        return self._count()

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token uses; all of them unless there are experts."""
        return self._count(self._active_share)

    @property
    def num_embedding_parameters(self) -> int:
        """Parameters with a vocabulary dimension: embedding and, unless tied, the head."""
        return self._count(lambda spec: 1.0 if _has_vocabulary(spec) else 0.0)

    @property
    def num_non_embedding_parameters(self) -> int:
        """All parameters but those with a vocabulary dimension."""
        return self.num_parameters - self.num_embedding_parameters

    @property
    def num_attention_layers(self) -> int:
        """Layers with attention; all of them unless the family is a hybrid."""
        if self.layout is None or self.layout.uniform:
            return self.num_layers
        with_heads = set(self.layout.layers_with("head"))
        kept = self.kept_layers if self.kept_layers is not None else range(self.num_layers)
        return sum(layer in with_heads for layer in kept)

    def flops_per_token(self, sequence_length: int, *, head: bool = True) -> float:
        """Forward FLOPs per token at a sequence length, causal attention counted at half the square.

        Two per weight of every matrix product (blocks and head; the embedding lookup is free) and two per attended
        position and attention channel. Of the experts only those count that a token is routed to. Training costs three times as much.
        """
        matrices = self._count(lambda spec: self._active_share(spec) if len(spec.dims) >= 2 and not _has_vocabulary(spec) else 0.0)
        products = matrices + (self.hidden_size * self.vocab_size if head else 0)
        return 2.0 * products + 2.0 * sequence_length * self.num_heads * self.head_dim * self.num_attention_layers

    def kv_cache_bytes(self, *, batch_size: int, sequence_length: int, bytes_per_value: int = 2) -> int:
        """Bytes of keys and values for a batch of full sequences."""
        return 2 * self.num_attention_layers * self.num_kv_heads * self.head_dim * batch_size * sequence_length * bytes_per_value

    @property
    def couplings(self) -> tuple[Coupling, ...]:
        """Sizes that the family's config ties to each other."""
        return () if self.layout is None else self.layout.couplings

    def with_coupled(self, **given: int) -> Architecture:
        """A copy with some sizes changed, where sizes tied to a given one follow unless they are given too."""
        for coupling in (*self.couplings, *self.couplings):  # twice: kv heads follow heads, which follow hidden channels
            mine, other = self.option(coupling.axis), self.option(coupling.other)
            if mine in given and other not in given and given[mine] % coupling.ratio == 0:
                given[other] = given[mine] // coupling.ratio
            elif other in given and mine not in given:
                given[mine] = given[other] * coupling.ratio
        return self.replace(**given)

    def to_dict(self) -> dict[str, Any]:
        """Sizes as plain JSON."""
        values = dataclasses.asdict(dataclasses.replace(self, layout=None))
        del values["layout"], values["kept_layers"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any], layout: Layout | None = None, kept_layers: tuple[int, ...] | None = None) -> Architecture:
        """The inverse of :meth:`to_dict`, with the layout of the family put back."""
        names = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in values.items() if k in names}, layout=layout, kept_layers=kept_layers)

    def check_within(self, teacher: Architecture) -> None:
        """Refuse a shape that is not a sub-shape of the teacher.

        Raises:
            ArchitectureError: an axis is empty, larger than the teacher's, or heads do not divide into their groups.
        """
        for axis, option in _SIZE_OF_AXIS.items():
            mine, most = self.size(axis), teacher.size(axis)
            least = 1 if most > 0 else 0
            if not least <= mine <= most:
                raise ArchitectureError(f"target.{option}={mine} is not between {least} and the teacher's {most}")
        for coupling in teacher.couplings:
            if not coupling.holds(self.size):
                tied, to = self.option(coupling.axis), self.option(coupling.other)
                times = f"{coupling.ratio} * " if coupling.ratio > 1 else ""
                raise ArchitectureError(
                    f"this family's config ties {tied} to {times}{to}: {tied}={self.size(coupling.axis)} and "
                    f"{to}={self.size(coupling.other)} do not go together"
                )
        if self.num_heads % self.num_kv_heads:
            raise ArchitectureError(f"num_heads={self.num_heads} does not divide into num_kv_heads={self.num_kv_heads} groups")
        if self.num_heads // self.num_kv_heads > teacher.num_heads // teacher.num_kv_heads:
            raise ArchitectureError(
                f"{self.num_heads} heads over {self.num_kv_heads} groups need more heads in a group than the teacher's "
                f"{teacher.num_heads // teacher.num_kv_heads}"
            )
        if self.num_experts < teacher.num_experts_per_token:
            raise ArchitectureError(
                f"num_experts={self.num_experts} is fewer than the {teacher.num_experts_per_token} experts that every token is sent to"
            )


def _has_vocabulary(spec: ParameterSpec) -> bool:
    return "vocab" in spec.axes()
