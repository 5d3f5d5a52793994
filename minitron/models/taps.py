"""Where the axes of a family are observed, and how its norms and its embedding compute: found by trying them on numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minitron.core.axes import Layout, ParameterSpec, Segment, SizeOf
from minitron.errors import ArchitectureError
from minitron.models.fields import small_config


@dataclass(frozen=True)
class NormKind:
    """How a norm computes: the axis it runs over, whether its statistics are of the RMS kind, and the offset it adds to its weight."""

    axis: str
    rms: bool
    weight_offset: float


@dataclass(frozen=True)
class Taps:
    """Module names at which axes are observed.

    ``blocks`` are the layers in order and ``norms`` the norms over hidden channels. The others map a layer to a module: ``ffn``,
    ``shared_ffn`` and ``head`` are observed at the input of the matrix whose input dimension they are, ``experts`` is the module that holds
    the experts' weights and ``router`` the one that chooses among them. Layers without such a part are missing.
    """

    blocks: list[str]
    norms: list[str]
    ffn: dict[int, str]
    head: dict[int, str]
    shared_ffn: dict[int, str]
    experts: dict[int, str]
    router: dict[int, str]


def _by_module(layout: Layout) -> dict[str, list[ParameterSpec]]:
    modules: dict[str, list[ParameterSpec]] = {}
    for spec in layout.parameters:
        modules.setdefault(spec.module, []).append(spec)
    return modules


def find_taps(layout: Layout, norms: dict[str, NormKind]) -> Taps:
    """Taps from the map alone.

    Raises:
        ArchitectureError: an axis has two places where it could be observed in one layer, or none.
    """
    found: dict[str, dict[int, str]] = {"ffn": {}, "shared_ffn": {}, "head": {}, "experts": {}, "router": {}}
    for module, specs in _by_module(layout).items():
        layer = specs[0].layer
        if layer is None:
            continue
        holds_experts = any({"expert", "expert_ffn"} <= spec.axes() for spec in specs)
        for spec in specs:
            axes = spec.axes()
            place = None
            if holds_experts:
                place = "experts"
            elif len(spec.dims) == 2 and axes == {"expert", "hidden"}:
                place = "router"
            elif len(spec.dims) == 2:
                inputs = {segment.axis for segment in spec.dims[1]}
                place = next((axis for axis in ("ffn", "shared_ffn", "head") if inputs == {axis}), None)
            if place is not None and found[place].setdefault(layer, module) != module:
                raise ArchitectureError(f"'{module}' and '{found[place][layer]}' both take the '{place}' axis as input in layer {layer}")
    for axis in ("ffn", "shared_ffn", "head"):
        missing = [layer for layer in layout.layers_with(axis) if layer not in found[axis]]
        if missing:
            raise ArchitectureError(f"no module takes the '{axis}' axis as input in layer {missing[0]}")
    if not found["head"]:
        raise ArchitectureError("no layer has attention heads: this is no decoder that can be cut")
    blocks = [f"{layout.layer_prefix}{index}" for index in range(layout.num_layers)]
    return Taps(blocks, [name for name, kind in norms.items() if kind.axis == "hidden"], **found)


def find_norms(model: nn.Module, layout: Layout, size_of: SizeOf) -> dict[str, NormKind]:
    """Every module that holds nothing but vectors over one axis that may be cut, and that normalises: tried on numbers once per class."""
    known: dict[tuple[type, str, int], NormKind | None] = {}
    norms = {}
    for name, specs in _by_module(layout).items():
        if any(spec.dims != specs[0].dims for spec in specs) or len(specs[0].dims) != 1 or len(specs[0].dims[0]) != 1:
            continue
        segment = specs[0].dims[0][0]
        if segment.axis not in ("hidden", "head", "kv_head"):
            continue
        module = model.get_submodule(name)
        key = (type(module), segment.axis, len(specs))
        if key not in known:
            known[key] = _norm_kind(module, segment, size_of)
        kind = known[key]
        if kind is not None:
            norms[name] = kind
    return norms


def _norm_kind(module: nn.Module, segment: Segment, size_of: SizeOf) -> NormKind | None:
    """A norm ignores the scale of its input, a layer norm also a shift; with weight zero only an offset remains."""
    norm: Any = module.to_empty(device="cpu").float()
    x = 1e3 * torch.linspace(-1.0, 2.0, segment.size(size_of)).unsqueeze(0)  # so large that no eps counts
    assert segment.axis is not None
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.zero_()
        try:
            offset = 1.0 if norm(x).abs().max() > 0 else 0.0
            norm.weight.fill_(1.0 - offset)
            plain, doubled, shifted = norm(x), norm(2 * x), norm(x + 3e3)
        except (TypeError, AttributeError, ValueError, RuntimeError):  # something else that holds vectors: it takes other inputs, or has no weight
            return None
    if (plain - doubled).abs().max() > 1e-2:
        return None
    return NormKind(segment.axis, bool((plain - shifted).abs().max() > 1e-3), offset)


def embedding_scales_with_hidden(config: Any, fields: dict[str, str], head_dim: int, *, implied_head_dim: bool) -> bool:
    """Whether embeddings enter the first layer multiplied by sqrt(hidden size), measured at two sizes.

    Raises:
        ArchitectureError: they are multiplied by something else that depends on the hidden size.
    """
    narrow, wide = (_embedding_scale(config, fields, head_dim, heads, implied_head_dim) for heads in (2, 4))
    if narrow is None or wide is None or abs(wide / narrow - 1.0) < 1e-2:
        return False
    if abs(wide / narrow - 2**0.5) < 1e-2:
        return True
    raise ArchitectureError(
        f"embeddings of '{config.model_type}' are multiplied by {narrow:.4g} at one hidden size and by {wide:.4g} at twice of it: "
        "minitron cannot keep that exact when hidden channels are cut"
    )


class _FirstInput(Exception):
    """Carries the input of the first layer out of a forward."""


def _embedding_scale(config: Any, fields: dict[str, str], head_dim: int, heads: int, implied_head_dim: bool) -> float | None:
    """The factor between embedding rows and the first layer's input; None where there is no single one."""
    from transformers import AutoModelForCausalLM

    dim = head_dim if implied_head_dim else 8
    sizes = {"hidden": heads * dim, "head": heads, "kv_head": 2, "ffn": 16, "expert": 2, "expert_ffn": 16, "shared_ffn": 16, "vocab": 8}
    small = small_config(config, fields, sizes, kept_layers=[0], head_dim=dim)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(small).float().eval()
        weight = model.get_input_embeddings().weight
        weight.uniform_(0.5, 1.0)
        blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))

        def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _FirstInput(args[0] if args else kwargs["hidden_states"])

        blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)
        except _FirstInput as caught:
            ratios = caught.args[0][0].float() / weight[1:4].float()
            return float(ratios.mean()) if ratios.max() - ratios.min() < 1e-2 * ratios.mean().abs() else None
    return None
