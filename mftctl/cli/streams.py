"""Standard streams that take any text, and whose reader may go away."""

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
"""How symbols that mftctl and Rich print are spelled where the encoding has none of them."""

_SPELLING = "mftctl.spelling"
_GONE = frozenset({errno.EIO, errno.ENXIO, errno.ENODEV})
"""What the system says of a terminal that was hung up."""


def prepare_streams() -> None:
    """Makes standard output and standard error fit to be written to, whatever they are.

    What the encoding cannot express is spelled in plain letters or escaped, and so are control characters in messages
    of any library. Of messages nothing is worth ending the work: what cannot be written to standard error is dropped,
    and so is a result where its terminal is gone. Streams that were closed at the start are opened on nothing, lest
    the next file take their place.
    """
    codecs.register_error(_SPELLING, _spell)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w" if number else "r", encoding="utf-8"))
    # Compared, since a test or another program that calls mftctl may have put streams of its own in place.
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
    """A replacement for what cannot be encoded, and where to go on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    spelled = (_PLAIN.get(part) or part.encode("ascii", "backslashreplace").decode("ascii") for part in text)
    return "".join(spelled), error.end


def unfiltered_messages() -> TextIO | None:
    """The stream behind standard error that takes controls too, for a console that writes its own; None without one.

    Rich looks for it itself, but not behind the stream that it puts in place of standard error while bars are live.
    """
    stream: Any = sys.stderr
    while (behind := getattr(stream, "rich_proxied_file", None)) is not None:
        stream = behind
    return None if stream is sys.stderr else stream


def _forgiving(stream: io.TextIOWrapper, dropped: frozenset[int] | None) -> io.TextIOWrapper:
    """The same stream, whose writing no longer fails with some errors."""
    return io.TextIOWrapper(_writer(stream, dropped), encoding=stream.encoding, line_buffering=True)


def _writer(stream: io.TextIOWrapper, dropped: frozenset[int] | None) -> io.BufferedWriter:
    return io.BufferedWriter(ForgivingWriter(stream.fileno(), dropped))


class _VisibleText(io.TextIOWrapper):
    """Standard error with control characters spelled out: in warnings, logs and tracebacks of any library.

    Rich, which has controls of its own to write, looks for the stream behind a stream under this name.
    """

    rich_proxied_file: io.TextIOWrapper

    def write(self, text: str) -> int:
        """The number of characters taken."""
        # A progress bar goes back to the start of its line before each of its states.
        super().write(f"\r{visible(text[1:])}" if text.startswith("\r") else visible(text))
        return len(text)


class ForgivingWriter(io.RawIOBase):
    """Writes to a descriptor; waits where it takes nothing just now, and drops what it will never take.

    Args:
        descriptor: Stays open when this is closed.
        dropped: The errors after which what was to be written is dropped; None for all.
    """

    def __init__(self, descriptor: int, dropped: frozenset[int] | None) -> None:
        self._descriptor = descriptor
        self._dropped = dropped

    def writable(self) -> bool:
        """True."""
        return True

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether it is a terminal that is still there."""
        return os.isatty(self._descriptor)

    def write(self, data: ReadableBuffer) -> int:
        """The number of bytes that were taken or dropped."""
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
    """Rich's console, with control characters of texts as escapes, and without links."""

    def render_str(self, text: str, **settings: Any) -> Text:
        """A text as it is laid out: escaped before its width is taken."""
        return super().render_str(visible(text), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What is written of anything, whoever made it."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            if control:
                yield segment
                continue
            is_link = style is not None and style.link is not None
            yield Segment(visible(text), style.update_link(None) if style is not None and is_link else style)
