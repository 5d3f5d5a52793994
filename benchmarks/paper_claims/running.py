"""Run arms one at a time. A result is a file, written when the arm is done; what is there and was made the same way is not made again."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minitron.core.manifest import write_text
from minitron.distill.losses import LossConfig, build_losses, state_terms
from minitron.distill.losses.state import StatesConfig
from minitron.distill.teacher import TeacherSignal
from minitron.engine import EngineConfig, build_engine
from minitron.log import get_logger
from paper_claims.arms import Arm, Result
from paper_claims.cutting import Knife
from paper_claims.teachers import Laboratory, blocks_of, digest, given, train

logger = get_logger(__name__)

#: Teacher states of a seed's batches that are kept, so that the arms of a seed share one teacher forward per batch.
_REMEMBER_BYTES = 2 * 10**9


def window_losses(model: nn.Module, windows: torch.Tensor, *, batch_size: int = 4) -> list[float]:
    """Mean loss of every window [windows, sequence], in nats per predicted token, from the model's own logits."""
    model.eval()
    losses: list[float] = []
    with torch.no_grad():
        for batch in windows.split(batch_size):
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()  # [batch, sequence - 1, vocab]
            rows = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
            losses += rows.view(len(batch), -1).double().mean(dim=1).tolist()
    return losses


class Bench:
    """Runs the arms of one laboratory and keeps their results."""

    def __init__(self, lab: Laboratory) -> None:
        self.lab, self.knife = lab, Knife(lab)
        self.folder = lab.work / "results"
        self.folder.mkdir(exist_ok=True)
        self._signal: tuple[Any, TeacherSignal] | None = None

    def path(self, arm: Arm, seed: int) -> Path:
        """Where an arm's result lies."""
        return self.folder / f"{arm.name.replace('/', '.')}.seed{seed}.json"

    def made_of(self, arm: Arm, seed: int) -> str:
        """A hash of everything that an arm's result depends on, code excepted."""
        suite = self.lab.suite
        teachers = {name: self.lab.fingerprint(name) for name in (arm.cut_from, arm.guided_by)}
        shared = [suite.sequence_length, suite.num_windows, suite.num_calibration, suite.layer_choice, suite.sizes[arm.cut.size]]
        return digest([given(arm) | {"seeds": seed}, shared, teachers, self.lab.corpus(arm.text).train.fingerprint])

    def result(self, arm: Arm, seed: int) -> Result | None:
        """The stored result, if there is one and it was made the same way."""
        path = self.path(arm, seed)
        if not path.is_file():
            return None
        document = json.loads(path.read_text())
        return Result(**document["result"]) if document["made_of"] == self.made_of(arm, seed) else None

    def run(self, arms: Iterable[Arm], *, seeds: Iterable[int] | None = None) -> None:
        """Run what is not done, seed by seed, so that the arms of a seed share the teacher's states."""
        arms = list(arms)
        for seed in sorted({seed for arm in arms for seed in arm.seeds}):
            for arm in arms:
                if seed in arm.seeds and (seeds is None or seed in seeds) and self.result(arm, seed) is None:
                    result = self._measure(arm, seed)
                    write_text(self.path(arm, seed), json.dumps({"made_of": self.made_of(arm, seed), "result": asdict(result)}))
                    logger.info("%s %s seed %d: loss %.4f, %.0f s", self.lab.suite.name, arm.name, seed, result.loss, result.seconds)

    def _measure(self, arm: Arm, seed: int) -> Result:
        started = time.perf_counter()
        corpus = self.lab.corpus(arm.text)
        student, plan = self.knife.student(arm.cut, teacher=arm.cut_from, text=arm.text, seed=seed)
        tokens, curve = 0, []
        if arm.loss is not None:
            assert arm.training is not None
            loss = _loss_config(arm.loss)
            guide = self._guide(arm, loss, seed) | {"kept_hidden": plan.hidden}
            done = train(student, corpus, arm.training, loss, seed=seed, folder=None, what=f"{arm.name} seed {seed}", **guide).run()
            tokens, curve = done.tokens, done.curve
        return Result(
            arm=arm.name,
            seed=seed,
            windows=[round(value, 6) for value in window_losses(student, corpus.windows)],
            num_parameters=sum(p.numel() for p in student.parameters()),
            seconds=round(time.perf_counter() - started, 1),
            tokens=tokens,
            curve=curve,
            kept_layers=plan.layer,
        )

    def _guide(self, arm: Arm, loss: LossConfig, seed: int) -> dict[str, Any]:
        """The teacher and its remembered states, for a loss that needs them."""
        if not any(member.function.needs_teacher for member in build_losses(loss)):
            return {}
        assert arm.training is not None
        teacher = self.knife.teacher(arm.guided_by)
        if state_terms(loss):  # only the last hidden states are remembered
            return {"teacher": teacher}
        key = (arm.guided_by, arm.text, seed)
        if self._signal is None or self._signal[0] != key:
            engine = build_engine(EngineConfig(), optimizer=arm.training.optimizer_config(), precision=arm.training.precision)
            signal = TeacherSignal(teacher, engine, blocks=blocks_of(teacher), placement="replicate", remember_bytes=_REMEMBER_BYTES)
            self._signal = (key, signal)
        return {"teacher": teacher, "signal": self._signal[1]}


def _loss_config(values: dict[str, Any]) -> LossConfig:
    """The section ``loss`` of an arm."""
    return LossConfig(**(values | ({"states": StatesConfig(**values["states"])} if "states" in values else {})))
