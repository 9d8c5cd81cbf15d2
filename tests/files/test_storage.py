from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from mftctl.errors import StorageError
from mftctl.files.atomic import is_alive, known_failures, require_writable


@pytest.mark.parametrize(
    "number",
    [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO, errno.ENAMETOOLONG, errno.ELOOP],
)
def test_a_system_error_is_a_known_failure(number: int) -> None:
    with pytest.raises(StorageError, match="cannot be read or written") as caught, known_failures(Path("folder")):
        raise OSError(number, os.strerror(number), "folder/file")
    assert (caught.value.path, caught.value.actual) == ("folder/file", os.strerror(number))
    assert caught.value.hint


def test_an_error_without_a_file_names_the_folder() -> None:
    with pytest.raises(StorageError) as caught, known_failures(Path("folder")):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.path == "folder"


def test_other_failures_propagate() -> None:
    with pytest.raises(FileNotFoundError), known_failures():
        Path("missing").read_text()


def test_a_result_in_a_folder_that_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_writable(tmp_path / "new" / "model")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(StorageError, match="cannot be written there") as caught:
        require_writable(tmp_path / "new" / "model")
    assert caught.value.path == str(tmp_path)
    assert caught.value.hint == "another --output"


def test_live_processes() -> None:
    assert is_alive(os.getpid())
    with subprocess.Popen(["true"], stdout=subprocess.PIPE) as ended:
        assert ended.stdout is not None
        ended.stdout.read()  # end of output: the process has exited
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        assert not is_alive(ended.pid)  # a zombie
    assert not is_alive(ended.pid)
