"""The report: one self-contained HTML page that tells what became of the model in a run folder."""

from minitron.report.compare import write_comparison
from minitron.report.page import write_report

__all__ = ["write_comparison", "write_report"]
