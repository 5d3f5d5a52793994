"""How the documents of a sequence are kept apart in a run: what was asked for, and what its models can do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from minitron.errors import ConfigError
from minitron.log import get_logger
from minitron.prune.apart import why_not_apart

logger = get_logger(__name__)


def choose_packing(asked: str, configs: Iterable[Any], *, separator: int | None) -> str:
    """``separate`` or ``joined``; one line says why documents are joined where ``auto`` was asked for.

    Args:
        asked: ``auto``, ``separate`` or ``joined``.
        configs: of every model that will read the text.
        separator: the token that closes a document; None: the tokenizer has none.

    Raises:
        ConfigError: ``separate`` was asked for, and a model or the tokenizer cannot do it.
    """
    if asked == "joined":
        return "joined"
    why = "the tokenizer has neither an end-of-text nor a start-of-text token to close them" if separator is None else None
    why = why or next((found for config in configs if (found := why_not_apart(config))), None)
    if why is None:
        return "separate"
    if asked == "separate":
        raise ConfigError(f"data.packing=separate cannot keep the documents of a sequence apart: {why}; use data.packing=joined")
    logger.info("data.packing=joined: the documents of a sequence see each other, because %s", why)
    return "joined"
