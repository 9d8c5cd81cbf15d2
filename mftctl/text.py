"""Text for terminals, Markdown and shells: escaped characters, quoted commands, and numbers with their nouns."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

_OBEYED = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 without tab and line feed, DEL, C1 with U+0085
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # bidirectional controls
    "\u2028\u2029"  # line and paragraph separators
    "\ufff9-\ufffb\U000e0000-\U000e007f"  # annotations and tags, which are invisible
    "\ud800-\udfff"  # lone surrogates, which cannot be encoded
    "]"
)
_BETWEEN_LINES = re.compile(r"[\t\n]+")


def visible(text: str) -> str:
    r"""Returns the text with control characters as escapes, such as `\x1b`; tabs and line feeds stay.

    Args:
        text: Any text.
    """
    return _OBEYED.sub(_escape, text)


def visible_line(text: str) -> str:
    r"""Returns the text in one line, for names and cells: like `visible`, with spaces for tabs and line feeds.

    Args:
        text: Any text.
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
    r"|\](?=[(\[:])"  # turns the brackets before it into a link or a footnote
    r"|\*(?!(?<=\d\*)\))"  # except after a number, where it marks a change
    r"|(?<![^\W_])_|_(?![^\W_])"  # inside a word it is not markup
    r"|(?<!\S)#"
)
_IN_TEXT, _IN_BRACKETS = re.compile(_MARKUP), re.compile(rf"{_MARKUP}|[\[\]]")
_BLOCK = re.compile(r"(?=[-+=\[]|\d{1,9}[.)](?:\s|$))")


def markdown_text(text: str) -> str:
    """Escapes a text inside a line or a table cell.

    Args:
        text: Any text.
    """
    return _IN_TEXT.sub(_escape_markdown, visible_line(text))


def markdown_item(text: str) -> str:
    """Escapes a text at the start of a line or item, so that it does not become a list, a heading or a checkbox.

    Args:
        text: Any text.
    """
    line = markdown_text(text).lstrip()
    if not _BLOCK.match(line):
        return line
    number = re.match(r"\d+", line)
    at = number.end() if number else 0
    return f"{line[:at]}\\{line[at:]}"


def markdown_label(text: str) -> str:
    """Escapes a text inside the brackets of a link or a picture.

    Args:
        text: Any text.
    """
    return _IN_BRACKETS.sub(_escape_markdown, visible_line(text))


def markdown_code(text: str) -> str:
    r"""Formats a text as inline code; a line feed becomes `\n`.

    Args:
        text: Any text.
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
    """Returns the first line of an exception's text, shortened; the name of its class if it has no text."""
    lines = str(error).strip().splitlines()
    line = lines[0] if lines else type(error).__name__
    return line if len(line) <= _MOST_CHARACTERS else f"{line[:_MOST_CHARACTERS]}…"


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun: `1 record`, `1,234 records`.

    Args:
        number: The number.
        noun: The noun in the singular; its plural ends in `s`.
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def command_line(*words: str | Path, runs: Path | None = None) -> str:
    """Returns a command quoted for the shell, with the runs folder if it is not the default.

    Args:
        words: The words of the command; paths that begin with a dash are kept distinct from options.
        runs: The runs folder of the command; None for a command that uses none.
    """
    texts = [_told_from_option(word) if isinstance(word, Path) else word for word in words]
    if runs is not None and runs.absolute() != Path(os.environ.get("MFTCTL_RUNS") or "runs").absolute():
        texts += ["--runs", _told_from_option(runs)]
    return shlex.join(texts)


def _told_from_option(path: Path) -> str:
    return f"./{path}" if str(path).startswith("-") else str(path)
