"""A record as the model sees it, on the console."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

MARKED = "those between » and «"
COLOURED = "in green"


def needs_marks() -> bool:
    """True if text trained on must be marked, since the console shows no colours."""
    return Console().color_system is None


def record_text(head: str, segments: Iterable[tuple[str, bool]], *, marked: bool) -> Text:
    """Returns a record with the text trained on in green, or between marks without colour support.

    Args:
        head: The first line.
        segments: The text in order, and whether each part is trained on.
        marked: Whether to mark the text.
    """
    text = Text(head + "\n", style="bold")
    for part, is_answer in segments:
        if is_answer:
            text.append(f"»{part}«" if marked else part, style="not bold green")
        else:
            text.append(part, style="not bold dim")
    return text.append("\n")


def trained_on(answer_tokens: int, tokens: int, *, marked: bool) -> str:
    """Returns how many tokens are trained on, and how they are shown."""
    return f"trains on {answer_tokens:,} of {tokens:,} tokens, {MARKED if marked else COLOURED}"
