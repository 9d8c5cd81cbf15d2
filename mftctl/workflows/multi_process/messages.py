"""Messages from a worker process to its command: one JSON line each, over a pipe."""

from __future__ import annotations

import base64
import json
import os
import pickle
from dataclasses import asdict, dataclass
from typing import Any

from mftctl.errors import MftError
from mftctl.experiments.result_kinds import read_result
from mftctl.experiments.results import Result
from mftctl.progress import Listener, Progress


class Speaker:
    """The sending end of the pipe; a listener for the work of a worker process.

    Args:
        descriptor: A descriptor open for writing.
        tells: Whether to forward progress and notes, which one process does for all.
    """

    def __init__(self, descriptor: int, *, tells: bool) -> None:
        self._descriptor = descriptor
        self._tells = tells

    def progress(self, state: Progress) -> None:
        """Forwards progress."""
        if self._tells:
            self._say("progress", asdict(state))

    def note(self, text: str) -> None:
        """Forwards a note."""
        if self._tells:
            self._say("note", text)

    def warn(self, text: str) -> None:
        """Forwards a warning."""
        if self._tells:
            self._say("warn", text)

    def result(self, command: str, result: Result) -> None:
        """Sends the result."""
        if self._tells:
            self._say("result", [command, result.document()])

    def error(self, error: MftError) -> None:
        """Sends the error that ended the work."""
        self._say("error", base64.b64encode(pickle.dumps(error)).decode())

    def _say(self, kind: str, content: object) -> None:
        # Unbuffered, as a signal handler may send at any point.
        waiting = memoryview(f"{json.dumps([kind, content])}\n".encode())
        while waiting:
            waiting = waiting[os.write(self._descriptor, waiting) :]


class Hearing:
    """The messages of one process so far.

    Attributes:
        result: The result, once received.
        error: The error that ended the work, once received.

    Args:
        listener: Receives progress and notes.
    """

    def __init__(self, listener: Listener) -> None:
        self.result: Result | None = None
        self.error: MftError | None = None
        self._listener = listener
        self._rest = b""

    def take(self, data: bytes) -> None:
        """Processes data from the pipe; an incomplete line is kept until its end arrives."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            kind, content = json.loads(line)
            self._understand(kind, content)

    def _understand(self, kind: str, content: Any) -> None:
        match kind:
            case "progress":
                self._listener.progress(Progress(**content))
            case "note":
                self._listener.note(content)
            case "warn":
                self._listener.warn(content)
            case "result":
                self.result = read_result(*content)
            case "error":
                self.error = pickle.loads(base64.b64decode(content))


@dataclass(frozen=True, slots=True)
class Order:
    """The work for a process.

    Attributes:
        folder: The run folder, with the command in its record.
        recipe: The resolved recipe, as plain data.
        source: The source model, as plain data.
        resume: Whether to resume from the run's saved state.
        may_replace: Whether to replace a result at the run's output.
        resumed_with: The options to resume the run with.
    """

    folder: str
    recipe: dict[str, Any]
    source: dict[str, Any]
    resume: bool
    may_replace: bool
    resumed_with: tuple[str, ...]

    def line(self) -> bytes:
        """Returns the line to send to a process."""
        return json.dumps(asdict(self)).encode() + b"\n"
