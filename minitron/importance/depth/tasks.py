"""Multiple-choice tasks in local files: the choice is the continuation that the model finds likeliest."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minitron.errors import DataError

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
_FORMS = "{query, choices, gold}, {context_options, continuation, gold} or {good, bad}"


@dataclass(frozen=True)
class Item:
    """Texts to choose from, each a context and what is scored after it; ``gold`` is the right one."""

    options: tuple[tuple[str, str], ...]
    gold: int


@dataclass(frozen=True)
class Row:
    """One option: token ids, and how many of the last of them are scored."""

    ids: list[int]
    num_scored: int


def read_items(path: Path, count: int | None = None) -> list[Item]:
    """The first items of a task file with one JSON object a line: Winogrande's and other schemas, questions with choices, or minimal pairs.

    Raises:
        DataError: the file is missing or unreadable, a line has none of the forms, or there are fewer items than asked for.
    """
    items: list[Item] = []
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as handle:
            for number, line in enumerate(handle, start=1):
                if line.strip() and (count is None or len(items) < count):
                    items.append(_item(line, f"{path}, line {number}"))
    except (OSError, EOFError, UnicodeError, lzma.LZMAError) as error:
        raise DataError(f"depth.task={path} cannot be read: {error}") from error
    if not items or (count is not None and len(items) < count):
        raise DataError(f"{path} has {len(items)} items; {count or 'at least one'} were asked for: lower depth.num_items or give another file")
    return items


def _item(line: str, where: str) -> Item:
    try:
        row = json.loads(line)
        if "good" in row:
            return Item((("", row["good"]), ("", row["bad"])), 0)
        if "context_options" in row:
            options = tuple((context, row["continuation"]) for context in row["context_options"])
        else:
            options = tuple((row["query"], choice) for choice in row["choices"])
        if not 0 <= row["gold"] < len(options) or len(options) < 2:
            raise ValueError(f"gold={row['gold']} of {len(options)} choices")
        return Item(options, row["gold"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where} is no multiple-choice item ({error}): each line must be {_FORMS}") from error


def encode(items: list[Item], tokenizer: Any, *, longest: int | None) -> list[Row]:
    """Every option of every item as tokens, in order. Without a context all tokens but the first are scored.

    Raises:
        DataError: an option is longer than the model's positions.
    """
    rows = []
    for item in items:
        for context, text in item.options:
            joint = "" if not context or context[-1].isspace() else " "
            before = tokenizer(context).input_ids if context else []
            scored = tokenizer(joint + text, add_special_tokens=not context).input_ids
            ids = [*before, *scored]
            if longest is not None and len(ids) > longest:
                raise DataError(f"an option of the task has {len(ids)} tokens, the model has {longest} positions: '{text[:60]}'")
            if len(ids) < 2:
                raise DataError(f"an option of the task has {len(ids)} tokens, of which none can be predicted: '{text[:60]}'")
            rows.append(Row(ids, len(scored) if before else len(ids) - 1))
    return rows


def batches_of(rows: list[Row], batch_size: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Rows of similar length together, filled up at their end: (numbers [batch], ids and counted tokens [batch, sequence]).

    A causal model's scored tokens never see what follows them, so that filling needs no mask.
    """
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
    batches = []
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        longest = max(len(rows[number].ids) for number in numbers)
        ids = torch.zeros(len(numbers), longest, dtype=torch.int64)
        counted = torch.zeros(len(numbers), longest, dtype=torch.bool)
        for place, number in enumerate(numbers):
            row = rows[number]
            ids[place, : len(row.ids)] = torch.tensor(row.ids)
            counted[place, len(row.ids) - row.num_scored : len(row.ids)] = True
        batches.append((torch.tensor(numbers), ids, counted))
    return batches


def accuracy_of(losses: torch.Tensor, items: list[Item]) -> torch.Tensor:
    """Share of items whose right option has the lowest summed loss, from losses [models, rows]; ties go to the first option."""
    right = torch.zeros(len(losses), dtype=torch.float64)
    start = 0
    for item in items:
        chosen = losses[:, start : start + len(item.options)].argmin(dim=1)
        right += (chosen == item.gold).double()
        start += len(item.options)
    return right / len(items)
