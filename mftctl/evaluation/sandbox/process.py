"""One sandboxed process: start, output and end."""

from __future__ import annotations

import marshal
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_TAIL_BYTES = 2000


_KILLED_FIRST = ("/bin/sh", "-c", 'echo 1000 >/proc/self/oom_score_adj; exec "$@"', "sh")
"""Makes the program, not mftctl, the first to be killed when memory runs out; only root can undo this."""


class SandboxedProcess:
    """A process in its own session.

    Attributes:
        output_fd: Read end of its standard output and standard error.
        output_bytes: Number of output bytes read so far.
        tail: The last part of the output.
        gate: Socket over which it sends its system call listener.
    """

    def __init__(self, command: Sequence[str], order: dict[str, Any], fds: Sequence[int]) -> None:
        self.output_bytes = 0
        self.tail = b""
        self.output_fd, write_end = os.pipe()
        self.gate, other_gate = socket.socketpair()
        try:
            with tempfile.TemporaryFile() as stdin:
                stdin.write(marshal.dumps({**order, "fds": list(fds), "gate": other_gate.fileno()}))
                stdin.seek(0)
                self._process = subprocess.Popen(
                    [*_KILLED_FIRST, *command],
                    stdin=stdin,
                    stdout=write_end,
                    stderr=write_end,
                    env={},
                    cwd="/",
                    pass_fds=[*fds, other_gate.fileno()],
                    start_new_session=True,
                )
        except BaseException:  # nothing was started: whatever the reason, the pipe must be closed
            os.close(self.output_fd)
            self.gate.close()
            raise
        finally:
            os.close(write_end)
            other_gate.close()

    @property
    def pid(self) -> int:
        """Id of the process and of its group."""
        return self._process.pid

    def read_output(self) -> bool:
        """Reads the available output; False at the end."""
        piece = os.read(self.output_fd, 65536)
        self.output_bytes += len(piece)
        self.tail = (self.tail + piece)[-_TAIL_BYTES:]
        return bool(piece)

    def how_it_ended(self, wait_seconds: float) -> tuple[int, int] | None:
        """Its exit status and the signal that killed it, 0 for none; None if it is still running after the wait.

        The process remains a zombie, so that its group id cannot be reused.
        """
        deadline = time.monotonic() + wait_seconds
        while True:
            found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            if found is not None:
                killed = found.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
                return (0, found.si_status) if killed else (found.si_status, 0)
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.005)

    def kill(self) -> None:
        """Kills its whole process group and waits for it."""
        os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self.output_fd)
        self.gate.close()


_ENTRY_BYTES = 4096  # charged per file, so that many empty files count too


def used_bytes(folder: Path, enough_bytes: int) -> int:
    """Approximate size of the folder in bytes; counting stops at `enough_bytes`.

    Entries that vanish or cannot be read meanwhile are skipped; links are not followed.
    """
    total = 0
    waiting = [str(folder)]
    while waiting and total < enough_bytes:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    total += _ENTRY_BYTES + entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    if total >= enough_bytes:
                        break
        except OSError:
            continue
    return total
