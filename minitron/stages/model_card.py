"""The README of an exported model, from its provenance alone."""

from __future__ import annotations

import math
import re
from typing import Any

_AXES = ("num_layers", "hidden_size", "ffn_size", "num_heads", "num_kv_heads", "num_experts", "expert_ffn_size", "shared_ffn_size")
#: Sections of the stages' settings that are listed, once each: those of the last stage that has one.
_SECTIONS = ("importance", "depth", "target", "prune", "sparsify", "training", "loss", "on_policy")
#: Stages that make a model another one, in words.
_MADE_BY = {"prune": "pruning", "sparsify": "sparsifying", "distill": "distillation"}


def model_card(title: str, provenance: dict[str, Any]) -> str:
    """Lineage, kept units, data, metrics, hyper-parameters and licence, in Markdown with front matter."""
    stages, parent = provenance["stages"], provenance["parent"]
    made = " and ".join(word for stage, word in _MADE_BY.items() if stage in stages) or "conversion"
    teacher = f"`{parent['name'] or 'a config'}`" + (f" ({parent['note']})" if parent["note"] else "")
    lines = [
        *_front(parent, stages),
        f"# {title}",
        "",
        f"A model of {provenance['num_parameters']:,} parameters, made from {teacher} by {made} with minitron {provenance['minitron_version']}.",
        "It loads with plain `transformers`. `minitron.json` holds the whole provenance, and the plan to make the same cut again (`prune.plan`).",
        "",
        "## Lineage",
        "",
        f"- Teacher: {teacher}" + (f", revision `{parent['revision']}`" if parent["revision"] else ""),
        f"- Content hash of what was cut: `{parent['fingerprint']}`",
        f"- Stages: {' → '.join([*stages, 'export'])}; seed {provenance['seed']}",
    ]
    if provenance["made_elsewhere"]:
        lines.append(f"- The pruned model was made elsewhere; its content hash is `{provenance['made_elsewhere']}`")
    lines += _kept(provenance) + _data(provenance["data"]) + _metrics(provenance["metrics"]) + _settings(stages) + _licence(parent["licence"])
    return "\n".join(lines) + "\n"


def _front(parent: dict[str, Any], stages: dict[str, Any]) -> list[str]:
    tags = ["minitron", *(tag for stage, tag in {"prune": "pruned", "sparsify": "sparse", "distill": "distilled"}.items() if stage in stages)]
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", f"tags: [{', '.join(tags)}]"]
    lines += [f"{key}: {value}" for key, value in parent["licence"].items() if key != "file"]
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", parent["name"] or "") and ".gguf" not in parent["name"]:
        lines.append(f"base_model: {parent['name']}")
    return [*lines, "---", ""]


def _kept(provenance: dict[str, Any]) -> list[str]:
    plan, teacher = provenance["plan"], provenance["parent"]["architecture"]
    if plan is None:
        return []
    shape = plan["architecture"]
    lines = ["", "## Kept units", "", "| size | teacher | kept |", "| --- | ---: | ---: |"]
    lines += [f"| {axis} | {teacher[axis]} | {shape[axis]} |" for axis in _AXES if teacher[axis]]
    merged = f"; residuals of dropped heads merged ({plan['head_merge']})" if plan["head_merge"] != "off" else ""
    rescaled = "rescaled for the smaller mean" if plan["norm_rescale"] else "sliced without rescaling"
    return [*lines, "", f"Layers of the teacher that stay: {', '.join(map(str, plan['layer']))}. Norms are {rescaled}{merged}."]


def _data(data: dict[str, Any]) -> list[str]:
    if not data:
        return []
    tokens = ", ".join(f"{stage} {count:,}" for stage, count in data["tokens"].items())
    lines = ["", "## Data", "", f"- Text: {data['name'] or 'not named'}", f"- Fingerprint: `{data['fingerprint']}`"]
    return lines + ([f"- Tokens: {tokens}"] if tokens else [])


def _metrics(metrics: dict[str, dict[str, float]]) -> list[str]:
    if not metrics:
        return []
    lines = ["", "## Held-out text", "", "| model | loss (nats per token) | perplexity |", "| --- | ---: | ---: |"]
    return lines + [f"| {name.replace('_', ' ')} | {row['loss']:.4f} | {math.exp(min(row['loss'], 700)):.2f} |" for name, row in metrics.items()]


def _settings(stages: dict[str, Any]) -> list[str]:
    sections: dict[str, Any] = {}
    for stage in stages.values():
        sections |= {name: values for name, values in stage["settings"].items() if name in _SECTIONS}
    if not sections.get("on_policy", {}).get("fraction"):
        sections.pop("on_policy", None)
    rows = [(f"{name}.{key}", value) for name in _SECTIONS for key, value in sections.get(name, {}).items() if value not in (None, [], {})]
    if not rows:
        return []
    return ["", "## Hyper-parameters", "", "| setting | value |", "| --- | --- |", *(f"| {key} | `{value}` |" for key, value in rows)]


def _licence(licence: dict[str, str]) -> list[str]:
    lines = ["", "## Licence", ""]
    if not licence:
        return [*lines, "The teacher's folder names no licence. The teacher's licence applies to this model."]
    name = licence.get("license_name") or licence.get("license")
    text = f"The teacher's licence applies to this model: {name or 'see the file'}"
    text += f" ({licence['license_link']})" if "license_link" in licence else ""
    return [*lines, text + (f"; its text is in `{licence['file']}`." if "file" in licence else ".")]
