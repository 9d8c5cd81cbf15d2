"""Records that a model was fine-tuned on; a mask learns little from records the model has memorised."""

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
"""With fewer unseen records, `auto` uses all records."""


def save_seen(folder: Path, records: Iterable[str]) -> None:
    """Writes the digests of the records that a run trains on to its folder, one per line."""
    write_text(folder / _FILE, "".join(f"{digest}\n" for digest in records))


def seen_records(root: Path, runs: Iterable[str]) -> frozenset[str]:
    """The digests of all records that these runs fine-tuned a model on.

    Args:
        root: The runs folder.
        runs: Names of runs, such as those that produced a model.
    """
    files = [root / name / _FILE for name in runs]
    return frozenset(digest for path in files if path.exists() for digest in read_regular(path).decode().split())


def records_to_learn_from(train: Sequence[Example], seen: frozenset[str], learn_from: LearnFrom) -> Sequence[Example]:
    """The records that a mask is learned from, in the order of the data.

    Args:
        train: All training records.
        seen: Digests of the records used in fine-tuning.
        learn_from: `unseen`: only records not used in fine-tuning; `auto`: the same if there are enough, otherwise all.

    Raises:
        DataError: `unseen` was requested, but fine-tuning used all records.
    """
    if learn_from == "all":
        return train
    unseen = [example for example in train if record_digest(example) not in seen]
    if learn_from == "unseen" and not unseen:
        raise DataError(
            "Every training record was already used in fine-tuning.",
            expected="records not used in fine-tuning (mask_train.learn_from: unseen)",
            actual=f"{len(train)} training records, all used in fine-tuning",
            hint="give different data with --data, or use --learn-from all",
        )
    return train if learn_from == "auto" and len(unseen) < _FEWEST_UNSEEN else unseen
