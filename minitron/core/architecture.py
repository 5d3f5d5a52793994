"""The shape of a decoder. It counts parameters, FLOPs and cache bytes, and knows no model names."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from minitron.core.axes import Layout, ParameterSpec
from minitron.errors import ArchitectureError

_SIZE_OF_AXIS = {
    "layer": "num_layers",
    "hidden": "hidden_size",
    "ffn": "ffn_size",
    "head": "num_heads",
    "kv_head": "num_kv_heads",
    "expert": "num_experts",
    "expert_ffn": "expert_ffn_size",
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
        return "-".join(parts)

    def _count(self, where: Any = None) -> int:
        if self.layout is None:
            raise ArchitectureError("this shape has no parameter layout: make it from a teacher's configuration to count parameters")
        return self.layout.count(self.size, self.num_layers, self.kept_layers, where)

    @property
    def num_parameters(self) -> int:
        """Exact number of parameters; tied weights count once."""
        return self._count()

    @property
    def num_embedding_parameters(self) -> int:
        """Parameters with a vocabulary dimension: embedding and, unless tied, the head."""
        return self._count(_has_vocabulary)

    @property
    def num_non_embedding_parameters(self) -> int:
        """All parameters but those with a vocabulary dimension."""
        return self.num_parameters - self.num_embedding_parameters

    def flops_per_token(self, sequence_length: int, *, head: bool = True) -> float:
        """Forward FLOPs per token at a sequence length, causal attention counted at half the square.

        Two per weight of every matrix product (blocks and head; the embedding lookup is free) and two per attended
        position and attention channel. Training costs three times as much.
        """
        matrices = self._count(lambda spec: len(spec.dims) >= 2 and not _has_vocabulary(spec))
        products = matrices + (self.hidden_size * self.vocab_size if head else 0)
        return 2.0 * products + 2.0 * sequence_length * self.num_heads * self.head_dim * self.num_layers

    def kv_cache_bytes(self, *, batch_size: int, sequence_length: int, bytes_per_value: int = 2) -> int:
        """Bytes of keys and values for a batch of full sequences."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * batch_size * sequence_length * bytes_per_value

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
        if self.num_heads % self.num_kv_heads:
            raise ArchitectureError(f"num_heads={self.num_heads} does not divide into num_kv_heads={self.num_kv_heads} groups")
        if self.num_heads // self.num_kv_heads > teacher.num_heads // teacher.num_kv_heads:
            raise ArchitectureError(
                f"{self.num_heads} heads over {self.num_kv_heads} groups need more heads in a group than the teacher's "
                f"{teacher.num_heads // teacher.num_kv_heads}"
            )


def _has_vocabulary(spec: ParameterSpec) -> bool:
    return "vocab" in spec.axes()
