"""What a process that works for a command says to it: a line of JSON each, over a pipe."""

from __future__ import annotations

import base64
import json
import os
import pickle
from dataclasses import asdict, dataclass
from typing import Any

from mftctl.errors import MftError
from mftctl.experiments.results import Result, read_result
from mftctl.progress import Listener, Progress


class Speaker:
    """The end of the pipe that a process speaks into; a listener to the work that it does.

    Args:
        descriptor: Open for writing.
        tells: Whether progress and notes are passed on, which one process does for all.
    """

    def __init__(self, descriptor: int, *, tells: bool) -> None:
        self._descriptor = descriptor
        self._tells = tells

    def progress(self, state: Progress) -> None:
        """Passes on."""
        if self._tells:
            self._say("progress", asdict(state))

    def note(self, text: str) -> None:
        """Passes on."""
        if self._tells:
            self._say("note", text)

    def warn(self, text: str) -> None:
        """Passes on."""
        if self._tells:
            self._say("warn", text)

    def result(self, command: str, result: Result) -> None:
        """Hands in what came out of a command."""
        if self._tells:
            self._say("result", [command, result.document()])

    def error(self, error: MftError) -> None:
        """Hands in why nothing did."""
        self._say("error", base64.b64encode(pickle.dumps(error)).decode())

    def _say(self, kind: str, content: object) -> None:
        # Unbuffered, since a signal's handler speaks too, in the middle of anything.
        waiting = memoryview(f"{json.dumps([kind, content])}\n".encode())
        while waiting:
            waiting = waiting[os.write(self._descriptor, waiting) :]


class Hearing:
    """What one process has said so far.

    Attributes:
        result: What came out; None before.
        error: Why nothing did; None before.

    Args:
        listener: Hears progress and notes.
    """

    def __init__(self, listener: Listener) -> None:
        self.result: Result | None = None
        self.error: MftError | None = None
        self._listener = listener
        self._rest = b""

    def take(self, data: bytes) -> None:
        """Understands what came through the pipe; a line that is not whole waits for its end."""
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
    """What a process is to do.

    Attributes:
        folder: Of the run, whose record names the command.
        recipe: Settled, as plain data.
        source: What it works on, as plain data.
        resume: Whether to go on from what the run has kept.
        may_replace: Whether a result at the run's output is replaced.
        resumed_with: The options to resume it with.
    """

    folder: str
    recipe: dict[str, Any]
    source: dict[str, Any]
    resume: bool
    may_replace: bool
    resumed_with: tuple[str, ...]

    def line(self) -> bytes:
        """As it goes to a process."""
        return json.dumps(asdict(self)).encode() + b"\n"
