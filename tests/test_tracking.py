"""minitron/tracking: lines that survive kills, wandb offline, and nothing said by the other ranks."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minitron.core.manifest import Manifest
from minitron.errors import ConfigError
from minitron.stages.tracked import track_stage
from minitron.tracking import TRACKERS, build_trackers, check_trackers
from minitron.tracking.jsonl import read_metrics, truncate_after


def trackers(folder: Path, settings: dict[str, Any]) -> Any:
    return build_trackers(settings, folder=folder, run_name="tiny", group="tests", config={"seed": 7, "loss": {"kind": "kl"}})


# ---------------------------------------------------------------------------------------------------------------- jsonl


def test_jsonl_lines_are_whole_at_once_and_step_comes_first(tmp_path: Path) -> None:
    tracker = trackers(tmp_path / "run", {"jsonl": {}})
    tracker.log(1, {"loss": 2.5, "step": 9, "tokens": 3})
    line = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert line == '{"step": 1, "loss": 2.5, "tokens": 3}\n'
    tracker.close()


@pytest.mark.parametrize("torn", ["", '{"step": 6, "lo', '{"step": 6, "loss": 1.0}', "\x00\x00"])
def test_truncate_after_cuts_later_steps_and_torn_lines(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)) + torn, encoding="utf-8")
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5]
    assert truncate_after(path, 3) == 2 + bool(torn)
    assert [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()] == [1, 2, 3]
    assert truncate_after(path, 3) == 0 and list(tmp_path.iterdir()) == [path]
    assert truncate_after(tmp_path / "none", 3) == 0


def test_appending_to_a_torn_line_loses_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo', encoding="utf-8")
    tracker = trackers(tmp_path, {"jsonl": None})
    tracker.log(2, {"loss": 1.0})
    tracker.close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2, "loss": 1.0}]


# ---------------------------------------------------------------------------------------------------------------- console, composite


def test_console_speaks_every_n_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = trackers(tmp_path, {"console": {"every": 5}})
    with caplog.at_level(logging.INFO, logger="minitron"):
        for step in range(1, 11):
            tracker.log(step, {"loss": 1.23456, "tokens": 1234567.0})
    assert [record.getMessage() for record in caplog.records] == [f"tiny step {step}  loss 1.235  tokens 1,234,567" for step in (1, 5, 10)]


def test_other_ranks_are_silent_but_check_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    tracker = trackers(tmp_path, {"jsonl": {}})
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="there is no tracker 'jsnl'"):
        trackers(tmp_path, {"jsnl": {}})


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"wandbb": {}}, "there is no tracker 'wandbb': did you mean 'wandb'"),
        ({"console": {"evry": 3}}, "the tracker console has no option 'evry': did you mean 'every'"),
        ({"jsonl": {"x": 3}}, "the tracker jsonl has no option 'x': it has none"),
        ({"console": {"every": 0}}, "tracking.console.every=0 must be at least 1"),
        ({"wandb": {"mode": "on"}}, "tracking.wandb.mode='on' is unknown: online, offline, disabled are accepted"),
    ],
)
def test_wrong_settings(tmp_path: Path, settings: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ConfigError, match=sentence):
        trackers(tmp_path, settings)


def test_close_reaches_every_member_though_one_fails(tmp_path: Path) -> None:
    tracker = trackers(tmp_path, {"console": {}, "jsonl": {}})

    def fail() -> None:
        raise OSError("no space left")

    tracker.members[0].close = fail
    with pytest.raises(OSError, match="no space left"):
        tracker.close()
    assert tracker.members[1]._file.closed


def test_table_is_in_step_with_the_modules() -> None:
    assert all(target.startswith(f"minitron.tracking.{name}:") for name, target in TRACKERS.items())


# ---------------------------------------------------------------------------------------------------------------- wandb


def raw_records(path: Path, block: int = 32768) -> Iterator[bytes]:
    """Records of a .wandb file: LevelDB's log format behind a header of seven bytes."""
    data = path.read_bytes()
    if len(data) < 7:
        return
    assert data[:4] == b":W&B"
    position, pending = 7, b""
    while position + 7 <= len(data):
        left = block - position % block
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if length == 0 and kind == 0:
            position += left
            continue
        chunk = data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind == 1:
            yield chunk
        elif kind == 2:
            pending = chunk
        elif kind == 3:
            pending += chunk
        elif kind == 4:
            yield pending + chunk
            pending = b""


def records(folder: Path) -> list[Any]:
    """Every record of every offline run in a folder, oldest run first. wandb's service may still write when ``finish`` has returned."""
    found: list[Any] = []
    end = time.monotonic() + 20.0
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        while not (read := parsed(path)) or read[-1].WhichOneof("record_type") != "exit":
            assert time.monotonic() < end, f"{path} was not finished"
            time.sleep(0.05)
        found += read
    return found


def parsed(path: Path) -> list[Any]:
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    found = []
    for raw in raw_records(path):
        record = wandb_internal_pb2.Record()
        try:
            record.ParseFromString(raw)
        except DecodeError:  # the end of a file that is being written
            break
        found.append(record)
    return found


def of_kind(kind: str, found: list[Any]) -> list[Any]:
    return [getattr(record, kind) for record in found if record.WhichOneof("record_type") == kind]


def as_row(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def read_back(folder: Path) -> tuple[list[dict[str, Any]], list[Any]]:
    """History rows and run records of every offline run below a folder, oldest first."""
    found = records(folder)
    return [as_row(history.item) for history in of_kind("history", found)], of_kind("run", found)


@pytest.fixture
def wandb_without_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: the wandb tracker is NOT tested")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_PROJECT", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("minitron.tracking.wandb._told_offline", False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))


@pytest.mark.usefixtures("wandb_without_key")
def test_wandb_without_a_key_goes_offline_and_a_resumed_run_keeps_its_id(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run"
    tracker = trackers(folder, {"wandb": {"mode": "online"}})
    assert len([record for record in caplog.records if "wandb has no API key" in record.getMessage()]) == 1
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 1.0 / step})
    tracker.close()
    stored = (folder / "wandb_run_id").read_text(encoding="utf-8").strip()

    tracker = trackers(folder, {"wandb": {"mode": "offline", "project": "other"}})
    tracker.log(3, {"loss": 0.25})
    tracker.close()

    rows, runs = read_back(folder)
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (3, 0.25)]
    assert {run.run_id for run in runs} == {stored}
    assert (runs[0].project, runs[0].run_group, runs[0].display_name) == ("minitron", "tests", "tiny")
    assert runs[-1].project == "other"
    config = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in runs[0].config.update}
    assert config["seed"] == 7 and config["loss"] == {"kind": "kl"}


@pytest.mark.usefixtures("wandb_without_key")
def test_wandb_failures_never_stop_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import wandb

    def fail(**_: Any) -> None:
        raise RuntimeError("service is gone")

    monkeypatch.setattr(wandb, "init", fail)
    tracker = trackers(tmp_path, {"wandb": {"mode": "offline"}})
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    assert [record.getMessage() for record in caplog.records] == [
        "wandb could not start (RuntimeError: service is gone); training goes on without it"
    ]


def test_wandb_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="tracking=wandb needs the package wandb: pip install wandb"):
        trackers(tmp_path, {"wandb": {"mode": "offline"}})


@pytest.mark.usefixtures("wandb_without_key")
def test_wandb_alerts_once_for_each_kind_of_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minitron.tracking import wandb as module

    told = threading.Event()
    monkeypatch.setattr(module.WandbTracker, "_stalled", lambda self, seconds, say=module.WandbTracker._stalled: (say(self, seconds), told.set()))
    tracker = trackers(tmp_path, {"wandb": {"mode": "offline", "stall_minutes": 0.002}})
    tracker.log(1, {"loss": 1.0, "gradient_norm": 2.0})
    tracker.log(2, {"loss": math.nan, "gradient_norm": math.inf})
    tracker.log(3, {"loss": math.nan, "gradient_norm": 1.0})
    tracker.log(4, {"loss_spike": 12.0})
    assert told.wait(10.0)
    tracker.close()
    titles = [alert.title for alert in of_kind("alert", records(tmp_path))]
    assert [title for title in titles if title != "no metrics"] == ["loss is nan", "the loss leapt"] and titles.count("no metrics") >= 1


@pytest.mark.usefixtures("wandb_without_key")
def test_wandb_keeps_tables_curves_in_the_group_and_references(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("many")
    tracker = trackers(tmp_path / "run", {"wandb": {"mode": "offline"}, "jsonl": {}})
    tracker.table("candidates", [{"name": "a", "loss": 2.0}, {"name": "b", "loss": 3.0, "reason": "late"}])
    tracker.curve("a", [{"step": 0, "loss": 4.0}, {"step": 5, "loss": 2.0}], {"num_parameters": 7})
    tracker.reference("student", folder, {"fingerprint": "abc"})
    tracker.close()
    found = records(tmp_path / "run")
    runs = of_kind("run", found)
    assert {(run.display_name, run.run_group, run.job_type) for run in runs} == {("tiny", "tests", ""), ("tiny/a", "tests", "candidate")}
    assert next(as_row(run.config.update) for run in runs if run.job_type)["num_parameters"] == 7
    rows = [as_row(history.item) for history in of_kind("history", found)]
    assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == [(0, 4.0), (5, 2.0)]
    (shown,) = (row for row in rows if any(key.startswith("candidates") for key in row))
    assert shown["candidates.ncols"] == 3 and shown["candidates.nrows"] == 2
    (table,) = (tmp_path / "run").glob("wandb/*/files/media/table/*.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["name", "loss", "reason"] and content["data"] == [["a", 2.0, None], ["b", 3.0, "late"]]
    artifact = next(artifact for artifact in of_kind("artifact", found) if artifact.name == "student")
    assert artifact.type == "model" and json.loads(artifact.metadata) == {"fingerprint": "abc"}
    assert [entry.ref for entry in artifact.manifest.contents] == [(folder / "weights").as_uri()]


# ---------------------------------------------------------------------------------------------------------------- tensorboard


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_tensorboard_shows_a_resumed_run_once_and_curves_beside_each_other(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: its tracker is NOT tested")
    for start, losses in ((0, {1: 4.0, 2: 3.0, 3: 9.0}), (2, {3: 2.5, 4: 2.0})):
        tracker = build_trackers({"tensorboard": None}, folder=tmp_path, run_name="t", group=None, config={"seed": 7}, step=start)
        for step, loss in losses.items():
            tracker.log(step, {"loss": loss, "phase": "first"})
        if start:
            tracker.curve("a", [{"step": 0, "loss": 4.0}, {"step": 5, "loss": 2.0}], {})
        tracker.close()
    found = events(tmp_path / "tensorboard")
    assert found == {"loss": [(1, 4.0), (2, 3.0), (3, 2.5), (4, 2.0)]}
    assert events(tmp_path / "tensorboard" / "a") == {"loss": [(0, 4.0), (5, 2.0)]}


def test_tensorboard_missing_is_said_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tracking=tensorboard needs the package tensorboard: pip install 'minitron\[tensorboard\]'"):
        check_trackers({"jsonl": {}, "tensorboard": {}})


# ---------------------------------------------------------------------------------------------------------------- finished stages


@pytest.mark.usefixtures("wandb_without_key")
def test_a_finished_ranking_is_shown_as_a_table_and_a_run_for_each_candidate(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: its tracker is NOT tested")
    folder = tmp_path / "ranking"
    folder.mkdir()
    rows = [
        {"name": name, "num_parameters": 9, "loss": 2.0, "curve": [{"step": s, "loss": 3.0 - s, "sequences": [1]} for s in (0, 1)]} for name in "ab"
    ]
    (folder / "ranking.json").write_text(json.dumps({"candidates": [*rows, {"name": "c", "status": "failed", "reason": "no room"}]}))
    about = {"run_dir": tmp_path, "title": "search", "tracking": {"wandb": {"mode": "offline"}, "tensorboard": {}, "jsonl": {}}}
    track_stage(folder, Manifest("rank", {}, {}), config={"seed": 1}, **about)
    place = tmp_path / "tracking" / "ranking"
    names = {run.display_name for run in of_kind("run", records(place))}
    assert names == {"search/rank", "search/rank/a", "search/rank/b"} and [p.name for p in folder.iterdir()] == ["ranking.json"]
    assert events(place / "tensorboard" / "b") == {"loss": [(0, 3.0), (1, 2.0)]}


def test_scores_of_all_models_are_shown_flat(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: its tracker is NOT tested")
    folder = tmp_path / "evaluation"
    folder.mkdir()
    row = {
        "perplexity": 9.0,
        "tasks": {"piqa": {"metrics": {"acc": {"value": 0.5, "stderr": 0.25}}}},
        "speed": {"batches": [{"batch_size": 8, "decode_ms": 2.0}]},
    }
    (folder / "metrics.json").write_text(json.dumps({"student": row, "note": "restored"}))
    track_stage(folder, Manifest("evaluate", {}, {}), run_dir=tmp_path, title="t", tracking={"tensorboard": {}}, config={})
    assert events(tmp_path / "tracking" / "evaluation" / "tensorboard") == {
        "student/perplexity": [(0, 9.0)],
        "student/piqa/acc": [(0, 0.5)],
        "student/piqa/acc_stderr": [(0, 0.25)],
        "student/batch_8/decode_ms": [(0, 2.0)],
    }
