"""All that the next step of a training depends on, saved and put back as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minitron import dist
from minitron.checkpoint import Checkpointer, check_room, random_state, restore_random_state
from minitron.core.protocols import Engine
from minitron.core.share import whole
from minitron.distill.best import BestWeights
from minitron.distill.loop import Progress
from minitron.distill.on_policy import ResumableBatches
from minitron.distill.pair import TeacherStudent
from minitron.engine.shares import differing_weights, spans_from
from minitron.errors import CheckpointError, DivergenceError
from minitron.log import get_logger

logger = get_logger(__name__)


class TrainingState:
    """Weights, moments, what the losses keep, random generators, the place in the data and the best weights so far.

    Weights and moments are saved as parts of wholes, so that another engine or another number of ranks goes on from them. The teacher is not saved:
    ``origin``, the fingerprint of what is learned from, says whether a checkpoint belongs to it.
    """

    def __init__(
        self,
        engine: Engine,
        pair: TeacherStudent,
        batches: ResumableBatches,
        checkpointer: Checkpointer | None,
        best: BestWeights | None,
        *,
        what: str,
        origin: str = "",
    ) -> None:
        self.engine, self.pair, self.batches, self.checkpointer, self.best = engine, pair, batches, checkpointer, best
        self._what, self._origin = what, origin
        self._times_back = 0

    def save(self, step: int, tokens: int, *, wait: bool) -> None:
        """A checkpoint of the step just taken; without ``wait`` it is written while training goes on.

        Raises:
            CheckpointError: it cannot be written.
        """
        assert self.checkpointer is not None, "this training has no folder"
        losses = self.pair.state_dict()
        everywhere = {name: whole(value.shape, copy=dist.rank(), num_copies=dist.world_size()) for name, value in losses.items()}
        kept = {"best": self.best.state_dict()} if self.best is not None else {}
        meta = {"tokens": tokens, "data": self.batches.state_dict(), "engine": self.engine.name, "origin": self._origin, **kept}
        state = {**self.engine.state_dict(), **losses, **random_state()}
        self.checkpointer.save(step, state, {**meta, "times_back": self._times_back}, shares={**self.engine.shares(), **everywhere}, wait=wait)
        if self.best is not None:
            self.best.drop_old()

    def poll(self) -> None:
        """Between steps: learn whether a checkpoint has come to stand.

        Raises:
            CheckpointError: it could not be written.
        """
        if self.checkpointer is not None and self.checkpointer.poll() and self.best is not None:
            self.best.drop_old()

    def restore(self) -> Progress:
        """Put the newest checkpoint back; without one, the beginning.

        Raises:
            CheckpointError: there are checkpoints, and none can be used.
        """
        found = self._load()
        if self.best is not None:
            self.best.load_state_dict(found.get("best", {}) if found is not None else {})
        if found is None:
            return Progress()
        self.batches.load_state_dict(found["data"])
        self._times_back = int(found.get("times_back", 0))
        logger.info("  %s goes on from step %d", self._what, found["step"])
        return Progress(found["step"], found["tokens"])

    def go_back(self, reason: str) -> Progress:
        """Put the newest checkpoint back, but go on in the data behind what has been drawn. Done once in a training.

        Raises:
            DivergenceError: there is no checkpoint, or training has gone back before.
        """
        if self._times_back:
            raise DivergenceError(f"{self._what} stops: {reason}. It has gone back to a checkpoint before; {_ADVICE}")
        place = self.batches.state_dict()
        found = self._load()
        if found is None:
            raise DivergenceError(f"{self._what} stops: {reason}. There is no checkpoint to go back to; {_ADVICE}")
        self._times_back = 1
        if self.best is not None:
            self.best.load_state_dict(found.get("best", {}))
        self.batches.load_state_dict(moved(found["data"], place))
        logger.warning("  %s goes back to step %d, and on behind the data at fault: %s", self._what, found["step"], reason)
        return Progress(found["step"], found["tokens"])

    @property
    def may_go_back(self) -> bool:
        """Whether there is a checkpoint to go back to, and training has not done so before."""
        if self.checkpointer is None or self._times_back:
            return False
        self.checkpointer.finish()
        return dist.any_rank(bool(self.checkpointer.steps()))

    def close(self) -> None:
        """Wait until the checkpoint at work stands.

        Raises:
            CheckpointError: it cannot be written.
        """
        if self.checkpointer is not None:
            self.checkpointer.finish()

    def _load(self) -> dict[str, Any] | None:
        """Load what is not the data's and not the best weights' concern; gives what stands beside the tensors."""
        if self.checkpointer is None:
            return None
        shares = self.engine.shares()

        def foreign(meta: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> str:
            if meta.get("origin", "") != self._origin:
                return "it belongs to a training on other models or data"
            return differing_weights(shares, shapes)

        found = self.checkpointer.load_latest(wanted=spans_from(shares), foreign=foreign)
        if found is None:
            return None
        tensors, meta = found
        private = {key: value for key, value in tensors.items() if key.startswith("random/")}
        self.engine.load_state_dict({key: value for key, value in tensors.items() if key not in private})
        self.pair.load_state_dict(tensors)
        restore_random_state(private)
        if meta["world_size"] != dist.world_size() or meta["engine"] != self.engine.name:
            there, here = (meta["world_size"], meta["engine"]), (dist.world_size(), self.engine.name)
            logger.info("  a checkpoint of %d ranks under engine=%s is read by %d under engine=%s", *there, *here)
        return meta


_ADVICE = "lower training.learning_rate, or look at the data there"


def moved(state: Any, place: Any) -> Any:
    """A state of batches whose streams stand where those of ``place`` do; counts of steps and phases stay."""
    if not isinstance(state, dict) or not isinstance(place, dict):
        return state
    return {key: place.get(key, value) if key == "stream" else moved(value, place.get(key)) for key, value in state.items()}


def check_room_on_main(folder: Path, *, num_bytes: int, keep: int, others: int) -> None:
    """:func:`minitron.checkpoint.check_room` by rank 0 for all.

    Raises:
        CheckpointError: on every rank, where not even one checkpoint fits.
    """
    failure = ""
    if dist.is_main():
        try:
            check_room(folder, num_bytes=num_bytes, keep=keep, others=others)
        except CheckpointError as error:
            failure = str(error)
    failure = dist.broadcast_object(failure)
    if failure:
        raise CheckpointError(failure)


def state_bytes(num_parameters: int, *, optimizer: str) -> int:
    """Bytes of a checkpoint over all ranks: float32 weights and the optimiser's moments."""
    return num_parameters * 4 * (1 + _MOMENTS[optimizer])


#: Numbers per weight that an optimiser keeps; of Muon those of its AdamW part.
_MOMENTS = {"adamw": 2, "lion": 1, "muon": 2, "sgd": 1}
