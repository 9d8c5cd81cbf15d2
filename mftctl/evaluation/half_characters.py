"""Texts with half of a surrogate pair, as JSON can express it and UTF-8 cannot: no tokenizer and no file takes them."""

from __future__ import annotations

from collections.abc import Sequence


def is_whole(text: str) -> bool:
    """Whether a text can be written.

    Args:
        text: Any.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def emptied(outputs: Sequence[Sequence[str]]) -> tuple[list[list[str]], list[int]]:
    """The outputs with an empty one in the place of each that cannot be written, and the problems of these.

    Args:
        outputs: Of each problem.
    """
    whole = [[text if is_whole(text) else "" for text in texts] for texts in outputs]
    return whole, [place for place, texts in enumerate(outputs) if whole[place] != list(texts)]
