"""Odd environments and streams: no traceback, and nothing that is missing from the output."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mftctl.cli.output import command_line
from mftctl.cli.streams import ForgivingWriter
from mftctl.data.sources import DataSource
from mftctl.errors import RunError
from mftctl.runs import create_run, list_runs, load_run


def report(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "mftctl", "report", *arguments]
    return subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, timeout=120)


@pytest.mark.parametrize(
    ("name", "text"), [("COLUMNS", "0"), ("COLUMNS", "1"), ("COLUMNS", "x"), ("MPLBACKEND", "nonsense")]
)
def test_what_only_says_how_to_show_things_ends_nothing(tmp_path: Path, name: str, text: str) -> None:
    done = report(tmp_path, **{name: text})
    assert (done.returncode, done.stderr.split(b"\n")[-2]) == (1, b"  try: mftctl fft, or --runs DIR")


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
def test_numbers_of_processes_that_are_none_are_one_error(tmp_path: Path, name: str) -> None:
    done = report(tmp_path, **{name: "x"})
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert f"key: {name}".encode() in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_text_that_the_encoding_lacks_is_spelled(encoding: str) -> None:
    code = "from mftctl.cli.streams import prepare_streams; prepare_streams(); print('a ± 1 × 2 − 3 ↑ 語')"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    signs = ("+-", "x") if encoding == "ascii" else ("±", "×")
    assert done.stdout.decode(encoding) == f"a {signs[0]} 1 {signs[1]} 2 - 3 ^ \\u8a9e\n"


def test_a_name_that_is_not_utf_8_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    done = report(tmp_path, "-o", os.fsdecode(b"\xff"))
    assert done.returncode == 2
    assert b"not UTF-8" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_a_closed_terminal_does_not_take_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(descriptor: int, data: bytes) -> int:
        raise OSError(errno.EIO, "gone")

    monkeypatch.setattr(os, "write", gone)
    assert ForgivingWriter(2, None).write(b"text") == 4


def test_a_pipe_in_the_place_of_a_record_blocks_nothing(tmp_path: Path) -> None:
    create_run(tmp_path, "fft", {})
    (tmp_path / "002-fft").mkdir()
    os.mkfifo(tmp_path / "002-fft" / "run.json")
    runs, errors = list_runs(tmp_path)
    assert [run.name for run in runs] == ["001-fft"]
    assert [error.path for error in errors] == [str(tmp_path / "002-fft" / "run.json")]
    with pytest.raises(RunError, match="not a readable run folder"):
        load_run(tmp_path / "002-fft")


def test_a_data_file_whose_name_holds_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert DataSource.parse("y=5") == DataSource("y", 5)
    Path("y=5").touch()
    assert DataSource.parse("y=5") == DataSource("y=5")


def test_the_next_command_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MFTCTL_RUNS", raising=False)
    assert command_line("mftctl", "eval", Path("a b"), runs=Path("other")) == "mftctl eval 'a b' --runs other"
    assert command_line("mftctl", "eval", Path("-x"), runs=Path("runs")) == "mftctl eval ./-x"
    monkeypatch.setenv("MFTCTL_RUNS", "other")
    assert command_line("mftctl", "probe", runs=Path("other")) == "mftctl probe"
