"""A separate process that removes the programs' working folders if mftctl is killed while they run."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mftctl.files.temporary import remove_leftovers

_DONE = b"done"
_PASSES = 8
_PAUSE_SECONDS = 0.25
"""Pause between passes: during the first, the killed programs may still be writing."""


@contextmanager
def cleaned_up_after() -> Iterator[None]:
    """Keeps a process on standby while the context is open, to remove leftovers after a SIGKILL.

    It also removes leftovers of earlier commands that were killed together with their standby process.
    """
    folder = tempfile.gettempdir()
    with suppress(OSError):
        remove_leftovers(Path(folder))
    # In its own session, so that a Ctrl-C in the terminal does not reach it.
    with subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            yield
        finally:
            with suppress(BrokenPipeError):
                process.communicate(_DONE)


def main(folder: Path) -> None:
    """Waits for the parent process to end, and cleans up if it was killed.

    Args:
        folder: The folder that contains the working folders.
    """
    if sys.stdin.buffer.read() == _DONE:
        return
    for _ in range(_PASSES):
        with suppress(OSError):
            remove_leftovers(folder)
        time.sleep(_PAUSE_SECONDS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
