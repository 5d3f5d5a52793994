"""The order inside fused dimensions, which shapes alone cannot show.

One row per parameter: model type (``*``: any), a pattern of the name within its layer, the dimension, and its segments in order. A
segment is an axis and its width per unit, in elements or in head dimensions. The first row that fits counts. Everything that is not
listed is discovered, and whatever is listed is proved like the rest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from minitron.core.axes import Dim, Segment


@dataclass(frozen=True)
class LayoutNote:
    """The segments of one fused dimension of one parameter: (axis, width, whether the width counts head dimensions)."""

    model_type: str
    pattern: str
    dim: int
    segments: tuple[tuple[str, int, bool], ...]

    def resolve(self, head_dim: int) -> Dim:
        """The dimension with its widths put in."""
        return tuple(Segment(axis, width * head_dim if in_heads else width) for axis, width, in_heads in self.segments)


_HEAD, _KV_HEAD = ("head", 1, True), ("kv_head", 1, True)
_GATE_UP, _EXPERT_GATE_UP = (("ffn", 1, False),) * 2, (("expert_ffn", 1, False),) * 2

LAYOUTS: tuple[LayoutNote, ...] = (
    LayoutNote("phi3", r"self_attn\.qkv_proj\.weight", 0, (_HEAD, _KV_HEAD, _KV_HEAD)),
    LayoutNote("*", r"mlp\.gate_up_proj\.(weight|bias)", 0, _GATE_UP),
    # gpt-oss stores experts transposed, with gate and up in turn: one unit is two neighbouring columns.
    LayoutNote("gpt_oss", r"mlp\.experts\.gate_up_proj", 2, (("expert_ffn", 2, False),)),
    LayoutNote("gpt_oss", r"mlp\.experts\.gate_up_proj_bias", 1, (("expert_ffn", 2, False),)),
    LayoutNote("*", r"mlp\.experts\.gate_up_proj", 1, _EXPERT_GATE_UP),
    # Families whose head dimension is hidden / heads: changing one changes both, so shapes cannot tell heads from hidden channels.
    LayoutNote("gpt_neox", r"attention\.query_key_value\.(weight|bias)", 0, (("head", 3, True),)),
    LayoutNote("gpt_neox", r"attention\.dense\.weight", 1, (_HEAD,)),
    LayoutNote("stablelm", r"self_attn\.q_proj\.(weight|bias)", 0, (_HEAD,)),
    LayoutNote("stablelm", r"self_attn\.[kv]_proj\.(weight|bias)", 0, (_KV_HEAD,)),
    LayoutNote("stablelm", r"self_attn\.o_proj\.weight", 1, (_HEAD,)),
    LayoutNote("olmoe", r"self_attn\.(q_proj|q_norm)\.(weight|bias)", 0, (_HEAD,)),
    LayoutNote("olmoe", r"self_attn\.([kv]_proj|k_norm)\.(weight|bias)", 0, (_KV_HEAD,)),
    LayoutNote("olmoe", r"self_attn\.o_proj\.weight", 1, (_HEAD,)),
)

#: Families that take an explicit head dimension for their projections but not for the norms over them: it must stay hidden / heads.
TIED_HEAD_DIM = ("olmoe",)


def fused_layout(model_type: str, suffix: str, dim: int, head_dim: int) -> Dim | None:
    """The noted segments of a dimension, or None when there is no note."""
    for note in LAYOUTS:
        if note.model_type in ("*", model_type) and note.dim == dim and re.fullmatch(note.pattern, suffix):
            return note.resolve(head_dim)
    return None
