"""What removes the working folders of programs when mftctl is killed while they run: a process of its own."""

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
"""Between passes: the killed programs may still be writing in the first."""


@contextmanager
def cleaned_up_after() -> Iterator[None]:
    """For the time of the block a process stands by that removes what is left of it after a SIGKILL.

    It also removes what earlier commands left that were killed together with theirs.
    """
    folder = tempfile.gettempdir()
    with suppress(OSError):
        remove_leftovers(Path(folder))
    # In a session of its own: a Ctrl-C in the terminal is not for it.
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
    """Waits for the end of the process that started this one, and cleans up if it was killed.

    Args:
        folder: Where working folders lie.
    """
    if sys.stdin.buffer.read() == _DONE:
        return
    for _ in range(_PASSES):
        with suppress(OSError):
            remove_leftovers(folder)
        time.sleep(_PAUSE_SECONDS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
