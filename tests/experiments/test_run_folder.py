from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mftctl.errors import ConfigError, DataError, Interrupted, MaskFileError, RunError, StorageError
from mftctl.experiments import run_folder
from mftctl.experiments.fingerprints import source_digest
from mftctl.experiments.recipe_yaml import read_yaml
from mftctl.experiments.recording import recorded
from mftctl.experiments.run_folder import Run, create_run, list_runs, load_run, newest_run
from mftctl.experiments.training_folder import TrainingFolder
from mftctl.files.temporary import temporary_folder
from tests.partial_results import partial_result


def finished(root: Path, command: str, **result: object) -> Run:
    run = create_run(root, command, {"seed": 0})
    run.finish(partial_result(result))
    return run


def test_new_run_has_its_record_and_its_configuration(tmp_path: Path) -> None:
    run = create_run(
        tmp_path / "runs",
        "mask-train",
        {"model": "größe", "seed": 3},
        recipe="quickstart",
        inputs={"model": "m"},
        output=Path("mask.bits"),
        stage="mft",
        digest="abc",
    )
    assert run.folder == tmp_path / "runs" / "001-mask-train"
    assert run.name == "001-mask-train"
    assert yaml.safe_load((run.folder / "config.yaml").read_text("utf-8")) == {"model": "größe", "seed": 3}
    record = json.loads((run.folder / "run.json").read_text("utf-8"))
    assert record["command"] == "mask-train"
    assert record["status"] == "running"
    assert record["config"] == {"model": "größe", "seed": 3}
    assert record["inputs"] == {"model": "m"}
    assert record["output"] == str(Path("mask.bits").absolute())
    assert (record["recipe"], record["stage"], record["digest"]) == ("quickstart", "mft", "abc")
    assert {"python", "torch", "transformers"} <= set(record["versions"])
    assert record["versions"]["mftctl source"] == source_digest()
    assert load_run(run.folder).record == run.record


@pytest.mark.slow
@given(st.from_regex(r"[-+]?[0-9]{0,3}\.?[0-9]{0,2}[eE]?[-+]?[0-9]{0,3}", fullmatch=True) | st.floats(allow_nan=False))
def test_configuration_reads_back_as_a_recipe_with_texts_as_texts_and_numbers_as_numbers(value: str | float) -> None:
    with TemporaryDirectory() as folder:
        run = create_run(Path(folder), "fft", {"revision": value, "fft": {"learning_rate": 1e-5}})
        found = read_yaml(run.folder / "config.yaml")
    assert found == {"revision": value, "fft": {"learning_rate": 1e-5}}
    assert type(found["revision"]) is type(value)


def test_numbers_continue_after_the_highest(tmp_path: Path) -> None:
    (tmp_path / "007-fft").mkdir()
    (tmp_path / "099-probe.txt").write_text("no folder")
    (tmp_path / "notes").mkdir()
    assert create_run(tmp_path, "eval", {}).name == "008-eval"
    (tmp_path / "1000-eval").mkdir()
    assert create_run(tmp_path, "eval", {}).name == "1001-eval"


@pytest.mark.slow
def test_runs_that_start_together_get_separate_folders(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(lambda seed: create_run(tmp_path, "eval", {"seed": seed}), range(24)))
    assert sorted(run.name for run in created) == [f"{number:03d}-eval" for number in range(1, 25)]
    assert {run.folder: run.record.config["seed"] for run in list_runs(tmp_path)[0]} == {
        run.folder: run.record.config["seed"] for run in created
    }


def test_runs_folder_that_cannot_be_made_is_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RunError, match="cannot be written") as caught:
        create_run(tmp_path / "runs", "fft", {})
    assert caught.value.hint == "--runs DIR"


def test_finished_run_reads_back_with_its_result(tmp_path: Path) -> None:
    run = create_run(tmp_path, "fft", {})
    run.update(inputs={"model": "m"})
    run.finish(partial_result({"state": "FFT", "best_loss": 0.5}))
    record = load_run(run.folder).record
    assert (record.status, record.result, record.inputs) == (
        "finished",
        {"state": "FFT", "best_loss": 0.5},
        {"model": "m"},
    )


def test_seconds_include_all_resumptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(run_folder.time, "monotonic", lambda: clock[0])
    run = create_run(tmp_path, "fft", {})
    clock[0] += 4
    run.update(status="interrupted")
    clock[0] += 1000
    resumed = load_run(run.folder)
    clock[0] += 3
    resumed.finish(partial_result({}))
    assert load_run(run.folder).record.seconds == pytest.approx(7)


def test_failing_write_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = create_run(tmp_path, "fft", {})
    before = (run.folder / "run.json").read_bytes()
    write = Path.write_text

    def half(path: Path, text: str, **options: str) -> int:
        write(path, text[: len(text) // 2], **options)
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(OSError, match="no space left"):
            run.finish(partial_result({"state": "FFT"}))
    assert (run.folder / "run.json").read_bytes() == before
    assert sorted(path.name for path in run.folder.iterdir()) == ["config.yaml", "run.json"]


def test_a_folder_is_created_with_its_record_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    rename = Path.rename

    def watching(source: Path, target: Path) -> Path:
        seen.append(sorted(path.name for path in source.iterdir()))
        assert not target.exists()
        return rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", watching)
        create_run(tmp_path, "fft", {})
    assert seen == [["config.yaml", "run.json"]]
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
    with pytest.raises(RunError):
        create_run(tmp_path, "fft", {})
    assert [path.name for path in tmp_path.iterdir()] == ["001-fft"]


def test_a_finished_run_has_no_checkpoints_but_those_that_a_kill_left(tmp_path: Path) -> None:
    run, other = create_run(tmp_path, "fft", {}), create_run(tmp_path, "fft", {})
    for folder in (run.folder, other.folder):
        (folder / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    run.finish(partial_result({}))
    assert not run.training.checkpoints.exists()
    (run.folder / "checkpoints").mkdir()
    create_run(tmp_path, "fft", {})
    assert not run.training.checkpoints.exists()
    assert other.training.checkpoints.exists()


def test_partial_results_of_a_killed_command_are_removed_by_the_next_run(tmp_path: Path) -> None:
    run = create_run(tmp_path, "apply", {})
    code = "import os, pathlib, sys\nfrom mftctl.files.temporary import temporary_folder\n"
    code += "kept = [temporary_folder(pathlib.Path(folder)) for folder in sys.argv[1:]]\n"
    code += "for manager in kept:\n    manager.__enter__()\nos._exit(0)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path), str(run.folder)], check=True)
    with temporary_folder(run.folder) as mine:
        assert len(list(tmp_path.rglob(".mftctl-tmp-*"))) == 3
        create_run(tmp_path, "apply", {})
        assert list(tmp_path.rglob(".*")) == [mine]


def test_result_that_is_not_plain_data_leaves_the_old_record(tmp_path: Path) -> None:
    run = create_run(tmp_path, "fft", {})
    with pytest.raises(TypeError):
        run.finish(partial_result({"model": object()}))
    assert load_run(run.folder).record.status == "running"


@pytest.mark.parametrize(
    "content",
    [None, b"", b'{"command": "fft"', b"[]", b"\xff\xfe", b'{"command": "fft"}', b'{"unknown": 1}'],
    ids=["missing", "empty", "cut short", "no mapping", "no text", "fields missing", "fields unknown"],
)
def test_unreadable_record_is_a_run_error(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(RunError, match="not a readable run folder") as caught:
        load_run(tmp_path)
    assert caught.value.path == str(tmp_path / "run.json")


def test_list_has_all_sound_runs_oldest_first_and_an_error_for_each_other(tmp_path: Path) -> None:
    for number in (10, 9, 100):
        (tmp_path / f"{number:03d}-fft").mkdir()
        (tmp_path / f"{number:03d}-fft" / "run.json").write_text(
            json.dumps({"command": "fft", "status": "finished", "started": "", "config": {}})
        )
    (tmp_path / "011-eval").mkdir()
    found, errors = list_runs(tmp_path)
    assert [run.name for run in found] == ["009-fft", "010-fft", "100-fft"]
    assert [error.path for error in errors] == [str(tmp_path / "011-eval" / "run.json")]


def test_folder_that_is_missing_has_no_runs(tmp_path: Path) -> None:
    assert list_runs(tmp_path / "runs") == ([], [])
    assert newest_run(tmp_path / "runs", "fft") is None


def test_newest_run_is_the_newest_finished_one_of_these_commands(tmp_path: Path) -> None:
    first, second = finished(tmp_path, "fft"), finished(tmp_path, "fft")
    finished(tmp_path, "eval")
    create_run(tmp_path, "fft", {})
    found = newest_run(tmp_path, "fft")
    assert found is not None
    assert found.name == second.name
    (second.folder / "run.json").write_text("{")
    found = newest_run(tmp_path, "fft", "apply")
    assert found is not None
    assert found.name == first.name
    assert newest_run(tmp_path, "apply") is None


def test_killed_run_counts_as_running_and_can_be_resumed(tmp_path: Path) -> None:
    killed = create_run(tmp_path, "fft", {})
    assert load_run(killed.folder).record.status == "running"
    assert newest_run(tmp_path, "fft") is None
    found = newest_run(tmp_path, "fft", unfinished=True)
    assert found is not None
    assert found.name == killed.name


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (Interrupted("Stopped."), "interrupted", None),
        (DataError("The file is empty.", path="a.jsonl"), "failed", "The file is empty.\n  where: a.jsonl"),
        (StorageError("No room."), "interrupted", "No room."),
    ],
)
def test_failure_is_recorded_and_reraised(
    tmp_path: Path, error: BaseException, status: str, message: str | None
) -> None:
    run = create_run(tmp_path, "fft", {})
    with pytest.raises(type(error)), recorded(run):
        raise error
    record = load_run(run.folder).record
    assert (record.status, record.error) == (status, message)


@pytest.mark.parametrize(("error", "resumable"), [(Interrupted("Stopped."), True), (DataError("Empty."), False)])
def test_interrupted_run_can_be_resumed_and_a_failed_one_cannot(
    tmp_path: Path, error: Exception, resumable: bool
) -> None:
    run = create_run(tmp_path, "fft", {})
    with pytest.raises(type(error)), recorded(run):
        raise error
    assert (newest_run(tmp_path, "fft", unfinished=True) is not None) == resumable


def test_a_full_disk_is_a_known_failure_even_if_the_record_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    run = create_run(tmp_path, "fft", {})
    with pytest.raises(StorageError, match="cannot be read or written") as caught, recorded(run):
        raise full
    assert (caught.value.path, caught.value.hint) == (str(run.folder), "free some space")
    assert load_run(run.folder).record.status == "interrupted"
    run.update(status="running", error=None)
    monkeypatch.setattr(run_folder, "write_text", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(StorageError), recorded(run):
        raise full
    assert load_run(run.folder).record.status == "running"
    assert newest_run(tmp_path, "fft", unfinished=True) is not None


def test_a_run_that_failed_for_lack_of_space_can_be_resumed(tmp_path: Path) -> None:
    run = create_run(tmp_path, "mask-train", {})
    with pytest.raises(MaskFileError), recorded(run):
        raise MaskFileError("The mask file cannot be written") from OSError(errno.ENOSPC, "No space left on device")
    assert load_run(run.folder).record.status == "interrupted"


def test_a_finished_run_does_not_keep_an_earlier_error(tmp_path: Path) -> None:
    run = create_run(tmp_path, "fft", {})
    with pytest.raises(DataError), recorded(run):
        raise DataError("Empty.")
    run.finish(partial_result({}))
    assert load_run(run.folder).record.error is None


def test_metrics_read_back_in_order(tmp_path: Path) -> None:
    folder = TrainingFolder(tmp_path / "groups" / "0-3", "probe")
    assert folder.metrics() == []
    lines = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25, "note": "größe\u2028"}]
    for line in lines:
        folder.log(line)
    assert [line.document() for line in folder.metrics()] == lines
    assert folder.checkpoints == folder.folder / "checkpoints"


def test_rewind_drops_what_was_logged_after_the_step(tmp_path: Path) -> None:
    folder = TrainingFolder(tmp_path, "fft")
    for step in (0, 1, 2, 2, 3):
        folder.log({"step": step})
    folder.rewind(2)
    assert [line.step for line in folder.metrics()] == [0, 1, 2, 2]
    folder.rewind(-1)
    assert folder.metrics() == []


def test_line_that_a_kill_cut_short_is_dropped(tmp_path: Path) -> None:
    folder = TrainingFolder(tmp_path, "fft")
    folder.log({"step": 1})
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 2, "lo')
    assert [line.document() for line in folder.metrics()] == [{"step": 1}]
    folder.rewind(5)
    folder.log({"step": 2})
    assert [line.document() for line in folder.metrics()] == [{"step": 1}, {"step": 2}]


# Concurrent processes


def test_a_run_of_a_live_process_is_not_resumed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        run = create_run(tmp_path, "fft", {})
        run.update(worker=f"{platform.node()}:{other.pid}")
        assert load_run(run.folder).is_worked_on
        with pytest.raises(RunError, match="Another process is working on this run") as caught:
            load_run(run.folder).go_on()
        assert str(other.pid) in str(caught.value.actual)
        run.update(status="interrupted")
        assert not load_run(run.folder).is_worked_on
        run.update(status="running")
        assert other.stdin is not None
        other.stdin.close()
        other.wait()
    taken = load_run(run.folder)
    taken.go_on()
    assert load_run(run.folder).record.worker == f"{platform.node()}:{os.getpid()}"


@pytest.mark.parametrize("worker", [None, "", "elsewhere:1", "damaged"])
def test_a_run_of_another_machine_or_without_a_process_is_resumed(tmp_path: Path, worker: str | None) -> None:
    run = create_run(tmp_path, "fft", {})
    run.update(worker=worker)
    assert not run.is_worked_on
    run.go_on()
    assert run.record.status == "running"


def test_resuming_sees_later_writes_of_another_process(tmp_path: Path) -> None:
    run = create_run(tmp_path, "fft", {})
    load_run(run.folder).update(status="interrupted", inputs={"model": "m"})
    run.go_on()
    assert run.record.inputs == {"model": "m"}


def test_resuming_with_changed_code_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = create_run(tmp_path, "fft", {})
    before = run.record.versions
    run.go_on()
    assert run.record.versions == before
    monkeypatch.setattr(run_folder, "source_digest", lambda: "0123456789ab")
    for _ in range(2):
        run.go_on()
        assert run.record.versions == {**before, run_folder.SOURCE: f"{before[run_folder.SOURCE]}, then 0123456789ab"}
    run.update(versions={})
    run.go_on()
    assert load_run(run.folder).record.versions["torch"] == f"not recorded, then {before['torch']}"


def test_a_run_that_could_not_be_read_back_is_not_created(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not valid UTF-8"):
        create_run(tmp_path / "runs", "fft", {}, inputs={"model": os.fsdecode(b"model-\xff")})
    with pytest.raises(ConfigError, match="not valid UTF-8"):
        create_run(tmp_path / "runs", "fft", {"revision": "\ud800"})
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_with_a_name_that_is_not_utf_8_is_reported(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"001-\xff")).mkdir()
    create_run(tmp_path, "fft", {})
    run_folder, errors = list_runs(tmp_path)
    assert [run.name for run in run_folder] == ["002-fft"]
    assert [error.path for error in errors] == [f"{tmp_path}/001-\\xff"]
