"""An inspection for people: one line per kind of parameter, layers and experts of one kind in braces."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from typing import TypeVar

from minitron.core.axes import ParameterSpec, SizeOf, describe_dim
from minitron.inspection import Inspection
from minitron.prune.proof import TOLERANCE

Told = TypeVar("Told", bound=Hashable)
_NUMBER = re.compile(r"\.(\d+)(?=\.|$)")
#: How an axis is observed at its modules.
_OBSERVED_AT = {
    "layer": "input and output of",
    "hidden": "output of",
    "ffn": "input of",
    "head": "input of",
    "kv_head": "input of",
    "expert": "output of",
    "expert_ffn": "inside of",
    "shared_ffn": "input of",
}


def inspection_table(found: Inspection) -> str:
    """Totals, axes with the verdict of the proof, couplings, places of observation, and every parameter."""
    parts = [_totals(found), _axes(found), _coupled(found), _observed(found), _parameters(found), _stored(found)]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _totals(found: Inspection) -> list[str]:
    shape = found.family.architecture
    rows = [
        ("parameters", f"{shape.num_parameters:,}"),
        ("non-embedding", f"{shape.num_non_embedding_parameters:,}"),
        ("KV cache", f"{found.kv_cache_bytes_per_token:,} bytes per token (2 bytes a value)"),
        ("FLOPs", f"{found.flops_per_token:.4g} per token forward, at {found.sequence_length:,} tokens"),
        ("embeddings", "tied to the head" if shape.tied_embeddings else "not tied to the head"),
    ]
    if shape.num_experts:
        told = f"{shape.num_active_parameters:,} parameters: {shape.num_experts_per_token} of {shape.num_experts} experts per token"
        rows.insert(2, ("active", told))
    return [f"{found.family.model_type}", *(f"  {name:<15}{text}" for name, text in rows)]


def _axes(found: Inspection) -> list[str]:
    fields = [str(row["field"]) for row in found.axes.values()]
    wide = max(len(field) for field in fields) + 2
    lines = [f"{'axis':<12}{'units':>7}{'size':>9}  {'config field':<{wide}}{'difference':>11}  verdict"]
    for axis, row in found.axes.items():
        lines.append(f"{axis:<12}{row['units']:>7,}{row['size']:>9,}  {row['field']:<{wide}}{_verdict(found, axis, int(row['units']))}")
    lines.append(f"{'all':<28}  {'':<{wide}}{_verdict(found, 'all', 2)}")
    lines.append(
        f"difference: the largest between logits of the model with units removed from its computation and with units cut out, on a small random "
        f"model of this family; proved when at most {TOLERANCE:g} of the largest logit"
    )
    return lines


def _verdict(found: Inspection, axis: str, units: int) -> str:
    difference = found.proof.differences.get(axis)
    told = "" if difference is None else f"{difference:.1e}"
    if axis in found.proof.refused:
        return f"{told:>11}  refused: {found.proof.refused[axis]}"
    if difference is None:
        return f"{told:>11}  {'there is only one' if units == 1 else 'not tried: too few to cut'}"
    return f"{told:>11}  proved"


def _coupled(found: Inspection) -> list[str]:
    shape, lines = found.family.architecture, []
    for coupling in found.couplings:
        times = f"{coupling.ratio} x " if coupling.ratio > 1 else ""
        lines.append(f"{coupling.axis} = {times}{coupling.other}: cut together")
    if shape.num_kv_heads < shape.num_heads:
        lines.append(f"kv_head is a group: keys, values and the {shape.num_heads // shape.num_kv_heads} query heads that read them go together")
    return ["coupled", *(f"  {line}" for line in lines)] if lines else []


def _observed(found: Inspection) -> list[str]:
    lines = ["observed at"]
    for axis, modules in found.observed.items():
        for position, (name, _, _) in enumerate(collapse((module, "") for module in modules)):
            lines.append(f"  {axis if position == 0 else '':<12}{_OBSERVED_AT[axis]} {name}")
    return lines


def _parameters(found: Inspection) -> list[str]:
    return ["parameters", *_table(found.family.layout.parameters, found.family.architecture.size)]


def _stored(found: Inspection) -> list[str]:
    other = [item.spec for item in found.family.stored if item.spec is not item.source]
    return ["in a checkpoint these lie under other names", *_table(other, found.family.architecture.size)] if other else []


def _table(specs: Iterable[ParameterSpec], size_of: SizeOf) -> list[str]:
    def told(spec: ParameterSpec) -> tuple[str, str]:
        shape = " x ".join(str(size) for size in spec.shape(size_of))
        return f"[{', '.join(describe_dim(dim) for dim in spec.dims)}]", shape + (" (buffer)" if spec.buffer else "")

    rows = [(name, *columns, f"×{count}" if count > 1 else "") for name, columns, count in collapse((spec.name, told(spec)) for spec in specs)]
    widths = [max(len(row[column]) for row in rows) + 2 for column in range(3)]
    return [f"  {name:<{widths[0]}}{axes:<{widths[1]}}{shape:<{widths[2]}}{times}".rstrip() for name, axes, shape, times in rows]


def collapse(items: Iterable[tuple[str, Told]]) -> list[tuple[str, Told, int]]:
    """Names that differ in their numbers alone, and of which the same is told, as one: ``layers.{0..31}.mlp``, what is told, how many."""
    groups: dict[tuple[str, Told], list[tuple[int, ...]]] = {}
    for name, told in items:
        numbers = tuple(int(number) for number in _NUMBER.findall(name))
        groups.setdefault((_NUMBER.sub(".*", name), told), []).append(numbers)
    found = []
    for (pattern, told), tuples in groups.items():
        for braces, count in _braces(tuples):
            fill = iter(braces)
            found.append((re.sub(r"\.\*(?=\.|$)", lambda match, fill=fill: f".{next(fill)}", pattern), told, count))  # type: ignore[misc]
    return found


def _braces(numbers: list[tuple[int, ...]]) -> list[tuple[tuple[str, ...], int]]:
    """Sets of number tuples as products of ranges, with the number of tuples in each."""
    if not numbers[0]:
        return [((), len(numbers))]
    rests: dict[int, list[tuple[int, ...]]] = {}
    for first, *rest in numbers:
        rests.setdefault(first, []).append(tuple(rest))
    firsts: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for first, several in rests.items():
        firsts.setdefault(tuple(several), []).append(first)
    return [((_range(group), *inner), len(group) * count) for same, group in firsts.items() for inner, count in _braces(list(same))]


def _range(numbers: list[int]) -> str:
    """Numbers in order: ``3``, ``{0..31}``, ``{0,2,..,30}``, ``{0..4,7}``."""
    numbers = sorted(numbers)
    if len(numbers) == 1:
        return str(numbers[0])
    steps = {later - earlier for earlier, later in zip(numbers, numbers[1:], strict=False)}
    if len(steps) == 1 and steps != {1} and len(numbers) > 3:
        return f"{{{numbers[0]},{numbers[1]},..,{numbers[-1]}}}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs) + "}"
