"""Text from outside, made fit to be shown: what a terminal or a page would obey is spelled out."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

_OBEYED = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 without tab and line feed, DEL, C1 with U+0085
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # of writing in two directions
    "\u2028\u2029"  # line and paragraph separators
    "\ufff9-\ufffb\U000e0000-\U000e007f"  # annotations and tags, which no one sees
    "\ud800-\udfff"  # halves of pairs, which no encoding holds
    "]"
)
_BETWEEN_LINES = re.compile(r"[\t\n]+")


def visible(text: str) -> str:
    r"""The text with every control character as an escape, such as `\x1b`; tabs and line feeds stay.

    Args:
        text: Of any origin.
    """
    return _OBEYED.sub(_escape, text)


def visible_line(text: str) -> str:
    r"""The same in one line, for names and cells: a space in place of tabs and line feeds.

    Args:
        text: Of any origin.
    """
    return visible(_BETWEEN_LINES.sub(" ", text))


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


_ENTITIES = {"<": "&lt;", ">": "&gt;"}
_MARKUP = (
    r"[<>\\`~$|]"
    r"|&(?=[#A-Za-z])"
    r"|\](?=[(\[:])"  # what makes a link or a footnote of the brackets before it
    r"|\*(?!(?<=\d\*)\))"  # but that of a number, which marks a change
    r"|(?<![^\W_])_|_(?![^\W_])"  # within a word it is none
    r"|(?<!\S)#"
)
_IN_TEXT, _IN_BRACKETS = re.compile(_MARKUP), re.compile(rf"{_MARKUP}|[\[\]]")
_BLOCK = re.compile(r"(?=[-+=\[]|\d{1,9}[.)](?:\s|$))")


def markdown_text(text: str) -> str:
    """A text amid a line or in the cell of a table.

    Args:
        text: Of any origin.
    """
    return _IN_TEXT.sub(_escape_markdown, visible_line(text))


def markdown_item(text: str) -> str:
    """A text that begins a line, or the line of an item: nothing at its start makes a list, a heading or a box of it.

    Args:
        text: Of any origin.
    """
    line = markdown_text(text).lstrip()
    if not _BLOCK.match(line):
        return line
    number = re.match(r"\d+", line)
    at = number.end() if number else 0
    return f"{line[:at]}\\{line[at:]}"


def markdown_label(text: str) -> str:
    """A text within the brackets of a link or a picture.

    Args:
        text: Of any origin.
    """
    return _IN_BRACKETS.sub(_escape_markdown, visible_line(text))


def markdown_code(text: str) -> str:
    r"""A text as code amid a line; a line feed is `\n`.

    Args:
        text: Of any origin.
    """
    line = visible_line(text.replace("\n", "\\n"))
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    room = " " if line.startswith("`") or line.endswith("`") or not line.strip() else ""
    return f"{fence}{room}{line}{room}{fence}"


def _escape_markdown(match: re.Match[str]) -> str:
    if match[0] == "&":
        return "&amp;"
    return _ENTITIES.get(match[0], f"\\{match[0]}")


_MOST_CHARACTERS = 300


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, not too long; the name of its class where it has no text."""
    lines = str(error).strip().splitlines()
    line = lines[0] if lines else type(error).__name__
    return line if len(line) <= _MOST_CHARACTERS else f"{line[:_MOST_CHARACTERS]}…"


def command_line(*words: str | Path, runs: Path | None = None) -> str:
    """A command quoted for the shell, with the runs folder where it is not the one that is used without being named.

    Args:
        words: Of the command line; a path that begins with a dash is told from an option.
        runs: The runs folder that the command works in; None for a command that uses none.
    """
    texts = [_told_from_option(word) if isinstance(word, Path) else word for word in words]
    if runs is not None and runs.absolute() != Path(os.environ.get("MFTCTL_RUNS") or "runs").absolute():
        texts += ["--runs", _told_from_option(runs)]
    return shlex.join(texts)


def _told_from_option(path: Path) -> str:
    return f"./{path}" if str(path).startswith("-") else str(path)
