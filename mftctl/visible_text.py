"""Text from outside, made fit to be shown: what a terminal or a page would obey is spelled out."""

from __future__ import annotations

import re

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
