"""Which weights are zero: the method, its pattern, and shares by kind of matrix and by layer."""

from __future__ import annotations

from minitron.report.formats import count, finite, percent
from minitron.report.markup import Child, join, table, tag
from minitron.report.reader import Run, as_dict
from minitron.report.sections.body import Body, share_bar
from minitron.report.summary import Summary


def render(run: Run, summary: Summary) -> Body | None:
    """A bar for each kind of matrix, and the range over the layers."""
    stage = next((stage for stage in run.stages if stage.folder == "sparse"), None)
    results = stage.table("results") if stage else {}
    share = finite(results.get("share_of_zeros"))
    if share is None:
        return None
    matrices = count(finite(results.get("num_matrices")))
    lead = f"{results.get('method')}, {results.get('pattern')}: {percent(share)} of the weights of {matrices} matrices are zero, "
    lead += f"{percent(finite(results.get('share_of_zeros_in_model')))} of all parameters."
    recovered = finite(results.get("recovered"))
    if recovered:
        lead += f" {percent(recovered, digits=2)} of the weights were put back beside the pattern."
    kinds = {str(kind): finite(value) for kind, value in as_dict(results.get("kinds")).items()}
    rows: list[list[Child]] = [[tag("code", kind), share_bar(value or 0.0), percent(value)] for kind, value in kinds.items()]
    layers = [value for value in map(finite, results.get("layers") or []) if value is not None]
    told = f"By layer from {percent(min(layers))} to {percent(max(layers))}." if layers and max(layers) - min(layers) > 1e-3 else None
    content = join(table(["matrix", "zeros", ""], rows, classes=["", "", "n"]), tag("p", told, class_="remark") if told else None)
    return Body(lead, content)
