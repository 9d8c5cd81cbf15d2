"""Records that a model was fine-tuned on; a mask learns little from records the model has memorised."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np

from mftctl.data.prepared.examples import Examples
from mftctl.errors import DataError, RunError
from mftctl.files.atomic import atomic_file
from mftctl.files.regular import read_regular

LearnFrom = Literal["auto", "all", "unseen"]

_FILE = "records.bin"
"""The digests, 8 bytes each, with the first byte first."""
_TEXT_FILE = "records.txt"
"""The same in hexadecimal, one per line, as written before."""
_DIGEST = re.compile(rb"[0-9a-f]{16}")
_STORED = np.dtype(">u8")
_FEWEST_UNSEEN = 64
"""With fewer unseen records, `auto` uses all records."""


def save_seen(folder: Path, digests: np.ndarray) -> None:
    """Writes the digests of the records that a run trains on to its folder.

    Args:
        folder: The run's folder.
        digests: uint64, from `Examples.digests`.
    """
    with atomic_file(folder / _FILE) as temporary:
        temporary.write_bytes(digests.astype(_STORED).tobytes())


def seen_records(root: Path, runs: Iterable[str]) -> np.ndarray:
    """The digests of all records that these runs fine-tuned a model on, uint64, each once, ascending.

    Args:
        root: The runs folder.
        runs: Names of runs, such as those that produced a model.

    Raises:
        RunError: A file of digests is damaged.
    """
    found = [np.empty(0, np.uint64)]
    for name in runs:
        for path, read in ((root / name / _FILE, _read), (root / name / _TEXT_FILE, _read_text)):
            if path.exists():
                found.append(read(path))
                break
    return np.unique(np.concatenate(found))


def records_to_learn_from(train: Examples, seen: np.ndarray, learn_from: LearnFrom) -> Examples:
    """The records that a mask is learned from, in the order of the data.

    Args:
        train: All training records.
        seen: Digests of the records used in fine-tuning, uint64.
        learn_from: `unseen`: only records not used in fine-tuning; `auto`: the same if there are enough, otherwise all.

    Raises:
        DataError: `unseen` was requested, but fine-tuning used all records.
    """
    if learn_from == "all" or not len(seen):
        return train
    unseen = np.flatnonzero(~np.isin(train.digests, seen))
    if learn_from == "unseen" and not len(unseen):
        raise DataError(
            "Every training record was already used in fine-tuning.",
            expected="records not used in fine-tuning (mask_train.learn_from: unseen)",
            actual=f"{len(train)} training records, all used in fine-tuning",
            hint="give different data with --data, or use --learn-from all",
        )
    return train if learn_from == "auto" and len(unseen) < _FEWEST_UNSEEN else train.take(unseen)


def _read(path: Path) -> np.ndarray:
    content = read_regular(path)
    if len(content) % _STORED.itemsize:
        raise _damaged(path, f"{len(content)} bytes")
    return np.frombuffer(content, _STORED).astype(np.uint64)


def _read_text(path: Path) -> np.ndarray:
    lines = read_regular(path).split()
    wrong = next((line for line in lines if _DIGEST.fullmatch(line) is None), None)
    if wrong is not None:
        raise _damaged(path, f"the line {wrong[:40].decode(errors='replace')!r}")
    return np.frombuffer(bytes.fromhex(b"".join(lines).decode()), _STORED).astype(np.uint64)


def _damaged(path: Path, actual: str) -> RunError:
    return RunError(
        "The digests of the records of a run are damaged.",
        path=path,
        expected="8 bytes or a line of 16 hexadecimal digits for each record",
        actual=actual,
        hint="use all records with --learn-from all",
    )
