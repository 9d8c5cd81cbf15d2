"""The text that a chat template writes after an assistant turn, which tells the model to stop."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """The end of an assistant turn in a template.

    Attributes:
        marker: The text that follows each answer, such as `<|im_end|>`; empty if no text follows all of them.
    """

    marker: str

    def after(self, answer: str, tail: str, specials: Sequence[str]) -> str:
        """The part of the text after an answer that is trained on with it.

        Args:
            answer: The answer, which may include its own end.
            tail: The text after the answer, up to the next answer or the end.
            specials: The special tokens of the tokenizer. If a template has no marker of its own, the first of them is
                the stop: the next role's token, as with GLM.
        """
        if self.marker and tail.startswith(self.marker):
            return self.marker
        first = None if self.ends(answer, specials) else _first_special(tail, specials)
        return tail[: tail.index(first) + len(first)] if first else ""

    def ends(self, answer: str, specials: Sequence[str]) -> bool:
        """True if the answer includes its own end."""
        ends = (*specials, self.marker) if self.marker else tuple(specials)
        return answer.rstrip().endswith(ends)


def common_start(one: str, other: str) -> str:
    """The longest common prefix of both texts."""
    length = next((index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    return one[: min(len(one), len(other)) if length is None else length]


def turn_end(between: str | None, last: str, specials: Sequence[str], *, opening: str | None = None) -> TurnEnd:
    """The end of a turn, derived from what a template writes after two answers of one conversation.

    Args:
        between: The text between an answer and the next one; None if only one could be rendered.
        last: The text after the last answer.
        specials: The special tokens of the tokenizer, which are never split.
        opening: The special token that opens a turn, which is not part of the end of the turn before.
    """
    ends = [text.partition(opening)[0] if opening else text for text in (between or last, last)]
    pieces = [_split(text, specials) for text in ends]
    common = ""
    for one, other in zip(*pieces, strict=False):
        if one != other:
            if one not in specials and other not in specials:
                common += common_start(one, other)
            break
        common += one
    return TurnEnd(common.rstrip())


def _split(text: str, specials: Sequence[str]) -> list[str]:
    """The text split before and after each special token."""
    if not specials:
        return [text] if text else []
    pattern = "|".join(re.escape(token) for token in sorted(specials, key=len, reverse=True))
    return [piece for piece in re.split(f"({pattern})", text) if piece]


def _first_special(tail: str, specials: Sequence[str]) -> str | None:
    """The special token that the text begins with, ignoring white space."""
    stripped = tail.lstrip()
    return max((token for token in specials if stripped.startswith(token)), key=len, default=None)
