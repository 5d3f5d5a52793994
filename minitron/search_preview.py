"""What ``minitron search --dry-run`` prints: candidates, what is predicted of them, and what ranking them will cost. No weights needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.config import Config
from minitron.core.architecture import Architecture
from minitron.core.cost import device
from minitron.log import duration
from minitron.models import resolve_teacher
from minitron.search import predicted_costs
from minitron.search.ranking import planned_cost
from minitron.stages.context import StageContext
from minitron.stages.search import SECTIONS, search_shapes

#: Share of a device's peak rate that training is taken to reach.
_EFFICIENCY = 0.4
#: The device of the hours where the target's own times are measured.
_DEVICE = "h100"


@dataclass(frozen=True)
class SearchPreview:
    """Candidates before any work: ``rows`` hold each one's predicted costs, ``cost`` the FLOPs of ranking them."""

    teacher: Architecture
    num_points: int
    num_found: int
    rows: list[dict[str, Any]]
    cost: dict[str, float]
    device: str

    @property
    def device_hours(self) -> float:
        """Hours of one device that ranking takes."""
        return self.cost["shared"] / (device(self.device).flops * _EFFICIENCY) / 3600

    def to_dict(self) -> dict[str, Any]:
        """The preview as plain JSON."""
        counts = {"points": self.num_points, "within_limits": self.num_found}
        return {**counts, "candidates": self.rows, "ranking_flops": self.cost, "device": self.device, "device_hours": self.device_hours}


def preview_search(config: Config, *, device_name: str | None = None) -> SearchPreview:
    """The candidates that ``search`` would write, and the cost of ranking them on a device.

    Raises:
        MinitronError: the teacher, the space or the target cannot be used.
    """
    teacher_section = config.sections["teacher"]
    stands_here = bool(teacher_section.path) and Path(teacher_section.path).expanduser().is_dir()
    folder = resolve_teacher(teacher_section, only_config=True) if stands_here or not teacher_section.config else None
    memory: dict[str, Any] = {"teacher": folder, "further": []}
    context = StageContext(Path(config.run_dir).expanduser(), config.title, config.seed, config.view(SECTIONS), memory=memory)
    teacher = context.family().architecture
    shapes, num_found, num_points, workload = search_shapes(context)
    rows = [
        {
            "name": shape.name,
            "num_parameters": shape.num_parameters,
            "kept_layers": list(shape.kept_layers) if shape.kept_layers is not None else None,
            **predicted_costs(shape, teacher, workload),
        }
        for shape in shapes
    ]
    length = config.sections["data"].sequence_length
    cost = planned_cost(config.sections["ranking"], config.sections["training"], shapes, teacher, sequence_length=length)
    kind = device_name or (workload.device if workload.measure is None and workload.device != "measured" else _DEVICE)
    device(kind)
    return SearchPreview(teacher, num_points, num_found, rows, cost, kind)


def preview_table(found: SearchPreview) -> str:
    """A preview for people."""
    teacher = found.teacher
    lines = [
        f"  teacher  {teacher.name}  {teacher.num_parameters:,} parameters",
        f"  {found.num_points:,} shapes in the space, {found.num_found:,} keep the target, {len(found.rows)} chosen",
        "",
        f"  {'candidate':<32}{'parameters':>16}{'share':>8}{'memory':>10}{'FLOPs/token':>13}{'decode':>10}{'tokens/s':>10}",
    ]
    for row in found.rows:
        latency = f"{row['latency_ms']:.2f} ms" if "latency_ms" in row else "–"
        speed = f"{row['throughput']:,.0f}" if "throughput" in row else "–"
        share = row["num_parameters"] / teacher.num_parameters
        sizes = f"{row['num_parameters']:>16,}{share:>8.1%}{row['memory_gb']:>7.2f} GB{row['flops_per_token']:>13.2e}"
        lines.append(f"  {row['name']:<32}{sizes}{latency:>10}{speed:>10}")
    if len(found.rows) > 1:
        cost, hours = found.cost, duration(3600 * found.device_hours)
        saved = cost["full_independent"] / cost["shared"]
        lines += [
            "",
            f"  ranking  {cost['tokens']:,.0f} tokens, {cost['shared']:.2e} FLOPs, {hours} of one {found.device} at {_EFFICIENCY:.0%} of its rate;",
            f"           every candidate to the end with a teacher of its own: {cost['full_independent']:.2e} FLOPs, {saved:.1f} times as much",
        ]
    return "\n".join(lines)
