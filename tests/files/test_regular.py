"""Special files in place of regular ones: reported in one line, and never waited for."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from mftctl.files.regular import open_regular, read_regular


def put_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


MAKERS: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
    "No such device": put_socket,
}


def test_a_file_is_read_whole_also_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link") == b"x" * 100_000
    with open_regular(tmp_path / "file") as stream:
        stream.seek(99_999)
        assert stream.read() == b"x"


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", MAKERS)
def test_a_special_file_is_named_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)  # socket paths must be short
    MAKERS[kind](Path("file"))
    with pytest.raises(OSError, match=kind) as caught:
        read_regular(Path("file"))
    assert caught.value.filename == "file"


def test_a_missing_file_is_reported_as_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "file")
