"""Entries of the cache: made once, whole or not at all, and again if they are damaged."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mftctl.data.prepared import encode, entries, load
from mftctl.data.prepared.cache_folder import TABLE, cache_folder, cache_use, clear_cache
from mftctl.data.prepared.entries import entry
from mftctl.data.sources import DataSource
from mftctl.errors import DataError, StorageError
from tests.data.prepared.preparing import Notes, prepare, write_questions


class Made:
    """Makes a file with a text and counts how often."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, path: Path) -> dict[str, Any]:
        self.times += 1
        path.write_text("content", encoding="utf-8")
        return {"n": 1}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the entries, which does not exist yet."""
    monkeypatch.setenv("MFTCTL_CACHE", str(tmp_path / "cache"))
    folder = cache_folder()
    assert folder is not None
    return folder


def test_an_entry_is_made_once(root: Path) -> None:
    make, notes = Made(), Notes()
    first, second = entry("a", make, notes), entry("a", make, notes)
    assert first == second
    assert first.table.read_text() == "content"
    assert first.summary == {"n": 1}
    assert make.times == 1
    assert entry("b", make, notes).name != first.name
    assert make.times == 2
    assert notes.notes == []
    assert cache_use().entries == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "no summary", "not JSON", "other summary"])
def test_a_damaged_entry_is_made_again(root: Path, damage: str) -> None:
    make, notes = Made(), Notes()
    table = entry("a", make, notes).table
    summary = table.with_name("summary.json")
    damages: dict[str, Callable[[], object]] = {
        "cut": lambda: table.write_text("conten"),
        "flipped": lambda: table.write_text("c0ntent"),
        "gone": table.unlink,
        "no summary": summary.unlink,
        "not JSON": lambda: summary.write_text("{"),
        "other summary": lambda: summary.write_text(summary.read_text().replace('"n": 1', '"n": 2')),
    }
    damages[damage]()
    again = entry("a", make, notes)
    assert (again.table.read_text(), again.summary) == ("content", {"n": 1})
    assert make.times == 2
    assert notes.notes == [f"The prepared data in {table.parent} is damaged; preparing it again."]


def test_nothing_is_kept_of_an_interrupted_preparation(root: Path) -> None:
    def interrupted(path: Path) -> dict[str, Any]:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        entry("a", interrupted, Notes())
    assert [path.name for path in root.rglob("*") if path.suffix != ".lock"] == []
    assert entry("a", Made(), Notes()).table.read_text() == "content"


def test_two_at_a_time_do_the_work_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "_TOLD_SECONDS", 0.0)
    begun, finish = threading.Event(), threading.Event()
    make, waiting = Made(), Notes()

    def slow(path: Path) -> dict[str, Any]:
        begun.set()
        assert finish.wait(30)
        return make(path)

    found: list[object] = []
    first = threading.Thread(target=lambda: found.append(entry("a", slow, Notes())))
    first.start()
    assert begun.wait(30)
    second = threading.Thread(target=lambda: found.append(entry("a", slow, waiting)))
    second.start()
    while not waiting.notes:
        assert second.is_alive()
    finish.set()
    first.join(30)
    second.join(30)
    assert found[0] == found[1]
    assert make.times == 1
    assert waiting.notes == ["Waiting for another process that prepares the same data."]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_cache_that_cannot_be_written(root: Path) -> None:
    root.parent.mkdir()
    root.parent.chmod(0o500)
    _without_cache(root, Notes())


def test_a_cache_whose_folder_is_a_file(root: Path) -> None:
    root.parent.write_text("mine")
    _without_cache(root, Notes())
    assert root.parent.read_text() == "mine"


def _without_cache(root: Path, notes: Notes) -> None:
    found = entry("a", Made(), notes)
    assert found.table.read_text() == "content"
    assert not found.table.is_relative_to(root)
    [note] = notes.notes
    assert note.startswith(f"The data is prepared for this command only: {root} cannot be written (")


def test_without_a_cache_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MFTCTL_CACHE", "off")
    make, notes = Made(), Notes()
    found = entry(str(tmp_path), make, notes)
    assert entry(str(tmp_path), make, notes) == found
    assert make.times == 1
    assert notes.notes == []


_KILLED = """
import os, signal
from pathlib import Path
from mftctl.data.prepared.entries import entry
from mftctl.progress import Silence

entry("a", lambda path: {"bytes": path.write_bytes(bytes(1000))}, Silence())
if KILLED:
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_later_command_removes_what_a_killed_one_without_a_cache_left(tmp_path: Path) -> None:
    environment = {**os.environ, "MFTCTL_CACHE": "off", "TMPDIR": str(tmp_path)}
    for killed, left in ((True, 1), (False, 0)):
        program = _KILLED.replace("KILLED", str(killed))
        subprocess.run([sys.executable, "-c", program], env=environment, check=False)
        assert len(list(tmp_path.iterdir())) == left


@pytest.mark.parametrize("kind", ["file", "folder", "link", "lock"])
def test_what_the_user_put_in_the_place_of_an_entry_stays(root: Path, tmp_path: Path, kind: str) -> None:
    place = entry("a", Made(), Notes()).table.parent
    clear_cache()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / TABLE).write_text("mine")
    things: dict[str, Callable[[], object]] = {
        "file": lambda: place.write_text("mine"),
        "folder": lambda: (place / "photos").mkdir(parents=True),
        "link": lambda: place.symlink_to(elsewhere),
        "lock": place.with_name(f"{place.name}.lock").mkdir,
    }
    things[kind]()
    before = set(root.rglob("*"))
    assert clear_cache().entries == 0
    _without_cache(root, Notes())
    clear_cache()
    assert set(root.rglob("*")) - before <= {place.with_name(f"{place.name}.lock")}
    assert before <= set(root.rglob("*"))
    assert (elsewhere / TABLE).read_text() == "mine"


def test_without_a_home_folder_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("MFTCTL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    notes = Notes()
    assert entry("without a home", Made(), notes).table.read_text() == "content"
    assert notes.notes == [
        "The data is prepared for this command only: there is no home folder; MFTCTL_CACHE may name one."
    ]
    assert (cache_use().folder, clear_cache().entries) == (None, 0)


def test_a_full_disk_of_temporary_files_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MFTCTL_CACHE", "off")

    def full(path: Path) -> dict[str, Any]:
        raise OSError(28, "No space left on device", str(path))

    with pytest.raises(StorageError) as caught:
        entry(str(tmp_path), full, Notes())
    assert caught.value.actual == "No space left on device"
    assert str(caught.value.path).endswith(TABLE)


def test_data_that_changes_is_prepared_again(root: Path, tmp_path: Path) -> None:
    path = write_questions(tmp_path / "data.jsonl", 5)
    before = list(prepare(path).records)
    write_questions(path, 6)
    after = list(prepare(path).records)
    assert len(after) == len(before) + 1
    assert cache_use().entries == 4
    moved = path.rename(tmp_path / "moved.jsonl")
    assert prepare(moved).records[0].where == f"{moved}:1"
    assert cache_use().entries == 4


def test_the_cache_is_cleared_but_for_what_is_being_prepared(root: Path) -> None:
    for key in ("a", "b"):
        entry(key, Made(), Notes())
    from mftctl.files.locks import try_lock

    kept = entry("c", Made(), Notes())
    lock = try_lock(root / f"{kept.name}.lock", create=True)
    assert lock is not None
    removed = clear_cache()
    assert (removed.entries, cache_use().entries) == (2, 1)
    assert removed.size_bytes > 2 * len("content")
    lock.release()
    assert clear_cache().entries == 1
    assert list(root.iterdir()) == []


@pytest.mark.slow
def test_a_lost_process_is_one_error(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_FEW_RECORDS", 100)
    monkeypatch.setenv("MFTCTL_DATA_PROCESSES", "2")
    path = write_questions(tmp_path / "data.jsonl", 3000)
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'mftctl.data.prepared.worker' in ' '.join(sys.orig_argv):\n"
        "    import signal, threading\n"
        "    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DataError, match="A process that prepares the data was lost") as caught:
        prepare(path)
    assert caught.value.actual == "exit status -9"
    assert [entry.name for entry in root.iterdir() if entry.is_dir() and entry.name.startswith(".")] == []


def test_data_that_changes_while_it_is_read_is_not_kept(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_questions(tmp_path / "data.jsonl", 5)
    digest = load.source_content_digest

    def then_grow(source: DataSource) -> str:
        found = digest(source)
        write_questions(path, 6)
        return found

    monkeypatch.setattr(load, "source_content_digest", then_grow)
    with pytest.raises(DataError, match="changed while it was read") as caught:
        prepare(path)
    assert caught.value.path == str(path)
    assert cache_use().entries == 0
