"""A tiny tokenizer and small texts, shared by the tests that need tokens."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

WORDS = "the quick brown fox jumps over a lazy dog while seven small rivers run to one wide quiet sea".split()


@functools.lru_cache(maxsize=4)
def tiny_tokenizer(vocab_size: int = 300) -> Any:
    """A byte-level BPE tokenizer with <pad> 0 and <eos> 1, trained in milliseconds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<pad>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>")


def document(number: int, num_words: int = 40) -> str:
    """A text that differs from every other number's and starts with its number."""
    return f"document {number}: " + " ".join(random.Random(number).choices(WORDS, k=num_words))


def write_jsonl(path: Path, *, num_documents: int = 60, first: int = 0, num_words: int = 40, column: str = "text") -> Path:
    """A file of JSON lines with one document each."""
    rows = (json.dumps({column: document(first + number, num_words)}) for number in range(num_documents))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path
