"""Which records a model was fine-tuned on: of those it knows by heart, a mask learns little."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from mftctl.data.examples import Example
from mftctl.data.sources import record_digest
from mftctl.errors import DataError
from mftctl.files.atomic import write_text
from mftctl.files.regular import read_regular

LearnFrom = Literal["auto", "all", "unseen"]

_FILE = "records.txt"
_FEWEST_UNSEEN = 64
"""Fewer records tell `auto` too little."""


def save_seen(folder: Path, records: Iterable[str]) -> None:
    """Writes the digests of the records that a run trains on, one a line, into its folder."""
    write_text(folder / _FILE, "".join(f"{digest}\n" for digest in records))


def seen_records(root: Path, runs: Iterable[str]) -> frozenset[str]:
    """The digests of all records that these runs trained weights on.

    Args:
        root: The runs folder.
        runs: Names of runs, such as the parents of a model.
    """
    files = [root / name / _FILE for name in runs]
    return frozenset(digest for path in files if path.exists() for digest in read_regular(path).decode().split())


def records_to_learn_from(train: Sequence[Example], seen: frozenset[str], learn_from: LearnFrom) -> Sequence[Example]:
    """The records that a mask is learned from, in the order of the data.

    Args:
        train: All training records.
        seen: Digests of those that fine-tuning has seen.
        learn_from: `unseen`: those that fine-tuning has not seen; `auto`: the same if there are enough, else all.

    Raises:
        DataError: Fine-tuning has seen them all, and they were to be unseen.
    """
    if learn_from == "all":
        return train
    unseen = [example for example in train if record_digest(example) not in seen]
    if learn_from == "unseen" and not unseen:
        raise DataError(
            "Fine-tuning has seen every training record.",
            expected="records that it has not seen (mask_train.learn_from: unseen)",
            actual=f"{len(train)} records, all of them seen",
            hint="other --data, or --learn-from all",
        )
    return train if learn_from == "auto" and len(unseen) < _FEWEST_UNSEEN else unseen
