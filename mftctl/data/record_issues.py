"""Problems with the records of a dataset, counted and reported once."""

from __future__ import annotations

import math
from collections import Counter
from enum import IntFlag
from typing import Final, Literal

from mftctl.errors import DataError
from mftctl.text import counted

BadRecords = Literal["error", "skip"]

_MOST_NAMED = 3


class Remark(IntFlag):
    """What the user is told about a record that is used."""

    NONE = 0
    CUT = 1
    """It is truncated."""
    WITHOUT_THINKING = 2
    """The chat template drops the thinking before an answer."""
    LAST_ONLY = 4
    """Earlier answers are not trained on, because the chat template changes them."""
    TOOLS_AS_TEXT = 8
    """Functions or calls are written as JSON text."""
    OPEN_TURN = 16
    """An earlier answer is trained on without an end-of-turn marker."""


REMARK_TEXTS: Final = {
    Remark.WITHOUT_THINKING: "the chat template drops the thinking before answers",
    Remark.LAST_ONLY: "answers that the chat template changes later are not trained on",
    Remark.TOOLS_AS_TEXT: "tools are written as JSON text: the chat template does not support them",
    Remark.OPEN_TURN: "the chat template does not end earlier answers: their end is not trained on",
}
"""What the user is told about records with these remarks."""


class RecordIssues:
    """Collects problems with single records, found while reading and encoding them.

    Attributes:
        refused: Why records cannot be used, one error each, in the order found.
        records: Records read.
        tokenised: Records passed to the tokenizer.
        used: Records tokenised successfully.
        ignored: Number of records that have each ignored field.
        overlong: Records skipped because their prompt alone exceeds the maximum length.
        first_overlong: Where the first of them comes from, such as `train.jsonl:17`; None without any.
        cut: Truncated records.
        without_thinking: Records whose thinking the chat template drops.
        last_only: Conversations whose earlier answers are not trained on because the chat template changes them.
        tools_as_text: Conversations whose functions or calls are written as JSON text.
        open_turns: Conversations with an answer that is trained on without an end-of-turn marker.
    """

    def __init__(self) -> None:
        self.refused: list[DataError] = []
        self.records = 0
        self.tokenised = 0
        self.used = 0
        self.ignored: Counter[str] = Counter()
        self.overlong = 0
        self.first_overlong: str | None = None
        self.cut = 0
        self.without_thinking = 0
        self.last_only = 0
        self.tools_as_text = 0
        self.open_turns = 0

    def count_remarks(self, remarks: Remark, records: int = 1) -> None:
        """Counts records that are used and have these remarks."""
        self.used += records
        self.cut += records * (Remark.CUT in remarks)
        self.without_thinking += records * (Remark.WITHOUT_THINKING in remarks)
        self.last_only += records * (Remark.LAST_ONLY in remarks)
        self.tools_as_text += records * (Remark.TOOLS_AS_TEXT in remarks)
        self.open_turns += records * (Remark.OPEN_TURN in remarks)

    def count_overlong(self, records: int, first: str) -> None:
        """Counts records that are skipped because their prompt is too long; `first` is where the first comes from."""
        self.overlong += records
        self.first_overlong = self.first_overlong or first

    def settle(self, bad_records: BadRecords, most: float = 1.0, *, part: str | None = None) -> None:
        """Checks that all records can be used, or that the few bad ones may be left out.

        Args:
            bad_records: `skip` skips malformed records. Records whose prompt is too long are always left out.
            most: Maximum share of malformed records, and of those whose prompt is too long.
            part: Name of the part of the data for the message, such as `Training data`.

        Raises:
            DataError: Some records cannot be used; the message names the first few.
        """
        if self.refused and bad_records == "error":
            self._refuse()
        if self.refused:
            first = self.refused[0]
            self._require_few("malformed", len(self.refused), self.records, most, part, first.path, _described(first))
        self._require_few(
            "with a prompt longer than --max-length", self.overlong, self._looked_at, most, part, self.first_overlong
        )

    def _require_few(
        self,
        what: str,
        count: int,
        total: int,
        most: float,
        part: str | None,
        first: str | None,
        why: str | None = None,
    ) -> None:
        """Checks that a kind of unusable records is rare.

        Args:
            what: The kind, in words that follow a number.
            count: Their number.
            total: The number of records that it refers to.
            most: Maximum share.
            part: Name of the part of the data.
            first: Where the first of them comes from.
            why: Why that one cannot be used, if it is malformed.
        """
        if count <= most * total:
            return
        text = "too many records cannot be used."
        remedies = "remove them, " if why else "remove them, raise --max-length, "
        raise DataError(
            text.capitalize() if part is None else f"{part}: {text}",
            path=first,
            key="--bad-records-max",
            expected=f"at most {100 * most:g}% of {counted(total, 'record')}",
            actual=f"{count:,} ({count / total:.1%}) {what}" + (f"; {why}" if why else ""),
            hint=f"{remedies}or leave them out with --bad-records-max {math.ceil(100 * count / total)}%",
        )

    def _refuse(self) -> None:
        first = self.refused[0]
        if len(self.refused) == 1:
            leave_out = "to skip it, pass --bad-records skip"
            first.hint = f"{first.hint}; {leave_out}" if first.hint else leave_out
            raise first
        named = [_described(error) for error in self.refused[:_MOST_NAMED]]
        more = len(self.refused) - len(named)
        raise DataError(
            f"{len(self.refused):,} of {self.records:,} records cannot be used.",
            path=first.path,
            expected="records of a known format that the model can learn from",
            actual="; ".join([*named, *([f"and {more:,} more"] if more else [])]),
            hint=f"{self._remedy()}, or skip them with --bad-records skip",
        )

    def _remedy(self) -> str:
        """The hint that applies to all bad records, if it is the same."""
        hints = {error.hint for error in self.refused}
        hint = hints.pop() if len(hints) == 1 else None
        return "fix them" if hint is None else hint

    @property
    def _looked_at(self) -> int:
        """The total that counts of tokenised records refer to."""
        return self.tokenised or self.records

    @property
    def learns_no_end(self) -> bool:
        """True if every record is truncated, so that the model cannot learn where to stop."""
        return self.cut > 0 and self.cut >= self.used

    def counts(self) -> dict[str, int]:
        """The nonzero counts of each problem, for the run record."""
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
        """Messages for the user, one line per kind of problem; empty if there are none."""
        lines = []
        if self.refused:
            named = "; ".join(_described(error) for error in self.refused[:_MOST_NAMED])
            lines.append(f"{len(self.refused):,} of {self.records:,} records skipped as unusable: {named}")
        if self.overlong:
            lines.append(
                f"{self.overlong:,} of {self._looked_at:,} records skipped: the prompt alone is longer than "
                f"--max-length {max_length_tokens}"
            )
        if self.cut:
            lines.append(
                f"{self.cut:,} of {self._looked_at:,} answers ({self.cut / self._looked_at:.1%}) truncated at "
                f"--max-length {max_length_tokens}: the end is not trained on"
            )
        if self.ignored:
            lines.append(f"ignored fields: {', '.join(sorted(self.ignored))}")
        for count, noun, remark in (
            (self.without_thinking, "record", Remark.WITHOUT_THINKING),
            (self.last_only, "conversation", Remark.LAST_ONLY),
            (self.tools_as_text, "conversation", Remark.TOOLS_AS_TEXT),
            (self.open_turns, "conversation", Remark.OPEN_TURN),
        ):
            if count:
                lines.append(f"in {counted(count, noun)} {REMARK_TEXTS[remark]}")
        return lines


def _described(error: DataError) -> str:
    place = f"{error.path}: " if error.path else ""
    key = f"{error.key}: " if error.key else ""
    return f"{place}{key}{error.message.rstrip('.')}" + (f" ({error.actual})" if error.actual else "")
