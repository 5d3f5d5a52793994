"""The sections of a report, in the order of the page: one file each, one row each in the table below."""

from __future__ import annotations

from collections.abc import Callable

from minitron.report.reader import Run
from minitron.report.sections import candidates, cost, distillation, evaluation, faults, importance, provenance, shape, sparsity, speed, tasks
from minitron.report.sections.body import Body
from minitron.report.summary import Summary

#: Anchor → heading and the function that makes the section, or None when the run has nothing for it.
SECTIONS: dict[str, tuple[str, Callable[[Run, Summary], Body | None]]] = {
    "shape": ("Shape", shape.render),
    "evaluation": ("Quality", evaluation.render),
    "tasks": ("Tasks", tasks.render),
    "speed": ("Speed", speed.render),
    "sparsity": ("Zeros", sparsity.render),
    "distillation": ("Distillation", distillation.render),
    "candidates": ("Candidates", candidates.render),
    "importance": ("Importance", importance.render),
    "cost": ("Cost", cost.render),
    "faults": ("Faults and restarts", faults.render),
    "provenance": ("Provenance", provenance.render),
}

__all__ = ["SECTIONS", "Body"]
