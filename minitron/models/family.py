"""Families are discovered: build the model on the meta device, change one config knob at a time, and see which dimensions move.

Nothing here knows a model by name. The result maps every parameter's dimensions to axes and names the modules at which each
axis is observed. The map is then checked against the real config's shapes, parameter by parameter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minitron.core.architecture import Architecture
from minitron.core.axes import Dim, Layout, ParameterSpec, Segment
from minitron.errors import ArchitectureError
from minitron.models.layouts import fused_layout

#: Config fields that hold the size of each axis, most common name first.
FIELDS = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "ffn": ("intermediate_size", "ffn_dim", "n_inner"),
    "head": ("num_attention_heads", "n_head"),
    "kv_head": ("num_key_value_heads",),
    "vocab": ("vocab_size",),
    "layer": ("num_hidden_layers", "n_layer"),
}
#: Probe sizes: hidden divides by every head count used, groups divide heads, and no two are equal.
_PROBE = {"hidden": 204, "ffn": 320, "head": 6, "kv_head": 2}
_CHANGED = {"hidden": 228, "ffn": 352, "head": 12, "kv_head": 3}


@dataclass(frozen=True)
class NormKind:
    """How a norm computes: whether its statistics are of the RMS kind, and the offset it adds to its weight."""

    rms: bool
    weight_offset: float


@dataclass(frozen=True)
class Taps:
    """Module names at which axes are observed: inputs of ``ffn`` and ``head`` modules, outputs of norms, ends of blocks."""

    blocks: list[str]
    ffn: list[str]
    head: list[str]
    norms: list[str]


@dataclass(frozen=True)
class Family:
    """One model type at one size: shape with layout, taps, the config field of every axis, and its kind of norm."""

    model_type: str
    architecture: Architecture
    taps: Taps
    fields: dict[str, str]
    norm: NormKind

    @property
    def layout(self) -> Layout:
        """The map from parameters to axes."""
        assert self.architecture.layout is not None
        return self.architecture.layout


def meta_model(config: Any) -> nn.Module:
    """The model of a config on the meta device: shapes without weights.

    Raises:
        ArchitectureError: transformers has no causal LM for this config, or refuses its sizes.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers raises many types here; all of them mean that this config cannot be built
        raise ArchitectureError(f"transformers cannot build a causal LM of type '{config.model_type}': {_first_line(error)}") from error


def changed_config(config: Any, changes: dict[str, Any]) -> Any:
    """A validated copy of a config with some fields changed.

    Raises:
        ArchitectureError: the family's config class refuses the values.
    """
    values = config.to_dict()
    values.update(changes)
    try:
        return type(config).from_dict(values)
    except Exception as error:  # strict dataclass validation raises its own types
        raise ArchitectureError(f"a {config.model_type} config cannot have {changes}: {_first_line(error)}") from error


def resized_config(config: Any, family: Family, shape: Architecture) -> Any:
    """A config with the sizes of another shape and all its layers, to ask whether the family's config class takes them.

    Raises:
        ArchitectureError: it does not (some want hidden_size to divide by the heads).
    """
    sizes = {name: shape.size(axis) for axis, name in family.fields.items() if axis in ("hidden", "ffn", "head", "kv_head")}
    return changed_config(config, {**sizes, "head_dim": shape.head_dim})


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__


def axis_fields(config: Any) -> dict[str, str]:
    """The config field that holds each axis's size."""
    fields = {}
    for axis, names in FIELDS.items():
        present = [name for name in names if getattr(config, name, None) is not None]
        if present:
            fields[axis] = present[0]
    missing = {"hidden", "ffn", "head", "layer", "vocab"} - set(fields)
    if missing:
        raise ArchitectureError(f"the {config.model_type} config has no field for {', '.join(sorted(missing))}")
    return fields


def head_dim_of(config: Any, fields: dict[str, str]) -> int:
    """The head width, which some configs leave implicit."""
    explicit = getattr(config, "head_dim", None)
    return int(explicit) if explicit else int(getattr(config, fields["hidden"])) // int(getattr(config, fields["head"]))


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


def _discover(config: Any) -> Family:
    if getattr(config, "is_encoder_decoder", False):
        raise ArchitectureError(f"'{config.model_type}' is an encoder-decoder; minitron prunes decoder-only models")
    fields = axis_fields(config)
    head_dim = head_dim_of(config, fields)
    knobs = [axis for axis in ("hidden", "ffn", "head", "kv_head") if axis in fields]
    base_sizes = {axis: _PROBE[axis] for axis in knobs} | {"vocab": int(config.vocab_size)}
    base_fields = {fields[axis]: size for axis, size in base_sizes.items()} | {"head_dim": head_dim}
    base = meta_model(changed_config(config, base_fields))
    shapes = {name: tuple(p.shape) for name, p in base.named_parameters()}
    moved: dict[str, dict[str, tuple[int, ...]]] = {}
    for axis in [*knobs, "vocab"]:
        size = _CHANGED.get(axis, base_sizes[axis] + 64)
        variant = meta_model(changed_config(config, base_fields | {fields[axis]: size}))
        moved[axis] = {name: tuple(p.shape) for name, p in variant.named_parameters()}
        base_sizes[f"{axis}'"] = size

    num_layers = int(getattr(config, fields["layer"]))
    prefix = _layer_prefix(list(shapes), num_layers, config.model_type)
    specs = [_explain(name, shape, moved, base_sizes, prefix, config.model_type, head_dim) for name, shape in shapes.items()]
    layout = Layout(tuple(specs), prefix)
    architecture = _architecture(config, fields, head_dim, layout)
    _check(architecture, config)
    taps = _taps(base, layout, num_layers)
    return Family(config.model_type, architecture, taps, fields, _norm_kind(base, taps.norms[0], _PROBE["hidden"]))


def _layer_prefix(names: list[str], num_layers: int, model_type: str) -> str:
    """The name prefix whose following number runs over exactly the layers."""
    seen: dict[str, set[int]] = {}
    for name in names:
        match = re.match(r"(.*?\.)(\d+)\.", name)
        if match:
            seen.setdefault(match.group(1), set()).add(int(match.group(2)))
    for prefix, indices in seen.items():
        if indices == set(range(num_layers)):
            return prefix
    raise ArchitectureError(f"no list of {num_layers} layers was found among the parameters of '{model_type}'")


def _explain(
    name: str,
    shape: tuple[int, ...],
    moved: dict[str, dict[str, tuple[int, ...]]],
    sizes: dict[str, int],
    prefix: str,
    model_type: str,
    head_dim: int,
) -> ParameterSpec:
    """The axes of one parameter, from how its shape moved under each knob."""
    match = re.match(re.escape(prefix) + r"(\d+)\.(.*)", name)
    layer, suffix = (int(match.group(1)), match.group(2)) if match else (None, name)
    natural = {"head": head_dim, "kv_head": head_dim}
    dims: list[Dim] = []
    for position, size in enumerate(shape):
        widths = {}
        for axis, other in moved.items():
            if name not in other or len(other[name]) != len(shape):
                raise ArchitectureError(f"parameter '{name}' of '{model_type}' appears or vanishes with {axis}: this family is not supported")
            delta = other[name][position] - size
            if delta:
                widths[axis] = delta / (sizes[f"{axis}'"] - sizes[axis])
        noted = fused_layout(model_type, suffix, position, head_dim)
        if noted is not None:
            dims.append(noted)
        elif not widths:
            dims.append((Segment(None, size),))
        else:
            axis, width = next(iter(widths.items()))
            if len(widths) > 1 or width != natural.get(axis, 1) or width * sizes[axis] != size:
                story = ", ".join(f"{w:g} per {a}" for a, w in widths.items())
                raise ArchitectureError(
                    f"dimension {position} of parameter '{name}' of '{model_type}' is fused or tied ({story}), and its order is not known"
                )
            dims.append((Segment(axis, int(width)),))
    return ParameterSpec(name, tuple(dims), layer)


def _architecture(config: Any, fields: dict[str, str], head_dim: int, layout: Layout) -> Architecture:
    num_heads = int(getattr(config, fields["head"]))
    return Architecture(
        num_layers=int(getattr(config, fields["layer"])),
        hidden_size=int(getattr(config, fields["hidden"])),
        ffn_size=int(getattr(config, fields["ffn"])),
        num_heads=num_heads,
        num_kv_heads=int(getattr(config, fields["kv_head"])) if "kv_head" in fields else num_heads,
        head_dim=head_dim,
        vocab_size=int(config.vocab_size),
        tied_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
        layout=layout,
    )


def _check(architecture: Architecture, config: Any) -> None:
    """Compare the map with the real config's shapes, so that nothing about the probe is taken on trust."""
    assert architecture.layout is not None
    real = {name: tuple(p.shape) for name, p in meta_model(config).named_parameters()}
    predicted = {spec.name: spec.shape(architecture.size) for spec in architecture.layout.parameters}
    for name in real.keys() | predicted.keys():
        if real.get(name) != predicted.get(name):
            raise ArchitectureError(
                f"'{config.model_type}' is not supported: parameter '{name}' has shape {real.get(name)}, its axes predict {predicted.get(name)}"
            )


def _taps(model: nn.Module, layout: Layout, num_layers: int) -> Taps:
    """Modules whose input dimension is ``ffn`` or ``head``, and those that hold nothing but vectors over ``hidden``."""
    by_module: dict[str, list[ParameterSpec]] = {}
    for spec in layout.parameters:
        by_module.setdefault(spec.name.rpartition(".")[0], []).append(spec)
    inputs: dict[str, list[str]] = {"ffn": [], "head": []}
    norms = []
    for module, specs in by_module.items():
        matrices = [spec for spec in specs if len(spec.dims) == 2]
        for axis in inputs:
            if any({segment.axis for segment in spec.dims[1]} == {axis} for spec in matrices):
                inputs[axis].append(module)
        if not matrices and all(spec.dims == ((Segment("hidden"),),) for spec in specs):
            norms.append(module)
    for axis, found in inputs.items():
        if len(found) != num_layers:
            raise ArchitectureError(f"{len(found)} modules take the '{axis}' axis as input, not one for each of the {num_layers} layers")
    return Taps([f"{layout.layer_prefix}{i}" for i in range(num_layers)], inputs["ffn"], inputs["head"], norms)


def _norm_kind(model: nn.Module, name: str, width: int) -> NormKind:
    """Try one norm on numbers: a layer norm ignores a shift of its input; with weight zero only an offset remains."""
    norm: Any = model.get_submodule(name).to_empty(device="cpu").float()
    x = torch.linspace(-1.0, 2.0, width).unsqueeze(0)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.zero_()
        offset = 1.0 if norm(x).abs().max() > 0 else 0.0
        norm.weight.fill_(1.0 - offset)
        rms = bool((norm(x) - norm(x + 3.0)).abs().max() > 1e-3)
    return NormKind(rms, offset)
