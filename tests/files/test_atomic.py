from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mftctl.files.atomic import _rename, atomic_file, atomic_folder, write_text


class StoppedError(Exception):
    """Stands for any reason why a write may end early."""


@pytest.fixture
def umask() -> Iterator[int]:
    previous = os.umask(0o027)
    yield 0o027
    os.umask(previous)


def anything(path: Path) -> None:
    """Permits any path to be replaced."""


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_write_text_creates_the_file_and_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "note.txt"
    write_text(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    assert list(path.parent.iterdir()) == [path]


def test_file_stays_the_old_one_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("old")
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent.parent == path.parent
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("existing", [True, False])
def test_failing_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, existing: bool) -> None:
    path = tmp_path / "run.json"
    if existing:
        path.write_text("old")

    def write() -> None:
        with atomic_file(path) as temporary:
            temporary.write_text("half of the n")
            raise StoppedError

    with pytest.raises(StoppedError):
        write()
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == ({"run.json": "old"} if existing else {})


def test_file_and_folder_get_the_permissions_of_any_other(tmp_path: Path, umask: int) -> None:
    write_text(tmp_path / "file", "")
    with atomic_folder(tmp_path / "folder", anything):
        pass
    assert mode(tmp_path / "file") == 0o666 & ~umask
    assert mode(tmp_path / "folder") == 0o777 & ~umask


@pytest.mark.slow
def test_writing_from_many_threads_leaves_the_umask_alone(tmp_path: Path, umask: int) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write_text(tmp_path / str(number), "text"), range(64)))
    assert os.umask(umask) == umask
    assert {mode(path) for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_folder_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "old.txt").write_text("old")
    with atomic_folder(path, anything) as temporary:
        (temporary / "new.txt").write_text("new")
        assert [file.name for file in path.iterdir()] == ["old.txt"]
    assert [file.name for file in path.iterdir()] == ["new.txt"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("existing", [True, False])
def test_new_folder_is_synced_before_it_replaces_the_old_one(
    tmp_path: Path, existing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    if existing:
        path.mkdir()
        (path / "old.txt").write_text("old")
    synced = []

    def fsync(handle: int) -> None:
        assert path.exists() == existing
        assert not existing or (path / "old.txt").exists()
        synced.append(os.read(handle, 9))

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_folder(path, anything) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "new.txt").write_text("new")
        (temporary / "sub" / "other.txt").write_text("other")
    assert sorted(synced) == ([b"new", b"other"] if existing else [])


def test_folder_replaces_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_text("a file")
    with atomic_folder(path, anything) as temporary:
        (temporary / "new.txt").write_text("new")
    assert [file.name for file in path.iterdir()] == ["new.txt"]
    assert list(tmp_path.iterdir()) == [path]


def test_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "a" / "model", anything) as temporary:
        (temporary / "new.txt").write_text("new")
    assert (tmp_path / "a" / "model" / "new.txt").read_text() == "new"


@pytest.mark.parametrize("existing", [True, False])
def test_failing_block_leaves_the_old_folder_and_nothing_else(tmp_path: Path, existing: bool) -> None:
    path = tmp_path / "model"
    if existing:
        path.mkdir()
        (path / "old.txt").write_text("old")

    def write() -> None:
        with atomic_folder(path, anything) as temporary:
            (temporary / "new.txt").write_text("new")
            raise StoppedError

    with pytest.raises(StoppedError):
        write()
    assert [file.name for file in tmp_path.rglob("*")] == (["model", "old.txt"] if existing else [])


@pytest.mark.parametrize("in_one_step", [True, False])
def test_an_existing_folder_is_replaced_on_any_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_one_step: bool
) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "old.txt").write_text("old")
    if not in_one_step:
        monkeypatch.setattr("mftctl.files.atomic._rename", lambda *_: False)
    with atomic_folder(path, anything) as temporary:
        (temporary / "new.txt").write_text("new")
    assert [file.name for file in tmp_path.rglob("*")] == ["model", "new.txt"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges names")
def test_an_exchange_that_fails(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with pytest.raises(FileNotFoundError):
        _rename(tmp_path / "one", tmp_path / "missing", 2)


def test_failing_exchange_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "old.txt").write_text("old")
    replace = Path.replace

    def failing(source: Path, target: Path) -> Path:
        if target == path and (source / "new.txt").exists():
            raise OSError("no space left on device")
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", failing)
    monkeypatch.setattr("mftctl.files.atomic._rename", lambda *_: False)
    with pytest.raises(OSError, match="no space left"), atomic_folder(path, anything) as temporary:
        (temporary / "new.txt").write_text("new")
    assert [file.name for file in tmp_path.rglob("*")] == ["model", "old.txt"]
