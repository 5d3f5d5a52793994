"""minitron/checkpoint: whole or not there, sound or passed over."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_ranks import run_ranks
from safetensors.torch import load_file

from minitron import dist
from minitron.checkpoint import Checkpointer, discard, files, random_state, restore_random_state, writing
from minitron.checkpoint import checkpointer as module
from minitron.checkpoint.files import sum_file, write_document
from minitron.core.share import Share, missing, whole
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
    sum_file(path).unlink()


def tear_the_state(path: Path) -> None:
    (path.parent / "state.json").write_text('{"step": 2')


def change_the_state(path: Path) -> None:
    state = path.parent / "state.json"
    state.write_text(state.read_text().replace('"tokens": 140', '"tokens": 141').replace('"tokens": 70', '"tokens": 71'))


class Bomb:
    """Unpickled it leaves a trace."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (Path(os.environ["MINITRON_TEST_BOMB"]), "ran")


def plant_pickles(path: Path) -> None:
    """Every file a pickle that runs code, with checksums that fit: what a stranger would send."""
    for target in [path, path.parent / "state.json", *(path.parent / name for name in ("state.pt", "model.bin", "zero_pp_rank_0_optim_states.pt"))]:
        target.write_bytes(pickle.dumps(Bomb()))
        files.write_sum(target, files.file_digest(target))


def plant_a_pickle_as_tensors(path: Path) -> None:
    """The same with a sound state.json."""
    path.write_bytes(pickle.dumps(Bomb()))
    files.write_sum(path, files.file_digest(path))


DAMAGES = [truncate, flip_a_bit, remove, remove_the_checksum, tear_the_state, change_the_state, plant_pickles, plant_a_pickle_as_tensors]


@pytest.fixture(autouse=True)
def no_bomb_goes_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test may let a planted pickle run."""
    monkeypatch.setenv("MINITRON_TEST_BOMB", str(tmp_path / "bomb"))
    yield
    assert not (tmp_path / "bomb").exists()


def test_a_pickle_would_run_if_it_were_read(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb()))
    assert (tmp_path / "bomb").read_text() == "ran"
    (tmp_path / "bomb").unlink()


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
    with pytest.raises(CheckpointError, match=r"none of the checkpoints in .* is sound \(step-20: damaged: .*step-10: damaged: .*remove that folder"):
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
    write_document(path, {**json.loads(path.read_text()), "world_size": 4})
    with pytest.raises(CheckpointError, match="step-20 needs 4 processes, this run has 1"):
        checkpointer.load_latest()


def no_space(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


PLACES = {"write_share": writing, "write_document": module, "replace": module.os}


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("wait", [True, False])
def test_a_full_disk_leaves_the_earlier_checkpoint_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, wait: bool) -> None:
    checkpointer = saved(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(PLACES[where], where, no_space)
        with pytest.raises(CheckpointError, match="checkpoint of step 30 cannot be written to .*No space left on device"):
            checkpointer.save(30, tensors(30), {}, wait=wait)
            checkpointer.finish()  # of a save in the background the error comes up at the next occasion
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


def test_training_goes_on_while_bytes_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved is the state at the call, however the tensors change before the thread comes to them; nothing appears before the end."""
    gate, whole_write = threading.Event(), writing.write_share

    def slow(*args: Any, **kwargs: Any) -> None:
        assert gate.wait(10)
        whole_write(*args, **kwargs)

    monkeypatch.setattr(writing, "write_share", slow)
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    state = {name: tensor.clone() for name, tensor in tensors(10).items()}
    checkpointer.save(10, state, {"best": 7}, wait=False)
    for tensor in state.values():
        tensor.zero_()
    assert checkpointer.steps() == [] and not checkpointer.poll() and [meta["best"] for meta in checkpointer.metas()] == [7]
    gate.set()
    while not checkpointer.poll():
        pass
    found = checkpointer.load_latest()
    assert found is not None and all(torch.equal(found[0][name], tensor) for name, tensor in tensors(10).items())
    assert not checkpointer.poll()  # told once


def test_host_memory_is_used_again(tmp_path: Path) -> None:
    copies = writing.HostCopies()
    first = copies.take(tensors(1), {})
    again = copies.take(tensors(2), {})
    assert {name: tensor.data_ptr() for name, tensor in first.items()} == {name: tensor.data_ptr() for name, tensor in again.items()}
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors(2).items())


def test_every_so_many_steps_are_kept_for_good(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path / "checkpoints", keep=1, keep_every=20)
    for step in (10, 20, 30, 40, 50):
        checkpointer.save(step, tensors(step), {})
    assert checkpointer.steps() == [20, 40, 50]
    discard(checkpointer.folder)
    assert checkpointer.steps() == [20, 40]
    discard(saved(tmp_path / "other").folder)
    assert not (tmp_path / "other" / "checkpoints").exists()


def test_checksums_are_those_of_the_usual_tool(tmp_path: Path) -> None:
    folder = saved(tmp_path).folder / "step-20"
    sums = sorted(path.name for path in folder.glob("*.sha256"))
    assert len(sums) == 2
    subprocess.run(["sha256sum", "--check", "--strict", *sums], cwd=folder, check=True, capture_output=True)


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    found = load_file(str(share(saved(tmp_path), 20)))
    assert found.keys() == tensors(20).keys() and all(torch.equal(found[name], tensor) for name, tensor in tensors(20).items())


# ------------------------------------------------------------------------------------------------------------- parts of wholes

SHAPES: dict[str, tuple[int, ...]] = {"weight/a": (7, 3), "weight/b": (2, 5), "weight/c": (11,), "optimizer/a/step": (), "weight/none": (0, 4)}


def value(name: str) -> torch.Tensor:
    """The whole tensor of that name: numbers that say where they are."""
    count = whole(SHAPES[name]).stop
    return (torch.arange(count, dtype=torch.float64) + 100 * list(SHAPES).index(name)).view(SHAPES[name])


def cut(scheme: str, rank: int, world: int) -> dict[str, Share]:
    """How ``world`` ranks share the tensors: rows, flat runs at odd places, or copies of rows in groups of two."""
    shares = {}
    for name, shape in SHAPES.items():
        count, rows = whole(shape).stop, shape[0] if shape else 1
        if not shape:
            shares[name] = whole(shape, copy=rank, num_copies=world)
        elif scheme == "flat":
            shares[name] = Share(shape, count * rank // world, count * (rank + 1) // world)
        else:
            groups = world // 2 if scheme == "copies" and world > 1 else world
            part, size = rank % groups, -(-rows // groups)
            first, last = (min(rows, place * size) * (count // rows if rows else 0) for place in (part, part + 1))
            shares[name] = Share(shape, first, last, rank // groups, world // groups)
    return shares


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))


def write_as(folder: Path, scheme: str, world: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """A checkpoint of ``world`` ranks, written by one process in turn; returns how many numbers are in its files."""
    final = folder / "step-1"
    final.mkdir(parents=True)
    for rank in range(world):
        shares = cut(scheme, rank, world)
        mine = {name: value(name).view(-1)[share.start : share.stop] for name, share in shares.items()}
        mine["random/cpu"] = torch.tensor([rank])
        files.write_share(final / module.rank_file(rank, world), writing.HostCopies().take(mine, shares), shares)
    write_document(final / "state.json", {"step": 1, "world_size": world, "tensors": {name: list(shape) for name, shape in SHAPES.items()}})
    return sum(load_file(str(path))[name].numel() for path in final.glob("*.safetensors") for name in load_file(str(path)) if name in SHAPES)


@pytest.mark.parametrize(("scheme", "world"), [("rows", 1), ("rows", 4), ("copies", 4), ("flat", 3)])
def test_any_number_of_ranks_reads_what_any_other_has_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, world: int) -> None:
    assert write_as(tmp_path, scheme, world, monkeypatch) == sum(value(name).numel() for name in SHAPES)  # copies are written once
    for other, ranks in (("rows", 1), ("rows", 2), ("rows", 4), ("flat", 5), ("copies", 4)):
        for rank in range(ranks):
            as_rank(monkeypatch, rank, ranks)
            shares = cut(other, rank, ranks)
            found = Checkpointer(tmp_path).load_latest(wanted=lambda name, shape, shares=shares: (shares[name].start, shares[name].stop))  # type: ignore[misc]
            assert found is not None
            for name, share in shares.items():
                assert torch.equal(found[0][name].reshape(-1).double(), value(name).view(-1)[share.start : share.stop]), (name, rank)
            assert ("random/cpu" in found[0]) == (rank < world)


def test_a_share_that_is_in_no_file_makes_a_checkpoint_unsound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_as(tmp_path, "rows", 2, monkeypatch)
    state = tmp_path / "step-1" / "state.json"
    write_document(state, {**json.loads(state.read_text()), "world_size": 1})
    (tmp_path / "step-1" / module.rank_file(0, 2)).rename(tmp_path / "step-1" / module.rank_file(0, 1))
    sums = sum_file(tmp_path / "step-1" / module.rank_file(0, 2))
    sum_file(tmp_path / "step-1" / module.rank_file(0, 1)).write_text(sums.read_text().replace("of-00002", "of-00001"))
    with pytest.raises(CheckpointError, match="numbers 12 to 21 of 'weight/a' are in no file"):
        Checkpointer(tmp_path).load_latest(wanted=lambda name, shape: (0, whole(shape).stop))


def test_a_foreign_checkpoint_is_passed_over_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpointer = saved(tmp_path)
    with caplog.at_level(logging.WARNING, logger="minitron"):
        found = checkpointer.load_latest(foreign=lambda meta, shapes: "it is another's" if meta["tokens"] == 140 else "")
    assert found is not None and found[1]["step"] == 10
    assert any("step-20 is passed over: it is another's" in record.getMessage() for record in caplog.records)


def test_what_is_missing_of_a_span() -> None:
    assert missing((0, 10), [(2, 3), (5, 12)]) == [(0, 2), (3, 5)]
    assert missing((4, 4), []) == [] and missing((0, 4), [(0, 4)]) == [] and missing((3, 5), [(0, 1)]) == [(3, 5)]


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
    for rank, name in ((0, "write_share"), (1, "write_share"), (0, "replace")):
        owner = PLACES[name]
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
