"""What the sizes of a cascade cost, beside training each of them from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minitron.config import Config
from minitron.core.architecture import Architecture
from minitron.core.cost import device, family_saving, training_flops
from minitron.estimate import stage_cost

#: Share of a device's peak rate that training is taken to reach.
_EFFICIENCY = 0.4


@dataclass(frozen=True)
class MemberCost:
    """One size: its shape, where it comes from, tokens and FLOPs by stage, and once it is made what was ``measured``."""

    name: str
    shape: Architecture
    cut_from: str
    distill_from: str
    tokens: dict[str, float]
    flops: dict[str, float]
    num_candidates: int
    measured: dict[str, float] = field(default_factory=dict)


def member_cost(
    config: Config, name: str, shape: Architecture, teachers: Mapping[str, Architecture], *, cut_from: str, distill_from: str, num_candidates: int
) -> MemberCost:
    """Predicted for the run of a size; ``teachers`` are the teacher's shapes by stage."""
    costs = {stage: stage_cost(stage, config, teacher, shape, num_candidates) for stage, teacher in teachers.items()}
    tokens, flops = ({stage: cost[part] for stage, cost in costs.items() if cost[1]} for part in (0, 1))
    return MemberCost(name, shape, cut_from, distill_from, tokens, flops, num_candidates)


@dataclass
class CascadeCosts:
    """The original and the sizes made of it, the largest first; ``scratch_tokens`` would train one size from scratch."""

    original: Architecture
    members: list[MemberCost]
    scratch_tokens: float | None
    sequence_length: int
    device: str

    def hours(self, flops: float) -> float:
        """Hours of one device."""
        return flops / (device(self.device).flops * _EFFICIENCY) / 3600

    def scratch(self, shape: Architecture) -> float:
        """FLOPs of training a shape from scratch."""
        return training_flops(shape, None, num_tokens=self.scratch_tokens or 0.0, sequence_length=self.sequence_length)

    def saving(self) -> dict[str, float]:
        """How many times more training from scratch would take, empty where nobody said with how many tokens: for the derived sizes alone
        (``sizes``), for the family with the original (``family``), and for that as the papers count, without teachers and searches (``papers``)."""
        if self.scratch_tokens is None:
            return {}
        scratch = [self.scratch(shape) for shape in (self.original, *(member.shape for member in self.members))]
        derived = [sum(member.flops.values()) for member in self.members]
        alone = [
            training_flops(member.shape, None, num_tokens=member.tokens.get("distill", 0.0), sequence_length=self.sequence_length)
            for member in self.members
        ]
        return {
            "sizes": sum(scratch[1:]) / sum(derived),
            "family": family_saving(scratch, derived),
            "papers": family_saving(scratch, alone),
        }

    def to_dict(self) -> dict[str, Any]:
        """The account as plain JSON."""
        sizes = []
        for member in self.members:
            flops = sum(member.flops.values())
            row: dict[str, Any] = {
                "name": member.name,
                "architecture": member.shape.to_dict(),
                "num_parameters": member.shape.num_parameters,
                "cut_from": member.cut_from,
                "distill_from": member.distill_from,
                "tokens": member.tokens,
                "flops": member.flops,
                "device_hours": self.hours(flops),
            }
            if self.scratch_tokens is not None:
                scratch = self.scratch(member.shape)
                row["scratch"] = {"tokens": self.scratch_tokens, "flops": scratch, "device_hours": self.hours(scratch)}
            sizes.append(row | ({"measured": member.measured} if member.measured else {}))
        total = sum(sum(member.flops.values()) for member in self.members)
        return {
            "original": {"name": self.original.name, "num_parameters": self.original.num_parameters},
            "sizes": sizes,
            "total": {"tokens": sum(sum(member.tokens.values()) for member in self.members), "flops": total, "device_hours": self.hours(total)},
            "saving": self.saving(),
            "device": self.device,
        }


def cascade_table(costs: CascadeCosts) -> str:
    """The account for people."""
    compared = costs.scratch_tokens is not None
    head = f"  {'size':<12}{'shape':<30}{'parameters':>16}{'share':>8}  {'cut from':<12}{'taught by':<12}{'tokens':>10}{'FLOPs':>10}{'hours':>10}"
    lines = [
        f"  original    {costs.original.name:<30}{costs.original.num_parameters:>16,}",
        "",
        head + (f"{'from scratch':>14}{'times':>8}" if compared else ""),
    ]
    for member in costs.members:
        flops, size = sum(member.flops.values()), member.shape.num_parameters
        lines.append(
            f"  {member.name:<12}{member.shape.name:<30}{size:>16,}{size / costs.original.num_parameters:>8.1%}"
            f"  {member.cut_from:<12}{member.distill_from:<12}{sum(member.tokens.values()):>10.2e}{flops:>10.2e}{costs.hours(flops):>10.3g}"
            + (f"{costs.hours(costs.scratch(member.shape)):>14.3g}{costs.scratch(member.shape) / flops:>8.1f}" if compared else "")
        )
    lines += ["", f"  hours: of one {costs.device} at {_EFFICIENCY:.0%} of its rate; tokens and FLOPs of all stages, what teachers read among them"]
    if compared:
        saving = costs.saving()
        lines.append(
            f"  the family with its original, each from scratch on {costs.scratch_tokens:.3g} tokens: {saving['family']:.2f} times as much "
            f"({saving['papers']:.2f} as the papers count, without teachers and searches)"
        )
    lines += [_measured_row(member) for member in costs.members if member.measured]
    return "\n".join(lines)


def _measured_row(member: MemberCost) -> str:
    told = member.measured
    loss = f", held-out loss {told['held_out_loss']:.3f}" if "held_out_loss" in told else ""
    return f"  {member.name}: {told['tokens']:,.0f} tokens in {told['process_hours']:.2g} hours of its processes here{loss}"
