"""Teachers of a suite as Hugging Face folders, made once: trained, taken out of a package, or corrected."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minitron.core.manifest import fingerprint_folder, publish, write_text
from minitron.distill.losses import LossConfig
from minitron.distill.settings import TrainingConfig
from minitron.distill.training import TrainingRun
from minitron.engine import EngineConfig
from minitron.log import get_logger
from minitron.models import TeacherConfig, discover, load_causal_lm, load_tokenizer, resolve_teacher
from minitron.models.weights import write_weights
from minitron.tracking import CompositeTracker
from paper_claims.suites import Suite, TeacherRecipe
from paper_claims.texts import Corpus, documents, open_corpus, train_tokenizer

logger = get_logger(__name__)

CPU = torch.device("cpu")


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model."""
    return [model.get_submodule(name) for name in discover(model.config).taps.blocks]


def digest(value: Any) -> str:
    """A short hash of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def given(settings: Any) -> Any:
    """A dataclass as plain data without the fields that stand at their defaults: a new option leaves old results valid."""
    if isinstance(settings, dict):
        return {key: given(value) for key, value in settings.items()}
    if not is_dataclass(settings) or isinstance(settings, type):
        return settings
    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    return {name: given(values[name]) for name, f in ((f.name, f) for f in fields(settings)) if values[name] != f.default}


def fresh_model(config: Any, *, seed: int) -> nn.Module:
    """A model of a config with random weights."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float()
    model.config.use_cache = False
    return model  # type: ignore[no-any-return]


class Laboratory:
    """What the arms of a suite share: tokenizer, texts, teachers. Everything that took long lies in the work folder."""

    def __init__(self, suite: Suite, files: dict[str, Path], work: Path) -> None:
        self.suite, self._files, self.work = suite, files, work / suite.name
        self.work.mkdir(parents=True, exist_ok=True)
        self._tokenizer: Any = None
        self._corpora: dict[str, Corpus] = {}
        self._fingerprints: dict[str, str] = {}

    @property
    def tokenizer(self) -> Any:
        """The suite's own tokenizer, trained on the training text, or that of its packaged teacher."""
        if self._tokenizer is None:
            if self.suite.vocab_size is not None:
                self._tokenizer = train_tokenizer(documents(self._files["train"]), self.suite.vocab_size)
            else:
                self._tokenizer = load_tokenizer(self.teacher("original"))
        return self._tokenizer

    def corpus(self, name: str) -> Corpus:
        """A text by name: ``main`` or ``other``."""
        if name not in self._corpora:
            sizes = {"sequence_length": self.suite.sequence_length, "num_windows": self.suite.num_windows}
            self._corpora[name] = open_corpus(name, self._files, self.tokenizer, **sizes)
        return self._corpora[name]

    def teacher(self, name: str) -> Path:
        """A teacher's folder; made when it is not there, or was made from other settings or text."""
        recipe = self.suite.teachers[name]
        if recipe.path is not None:
            folder = resolve_teacher(TeacherConfig(path=recipe.path))
            assert folder is not None
            return folder
        final = self.work / f"teacher-{name}"
        made_of = digest([given(recipe), self.corpus(recipe.text).train.fingerprint, self.suite.sequence_length, self.suite.vocab_size])
        if recipe.source is not None:
            made_of = digest([made_of, self.fingerprint(recipe.source)])
        mark = final / "claims.json"
        if not mark.is_file() or json.loads(mark.read_text())["made_of"] != made_of:
            shutil.rmtree(final, ignore_errors=True)
            self._train(recipe, name, final, made_of)
        return final

    def fingerprint(self, teacher: str) -> str:
        """A hash of a teacher's files."""
        if teacher not in self._fingerprints:
            self._fingerprints[teacher] = fingerprint_folder(self.teacher(teacher))
        return self._fingerprints[teacher]

    def _train(self, recipe: TeacherRecipe, name: str, final: Path, made_of: str) -> None:
        assert recipe.training is not None
        model: Any = self._untrained(recipe)
        partial = self.work / f"teacher-{name}.{made_of}.partial"  # holds checkpoints: a killed training goes on from them
        partial.mkdir(exist_ok=True)
        corpus, started = self.corpus(recipe.text), time.perf_counter()
        logger.info("teacher %s: %s steps", name, recipe.training.num_steps)
        run = train(model, corpus, recipe.training, LossConfig(name="cross_entropy"), seed=0, folder=partial, what=f"teacher {name}")
        result = run.run()
        shutil.rmtree(partial / "checkpoints", ignore_errors=True)
        write_weights(partial, result.student_weights())
        model.config.dtype = "float32"
        model.config.save_pretrained(partial)
        self.tokenizer.save_pretrained(partial)
        record = {"made_of": made_of, "tokens": result.tokens, "seconds": time.perf_counter() - started, "curve": result.curve}
        write_text(partial / "claims.json", json.dumps(record))
        publish(partial, final)

    def _untrained(self, recipe: TeacherRecipe) -> nn.Module:
        if recipe.source is not None:
            return load_causal_lm(self.teacher(recipe.source), dtype=torch.float32, device=CPU)
        from transformers import AutoConfig

        assert recipe.config is not None
        values = dict(recipe.config)
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        config.architectures = ["LlamaForCausalLM"]
        return fresh_model(config, seed=0)


def train(
    student: nn.Module, corpus: Corpus, training: TrainingConfig, loss: LossConfig, *, seed: int, folder: Path | None, what: str, **more: Any
) -> TrainingRun:
    """minitron's own training of a model on a text, ready to run; ``seed`` fixes the order of the documents."""
    windows = corpus.windows[: training.num_validation_sequences]
    length = windows.shape[1]
    return TrainingRun(
        student=student,
        teacher=more.pop("teacher", None),
        stream=corpus.train.stream(seed=seed),
        validation=windows,
        sequence_length=length,
        training=training,
        loss=loss,
        engine=EngineConfig(),
        blocks_of=blocks_of,
        open_tracker=lambda step: CompositeTracker([]),
        what=what,
        folder=folder,
        seed=seed,
        **more,
    )
