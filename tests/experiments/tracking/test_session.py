"""Tracking of a run: what is sent, what happens if a tracker fails, and how a resumed run goes on."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from mftctl.errors import Interrupted, TrainingError
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import parse_recipe
from mftctl.experiments.run_config import to_document
from mftctl.experiments.run_folder import Run, create_run
from mftctl.experiments.run_record import RunStatus
from mftctl.experiments.tracking import session
from mftctl.experiments.tracking.feed import without_secrets
from mftctl.experiments.tracking.session import tracked
from tests.experiments.tracking.fake_trackers import FakeLibraries, Lines


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> FakeLibraries:
    return FakeLibraries(monkeypatch)


def new_run(root: Path, *, stage: str | None = None, recipe: str | None = None, **changes: object) -> Run:
    return create_run(root, "fft", to_document(parse_recipe({"model": "tiny", **changes})), stage=stage, recipe=recipe)


def test_lines_and_result_arrive_in_order(tmp_path: Path, libraries: FakeLibraries) -> None:
    run, lines = new_run(tmp_path), Lines()
    with tracked(run, ("wandb", "mlflow"), lines) as take_result:
        for step in range(50):
            run.training.log({"step": step, "loss": float(step)})
        take_result({"best_loss": 0.5})
    for name in ("wandb", "mlflow"):
        (tracker,) = libraries.opened[name]
        assert tracker.lines == [(step, {"loss": float(step)}, "") for step in range(50)]
        assert tracker.closed == [(RunStatus.FINISHED, {"result/best_loss": 0.5})]
    assert sorted(lines.notes) == ["Tracking: mlflow, nowhere", "Tracking: wandb, nowhere"]
    assert lines.warnings == []
    assert lines.threads == {threading.main_thread()}
    run.training.log({"step": 50, "loss": 0.0})
    assert len(libraries.opened["wandb"][0].lines) == 50


@pytest.mark.parametrize("track", [(), ("none",)])
def test_off_by_default(tmp_path: Path, libraries: FakeLibraries, track: tuple[str, ...]) -> None:
    run = new_run(tmp_path)
    with tracked(run, track, Lines()):  # type: ignore[arg-type]
        run.training.log({"step": 0, "loss": 1.0})
        assert run.observer is None
    assert libraries.opened == {}
    assert not (run.folder / "tracking").exists()


def test_only_the_first_process_sends(
    tmp_path: Path, libraries: FakeLibraries, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with tracked(new_run(tmp_path), ("wandb",), Lines()) as take_result:
        take_result({"best_loss": 0.5})
    assert libraries.opened == {}


def test_a_missing_tracker_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = FakeLibraries(monkeypatch, missing=("wandb",))
    run = new_run(tmp_path)
    with tracked(run, ("wandb", "mlflow"), Lines()):
        run.training.log({"step": 0, "loss": 1.0})
    assert list(libraries.opened) == ["mlflow"]


def test_a_tracker_that_fails_midway_is_dropped_with_one_line(tmp_path: Path, libraries: FakeLibraries) -> None:
    libraries.options = {"fails_at": 2}
    run, lines = new_run(tmp_path), Lines()
    with tracked(run, ("wandb",), lines) as take_result:
        for step in range(5):
            run.training.log({"step": step, "loss": 1.0})
        take_result({"best_loss": 0.5})
    assert [step for step, _, _ in libraries.opened["wandb"][0].lines] == [0, 1]
    assert libraries.opened["wandb"][0].closed == []
    assert lines.warnings == [
        "--track wandb: nothing more is sent to it, as it failed: no route to https://***@tracker.example"
    ]
    assert len(run.training.metrics()) == 5


def test_a_tracker_that_cannot_be_opened_is_dropped_with_one_line(
    tmp_path: Path, libraries: FakeLibraries, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(name: str, run: object, state: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(session, "open_tracker", unreachable)
    run, lines = new_run(tmp_path), Lines()
    with tracked(run, ("mlflow",), lines):
        run.training.log({"step": 0, "loss": 1.0})
    assert lines.warnings == ["--track mlflow: nothing more is sent to it, as it failed: no space left on device"]


def test_a_broken_installation_is_one_line(
    tmp_path: Path, libraries: FakeLibraries, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> None:
        raise ImportError(f"cannot import {name}")

    monkeypatch.setattr(session, "import_module", broken)
    run, lines = new_run(tmp_path), Lines()
    with tracked(run, ("tensorboard",), lines):
        run.training.log({"step": 0, "loss": 1.0})
    assert lines.warnings == [
        "--track tensorboard: nothing more is sent to it, as it failed: cannot import torch.utils.tensorboard"
    ]


def test_a_tracker_that_never_answers_is_not_waited_for(
    tmp_path: Path, libraries: FakeLibraries, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "WAIT_SECONDS", 0.2)
    libraries.options = {"blocks": True}
    run, lines = new_run(tmp_path), Lines()
    start_seconds = time.monotonic()
    with tracked(run, ("wandb",), lines):
        for step in range(3):
            run.training.log({"step": step, "loss": 1.0})
        assert time.monotonic() - start_seconds < 5
    assert lines.warnings == ["--track wandb: it did not take the last numbers within 0.2 s."]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Interrupted("Stopped."), RunStatus.INTERRUPTED),
        (KeyboardInterrupt(), RunStatus.INTERRUPTED),
        (TrainingError("diverged"), RunStatus.FAILED),
    ],
)
def test_trackers_learn_how_a_run_ended(
    tmp_path: Path, libraries: FakeLibraries, error: BaseException, status: RunStatus
) -> None:
    run = new_run(tmp_path)

    def fails() -> None:
        with tracked(run, ("wandb",), Lines()):
            run.training.log({"step": 0, "loss": 1.0})
            raise error

    with pytest.raises(type(error)):
        fails()
    assert libraries.opened["wandb"][0].closed == [(status, {})]


def test_a_run_that_fails_before_its_first_line_is_not_tracked(tmp_path: Path, libraries: FakeLibraries) -> None:
    with pytest.raises(TrainingError), tracked(new_run(tmp_path), ("wandb",), Lines()):
        raise TrainingError("no data")
    assert libraries.opened == {}


def test_a_result_without_lines_is_tracked(tmp_path: Path, libraries: FakeLibraries) -> None:
    with tracked(new_run(tmp_path), ("wandb",), Lines()) as take_result:
        take_result({"removed": 12})
    assert libraries.opened["wandb"][0].closed == [(RunStatus.FINISHED, {"result/removed": 12.0})]


def log_steps(run: Run, *steps: int) -> None:
    for step in steps:
        run.training.log({"step": step, "loss": 1.0})


def test_repeated_steps_are_sent_once_to_the_same_tracked_run(tmp_path: Path, libraries: FakeLibraries) -> None:
    run = new_run(tmp_path)
    with tracked(run, ("wandb",), Lines()):
        log_steps(run, 1, 2, 3, 4)
        run.training.log({"step": 4, "eval_loss": 2.0})
    with tracked(run, ("wandb",), Lines()):
        run.training.rewind(2)
        log_steps(run, 3, 4, 5)
        run.training.log({"step": 4, "eval_loss": 2.0})
        run.training.log({"step": 4, "retained_loss": 2.0})
    first, second = libraries.opened["wandb"]
    assert (first.known, second.known) == (None, "wandb-id")
    assert [step for step, _, _ in first.lines] == [1, 2, 3, 4, 4]
    assert second.lines == [(5, {"loss": 1.0}, ""), (4, {"retained_loss": 2.0}, "")]


def test_a_tracker_added_on_resumption_gets_the_lines_before(tmp_path: Path, libraries: FakeLibraries) -> None:
    run = new_run(tmp_path)
    log_steps(run, 1, 2, 3)
    with tracked(run, ("mlflow",), Lines()):
        run.training.rewind(2)
        log_steps(run, 3, 4)
    (added,) = libraries.opened["mlflow"]
    assert [step for step, _, _ in added.lines] == [1, 2, 3, 4]


@pytest.mark.parametrize("fails_at", range(1, 8))
@pytest.mark.parametrize("saved", range(7))
def test_what_a_failed_tracker_missed_is_sent_on_resumption(
    tmp_path: Path, libraries: FakeLibraries, fails_at: int, saved: int
) -> None:
    run = new_run(tmp_path)
    libraries.options = {"fails_at": fails_at}
    with tracked(run, ("wandb",), Lines()):
        log_steps(run, *range(1, 7))
    libraries.options = {}
    for _ in range(2):  # stopped once more at the same point
        with tracked(run, ("wandb",), Lines()):
            run.training.rewind(saved)
            log_steps(run, *range(saved + 1, 9))
    sent = [step for tracker in libraries.opened["wandb"] for step, _, _ in tracker.lines]
    assert sent == list(range(1, 9))


def test_groups_of_a_probe_are_told_apart(tmp_path: Path, libraries: FakeLibraries) -> None:
    run = new_run(tmp_path)
    with tracked(run, ("wandb",), Lines()):
        for layers in ("0-1", "2-3"):
            run.training_in(run.folder / "groups" / layers).log({"step": 0, "eval_loss": 1.0})
    assert [training for _, _, training in libraries.opened["wandb"][0].lines] == ["layers 0-1", "layers 2-3"]


@pytest.mark.parametrize(
    ("name", "recipe", "stage", "expected"),
    [
        (None, None, None, ("mftctl", "001-fft")),
        ("my study", None, None, ("my study", "001-fft")),
        (None, "recipes/mine.yaml", "fft[learning_rate=1e-5]", ("mine", "fft[learning_rate=1e-5] fft seed 3")),
        ("a/b:c", "mine.yaml", "mft", ("a-b-c", "mft fft seed 3")),
    ],
)
def test_project_and_run_are_named_after_recipe_and_stage(
    tmp_path: Path,
    libraries: FakeLibraries,
    name: str | None,
    recipe: str | None,
    stage: str | None,
    expected: tuple[str, str],
) -> None:
    run = new_run(tmp_path, stage=stage, recipe=recipe, seed=3, **({"name": name} if name else {}))
    with tracked(run, ("wandb",), Lines()):
        run.training.log({"step": 0, "loss": 1.0})
    shown = libraries.opened["wandb"][0].run
    assert (shown.project, shown.name) == expected
    assert shown.config == run.record.config


def test_no_secret_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pass word")
    text = "401 for 0123456789abcdef at https://me:pass word@host/ and http://me:other@host:5000/api, pass word"
    shown = without_secrets(text)
    for secret in ("0123456789abcdef", "pass word", "other"):
        assert secret not in shown
    assert "host:5000/api" in shown


def test_tracking_does_not_decide_the_result() -> None:
    from mftctl.experiments.deciding_keys import deciding_keys

    for command in ("fft", "probe", "mask-train", "eval"):
        with_trackers = Recipe(track=("wandb", "tensorboard"))
        assert deciding_keys(with_trackers, command) == deciding_keys(Recipe(), command)
