"""The proof of every listed family: the largest difference per axis between masked and pruned logits, written as a page.

    python benchmarks/families.py [--out docs/families.md]

Takes each family's default config as transformers has it (no weights, no network) and runs what ``minitron inspect`` runs. Fails when a
listed family is refused, or when one of those listed as refused is not. About two minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron import host

host.prepare()  # the settings under which minitron itself runs, and before torch is loaded

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoConfig  # noqa: E402

from minitron.core.axes import AXES  # noqa: E402
from minitron.errors import ArchitectureError  # noqa: E402
from minitron.inspection import Inspection  # noqa: E402
from minitron.models import discover  # noqa: E402
from minitron.models.load import quiet_transformers  # noqa: E402
from minitron.prune.proof import TOLERANCE, examine  # noqa: E402


@dataclass(frozen=True)
class Row:
    """A family of the page: its model type, and what its default config lacks or a variant changes."""

    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """How the page calls it."""
        return " ".join([self.model_type, *(f"{key}={value}" for key, value in self.changes.items())])


FAMILIES = (
    *map(Row, ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3")),
    Row("nemotron", {"num_key_value_heads": 8}),
    *map(Row, ("granite", "olmo2", "smollm3", "starcoder2", "cohere2", "glm4", "stablelm", "gpt_neox", "mixtral", "qwen3_moe")),
    Row("qwen3_moe", {"mlp_only_layers": [0, 5]}),
    *map(Row, ("qwen2_moe", "olmoe", "gpt_oss", "nemotron_h", "falcon_h1")),
)
#: One example of every reason to refuse.
REFUSED = ("deepseek_v3", "t5", "bert", "vit")

_INTRODUCTION = """# Families

minitron has no code per model family. It builds the model from its config without weights, turns one config field at a time, and reads off
which dimension of which parameter moved. What it has understood it then **proves**, on a small random model of the family with at least one
layer of every kind: units are removed from the *computation* of the whole model (masked), the same units are cut out of its *weights*
(pruned), and the logits of the two must agree. The pruned model is built anew from its own config, and must have exactly the predicted
number of parameters.

An axis is proved when the largest absolute difference is at most {tolerance:g} of the largest logit. Nearly all differences are float32
rounding. Families with one eps for several norms of which only some were cut (olmo2, nemotron_h) differ by the order of eps. In this page
logits are of the order of 1 to 10 (cohere2: 0.3, it scales them down), and the cuts themselves change them by as much.

`minitron inspect MODEL` says the same for any model, from its config alone, with every parameter's axes; the command leaves with exit code
2 when an axis is refused. Before weights are cut, `prune` and `rank` run this proof for the very config at hand. A family that is not
listed works too if its proof passes.

| axis | what goes |
| --- | --- |
| `layer` | whole blocks |
| `hidden` | channels of the residual stream, in every parameter that touches it; weights of RMS norms are rescaled |
| `ffn` | neurons of an MLP |
| `head` | query heads, the same number in every group |
| `kv_head` | keys, values and the query heads that read them |
| `expert` | experts and their rows of the router |
| `expert_ffn` | neurons inside experts, others in each |
| `shared_ffn` | neurons of the shared experts |
| all | all of these at once, different units in each layer |

Made by `python benchmarks/families.py` with each family's default config, torch {torch}, transformers {transformers}, Python {python};
float32 on a CPU.
"""


def inspected(row: Row) -> Inspection:
    """A family with its proof."""
    config = AutoConfig.for_model(row.model_type, **row.changes)
    return Inspection(discover(config), examine(config), sequence_length=1024)


def notes(found: Inspection) -> str:
    """What is particular about a family, as discovered."""
    family, shape = found.family, found.family.architecture
    told = []
    if shape.num_kv_heads < shape.num_heads:
        told.append("one key-value head" if shape.num_kv_heads == 1 else f"{shape.num_heads // shape.num_kv_heads} heads per group")
    else:
        told.append("keys and values per head")
    told += ["tied head"] if shape.tied_embeddings else []
    told += ["layer norms"] if any(not norm.rms for norm in family.norms.values()) else []
    told += ["norm weights offset by 1"] if any(norm.weight_offset for norm in family.norms.values()) else []
    told += ["norms over all heads"] if any(norm.axis == "head" for norm in family.norms.values()) else []
    told += ["embedding times sqrt(hidden)"] if family.scaled_embedding else []
    told += [f"{shape.num_experts_per_token} of {shape.num_experts} experts"] if shape.num_experts else []
    told += [f"layers of {kinds} kinds"] if (kinds := len(set(family.layout.layer_kinds))) > 1 else []
    told += ["a buffer is cut too"] if any(spec.buffer for spec in family.layout.parameters) else []
    told += ["other names in a checkpoint"] if any(item.spec is not item.source for item in family.stored) else []
    return ", ".join(told)


def table(found: dict[str, Inspection]) -> list[str]:
    """One line per family."""
    axes = [axis for axis in AXES if any(axis in row.proof.differences for row in found.values())] + ["all"]
    lines = ["| family | " + " | ".join(axes) + " | cut together | notes |", "| --- |" + " ---: |" * len(axes) + " --- | --- |"]
    for title, row in found.items():
        differences = row.proof.differences
        cells = [f"{differences[axis]:.1e}" if axis in differences else "" for axis in axes]
        coupled = "; ".join(f"{c.axis} = {f'{c.ratio} × ' if c.ratio > 1 else ''}{c.other}" for c in row.couplings)
        lines.append(f"| `{title}` | " + " | ".join(cells) + f" | {coupled} | {notes(row)} |")
    return lines


def refusals() -> list[str]:
    """The sentence that each refused type gets.

    Raises:
        SystemExit: one of them is not refused.
    """
    lines = ["| type | what is said |", "| --- | --- |"]
    for model_type in REFUSED:
        try:
            discover(AutoConfig.for_model(model_type))
        except ArchitectureError as error:
            lines.append(f"| `{model_type}` | {error} |")
        else:
            raise SystemExit(f"{model_type} is not refused any more: list it as a family")
    return lines


def main() -> None:
    """Prove every family and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "families.md")
    arguments = parser.parse_args()
    quiet_transformers()
    found: dict[str, Inspection] = {}
    for row in FAMILIES:
        found[row.title] = inspected(row)
        sys.stderr.write(f"{row.title}: {'proved' if found[row.title].proof.passed else found[row.title].proof.refused}\n")
    introduction = _INTRODUCTION.format(
        tolerance=TOLERANCE, torch=torch.__version__, transformers=transformers.__version__, python=platform.python_version()
    )
    text = [introduction, "## Proved", "", "Largest absolute difference of logits, per axis.", "", *table(found), ""]
    text += ["A GPT-NeoX, StableLM or OLMoE has no head width of its own: cutting `hidden` cuts as many `head`s.", "", "## Refused", ""]
    text += ["One sentence, and exit code 2. Multi-head latent attention (DeepSeek) is refused: queries, keys and values come out of low-rank"]
    text += ["projections whose rows mix parts with and without rotary positions in sizes of their own.", "", *refusals(), ""]
    arguments.out.write_text("\n".join(text))
    failed = [title for title, row in found.items() if not row.proof.passed]
    if failed:
        raise SystemExit(f"refused: {', '.join(failed)}")


if __name__ == "__main__":
    main()
