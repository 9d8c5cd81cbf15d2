from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mftctl.cli.environment_checks import check_environment, settle_environment
from mftctl.errors import ConfigError
from tests.cli.running import CommandLine
from tests.reporting.run_folders import write_experiment


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"])
@pytest.mark.parametrize("text", ["x", "", "-1", "1.5", "²"])
def test_an_invalid_process_number(mftctl: CommandLine, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    monkeypatch.setenv(name, text)
    outcome = mftctl("report")
    assert outcome.code == 2
    assert f"key: {name}" in outcome.stderr
    assert outcome.stderr.startswith("Error: ")


def test_a_rank_out_of_range_is_reported_by_this_process(mftctl: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    outcome = mftctl("report")
    assert outcome.code == 2
    assert "less than WORLD_SIZE, 1" in outcome.stderr


def test_valid_process_numbers_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, text)
    check_environment([])


@pytest.mark.parametrize("text", ["0", "1", "19", "x", "-5", "", "²", "100000", "9" * 5000])
def test_an_implausible_terminal_width_is_ignored(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("COLUMNS", text)
    settle_environment()
    assert "COLUMNS" not in os.environ


def test_a_plausible_terminal_width_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("LINES", "24")
    settle_environment()
    assert (os.environ["COLUMNS"], os.environ["LINES"]) == ("20", "24")


@pytest.mark.slow
@pytest.mark.parametrize("columns", ["0", "1", "20", "37", "79"])
def test_no_number_of_a_report_is_cut_off(tmp_path: Path, columns: str) -> None:
    write_experiment(tmp_path / "runs")
    command = [sys.executable, "-m", "mftctl", "report"]
    environment = {**os.environ, "COLUMNS": columns, "MPLBACKEND": "nonsense"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "…" not in done.stdout
    assert "continued" in done.stdout


def test_an_argument_that_is_not_utf_8(mftctl: CommandLine) -> None:
    outcome = mftctl("mask", "info", os.fsdecode(b"mask-\xff.bits"))
    assert outcome.code == 2
    assert "argument 3" in outcome.stderr
    assert r"mask-\xff.bits" in outcome.stderr


@pytest.mark.slow
@pytest.mark.parametrize("option", ["-m", "-d", "-o", "--runs", "--recipe", "--val-data"])
def test_nothing_is_written_for_a_name_that_is_not_utf_8(tmp_path: Path, option: str) -> None:
    command: list[str | bytes] = [sys.executable, "-m", "mftctl", "fft", option, b"name-\xff"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 2, done.stderr
    assert rb"name-\xff" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_current_folder_that_is_not_utf_8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"folder-\xff")
    folder.mkdir()
    done = subprocess.run([sys.executable, "-m", "mftctl", "fft"], cwd=folder, capture_output=True, check=False)
    assert done.returncode == 2
    assert rb"folder-\xff" in done.stderr
    assert not list(folder.iterdir())


def test_a_runs_folder_of_the_environment_that_is_not_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MFTCTL_RUNS", os.fsdecode(b"runs-\xff"))
    with pytest.raises(ConfigError) as caught:
        check_environment(["report"])
    assert caught.value.key == "MFTCTL_RUNS"


@pytest.mark.slow
def test_a_current_folder_that_was_deleted(tmp_path: Path) -> None:
    code = f"cd {tmp_path}/gone && rmdir ../gone && exec {sys.executable} -m mftctl env"
    (tmp_path / "gone").mkdir()
    done = subprocess.run(["sh", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "The current folder was deleted" in done.stderr
