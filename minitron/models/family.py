"""Families are discovered: build the model on the meta device, change one config knob at a time, and see which dimensions move.

Nothing here knows a model by name. The result maps every parameter's dimensions to axes and names the modules at which each
axis is observed. The map is then checked against the real config's shapes, parameter by parameter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from minitron.core.architecture import Architecture
from minitron.core.axes import Coupling, Dim, Layout, ParameterSpec, Segment
from minitron.errors import ArchitectureError
from minitron.models.fields import axis_fields, changed_config, experts_per_token, head_dim_of, meta_model, require_decoder
from minitron.models.layouts import TIED_HEAD_DIM, fused_layout
from minitron.models.stored import StoredTensor, find_stored, stored_layout
from minitron.models.taps import NormKind, Taps, embedding_scales_with_hidden, find_norms, find_taps

#: Probe sizes: hidden divides by every head count used, groups divide heads, and no two are equal.
_PROBE = {"hidden": 204, "ffn": 320, "head": 6, "kv_head": 2, "expert_ffn": 168, "shared_ffn": 184}
_CHANGED = {"hidden": 228, "ffn": 352, "head": 12, "kv_head": 3, "expert_ffn": 192, "shared_ffn": 200}

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Family:
    """One model type at one size.

    ``architecture`` is the shape with its layout; ``fields`` the config field of every axis; ``norms`` every norm over an axis that may be
    cut, by module name; ``embedding`` the name of the embedding's weight; ``scaled_embedding`` whether the model multiplies embeddings by
    sqrt(hidden size), as Gemma does.
    """

    model_type: str
    architecture: Architecture
    taps: Taps
    fields: dict[str, str]
    norms: dict[str, NormKind]
    embedding: str
    scaled_embedding: bool
    stored: tuple[StoredTensor, ...]

    @property
    def layout(self) -> Layout:
        """The map from the parameters in memory to axes."""
        assert self.architecture.layout is not None
        return self.architecture.layout

    @cached_property
    def stored_layout(self) -> Layout:
        """The map from the tensors in a checkpoint to axes; it differs where transformers fuses experts while loading."""
        return stored_layout(self.stored, self.layout)

    @property
    def final_norm(self) -> str:
        """The name of the norm after the last layer."""
        outside = [spec.module for spec in self.layout.parameters if spec.layer is None]
        return next(name for name in reversed(outside) if name in self.norms)


_FOUND: dict[str, Family] = {}


def discover(config: Any) -> Family:
    """The family of a Hugging Face config; found once per process and config.

    Raises:
        ArchitectureError: no decoder, or a parameter whose dimensions the knobs do not explain (named).
    """
    key = config.to_json_string(use_diff=False)
    if key not in _FOUND:
        _FOUND[key] = _discover(config)
    return _FOUND[key]


def resized_config(config: Any, family: Family, shape: Architecture) -> Any:
    """A config with the sizes of another shape and all its layers, to ask whether the family's config class takes them.

    Raises:
        ArchitectureError: it does not (some want hidden_size to divide by the heads).
    """
    sizes = {name: shape.size(axis) for axis, name in family.fields.items() if axis not in ("layer", "vocab")}
    return changed_config(config, {**sizes, "head_dim": shape.head_dim})


def _discover(config: Any) -> Family:
    require_decoder(config)
    fields = axis_fields(config)
    head_dim = head_dim_of(config, fields)
    probe = _Probe(config, fields, head_dim)
    num_layers = int(getattr(config, fields["layer"]))
    prefix = layer_prefix(list(probe.shapes), num_layers, config.model_type)
    specs = [_explain(name, probe, prefix, config.model_type) for name in probe.shapes]
    axes = {axis for spec in specs for axis in spec.axes()}
    couplings = _couplings(probe, axes)
    layout = Layout(tuple(specs), prefix, couplings)
    fields = _fields_of_axes(fields, axes)
    architecture = _architecture(config, fields, head_dim, layout)
    real = meta_model(config)
    _check(architecture, real, config.model_type)
    norms = find_norms(probe.base, layout, probe.size_of)
    embedding = _embedding_name(real)
    return Family(
        config.model_type,
        architecture,
        find_taps(layout, norms),
        fields,
        norms,
        embedding,
        embedding_scales_with_hidden(config, fields, head_dim, implied_head_dim=probe.implied_head_dim),
        find_stored(config, fields, layout, head_dim),
    )


class _Probe:
    """Shapes of the base model and of one variant per knob."""

    def __init__(self, config: Any, fields: dict[str, str], head_dim: int) -> None:
        self.config, self.fields, self.head_dim = config, fields, head_dim
        self.sizes = {axis: _PROBE[axis] for axis in fields if axis in _PROBE} | {"vocab": int(config.vocab_size)}
        if "expert" in fields:
            self.sizes["expert"] = int(getattr(config, fields["expert"]))
        if "kv_head" not in fields:
            self.sizes["kv_head"] = self.sizes["head"]
        self.implied_head_dim = self._head_dim_is_implied()
        if self.implied_head_dim:
            self.sizes["hidden"] = self.sizes["head"] * head_dim
        self.base = self._build({})
        self.shapes = _shapes(self.base)
        self.buffers = set(self.shapes) - {name for name, _ in self.base.named_parameters()}
        self.steps: dict[str, int] = {}
        self.moved: dict[str, Shapes] = {}
        for axis in [axis for axis in fields if axis != "layer"]:
            if self.implied_head_dim and axis == "head":
                continue  # moves together with hidden; where heads are is noted
            changed = {axis: _CHANGED.get(axis, self.sizes[axis] * 2 if axis == "expert" else self.sizes[axis] + 64)}
            if self.implied_head_dim and axis == "hidden":
                changed = {"hidden": _CHANGED["head"] * head_dim, "head": _CHANGED["head"]}
            self.steps[axis] = changed[axis] - self.sizes[axis]
            self.moved[axis] = _shapes(self._build(changed))

    def size_of(self, axis: str) -> int:
        """Units of an axis in the base model."""
        knob = {"expert_ffn": "ffn", "shared_ffn": "expert_ffn"}
        while axis not in self.sizes and axis in knob:
            axis = knob[axis]
        return self.sizes[axis]

    def _build(self, changed: dict[str, int], **more: int) -> nn.Module:
        sizes = {**self.sizes, **changed}
        values = {field: sizes[axis] for axis, field in self.fields.items() if axis in sizes}
        return meta_model(changed_config(self.config, values | {"head_dim": self.head_dim} | more))

    def _head_dim_is_implied(self) -> bool:
        """Whether the family computes its head dimension as hidden / heads whatever its config says."""
        if self.config.model_type in TIED_HEAD_DIM:
            return True
        sizes = {"hidden": self.sizes["head"] * self.head_dim}
        return _shapes(self._build(sizes)) == _shapes(self._build(sizes, head_dim=2 * self.head_dim))


def _shapes(model: nn.Module) -> Shapes:
    """Shapes of all parameters (tied ones once) and of the buffers that are saved with them."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return shapes | {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in tied}


def layer_prefix(names: list[str], num_layers: int, model_type: str) -> str:
    """The name prefix whose following number runs over exactly the layers.

    Raises:
        ArchitectureError: there is none.
    """
    seen: dict[str, set[int]] = {}
    for name in names:
        match = re.match(r"(.*?\.)(\d+)\.", name)
        if match:
            seen.setdefault(match.group(1), set()).add(int(match.group(2)))
    for prefix, indices in seen.items():
        if indices == set(range(num_layers)):
            return prefix
    raise ArchitectureError(f"no list of {num_layers} layers was found among the parameters of '{model_type}'")


def _explain(name: str, probe: _Probe, prefix: str, model_type: str) -> ParameterSpec:
    """The axes of one parameter, from how its shape moved under each knob."""
    shape = probe.shapes[name]
    match = re.match(re.escape(prefix) + r"(\d+)\.(.*)", name)
    layer, suffix = (int(match.group(1)), match.group(2)) if match else (None, name)
    for knob, other in probe.moved.items():
        if name not in other or len(other[name]) != len(shape):
            raise ArchitectureError(
                f"parameter '{name}' of '{model_type}' appears or vanishes with {probe.fields[knob]}: this family is not supported"
            )
    has_experts = "expert" in probe.moved and probe.moved["expert"][name] != shape
    dims: list[Dim] = []
    for position, size in enumerate(shape):
        widths = {knob: (other[name][position] - size) / probe.steps[knob] for knob, other in probe.moved.items() if other[name][position] != size}
        noted = fused_layout(model_type, suffix, position, probe.head_dim)
        if noted is not None and sum(segment.size(probe.size_of) for segment in noted) == size:
            dims.append(noted)
        elif not widths:
            dims.append((Segment(None, size),))
        else:
            knob, width = next(iter(widths.items()))
            if len(widths) > 1 or width != int(width) or width * probe.sizes[knob] != size:
                story = ", ".join(f"{w:g} per {probe.fields[k]}" for k, w in widths.items())
                raise ArchitectureError(
                    f"dimension {position} of parameter '{name}' of '{model_type}' is fused or tied ({story}), and its order is not known"
                )
            dims.append((Segment(_axis_of_knob(knob, has_experts), int(width)),))
    return ParameterSpec(name, tuple(dims), layer, buffer=name in probe.buffers)


def _axis_of_knob(knob: str, has_experts: bool) -> str:
    """One field may size the neurons of experts in some parameters and of plain or shared MLPs in others."""
    if has_experts:
        return "expert_ffn" if knob in ("ffn", "expert_ffn") else knob
    return "shared_ffn" if knob == "expert_ffn" else knob


def _fields_of_axes(fields: dict[str, str], axes: set[str]) -> dict[str, str]:
    """The field of every axis that some parameter carries; sizes that move nothing are dropped."""
    found = {axis: field for axis, field in fields.items() if axis in axes or axis in ("layer", "head", "kv_head")}
    if "expert_ffn" in axes and "expert_ffn" not in found:
        found["expert_ffn"] = fields["ffn"]
    if "shared_ffn" in axes and "shared_ffn" not in found:
        found["shared_ffn"] = fields["expert_ffn"]
    return found


def _couplings(probe: _Probe, axes: set[str]) -> tuple[Coupling, ...]:
    """Sizes that one config field, or the family's code, ties to each other."""
    found = []
    if probe.implied_head_dim:
        found.append(Coupling("hidden", "head", probe.head_dim))
    if "kv_head" not in axes:
        found.append(Coupling("kv_head", "head", 1))
    if "shared_ffn" in axes and "shared_ffn" not in probe.fields:
        found.append(Coupling("shared_ffn", "expert_ffn", 1))
    if {"ffn", "expert_ffn"} <= axes and "expert_ffn" not in probe.fields:
        found.append(Coupling("ffn", "expert_ffn", 1))
    return tuple(found)


def _architecture(config: Any, fields: dict[str, str], head_dim: int, layout: Layout) -> Architecture:
    def size(axis: str) -> int:
        return int(getattr(config, fields[axis])) if axis in fields else 0

    return Architecture(
        num_layers=size("layer"),
        hidden_size=size("hidden"),
        ffn_size=size("ffn"),
        num_heads=size("head"),
        num_kv_heads=size("kv_head") or size("head"),
        head_dim=head_dim,
        vocab_size=int(config.vocab_size),
        tied_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
        num_experts=size("expert"),
        expert_ffn_size=size("expert_ffn"),
        shared_ffn_size=size("shared_ffn"),
        num_experts_per_token=experts_per_token(config) if "expert" in fields else 0,
        layout=layout,
    )


def _check(architecture: Architecture, model: nn.Module, model_type: str) -> None:
    """Compare the map with the real config's shapes, so that nothing about the probe is taken on trust."""
    assert architecture.layout is not None
    real = _shapes(model)
    predicted = {spec.name: spec.shape(architecture.size) for spec in architecture.layout.parameters}
    for name in sorted(real.keys() | predicted.keys()):
        if real.get(name) != predicted.get(name):
            raise ArchitectureError(
                f"'{model_type}' is not supported: parameter '{name}' has shape {real.get(name)}, its axes predict {predicted.get(name)}"
            )


def _embedding_name(model: nn.Module) -> str:
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    return next(name for name, parameter in model.named_parameters() if parameter is weight)
