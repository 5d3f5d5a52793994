"""The order inside fused dimensions, which shapes alone cannot show.

One row per parameter: model type, a pattern of the name within its layer, the dimension, and its segments in order. A segment is
an axis and the config value that is its width per unit (an int, or ``"head_dim"``). Everything that is not listed is discovered.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from minitron.core.axes import Dim, Segment


@dataclass(frozen=True)
class LayoutNote:
    """The segments of one fused dimension of one parameter."""

    model_type: str
    pattern: str
    dim: int
    segments: tuple[tuple[str, int | str], ...]

    def resolve(self, head_dim: int) -> Dim:
        """The dimension with its widths put in."""
        return tuple(Segment(axis, head_dim if width == "head_dim" else int(width)) for axis, width in self.segments)


_QKV = (("head", "head_dim"), ("kv_head", "head_dim"), ("kv_head", "head_dim"))
_GATE_UP = (("ffn", 1), ("ffn", 1))

LAYOUTS: tuple[LayoutNote, ...] = (
    LayoutNote("phi3", r"self_attn\.qkv_proj\.weight", 0, _QKV),
    LayoutNote("phi3", r"mlp\.gate_up_proj\.weight", 0, _GATE_UP),
)


def fused_layout(model_type: str, suffix: str, dim: int, head_dim: int) -> Dim | None:
    """The noted segments of a dimension, or None when there is no note."""
    for note in LAYOUTS:
        if note.model_type == model_type and note.dim == dim and re.fullmatch(note.pattern, suffix):
            return note.resolve(head_dim)
    return None
