"""The real trackers: what they store of a run that was stopped and resumed, read back with their own readers."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mftctl.errors import Interrupted
from mftctl.experiments.run_folder import Run
from mftctl.experiments.tracking import session
from mftctl.experiments.tracking.libraries import MODULES
from mftctl.experiments.tracking.session import tracked
from tests.experiments.tracking.fake_trackers import Lines
from tests.experiments.tracking.test_session import new_run

RESULT = {"best_loss": 0.5, "layer_ratios": {"4": 0.25}, "state": "MFT"}
CONFIG_KEYS = {"model": "tiny", "seed": 3}
SCORES = [{"name": "exact_match,strict-match", "value": 0.75, "standard_error": None, "samples": 4}]


def needs(module: str, extra: str | None = None) -> pytest.MarkDecorator:
    """Skips a test where a tracker is not installed."""
    is_missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(is_missing, reason=f"needs pip install 'mftctl[{extra or module}]'")


def stop_and_resume(root: Path, tracker: Any) -> tuple[Run, Lines]:
    """Trains three steps, is stopped, and goes on from step 2 to step 4, with a group of its own at the end."""
    run, lines = new_run(root, name="my study", seed=3), Lines()

    def train(steps: list[int], *, stops: bool) -> None:
        with tracked(run, (tracker,), lines) as take_result:
            if steps[0] > 1:
                run.training.rewind(steps[0] - 1)
            for step in steps:
                run.training.log({"step": step, "loss": 1 / step})
            if stops:
                raise Interrupted("Stopped.")
            run.training.log({"step": 4, "dataset": "gsm8k", "metrics": SCORES})
            run.training.log({"step": 4, "eval_loss": math.nan})
            run.training_in(run.folder / "groups" / "4-7").log({"step": 1, "eval_loss": 2.0})
            take_result(RESULT)

    with pytest.raises(Interrupted):
        train([1, 2, 3], stops=True)
    train([3, 4], stops=False)
    assert lines.warnings == []
    return run, lines


def identifier_of(run: Run, tracker: str) -> str:
    return str(json.loads((run.folder / "tracking" / f"{tracker}.json").read_text())["id"])


@pytest.fixture(autouse=True)
def _busy_machines_may_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "WAIT_SECONDS", 200.0)
    monkeypatch.setattr(session, "_SHORT_WAIT_SECONDS", 200.0)


@needs("tensorboard")
def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, lines = stop_and_resume(tmp_path, "tensorboard")
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == [1, 2, 3, 4]
    assert [event.value for event in losses] == pytest.approx([1.0, 0.5, 1 / 3, 0.25])
    assert [event.value for event in events.Scalars("gsm8k/exact_match.strict-match")] == [0.75]
    assert math.isnan(events.Scalars("eval_loss")[0].value)
    assert [(event.step, event.value) for event in events.Scalars("result/best_loss")] == [(4, 0.5)]
    assert events.Scalars("result/layer_ratios/4")[0].value == 0.25
    (config,) = events.Tensors("config/text_summary")
    assert CONFIG_KEYS.items() <= json.loads(config.tensor_proto.string_val[0]).items()
    group = EventAccumulator(str(run.folder / "tensorboard" / "layers 4-7")).Reload()
    assert [(event.step, event.value) for event in group.Scalars("eval_loss")] == [(1, 2.0)]
    assert lines.notes == [f"Tracking: tensorboard, tensorboard --logdir {tmp_path}"] * 2


@needs("trackio")
@pytest.mark.filterwarnings("default")
def test_trackio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = stop_and_resume(tmp_path, "trackio")
    name = identifier_of(run, "trackio")
    (path,) = Path(os.environ["TRACKIO_DIR"]).glob("*.db")
    with sqlite3.connect(path) as store:
        rows = store.execute("select run_id, step, metrics from metrics where run_name = ? order by id", (name,))
        found = [(run_id, step, json.loads(metrics)) for run_id, step, metrics in rows]
        (config,) = store.execute("select config from configs where run_name = ?", (name,)).fetchone()
    assert name.startswith("001-fft ")
    assert len({run_id for run_id, _, _ in found}) == 1
    assert [(step, metrics) for _, step, metrics in found] == [
        (1, {"loss": 1.0}),
        (2, {"loss": 0.5}),
        (3, {"loss": 1 / 3}),
        (4, {"loss": 0.25}),
        (4, {"gsm8k/exact_match.strict-match": 0.75}),
        (4, {"eval_loss": "NaN"}),
        (1, {"layers 4-7/eval_loss": 2.0}),
        (4, {"result/best_loss": 0.5, "result/layer_ratios/4": 0.25}),
    ]
    assert CONFIG_KEYS.items() <= json.loads(config).items()
    assert capsys.readouterr().out == ""


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file: blocks of 32 KiB with pieces of records, as in LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


def wandb_history(path: Path) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """The identifier of the run, its lines without wandb's own keys, and its summary."""
    identifier, lines, summary = "", [], {}
    for record in wandb_records(path):
        if record.HasField("run"):
            identifier = record.run.run_id
        if record.HasField("history"):
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            lines.append({key: value for key, value in items.items() if not key.startswith("_")})
        if record.HasField("summary"):
            summary |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.summary.update}
    return identifier, lines, summary


@needs("wandb")
@pytest.mark.filterwarnings("default")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    import wandb

    wandb.teardown()  # its settings are those of the first run of a process
    run, lines = stop_and_resume(tmp_path / "runs", "wandb")
    wandb.teardown()  # writes the last lines, as the end of a process does
    identifier = identifier_of(run, "wandb")
    first, second = (
        wandb_history(path) for path in sorted(tmp_path.rglob("*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    )
    assert first[:2] == (identifier, [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 1 / 3}])
    assert second[0] == identifier
    assert second[1][:2] == [{"step": 4, "loss": 0.25}, {"step": 4, "gsm8k/exact_match.strict-match": 0.75}]
    assert second[1][3] == {"step": 1, "layers 4-7/eval_loss": 2.0}
    assert {"result/best_loss": 0.5, "result/layer_ratios/4": 0.25}.items() <= second[2].items()
    assert all(note.startswith("Tracking: wandb, offline in ") for note in lines.notes)
    assert capsys.readouterr() == ("", "")


@needs("mlflow")
@needs("sqlalchemy", "mlflow")
@pytest.mark.filterwarnings("default")
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run, _ = stop_and_resume(tmp_path / "runs", "mlflow")
    client = MlflowClient()
    experiment = client.get_experiment_by_name("my study")
    assert experiment is not None
    (stored,) = client.search_runs([experiment.experiment_id])
    assert stored.info.run_id == identifier_of(run, "mlflow")
    assert (stored.info.run_name, stored.info.status) == ("001-fft", "FINISHED")
    history = client.get_metric_history(stored.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    values = stored.data.metrics
    assert values["gsm8k/exact_match.strict-match"] == 0.75
    assert values["layers 4-7/eval_loss"] == 2.0
    assert (values["result/best_loss"], values["result/layer_ratios/4"]) == (0.5, 0.25)
    assert math.isnan(values["eval_loss"])
    assert (stored.data.params["seed"], stored.data.params["fft.learning_rate"]) == ("3", "2e-05")


@needs("trackio")
@pytest.mark.filterwarnings("default")
def test_a_store_that_trackio_cannot_write_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from trackio import sqlite_storage

    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path / "file" / "store")
    (tmp_path / "file").write_text("not a folder")
    run, lines = new_run(tmp_path / "runs"), Lines()
    with tracked(run, ("trackio",), lines):
        run.training.log({"step": 1, "loss": 1.0})
    (line,) = lines.warnings
    assert line.startswith("--track trackio: nothing more is sent to it, as it failed: ")
    assert "Not a directory" in line
    assert capsys.readouterr() == ("", "")


UNREACHABLE = """
import sys
from pathlib import Path
from mftctl.experiments.tracking import libraries, session
from tests.experiments.tracking.fake_trackers import Lines
from tests.experiments.tracking.test_session import new_run

libraries.WAIT_SECONDS = session.WAIT_SECONDS = 4.0
run, lines = new_run(Path(sys.argv[1])), Lines()
with session.tracked(run, (sys.argv[2],), lines) as take_result:
    run.training.log({"step": 1, "loss": 1.0})
    take_result({"best_loss": 0.5})
print(*lines.warnings, sep="\\n")
"""


@pytest.mark.slow
@pytest.mark.parametrize("tracker", [pytest.param(name, marks=needs(name)) for name in ("wandb", "mlflow")])
def test_a_server_that_cannot_be_reached_is_one_line(tmp_path: Path, tracker: str) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]),
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_API_KEY": "0123456789" * 4,
        "MLFLOW_TRACKING_URI": "http://me:password@127.0.0.1:9",
    }
    done = subprocess.run(
        [sys.executable, "-c", UNREACHABLE, str(tmp_path / "runs"), tracker],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"--track {tracker}: ")
    assert "0123456789" not in done.stdout + done.stderr
    assert "password" not in done.stdout + done.stderr


@needs("wandb")
@pytest.mark.filterwarnings("default")
def test_wandb_without_a_key_does_not_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    wandb.teardown()
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run, lines = new_run(tmp_path / "runs"), Lines()
    with tracked(run, ("wandb",), lines):
        run.training.log({"step": 1, "loss": 1.0})
    (line,) = lines.warnings
    assert line.startswith("--track wandb: nothing more is sent to it, as it failed: ")
    assert "wandb login" in line


@pytest.mark.parametrize("tracker", [pytest.param("tensorboard", marks=needs("tensorboard"))])
def test_a_full_disk_is_one_line(tmp_path: Path, tracker: Any) -> None:
    run, lines = new_run(tmp_path), Lines()
    (run.folder / "tensorboard").write_text("not a folder")
    with tracked(run, (tracker,), lines):
        run.training.log({"step": 1, "loss": 1.0})
    assert len(lines.warnings) == 1
    assert len(run.training.metrics()) == 1


@pytest.mark.parametrize(
    "tracker", [pytest.param(name, marks=needs(name)) for name in ("tensorboard", "trackio", "mlflow", "wandb")]
)
@pytest.mark.filterwarnings("default")
def test_importing_a_tracker_leaves_random_numbers_as_they_are(tracker: str) -> None:
    random.seed(3)
    before = random.getstate()
    session._import(MODULES[tracker])
    assert random.getstate() == before
