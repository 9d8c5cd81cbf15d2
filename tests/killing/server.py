"""A process with all imports done that forks one mftctl command after another, and kills them on request.

A command thus costs only its work and no import time. The server reads one JSON document per line from stdin, with the
fields of `tests.killing.commands.Order`, and answers each with one.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link")
"""Audit events of the standard library that change a folder; the first argument is the path."""
_WRITE, _OTHER = 1, 2
_MOST_EVENTS = 1 << 16


def import_everything() -> None:
    """Imports the modules that commands import when called."""
    import torch
    import transformers.models.llama.modeling_llama
    import transformers.trainer  # noqa: F401

    import mftctl.cli.app
    import mftctl.cli.apply
    import mftctl.cli.fft
    import mftctl.cli.mask_train
    import mftctl.cli.probe
    import mftctl.workflows.apply
    import mftctl.workflows.fft
    import mftctl.workflows.mask_train
    import mftctl.workflows.probe  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


class Writes:
    """Counts a command's changes to files in a folder, and kills it at one of these events.

    Args:
        folder: Only changes inside it count.
        kill_at: The number of the event before which the process is killed, from 1; 0 for none.
        torn: Whether to leave the file of that event half-written.
        kinds: Shared memory with one byte per event: 1 where a file is written, 2 for any other change.
    """

    def __init__(self, folder: Path, kill_at: int, torn: bool, kinds: mmap.mmap) -> None:
        self._folder = folder
        self._kill_at = kill_at
        self._torn = torn
        self._kinds = kinds
        self._events = 0
        self._dying = False

    def watch(self) -> None:
        """Starts counting, for the rest of this process."""
        import safetensors.torch
        import torch
        import transformers.modeling_utils

        import mftctl.training.score_trainer

        # These open their files in Rust and C++, which Python hooks do not see.
        torch.save = self._around(torch.save)
        save_file = self._around(safetensors.torch.save_file)
        transformers.modeling_utils.safe_save_file = save_file  # type: ignore[attr-defined]
        mftctl.training.score_trainer.save_file = save_file  # type: ignore[attr-defined]
        sys.addaudithook(self._hear)

    def _around(self, save: Callable[..., Any]) -> Callable[..., Any]:
        def saved(content: Any, path: Any, *arguments: Any, **options: Any) -> Any:
            def half() -> None:
                save(content, path, *arguments, **options)
                os.truncate(path, Path(path).stat().st_size // 2)

            self._event(half)
            return save(content, path, *arguments, **options)

        return saved

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._dying:
            return
        if event == "open":
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not isinstance(path, int) and self._is_below(path, -1):
                self._event(lambda: _write_half(path, flags))
        elif event in CHANGES:
            if self._is_below(arguments[0], arguments[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") else -1):
                self._event()
        elif event == "ctypes.dlsym" and arguments[1] == "renameat2":
            self._event()

    def _is_below(self, path: Any, folder_descriptor: int) -> bool:
        start = Path.cwd() if folder_descriptor == -1 else Path(f"/proc/self/fd/{folder_descriptor}").readlink()
        return (start / os.fsdecode(path)).is_relative_to(self._folder)

    def _event(self, tear: Callable[[], None] | None = None) -> None:
        if self._dying:
            return
        self._events += 1
        self._kinds[self._events - 1] = _OTHER if tear is None else _WRITE
        if self._events == self._kill_at:
            self._dying = True
            if self._torn and tear is not None:
                tear()
            os.kill(os.getpid(), signal.SIGKILL)


def _write_half(path: Any, flags: int) -> None:
    """Leaves a file as if its writing had been killed halfway."""
    descriptor = os.open(path, flags | os.O_CREAT, 0o600)
    begin = {"purpose": "temporary folder of mftctl", "host": platform.node()}
    is_journal = Path(os.fsdecode(path)).name == "journal.json"
    os.write(descriptor, json.dumps(begin)[:-1].encode() if is_journal else b'{"step": 3, "lo')
    os.close(descriptor)


def _run(order: dict[str, Any], kinds: mmap.mmap) -> None:
    """Runs the command in a forked process, and ends that process."""
    folder = Path(order["folder"])
    os.chdir(folder)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    Writes(folder, order["kill_at_event"], order["torn"], kinds).watch()
    from mftctl.cli.app import main

    sys.argv = ["mftctl", *order["arguments"]]
    code: Any = 0
    try:
        main()
    except SystemExit as stopped:
        code = stopped.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)


def _wait(process: int, kill_after_seconds: float | None) -> int:
    """The exit status of a process, which is killed after a given time."""
    if kill_after_seconds is not None:
        end_seconds = time.monotonic() + kill_after_seconds
        while time.monotonic() < end_seconds:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                return status
            time.sleep(0.001)
        os.kill(process, signal.SIGKILL)
    return os.waitpid(process, 0)[1]


def main() -> None:
    """Processes orders until stdin ends."""
    import_everything()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        order = json.loads(line)
        kinds = mmap.mmap(-1, _MOST_EVENTS)
        start_seconds = time.monotonic()
        process = os.fork()
        if process == 0:
            _run(order, kinds)
        status = _wait(process, order["kill_after_seconds"])
        answer = {
            "code": os.waitstatus_to_exitcode(status),
            "writes": [kind == _WRITE for kind in kinds[:].rstrip(b"\0")],
            "seconds": time.monotonic() - start_seconds,
        }
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
