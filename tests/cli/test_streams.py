"""Output in every encoding, and to closed terminals and pipes: messages may be lost, results never."""

from __future__ import annotations

import errno
import fcntl
import io
import logging
import os
import pty
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mftctl.cli import app
from mftctl.cli.streams import ForgivingWriter, prepare_streams
from mftctl.masking.mask import load_mask
from tests.forked_commands.commands import ForkedCommands


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", f"from mftctl.cli.streams import prepare_streams\n{code}"]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, check=False, timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", b"+- x - ^ v >> << \\xfc \\u4e2d \\U0001f600 \\udcff\n"),
        ("latin-1", b"\xb1 \xd7 - ^ v \xbb \xab \xfc \\u4e2d \\U0001f600 \\udcff\n"),
        ("utf-8", "± × − ↑ ↓ » « ü 中 😀 \\udcff\n".encode()),
    ],
)
def test_characters_that_an_encoding_lacks_are_replaced_or_escaped(encoding: str, expected: bytes) -> None:
    text = "± × − ↑ ↓ » « ü 中 😀 \udcff"
    code = f"import sys\nprepare_streams()\nprint({text!r})\nprint({text!r}, file=sys.stderr)"
    done = run_python(code, PYTHONIOENCODING=encoding)
    assert (done.stdout, done.stderr) == (expected, expected)


@given(st.text(st.characters()))
def test_any_text_can_be_written_in_ascii(text: str) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        prepare_streams()
        stream.write(text)
        stream.flush()
    assert raw.getvalue().isascii()
    assert stream.errors == "mftctl.spelling"


@pytest.mark.slow
def test_closed_streams_are_not_replaced_by_opened_files(tmp_path: Path) -> None:
    code = "from mftctl.cli.app import main; import sys; sys.argv = ['mftctl', 'env']; main()"
    closed = f'exec {sys.executable} -c "{code}" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", closed], cwd=tmp_path, check=False, timeout=120).returncode == 0


@pytest.mark.parametrize("number", [errno.EIO, errno.EPIPE, errno.ENOSPC])
def test_a_message_that_cannot_be_written_is_dropped(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(descriptor: int, data: bytes) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", refuse)
    assert ForgivingWriter(2, None).write(b"12345") == 5


def test_a_result_that_cannot_be_written_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(OSError, match="No space"):
        ForgivingWriter(1, frozenset({errno.EIO})).write(b"12345")


def test_a_full_pipe_is_waited_for() -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETFL, fcntl.fcntl(writing, fcntl.F_GETFL) | os.O_NONBLOCK)
    data = b"x" * 500_000
    found = bytearray()

    def read() -> None:
        time.sleep(0.1)
        while len(found) < len(data):
            found.extend(os.read(reading, 65536))

    reader = threading.Thread(target=read)
    reader.start()
    with io.BufferedWriter(ForgivingWriter(writing, None)) as stream:
        stream.write(data)
    reader.join()
    assert bytes(found) == data
    for descriptor in (reading, writing):
        os.close(descriptor)


def training(workspace: Path) -> list[str]:
    options = ["--layers", "0-3", "--batch-size", "1", "--val-steps", "10", "--max-steps", "20"]
    data = ["-m", str(workspace / "tiny"), "-d", str(workspace / "train.jsonl")]
    return ["mask-train", *data, *options]


@pytest.mark.slow
def test_a_closed_pipe_of_messages_does_not_end_a_training(
    workspace: Path, tmp_path: Path, forked_commands: ForkedCommands
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [*forked_commands.mftctl, *training(workspace)]
    done = subprocess.run(command, cwd=tmp_path, stderr=writing, stdout=subprocess.PIPE, check=False)
    os.close(writing)
    assert done.returncode == 0
    assert b"validation loss" in done.stdout
    assert len(load_mask(tmp_path / "mask.bits"))


@pytest.mark.slow
def test_a_terminal_that_is_gone_does_not_end_a_training(workspace: Path, tmp_path: Path) -> None:
    """Both streams are a terminal with live bars that closes during training; the process ignores SIGHUP."""
    master, terminal = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "mftctl", *training(workspace)],
        cwd=tmp_path,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    ) as process:
        os.close(terminal)
        shown = b""
        while b"training" not in shown:
            shown += os.read(master, 4096)
        os.close(master)
        assert process.wait(timeout=240) == 0
    assert len(load_mask(tmp_path / "mask.bits"))
    assert '"status": "finished"' in (tmp_path / "runs" / "001-mask-train" / "run.json").read_text()


def test_a_progress_bar_of_a_library_stays_on_its_line() -> None:
    code = r"import sys; prepare_streams(); sys.stderr.write('\r 10%'); sys.stderr.write('a\r\x1b[2Kb\n')"
    assert run_python(code).stderr == b"\r 10%a\\x0d\\x1b[2Kb\n"


def test_a_librarys_advice_is_not_shown() -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before = logging.getLogger("bitsandbytes.backends").level
    try:
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("always")
            app._quiet_libraries()
            warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed", FutureWarning, stacklevel=1)
            warnings.warn("another", FutureWarning, stacklevel=1)
        assert [str(warning.message) for warning in shown] == ["another"]
        assert not logger.isEnabledFor(logging.WARNING)
        assert logger.isEnabledFor(logging.ERROR)
    finally:
        logging.getLogger("bitsandbytes.backends").setLevel(before)
