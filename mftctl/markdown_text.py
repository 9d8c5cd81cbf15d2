"""Text from outside in Markdown: no HTML, no link, no picture, no mathematics, no line of its own."""

from __future__ import annotations

import re

from mftctl.visible_text import visible_line

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
    return _IN_TEXT.sub(_escape, visible_line(text))


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
    return _IN_BRACKETS.sub(_escape, visible_line(text))


def markdown_code(text: str) -> str:
    r"""A text as code amid a line; a line feed is `\n`.

    Args:
        text: Of any origin.
    """
    line = visible_line(text.replace("\n", "\\n"))
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    room = " " if line.startswith("`") or line.endswith("`") or not line.strip() else ""
    return f"{fence}{room}{line}{room}{fence}"


def _escape(match: re.Match[str]) -> str:
    if match[0] == "&":
        return "&amp;"
    return _ENTITIES.get(match[0], f"\\{match[0]}")
