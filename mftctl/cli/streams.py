"""Standard streams that accept any text and survive the loss of their reader."""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from mftctl.text import visible

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_PLAIN = {
    "±": "+-",
    "×": "x",
    "−": "-",
    "–": "-",
    "↑": "^",
    "↓": "v",
    "→": "->",
    "»": ">>",
    "«": "<<",
    "…": "...",
    "•": "*",
    "▸": ">",
    "✓": "+",
    "✗": "x",
    "↻": "~",
    "○": "o",
    "’": "'",
}
"""ASCII spellings of symbols that mftctl and Rich print, for encodings without them."""

_SPELLING = "mftctl.spelling"
_GONE = frozenset({errno.EIO, errno.ENXIO, errno.ENODEV})
"""System errors for a terminal that was hung up."""


def prepare_streams() -> None:
    """Makes standard output and standard error safe to write to, whatever they are.

    Characters that the encoding lacks are spelled in ASCII or escaped, as are control characters in messages of any
    library. No message is worth ending the work for: what cannot be written to standard error is dropped, and so is a
    result whose terminal is gone. Streams that were closed at the start are opened on the null device, so that the
    next file opened does not take their place.
    """
    codecs.register_error(_SPELLING, _spell)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w" if number else "r", encoding="utf-8"))
    # Compared because a test or another program that calls mftctl may have installed its own streams.
    if sys.stderr is sys.__stderr__ and isinstance(sys.stderr, io.TextIOWrapper):
        behind = _forgiving(sys.stderr, None)
        sys.stderr = _VisibleText(_writer(sys.stderr, None), encoding=sys.stderr.encoding, line_buffering=True)
        sys.stderr.rich_proxied_file = behind
    if sys.stdout is sys.__stdout__ and isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.isatty():
        sys.stdout = _forgiving(sys.stdout, _GONE)
    for stream in (sys.stdout, sys.stderr, getattr(sys.stderr, "rich_proxied_file", None)):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_SPELLING)


def _spell(error: UnicodeError) -> tuple[str, int]:
    """Returns a replacement for text that cannot be encoded, and the position to continue at."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    spelled = (_PLAIN.get(part) or part.encode("ascii", "backslashreplace").decode("ascii") for part in text)
    return "".join(spelled), error.end


def unfiltered_messages() -> TextIO | None:
    """Returns the stream behind standard error that accepts control characters, for a console; None without one.

    Rich finds it by itself, except behind the stream that it substitutes for standard error while bars are live.
    """
    stream: Any = sys.stderr
    while (behind := getattr(stream, "rich_proxied_file", None)) is not None:
        stream = behind
    return None if stream is sys.stderr else stream


def _forgiving(stream: io.TextIOWrapper, dropped: frozenset[int] | None) -> io.TextIOWrapper:
    """Returns the same stream, with some write errors ignored."""
    return io.TextIOWrapper(_writer(stream, dropped), encoding=stream.encoding, line_buffering=True)


def _writer(stream: io.TextIOWrapper, dropped: frozenset[int] | None) -> io.BufferedWriter:
    return io.BufferedWriter(ForgivingWriter(stream.fileno(), dropped))


class _VisibleText(io.TextIOWrapper):
    """Standard error with control characters escaped, in warnings, logs and tracebacks of any library.

    Rich, which writes control characters itself, finds the underlying stream under the attribute name below.
    """

    rich_proxied_file: io.TextIOWrapper

    def write(self, text: str) -> int:
        """Writes text and returns the number of characters accepted."""
        # A progress bar returns to the start of its line before each update.
        super().write(f"\r{visible(text[1:])}" if text.startswith("\r") else visible(text))
        return len(text)


class ForgivingWriter(io.RawIOBase):
    """Writes to a descriptor; waits while it is not ready, and drops what it will never accept.

    Args:
        descriptor: The descriptor, which stays open when this object is closed.
        dropped: Errors on which the data is dropped; None for all errors.
    """

    def __init__(self, descriptor: int, dropped: frozenset[int] | None) -> None:
        self._descriptor = descriptor
        self._dropped = dropped

    def writable(self) -> bool:
        """Returns True."""
        return True

    def fileno(self) -> int:
        """Returns the descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Returns True for a terminal that is still open."""
        return os.isatty(self._descriptor)

    def write(self, data: ReadableBuffer) -> int:
        """Writes data and returns the number of bytes written or dropped."""
        while True:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:
                select.select([], [self._descriptor], [])
            except OSError as error:
                if self._dropped is not None and error.errno not in self._dropped:
                    raise
                return memoryview(data).nbytes


class PlainTextConsole(Console):
    """Rich's console, with control characters in text escaped, and without links."""

    def render_str(self, text: str, **settings: Any) -> Text:
        """Returns the text for layout, escaped before its width is measured."""
        return super().render_str(visible(text), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yields the segments of any renderable, with control characters escaped."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            if control:
                yield segment
                continue
            is_link = style is not None and style.link is not None
            yield Segment(visible(text), style.update_link(None) if style is not None and is_link else style)
