from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mftctl.files.locks import locked_folder, try_lock


def test_only_one_holds_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    lock = try_lock(path, create=True)
    assert lock is not None
    assert try_lock(path) is None
    lock.release()
    lock.release()
    second = try_lock(path)
    assert second is not None
    second.release()


def test_a_process_that_ends_releases_its_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = "import sys, pathlib; from mftctl.files.locks import try_lock; "
    code += "lock = try_lock(pathlib.Path(sys.argv[1]), create=True); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert try_lock(path) is None
        process.kill()
    lock = try_lock(path)
    assert lock is not None
    lock.release()


def test_a_missing_file_cannot_be_locked(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        try_lock(tmp_path / "missing")


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    with pytest.raises(OSError, match="symbolic links"):
        try_lock(tmp_path / "link", create=True)


def test_a_lock_on_a_removed_file_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    lock = try_lock(path, create=True)
    assert lock is not None
    assert lock.is_on(path)
    path.unlink()
    assert not lock.is_on(path)
    path.touch()
    assert not lock.is_on(path)
    lock.release()


@pytest.mark.slow
def test_a_folder_is_locked_during_the_block(tmp_path: Path) -> None:
    code = "import sys, pathlib; from mftctl.files.locks import locked_folder\n"
    code += "with locked_folder(pathlib.Path(sys.argv[1])):\n    pathlib.Path(sys.argv[1], 'in').touch()"
    with locked_folder(tmp_path):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1.5)
        assert list(tmp_path.iterdir()) == []
    assert process.wait(timeout=20) == 0
    assert list(tmp_path.iterdir()) == [tmp_path / "in"]
