"""Assembles the page: the first screen, then every section the run has data for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minitron.log import get_logger
from minitron.report.hero import hero
from minitron.report.markup import Html, join, tag
from minitron.report.reader import Run, read_run
from minitron.report.sections import SECTIONS, Body
from minitron.report.style import STYLE
from minitron.report.summary import Summary, summarise

_logger = get_logger(__name__)


def _section(anchor: str, heading: str, body: Body) -> Html:
    aside = tag("div", tag("h2", heading), tag("p", body.lead) if body.lead else None, class_="aside")
    return tag("section", aside, tag("div", body.content, class_="content"), id=anchor)


def _footer(run: Run) -> Html:
    version = run.about.get("minitron_version")
    notes = [tag("p", warning, class_="remark") for warning in run.warnings]
    return tag("footer", notes, tag("p", f"Made by minitron{f' {version}' if version else ''} from {run.path.name or run.path}"))


def render_page(run: Run, summary: Summary, *, title: str) -> tuple[Html, list[str]]:
    """The whole document and the anchors of the sections it has."""
    bodies = {anchor: (heading, render(run, summary)) for anchor, (heading, render) in SECTIONS.items()}
    present = {anchor: (heading, body) for anchor, (heading, body) in bodies.items() if body is not None}
    return document(title, hero(run, summary, title=title), present, footer=[_footer(run)]), list(present)


def document(title: str, header: Html, sections: Mapping[str, tuple[str, Body]], *, footer: Sequence[Html]) -> Html:
    """A whole page: header, links, and the sections by their anchors."""
    links = [tag("a", heading, href=f"#{anchor}") for anchor, (heading, _) in sections.items()]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    main = tag("main", [_section(anchor, heading, body) for anchor, (heading, body) in sections.items()])
    nav = tag("nav", links, aria_label="Sections") if len(links) > 1 else None
    whole = tag("html", head, tag("body", header, nav, main, footer), lang="en")
    return join(Html("<!doctype html>\n"), whole, Html("\n"))


def write_report(run_dir: Path, out: Path, *, title: str) -> dict[str, Any]:
    """Write ``out/index.html``, one page with everything in it, from whatever the run folder holds.

    Returns:
        The page's name and size, the sections it has, what was left out as damaged, and the headline numbers.

    Raises:
        CheckpointError: there is no run at ``run_dir``.
    """
    run = read_run(run_dir)
    for warning in run.warnings:
        _logger.warning("report: %s", warning)
    summary = summarise(run)
    page, sections = render_page(run, summary, title=title)
    out.mkdir(parents=True, exist_ok=True)
    written = (out / "index.html").write_bytes(page.encode("utf-8"))
    return {"page": "index.html", "bytes": written, "sections": sections, "warnings": run.warnings, **summary.to_dict()}
