"""minitron/checkpoint: whole or not there, sound or passed over."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_ranks import run_ranks

from minitron import dist
from minitron.checkpoint import Checkpointer, random_state, restore_random_state
from minitron.checkpoint import checkpointer as module
from minitron.errors import CheckpointError


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"weight/a": torch.full((3, 4), float(step)), "optimizer/a/step": torch.tensor(float(step)), "half": torch.arange(6).bfloat16()}


def saved(folder: Path, steps: tuple[int, ...] = (10, 20), keep: int = 2) -> Checkpointer:
    checkpointer = Checkpointer(folder / "checkpoints", keep=keep)
    for step in steps:
        checkpointer.save(step, tensors(step), {"tokens": 7 * step, "data": {"drawn": step}})
    return checkpointer


def share(checkpointer: Checkpointer, step: int) -> Path:
    (path,) = (checkpointer.folder / f"step-{step}").glob("*.safetensors")
    return path


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    checkpointer = saved(tmp_path)
    found = checkpointer.load_latest()
    assert found is not None and found[1] == {"step": 20, "world_size": 1, "tokens": 140, "data": {"drawn": 20}}
    assert found[0].keys() == tensors(20).keys()
    for name, tensor in tensors(20).items():
        assert torch.equal(found[0][name], tensor) and found[0][name].dtype == tensor.dtype
    assert Checkpointer(tmp_path / "none").load_latest() is None


def test_only_the_newest_are_kept_and_nothing_half_written_stays(tmp_path: Path) -> None:
    for keep in (1, 2, 3):
        checkpointer = saved(tmp_path / str(keep), (5, 10, 15, 100), keep=keep)
        assert checkpointer.steps() == [5, 10, 15, 100][-keep:]
        assert sorted(entry.name for entry in checkpointer.folder.iterdir()) == sorted(f"step-{step}" for step in checkpointer.steps())


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpointer = saved(tmp_path)
    checkpointer.save(20, tensors(99), {})
    found = checkpointer.load_latest()
    assert found is not None and found[0]["weight/a"][0, 0] == 99 and checkpointer.steps() == [10, 20]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def remove(path: Path) -> None:
    path.unlink()


def remove_the_checksum(path: Path) -> None:
    path.with_suffix(".sha256").unlink()


def tear_the_state(path: Path) -> None:
    (path.parent / "state.json").write_text('{"step": 2')


DAMAGES = [truncate, flip_a_bit, remove, remove_the_checksum, tear_the_state]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_aloud(tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture) -> None:
    checkpointer = saved(tmp_path)
    damage(share(checkpointer, 20))
    with caplog.at_level(logging.WARNING, logger="minitron"):
        found = checkpointer.load_latest()
    assert found is not None and found[1]["step"] == 10 and found[0]["weight/a"][0, 0] == 10
    assert any("step-20" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("damage", DAMAGES)
def test_when_all_are_damaged_the_run_is_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    checkpointer = saved(tmp_path)
    for step in (10, 20):
        damage(share(checkpointer, step))
    with pytest.raises(CheckpointError, match="none of the checkpoints in .* is sound; remove"):
        checkpointer.load_latest()


def test_a_damaged_later_step_does_not_push_out_the_sound_ones(tmp_path: Path) -> None:
    checkpointer = saved(tmp_path, (10, 20), keep=2)
    flip_a_bit(share(checkpointer, 20))
    for keep, step in ((2, 15), (1, 16)):  # training goes on from step 10
        checkpointer.keep = keep
        checkpointer.save(step, tensors(step), {})
        found = checkpointer.load_latest()
        assert found is not None and found[1]["step"] == step
    assert checkpointer.steps() == [16]


def test_another_number_of_ranks_is_refused(tmp_path: Path) -> None:
    checkpointer = saved(tmp_path)
    path = checkpointer.folder / "step-20" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "world_size": 4}))
    with pytest.raises(CheckpointError, match="step-20 needs 4 processes, this run has 1"):
        checkpointer.load_latest()


def no_space(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["save_file", "file_digest", "replace"])
def test_a_full_disk_leaves_the_earlier_checkpoint_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    checkpointer = saved(tmp_path)
    monkeypatch.setattr(module.os if where == "replace" else module, where, no_space)
    with pytest.raises(CheckpointError, match="checkpoint of step 30 cannot be written to .*No space left on device"):
        checkpointer.save(30, tensors(30), {})
    monkeypatch.undo()
    assert sorted(entry.name for entry in checkpointer.folder.iterdir()) == ["step-10", "step-20"]
    found = checkpointer.load_latest()
    assert found is not None and found[1]["step"] == 20
    checkpointer.save(30, tensors(30), {})
    assert checkpointer.steps() == [20, 30]


def test_a_process_killed_while_writing_leaves_no_trace_in_the_next_run(tmp_path: Path) -> None:
    checkpointer = saved(tmp_path)
    partial = checkpointer.folder / "step-30.partial"
    partial.mkdir()
    (partial / "rank-00000-of-00001.safetensors").write_bytes(b"half")
    found = checkpointer.load_latest()
    assert found is not None and found[1]["step"] == 20
    checkpointer.save(30, tensors(30), {})
    assert not partial.exists() and checkpointer.steps() == [20, 30]


def test_random_generators_go_on_where_they_stood() -> None:
    torch.manual_seed(3)
    torch.rand(5)
    state = {name: tensor.clone() for name, tensor in random_state().items()}
    expected = torch.rand(4)
    torch.rand(100)
    restore_random_state(state)
    assert torch.equal(torch.rand(4), expected)


# ---------------------------------------------------------------------------------------------------------------- two ranks


def two_ranks(folder: Path) -> list[Any]:
    """Save, damage one rank's newest share, load; then a disk that is full for one rank only."""
    checkpointer = Checkpointer(folder / "checkpoints")
    for step in (1, 2):
        checkpointer.save(step, {"x": torch.tensor([step, dist.rank()])}, {})
    if dist.rank() == 1:
        truncate(checkpointer.folder / "step-2" / "rank-00001-of-00002.safetensors")
    dist.barrier()
    found = checkpointer.load_latest()
    assert found is not None
    told = []
    for rank, name in ((0, "save_file"), (1, "save_file"), (0, "replace")):
        owner = module.os if name == "replace" else module
        whole = getattr(owner, name)
        if dist.rank() == rank:
            setattr(owner, name, no_space)
        try:
            checkpointer.save(9, {"x": torch.zeros(1)}, {})
        except CheckpointError as error:
            told.append(str(error).rpartition(": ")[2])
        setattr(owner, name, whole)
    return [found[0]["x"].tolist(), told, checkpointer.steps()]


def test_ranks_fall_back_and_fail_together(tmp_path: Path) -> None:
    full, other = "[Errno 28] No space left on device", "another rank failed"
    assert run_ranks(two_ranks, 2, tmp_path) == [
        [[1, 0], [full, other, full], [1, 2]],
        [[1, 1], [other, full, other], [1, 2]],
    ]


def load_alone(folder: Path) -> str:
    try:
        Checkpointer(folder / "checkpoints").load_latest()
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_checkpoint_of_two_ranks_is_refused_by_one(tmp_path: Path) -> None:
    run_ranks(two_ranks, 2, tmp_path)
    assert "needs 2 processes, this run has 1" in load_alone(tmp_path)
