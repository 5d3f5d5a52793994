"""HTML that is escaped by construction: plain strings are text, :class:`Html` is markup."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TypeAlias

_EMPTY = {"meta", "br", "hr", "rect", "line", "path", "circle"}


class Html(str):
    """Text that is already markup and must not be escaped again."""

    __slots__ = ()


Child: TypeAlias = "str | None | Iterable[Child]"


def escape(text: str) -> Html:
    """Markup that shows ``text`` literally."""
    return text if isinstance(text, Html) else Html(html.escape(text, quote=True))


def join(*children: Child) -> Html:
    """Children one after another; None is left out, iterables are flattened."""
    parts: list[str] = []
    for child in children:
        if child is None:
            continue
        parts.append(escape(child) if isinstance(child, str) else join(*child))
    return Html("".join(parts))


def _attribute(name: str, value: object) -> str:
    name = name.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return f' {name}="{html.escape(text, quote=True)}"'


def tag(element: str, /, *children: Child, **attributes: object) -> Html:
    """One element. ``class_`` becomes ``class``, other underscores become hyphens; None and False leave an attribute out."""
    written = "".join(_attribute(name, value) for name, value in attributes.items() if value is not None and value is not False)
    inside = join(*children)
    if element in _EMPTY and not inside:
        return Html(f"<{element}{written}/>")
    return Html(f"<{element}{written}>{inside}</{element}>")


def table(header: Iterable[Child], rows: Iterable[Iterable[Child]], *, classes: Iterable[str] = (), total: Iterable[Child] | None = None) -> Html:
    """A table in a box that scrolls sideways where it is too wide.

    Args:
        classes: per column: ``n`` for numbers, ``opt`` for what a phone leaves out.
        total: a last row set apart.
    """
    marks = list(classes)

    def row(cells: Iterable[Child], element: str) -> Html:
        made = []
        for index, cell in enumerate(cells):
            mark = marks[index] if index < len(marks) and marks[index] else None
            scope = "col" if element == "th" else ("row" if index == 0 else None)
            made.append(tag("th" if scope else "td", cell, class_=mark, scope=scope))
        return tag("tr", made)

    foot = tag("tfoot", row(total, "td")) if total is not None else None
    return tag("div", tag("table", tag("thead", row(header, "th")), tag("tbody", [row(cells, "td") for cells in rows]), foot), class_="scroll")
