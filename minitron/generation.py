"""``minitron generate``: what teacher and student write after one prompt, side by side."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from minitron.config import Config
from minitron.engine import resolve_dtype
from minitron.errors import CheckpointError, ConfigError
from minitron.evaluate import GenerateConfig, Written, agreement_from_start, prompt_ids, write_on
from minitron.log import get_logger
from minitron.models import TeacherConfig, config_of, load_causal_lm, load_tokenizer, resolve_teacher
from minitron.report.reader import read_run

logger = get_logger(__name__)

#: What stands for the finished model of a run: the first of these folders that is whole.
_FINISHED = (("export", "student"), ("student", "student"), ("sparse", "sparse"))
#: A column narrower than this is no pleasure to read.
_COLUMN = 44


@dataclass(frozen=True)
class Source:
    """A model to hear: what to call it, and its folder."""

    name: str
    folder: Path


@dataclass(frozen=True)
class Answer:
    """What one model wrote."""

    name: str
    folder: str
    num_parameters: int
    written: Written


@dataclass(frozen=True)
class Generation:
    """One prompt and every model's continuation, in the order asked for."""

    prompt: str
    settings: GenerateConfig
    answers: list[Answer]

    @property
    def shared_tokens(self) -> int | None:
        """How many tokens the first two write alike before they part; None for a single model."""
        if len(self.answers) < 2:
            return None
        return agreement_from_start(self.answers[0].written.ids, self.answers[1].written.ids)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        rows = [
            {
                "name": answer.name,
                "folder": answer.folder,
                "num_parameters": answer.num_parameters,
                "text": answer.written.text,
                "num_tokens": len(answer.written.ids),
                "tokens_per_second": answer.written.tokens_per_second,
            }
            for answer in self.answers
        ]
        return {"prompt": self.prompt, "settings": asdict(self.settings), "answers": rows, "shared_tokens": self.shared_tokens}


def generate(config: Config, words: Sequence[str]) -> Generation:
    """Let every model that ``words`` name go on from ``generate.prompt``: run folders give their teacher and their finished model.

    Raises:
        MinitronError: nothing to go on from, no such run or model, or a prompt that does not fit one of them.
    """
    settings: GenerateConfig = config.sections["generate"]
    settings.check()
    sources = _sources(config, words)
    loaded = {source.folder: config_of(source.folder, config.sections["teacher"]) for source in sources}
    tokenizers = {folder: load_tokenizer(folder, trust_remote_code=config.sections["teacher"].trust_remote_code) for folder in loaded}
    for folder, document in loaded.items():
        prompt_ids(tokenizers[folder], settings, max_positions=getattr(document, "max_position_embeddings", None))
    answers = [_answer(source, tokenizers[source.folder], config) for source in sources]
    return Generation(settings.prompt or "", settings, answers)


def _answer(source: Source, tokenizer: Any, config: Config) -> Answer:
    """One model is in memory at a time."""
    teacher = config.sections["teacher"]
    logger.info("  %s: %s", source.name, source.folder)
    model = load_causal_lm(
        source.folder, dtype=resolve_dtype(teacher.dtype), attention=teacher.attention, trust_remote_code=teacher.trust_remote_code
    )
    written = write_on(model, tokenizer, config.sections["generate"], seed=config.seed)
    return Answer(source.name, str(source.folder), sum(p.numel() for p in model.parameters()), written)


def _sources(config: Config, words: Sequence[str]) -> list[Source]:
    """The models to hear, each folder once."""
    if not words:
        raise ConfigError("there is nobody to hear: give a run folder, or model folders, as in: minitron generate runs/quickstart prompt='The'")
    several = len(words) > 1
    found: list[Source] = []
    for word in words:
        path = Path(word).expanduser()
        if (path / "run.json").is_file():
            found += [Source(f"{path.name} {s.name}" if several and s.name != "teacher" else s.name, s.folder) for s in _of_run(path)]
        elif path.is_dir() and not (path / "config.json").is_file():
            raise CheckpointError(f"{word} is neither a run folder (it has no run.json) nor a model folder (it has no config.json)")
        else:
            found.append(Source(path.name or word, _model_folder(config, word)))
    once: dict[Path, Source] = {}
    for source in found:
        once.setdefault(source.folder.resolve(), source)
    return list(once.values())


def _model_folder(config: Config, word: str) -> Path:
    """A folder, a hub id or a GGUF, as ``teacher.path`` takes them."""
    try:
        folder = resolve_teacher(replace(config.sections["teacher"], path=word, config=None, revision=None, more=None))
    except CheckpointError as error:
        raise CheckpointError(str(error).replace("teacher.path=", "", 1)) from error
    assert folder is not None
    return folder


def _of_run(path: Path) -> list[Source]:
    """The teacher (the corrected one, where there is one) and the finished model of a run."""
    found = []
    if (path / "teacher" / "manifest.json").is_file():
        found.append(Source("teacher", path / "teacher"))
    elif (folder := _original_teacher(path)) is not None:
        found.append(Source("teacher", folder))
    finished = next(((name, path / place) for place, name in _FINISHED if (path / place / "manifest.json").is_file()), None)
    if finished is None and (winner := read_run(path).winner) is not None:
        finished = ("pruned", path / "pruned" / winner.name)
    if finished is not None:
        found.append(Source(*finished))
    if not found:
        raise CheckpointError(f"the run {path} has no model yet, and its teacher is only a config")
    return found


def _original_teacher(path: Path) -> Path | None:
    """The folder of the teacher that a run was started with; None for a bare config."""
    try:
        recorded = json.loads((path / "run.json").read_text())["config"]["teacher"]
        teacher = TeacherConfig(**recorded)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / 'run.json'} does not say which teacher the run had ({error})") from error
    return resolve_teacher(teacher) if teacher.path else None


def generation_table(found: Generation, *, width: int | None = None) -> str:
    """The continuations in columns where the terminal is wide enough for them, else one after another."""
    width = width or shutil.get_terminal_size((100, 40)).columns
    heads = [
        f"{a.name}: {a.num_parameters / 1e6:,.1f}M parameters, {len(a.written.ids)} tokens, {a.written.tokens_per_second:.1f} tokens/s"
        for a in found.answers
    ]
    lines = [f"prompt: {found.prompt}", ""]
    column = (width - 3 * (len(heads) - 1)) // len(heads)
    if len(heads) > 1 and column >= _COLUMN:
        lines += _columns(
            [[*_wrapped(head, column), "", *_wrapped(a.written.text, column)] for head, a in zip(heads, found.answers, strict=True)], column
        )
    else:
        for head, answer in zip(heads, found.answers, strict=True):
            lines += [head, "", *(f"  {line}" for line in _wrapped(answer.written.text, min(width, 120) - 2)), ""]
    if found.shared_tokens is not None and found.settings.temperature == 0:
        first, second = (answer.name for answer in found.answers[:2])
        lines += ["", f"{first} and {second} write the same first {found.shared_tokens} tokens"]
    return "\n".join(line.rstrip() for line in lines).rstrip()


def _wrapped(text: str, width: int) -> list[str]:
    return [part for line in text.split("\n") for part in (textwrap.wrap(line, width) or [""])]


def _columns(cells: Sequence[Sequence[str]], width: int) -> list[str]:
    height = max(len(cell) for cell in cells)
    rows = [[cell[i] if i < len(cell) else "" for cell in cells] for i in range(height)]
    return [" │ ".join(part.ljust(width) for part in row) for row in rows]
