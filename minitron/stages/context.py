"""What a stage is given, and the questions that several stages ask of a run folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from minitron import dist
from minitron.core.candidate import Candidate, read_candidates
from minitron.core.manifest import Manifest, fingerprint_folder
from minitron.core.protocols import Tracker
from minitron.data import Blends, Text, data_fingerprint, open_text, separator_of
from minitron.engine import resolve_dtype
from minitron.errors import CheckpointError, DataError
from minitron.models import Family, config_of, discover, further_teachers, load_causal_lm, load_tokenizer, resolve_teacher
from minitron.models.lazy import load_lazily
from minitron.stages.packing import choose_packing
from minitron.tracking import build_trackers
from minitron.tracking.jsonl import FILE_NAME, truncate_after

#: The folder of the model with zeros.
SPARSE = "sparse"
#: Held-out losses of untrained candidates, beside the pruned folders.
ZERO_SHOT = "zero_shot.json"


@dataclass
class StageContext:
    """A stage's view of the run: its folder, the sections that the stage declared, and a way to be asked to stop."""

    run_dir: Path
    title: str
    seed: int
    sections: SimpleNamespace
    stop: Callable[[], bool] = lambda: False
    memory: dict[str, Any] = field(default_factory=dict)

    def origin(self) -> str:
        """A fingerprint of all that the stage at work reads, which its checkpoints carry; empty outside of a run."""
        inputs = self.memory.get("inputs")
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest() if inputs is not None else ""

    def original_teacher(self) -> Path | None:
        """The folder that ``teacher.path`` leads to; None for a config-only teacher."""
        if "teacher" not in self.memory:
            self.memory["teacher"] = resolve_teacher(self.sections.teacher)
            self.memory["further"] = further_teachers(self.sections.teacher)
        return self.memory["teacher"]  # type: ignore[no-any-return]

    def further_teachers(self) -> list[tuple[Path, float]]:
        """Folders and weights of the teachers that ``teacher.more`` names beside the first, whose weight is 1."""
        self.original_teacher()
        return self.memory["further"]  # type: ignore[no-any-return]

    def teacher_folder(self, *, to_cut: bool = False) -> Path:
        """The teacher's weights: the corrected ones when there are some; ``to_cut`` asks for what is scored and pruned.

        Raises:
            CheckpointError: the teacher is a config without weights.
        """
        corrected = self.run_dir / "teacher"
        done = Manifest.read(corrected) if corrected.is_dir() else None
        if done is not None and not (to_cut and done.results.get("prune_from") == "original"):
            return corrected
        folder = self.original_teacher()
        if folder is None:
            raise CheckpointError("the teacher is only a config here: give teacher.path=FOLDER_OR_HUB_ID with its weights")
        return folder

    def teacher_config(self) -> Any:
        """The teacher's HF config."""
        return config_of(self.original_teacher(), self.sections.teacher)

    def family(self) -> Family:
        """The teacher's family and shape."""
        return discover(self.teacher_config())

    def load_teacher(self, *, to_cut: bool = False, device: torch.device | None = None, lazily: bool = False) -> nn.Module:
        """The teacher in the dtype of ``teacher.dtype``; ``lazily``: without its weights, which the engine that places it reads."""
        teacher, folder = self.sections.teacher, self.teacher_folder(to_cut=to_cut)
        options: dict[str, Any] = {"attention": teacher.attention, "trust_remote_code": teacher.trust_remote_code}
        if lazily:
            return load_lazily(folder, dtype=resolve_dtype(teacher.dtype), **options)
        return load_causal_lm(folder, dtype=resolve_dtype(teacher.dtype), device=device, **options)

    def data_fingerprint(self, later: Blends = ()) -> str:
        """The content hash of the text, with the blends that follow the section's own."""
        key = f"data {later!r}"
        if key not in self.memory:
            self.memory[key] = data_fingerprint(self.sections.data, later=later)
        return self.memory[key]  # type: ignore[no-any-return]

    def text(self, later: Blends = ()) -> Text:
        """The text, tokenised by the teacher's tokenizer, with the blends that follow the section's own."""
        known = self.memory.get("text")
        if known is None or known[0] != later:
            self.memory["text"] = (later, open_text(self.sections.data, self.tokenizer(), seed=self.seed, later=later))
        return self.memory["text"][1]  # type: ignore[no-any-return]

    def tokenizer(self) -> Any:
        """The teacher's, as it came.

        Raises:
            CheckpointError: the teacher is a config without one.
        """
        if "tokenizer" not in self.memory:
            folder = self.original_teacher()
            if folder is None:
                raise CheckpointError("the teacher is only a config here, without a tokenizer: give teacher.path=FOLDER_OR_HUB_ID")
            self.memory["tokenizer"] = load_tokenizer(folder, trust_remote_code=self.sections.teacher.trust_remote_code)
        return self.memory["tokenizer"]

    def packing(self) -> str:
        """``separate`` or ``joined``, what ``data.packing`` comes to with the models of this stage; the word itself for a config-only teacher.

        Raises:
            ConfigError: ``separate`` was asked for, and a model or the tokenizer cannot do it.
        """
        asked, student = self.sections.data.packing, getattr(getattr(self.sections, "student", None), "path", None)
        if asked == "joined" or self.original_teacher() is None:
            return str(asked)
        key = f"packing {asked} {student}"
        if key not in self.memory:
            folders = [folder for folder, _ in self.further_teachers()] + ([Path(student).expanduser()] if student else [])
            configs = [self.teacher_config(), *(config_of(folder, self.sections.teacher) for folder in folders)]
            self.memory[key] = choose_packing(asked, configs, separator=separator_of(self.tokenizer()))
        return self.memory[key]  # type: ignore[no-any-return]

    def separator(self) -> int | None:
        """The token after which a document sees nothing of those before it; None where the documents of a sequence are joined."""
        return separator_of(self.tokenizer()) if self.packing() == "separate" else None

    def held_out(self, count: int, later: Blends = ()) -> torch.Tensor:
        """Up to ``count`` held-out sequences [num, sequence] of the section's own text, in document order.

        Raises:
            DataError: the held-out text does not fill one sequence.
        """
        rows = list(islice(self.text(later).stream(split="validation").first_epoch(), count))
        if not rows:
            length = self.sections.data.sequence_length
            raise DataError(f"the held-out text is shorter than one sequence of {length} tokens: give more text or lower data.sequence_length")
        return torch.stack(rows)

    def candidates(self) -> list[Candidate]:
        """The shapes that ``search`` wrote."""
        return read_candidates(self.run_dir / "candidates" / "candidates.jsonl", self.family().layout)

    def winner(self) -> str:
        """The candidate to go on with: the best ranked, else the only one, else the best without training (``zero_shot.json``).

        Raises:
            CheckpointError: nothing says which one that is.
        """
        ranking = self.run_dir / "ranking" / "ranking.json"
        if ranking.is_file():
            best = json.loads(ranking.read_text())["candidates"][0]
            if best["status"] != "ok":
                raise CheckpointError(f"no candidate of {ranking} was trained to its end: {best['name']} failed ({best['reason']})")
            return str(best["name"])
        if not (self.run_dir / "candidates").is_dir() and (replayed := self.replayed()):
            return replayed
        candidates = self.candidates()
        if len(candidates) == 1:
            return candidates[0].name
        losses = self.zero_shot_losses()
        if not losses:
            raise CheckpointError("there are several candidates and no ranking: run 'minitron rank' or 'minitron prune' first")
        return min(losses, key=losses.__getitem__)

    def replayed(self) -> str | None:
        """The cut that ``prune.plan`` made in a run without candidates; None when there is none.

        Raises:
            CheckpointError: there are several.
        """
        names = [path.parent.name for path in sorted((self.run_dir / "pruned").glob("*/manifest.json"))]
        names = [name for name in names if "." not in name]  # not what was set aside
        if len(names) > 1:
            raise CheckpointError(f"{self.run_dir} has several pruned models ({', '.join(names)}): give student.path")
        return names[0] if names else None

    def zero_shot_losses(self) -> dict[str, float]:
        """Held-out losses of the untrained candidates, when ``prune`` has measured them for the candidates of now."""
        path = self.run_dir / "pruned" / ZERO_SHOT
        if not path.is_file():
            return {}
        known = json.loads(path.read_text())
        return dict(known["losses"]) if known["inputs"] == self.zero_shot_inputs() else {}

    def zero_shot_inputs(self) -> dict[str, str]:
        """Fingerprints that the zero-shot losses belong to."""
        return {name: fingerprint_folder(self.run_dir / name) for name in ("candidates", "scores")}

    def pruned_folder(self) -> Path:
        """The pruned model to distil: ``student.path`` when given, else the winner's folder."""
        given = getattr(getattr(self.sections, "student", None), "path", None)
        return Path(given).expanduser() if given else self.run_dir / "pruned" / self.winner()

    def dense_folder(self) -> Path:
        """The model to make sparse: ``student.path`` when given, else this run's pruned winner, else the teacher."""
        given = getattr(getattr(self.sections, "student", None), "path", None)
        if given or any((self.run_dir / "pruned").glob("*/manifest.json")):
            return self.pruned_folder()
        return self.teacher_folder(to_cut=True)

    def sparse_folder(self) -> Path | None:
        """What ``sparsify`` wrote; None when it did not, or ``student.path`` names another model than it was made from."""
        folder = self.run_dir / SPARSE
        made = Manifest.read(folder) if folder.is_dir() else None
        given = getattr(getattr(self.sections, "student", None), "path", None)
        if made is None or (given and made.inputs.get("model") != fingerprint_folder(Path(given).expanduser())):
            return None
        return folder

    def student_folder(self) -> Path:
        """The model that distillation starts from: the sparse one where there is one, else the pruned one."""
        return self.sparse_folder() or self.pruned_folder()

    def open_tracker(self, out: Path, stage: str) -> Callable[[int], Tracker]:
        """A maker of trackers that first cuts off metric lines after the step to go on from."""

        def make(step: int) -> Tracker:
            if dist.is_main() and (out / FILE_NAME).is_file():
                truncate_after(out / FILE_NAME, step if step > 0 else -1)
            settings = {"jsonl": {}, **self.sections.tracking}
            about: dict[str, Any] = {"run_name": f"{self.title}/{stage}", "group": self.title, "config": self.memory.get("config", {})}
            return build_trackers(settings, folder=out, step=step, job=stage, **about)

        return make


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model, the natural units of sharding."""
    return [model.get_submodule(name) for name in discover(model.config).taps.blocks]


def config_fingerprint(config: Any) -> str:
    """A hash of a config's content, for stages that read no weights."""
    values = {key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "transformers_version", "dtype")}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
