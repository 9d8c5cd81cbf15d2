"""What is wrong with the records of a data set, counted and told once."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from mftctl.errors import DataError

BadRecords = Literal["error", "skip"]

_MOST_NAMED = 3


class RecordIssues:
    """Collects what reading and encoding find in single records.

    Attributes:
        refused: Why records cannot be used, one error each, in the order found.
        records: Records looked at.
        tokenised: Records of which tokens were to be made.
        used: Records that were.
        ignored: How many records have each field that is not used.
        overlong: Records left out, since their prompt alone is longer than allowed.
        cut: Records whose end was cut off.
        without_thinking: Records of which the chat template leaves out what was thought.
        last_only: Conversations of which earlier answers are not learned, since the chat template changes them.
        tools_as_text: Conversations of which functions or calls are written as JSON text.
        open_turns: Conversations in which an answer is learned without anything that ends it.
    """

    def __init__(self) -> None:
        self.refused: list[DataError] = []
        self.records = 0
        self.tokenised = 0
        self.used = 0
        self.ignored: Counter[str] = Counter()
        self.overlong = 0
        self.cut = 0
        self.without_thinking = 0
        self.last_only = 0
        self.tools_as_text = 0
        self.open_turns = 0

    def settle(self, bad_records: BadRecords) -> None:
        """Nothing, if every record can be used or those that cannot may be left out.

        Args:
            bad_records: `skip` leaves them out.

        Raises:
            DataError: Some cannot be used; the first few are named.
        """
        if not self.refused or bad_records == "skip":
            return
        first = self.refused[0]
        if len(self.refused) == 1:
            leave_out = "--bad-records skip leaves it out"
            first.hint = f"{first.hint}; {leave_out}" if first.hint else leave_out
            raise first
        named = [_described(error) for error in self.refused[:_MOST_NAMED]]
        more = len(self.refused) - len(named)
        raise DataError(
            f"{len(self.refused):,} of {self.records:,} records cannot be used.",
            path=first.path,
            expected="records of a known format that the model can learn from",
            actual="; ".join([*named, *([f"and {more:,} more"] if more else [])]),
            hint=f"{self._remedy()}, or leave them out with --bad-records skip",
        )

    def _remedy(self) -> str:
        """What all of the records need, if they need the same."""
        hints = {error.hint for error in self.refused}
        hint = hints.pop() if len(hints) == 1 else None
        return "mend them" if hint is None else hint

    @property
    def _looked_at(self) -> int:
        """The records that what is said of tokens is a part of."""
        return self.tokenised or self.records

    @property
    def learns_no_end(self) -> bool:
        """Whether no record is left whole, so that no model learns of them where to stop."""
        return self.cut > 0 and self.cut >= self.used

    def counts(self) -> dict[str, int]:
        """What was found and how often, without what was not, for a record."""
        found = {
            "refused": len(self.refused),
            "overlong": self.overlong,
            "cut": self.cut,
            "without_thinking": self.without_thinking,
            "last_only": self.last_only,
            "tools_as_text": self.tools_as_text,
            "open_turns": self.open_turns,
        }
        return {name: count for name, count in found.items() if count}

    def lines(self, max_length_tokens: int) -> list[str]:
        """What a user should know, a line each; none if there is nothing."""
        lines = []
        if self.refused:
            named = "; ".join(_described(error) for error in self.refused[:_MOST_NAMED])
            lines.append(f"{len(self.refused):,} of {self.records:,} records cannot be used and are left out: {named}")
        if self.overlong:
            lines.append(
                f"{self.overlong:,} of {self._looked_at:,} records are left out: their prompt alone is longer than "
                f"--max-length {max_length_tokens}"
            )
        if self.cut:
            lines.append(
                f"{self.cut:,} of {self._looked_at:,} answers ({self.cut / self._looked_at:.1%}) are cut at "
                f"--max-length {max_length_tokens}: the end of these is not learned"
            )
        if self.ignored:
            lines.append(f"ignored: {', '.join(sorted(self.ignored))}")
        for count, noun, words in (
            (self.without_thinking, "record", "the chat template leaves out the thinking before answers"),
            (self.last_only, "conversation", "answers are not learned that the chat template changes later on"),
            (
                self.tools_as_text,
                "conversation",
                "tools are written as JSON text: the chat template has no place for them",
            ),
            (
                self.open_turns,
                "conversation",
                "the chat template ends earlier answers with nothing: their end is not learned",
            ),
        ):
            if count:
                lines.append(f"in {count:,} {noun if count == 1 else f'{noun}s'} {words}")
        return lines


def _described(error: DataError) -> str:
    place = f"{error.path}: " if error.path else ""
    key = f"{error.key}: " if error.key else ""
    return f"{place}{key}{error.message.rstrip('.')}" + (f" ({error.actual})" if error.actual else "")
