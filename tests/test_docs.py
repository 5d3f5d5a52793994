"""The documentation: every link inside it leads somewhere, every page is found from the first one, and every option it names exists."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<!!)\[[^\]\n]*\]\(([^)\s]+)\)|!\[[^\]\n]*\]\(([^)\s]+)\)")


def pages() -> list[Path]:
    """Every Markdown file of the repository."""
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"], cwd=ROOT, capture_output=True, text=True)
    found = [ROOT / name for name in listed.stdout.split("\n") if name]
    return [path for path in found if path.is_file()] or sorted(ROOT.glob("docs/**/*.md"))


@cache
def prose(path: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@cache
def anchors(path: Path) -> frozenset[str]:
    """What the headings of a page are called in links."""
    words = re.findall(r"^#+ +(.*)$", prose(path), re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", word.lower()).strip().replace(" ", "-") for word in words)


def links(path: Path) -> list[str]:
    return [a or b for a, b in LINK.findall(prose(path))]


@pytest.mark.parametrize("page", pages(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for link in links(page):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            wrong.append(link)
    assert not wrong, f"{page.relative_to(ROOT)}: {wrong}"


def test_every_page_is_reached_from_the_first_one() -> None:
    reached, waiting = set[Path](), [ROOT / "docs" / "index.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        targets = [(page.parent / link.partition("#")[0]).resolve() for link in links(page) if "://" not in link]
        waiting += [target for target in targets if target.suffix == ".md" and target.is_file()]
    assert not {path for path in pages() if (ROOT / "docs") in path.parents} - reached


def test_options_named_in_the_documentation_exist() -> None:
    """``section.key`` in code spans; a misspelt one would send the reader to an error."""
    from minitron.config import SECTIONS, known_keys
    from minitron.tracking import TRACKERS

    known, wrong = set(known_keys()), []
    open_ones = [name for name, kind in known_keys().items() if "dict" in str(kind)]
    for page in pages():
        if page.name == "CHANGELOG.md":
            continue
        for span in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
            for name in re.findall(r"(?<![\w./-])([a-z_]+(?:\.[a-z_0-9]+)+)(?==)", span):
                section, _, rest = name.partition(".")
                if section not in {*SECTIONS, "tracking"} or name in known or any(name.startswith(f"{o}.") for o in open_ones):
                    continue
                if section == "tracking" and rest.split(".")[0] in TRACKERS:
                    continue
                wrong.append(f"{page.name}: {name}")
    assert not wrong, wrong
