from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mftctl.experiments.run_folder import Run, create_run
from mftctl.reporting import watch
from mftctl.reporting.watch import Following, RunProgress, follow
from tests.partial_results import partial_result

CONFIG = {"seed": 3, "fft": {"epochs": 2.0, "batch_size": 4}, "mask_train": {"epochs": 1.0, "batch_size": 4}}
INPUTS = {"train_records": 40}


def start(root: Path, command: str = "fft", **config: Any) -> Run:
    return create_run(root, command, {**CONFIG, **config}, inputs=INPUTS, stage="stage")


def train(run: Run, *steps: int, first_seconds: float = 10.0, folder: Path | None = None) -> None:
    """Writes the lines of these steps: two seconds and 100 tokens per second each, with a loss of 1 / step."""
    path = (folder or run.folder) / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        for number, step in enumerate(steps):
            line = {"step": step, "loss": 1 / step, "train_runtime": first_seconds + 2.0 * number}
            stream.write(json.dumps({**line, "train_tokens_per_second": 100.0}) + "\n")


def validate(run: Run, step: int, loss: float) -> None:
    with (run.folder / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"step": step, "eval_loss": loss}) + "\n")


def only(root: Path) -> RunProgress:
    [found] = follow(root)
    return found


def test_running_training_is_reported_in_full(tmp_path: Path) -> None:
    run = start(tmp_path)
    validate(run, 0, 3.0)
    train(run, 1, 2, 3, 4)
    validate(run, 4, 1.0)
    train(run, 5, first_seconds=18.0)
    validate(run, 5, 2.0)
    found = only(tmp_path)
    assert (found.run, found.command, found.stage, found.seed, found.status) == (
        "001-fft",
        "fft",
        "stage",
        3,
        "running",
    )
    assert (found.step, found.steps) == (5, 20)  # 40 records, 2 epochs, 4 records per step
    assert (found.train_loss, found.validation_loss, found.best_validation_loss) == (0.2, 2.0, 1.0)
    assert found.tokens_per_second == 100.0
    assert found.seconds_left == pytest.approx(15 * 2.0)
    assert found.written == pytest.approx(time.time(), abs=30)


def test_run_without_a_step_is_shown_with_its_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(tmp_path, "eval")
    written = (tmp_path / "001-eval" / "run.json").stat().st_mtime
    monkeypatch.setattr(watch.time, "time", lambda: written + 7.0)
    found = only(tmp_path)
    assert (found.step, found.steps, found.train_loss, found.seconds_left) == (None, None, None, None)
    assert found.seconds == pytest.approx(7.0)


def test_finished_run_is_shown_from_its_record_alone(tmp_path: Path) -> None:
    run = start(tmp_path)
    (run.folder / "metrics.jsonl").write_text("no metrics\n")
    run.finish(partial_result({"steps": 20, "best_loss": 0.5, "last_loss": 0.75}))
    found = only(tmp_path)
    assert (found.status, found.step, found.steps) == ("finished", 20, 20)
    assert (found.best_validation_loss, found.validation_loss, found.seconds_left) == (0.5, 0.75, None)


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_stopped_run_has_its_status_and_the_first_line_of_its_error(tmp_path: Path, status: Any) -> None:
    start(tmp_path).update(status=status, error="It broke.\n  where: there")
    found = only(tmp_path)
    assert (found.status, found.error) == (status, "It broke.")


def test_run_without_a_live_process_on_this_machine_was_killed(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    workers = {
        f"{platform.node()}:{dead.pid}": "killed",
        f"{platform.node()}:{os.getpid()}": "running",
        f"another-host:{dead.pid}": "running",
        "unreadable": "running",
        None: "running",
    }
    for worker in workers:
        start(tmp_path).update(worker=worker)
    found = follow(tmp_path)
    assert [item.status for item in found] == list(workers.values())
    assert found[0].seconds_left is None


def test_probe_is_shown_with_its_current_group(tmp_path: Path) -> None:
    run = start(tmp_path, "probe", probe={"epochs": 4.0})
    for layers in ("0-3", "4-7"):
        train(run, 1, 2, folder=run.folder / "groups" / layers)
    (run.folder / "groups" / "0-3" / "outcome.json").write_text("{}")
    found = only(tmp_path)
    assert (found.part, found.step, found.steps) == ("4-7", 2, 40)
    (run.folder / "groups" / "4-7" / "outcome.json").write_text("{}")
    assert (only(tmp_path).part, only(tmp_path).step) == (None, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "config", "steps"),
    [
        ("fft", {}, 20),
        ("fft", {"fft": {"max_steps": 7}}, 7),
        ("fft", {"fft": {"schedule": "unheard of"}}, None),
        ("mask-train", {}, 10),
        ("mask-train", {"mask_train": {"method": "learned", "batch_size": 8}}, 5),
        ("mask-train", {"mask_train": {"method": "random"}}, None),
        ("mask-train", {"mask_train": {"method": "drop"}}, None),
        ("probe", {"probe": {"fast": True}}, None),
        ("apply", {}, None),
    ],
)
def test_total_steps_follow_from_records_and_options(
    tmp_path: Path, command: str, config: dict[str, Any], steps: int | None
) -> None:
    start(tmp_path, command, **config)
    assert only(tmp_path).steps == steps


def test_processes_share_the_records_of_a_step(tmp_path: Path) -> None:
    start(tmp_path).update(processes=2)
    assert only(tmp_path).steps == 10


# Reading during writing


def test_an_incomplete_line_is_read_once_it_is_complete(tmp_path: Path) -> None:
    run, watched = start(tmp_path), Following(tmp_path)
    train(run, 1)
    path = run.folder / "metrics.jsonl"
    line = json.dumps({"step": 2, "loss": 0.25, "train_runtime": 12.0}) + "\n"
    with path.open("a") as stream:
        stream.write(line[:20])
    assert watched.refresh()[0].step == 1
    with path.open("a") as stream:
        stream.write(line[20:])
    assert (watched.refresh()[0].step, watched.refresh()[0].train_loss) == (2, 0.25)


def test_line_truncated_by_a_kill_is_skipped(tmp_path: Path) -> None:
    run = start(tmp_path)
    train(run, 1)
    with (run.folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 2, "lo\n[]\n')
    train(run, 3)
    assert only(tmp_path).step == 3


def test_resumed_training_is_counted_from_where_it_resumes(tmp_path: Path) -> None:
    run, watched = start(tmp_path), Following(tmp_path)
    validate(run, 0, 3.0)
    train(run, 1, 2, 3)
    validate(run, 3, 0.1)
    assert watched.refresh()[0].best_validation_loss == 0.1
    run.training.rewind(2)
    found = watched.refresh()[0]
    assert (found.step, found.best_validation_loss) == (2, 3.0)
    train(run, 3, 4, 5, first_seconds=1.0)  # the training clock restarts
    found = watched.refresh()[0]
    assert (found.step, found.seconds_left) == (5, pytest.approx(15 * 2.0))


@pytest.mark.slow
@settings(max_examples=40)
@given(st.lists(st.sampled_from(["step", "validation", "rewind", "look"]), max_size=30))
def test_intermediate_reads_change_nothing(tmp_path_factory: pytest.TempPathFactory, actions: list[str]) -> None:
    root = tmp_path_factory.mktemp("runs")
    run, watched, step = start(root), Following(root), 0
    for action in actions:
        if action == "step":
            step += 1
            train(run, step, first_seconds=float(step))
        elif action == "validation":
            validate(run, step, float(len(actions) % 7 - step))
        elif action == "rewind" and step:
            step -= 1
            run.training.rewind(step)
        else:
            watched.refresh()
    [seen], [fresh] = watched.refresh(), follow(root)
    names = ("step", "train_loss", "validation_loss", "best_validation_loss", "seconds_left")
    assert [getattr(seen, name) for name in names] == [getattr(fresh, name) for name in names]


def test_unchanged_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(5):
        start(tmp_path).finish(partial_result({}))
    run, watched = start(tmp_path), Following(tmp_path)
    train(run, 1, 2)
    watched.refresh()
    loaded: list[str] = []
    load = watch.load_run
    monkeypatch.setattr(watch, "load_run", lambda folder: loaded.append(folder.name) or load(folder))
    parsed: list[bytes] = []
    parse = watch.metrics_line
    monkeypatch.setattr(watch, "metrics_line", lambda text: parsed.append(text) or parse(text))
    assert watched.refresh()[-1].step == 2
    assert (loaded, parsed) == ([], [])
    train(run, 3)
    assert watched.refresh()[-1].step == 3
    assert (loaded, len(parsed)) == ([], 1)
    run.update(status="interrupted")
    assert watched.refresh()[-1].status == "interrupted"
    assert loaded == ["006-fft"]


def test_runs_come_and_go(tmp_path: Path) -> None:
    watched = Following(tmp_path / "runs")
    assert (watched.refresh(), watched.unreadable) == ([], ())
    run = start(tmp_path / "runs")
    assert [item.run for item in watched.refresh()] == ["001-fft"]
    run.folder.rename(tmp_path / "gone")
    assert watched.refresh() == []


@pytest.mark.parametrize(
    "content", [None, "{", '{"command": "fft", "status": "finished", "started": "", "config": null}']
)
def test_record_that_cannot_be_read_hides_no_other_run(tmp_path: Path, content: str | None) -> None:
    start(tmp_path)
    (tmp_path / "002-fft").mkdir()
    if content is not None:
        (tmp_path / "002-fft" / "run.json").write_text(content)
    watched = Following(tmp_path)
    assert [item.run for item in watched.refresh()] == ["001-fft"]
    assert watched.unreadable == ("002-fft",)
    (tmp_path / "002-fft" / "run.json").write_text((tmp_path / "001-fft" / "run.json").read_text())
    assert len(watched.refresh()) == 2
    assert watched.unreadable == ()
