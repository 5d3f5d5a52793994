"""Text that every installation has: the documentation of the running Python, about 1.7 MB of English with code."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import json
import os
import sys
import sysconfig
import tempfile
import warnings
from pathlib import Path

from minitron import paths
from minitron.errors import DataError
from minitron.log import get_logger

_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"})
_SHORTEST_DOCSTRING = 200
_RECIPE = 1  # raise when the gathering below changes, or old caches would be read

_logger = get_logger(__name__)


@functools.lru_cache(maxsize=1)
def python_docs() -> tuple[str, ...]:
    """The language reference topics, then the joined long docstrings of each standard library module.

    Parsing the library takes some five seconds, so the result is kept in the user's cache folder.

    Raises:
        DataError: this Python comes without its library sources.
    """
    key = hashlib.blake2b(f"{_RECIPE} {sys.version} {sysconfig.get_path('stdlib')}".encode(), digest_size=8).hexdigest()
    cache = paths.cache_dir() / f"python_docs-{key}.json"
    try:
        return tuple(json.loads(cache.read_text(encoding="utf-8")))
    except (OSError, ValueError):  # not there yet, or torn: gather
        documents = (*_topics(), *_library())
    if not documents:
        raise DataError("data=python_docs finds no documentation in this Python (its library sources are missing): give data.path=FILE_OR_FOLDER")
    _store(cache, documents)
    return documents


def _topics() -> list[str]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions leave it out
        return []
    return [topics[name] for name in sorted(topics)]


def _library() -> list[str]:
    root = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    documents = []
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        if _SKIPPED.isdisjoint(file.relative_to(root).parts):
            docstrings = [text for text in _docstrings(file) if text not in seen]
            seen.update(docstrings)
            if docstrings:
                documents.append("\n\n".join(dict.fromkeys(docstrings)))
    return documents


def _docstrings(file: Path) -> list[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))  # walk goes breadth first; a reader goes from top to bottom
    texts = [ast.get_docstring(node) or "" for node in nodes]
    return [text for text in texts if len(text) > _SHORTEST_DOCSTRING]


def _store(cache: Path, documents: tuple[str, ...]) -> None:
    """Best effort: a read-only home only costs the seconds again. Written aside and renamed, since several ranks may do it at once."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=cache.parent, suffix=".partial", delete=False) as file:
            json.dump(documents, file)
        os.replace(file.name, cache)
    except OSError as error:
        _logger.debug("the Python documentation is not cached: %s", error)
