"""What a section hands to the page."""

from __future__ import annotations

from dataclasses import dataclass

from minitron.report.markup import Html, tag


@dataclass(frozen=True)
class Body:
    """A sentence or two beside the heading, and the content."""

    lead: str
    content: Html


def share_bar(share: float, style: str = "student") -> Html:
    """A thin bar filled to a share of one."""
    return tag("span", tag("i", class_=f"fill {style}", style=f"width:{100 * max(0.0, min(share, 1.0)):.1f}%"), class_="share")
