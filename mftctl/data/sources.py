"""The data of a command: files, folders, hub datasets and the built-in problems, mixed in given amounts."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mftctl.data.files import Record, data_files, file_kind, stream_records, unreadable
from mftctl.data.hub import open_hub, rows_digest, stream_rows
from mftctl.data.quickstart import built_in
from mftctl.data.trees import resolve_trees
from mftctl.errors import DataError
from mftctl.files.regular import open_regular

if TYPE_CHECKING:
    import datasets

_HUB_ID = re.compile(r"(?P<identifier>[A-Za-z0-9][\w.-]*(/[\w.-]+)?)(:(?P<configuration>[\w.-]+))?", re.ASCII)
# `owner/data-v1.5` is a name with a version, `data.jsonl` is a file.
_FILE_SUFFIX = re.compile(r"\.[A-Za-z]\w*$")
_PATTERN_CHARACTERS = frozenset("*?[")

_BUILT_IN: dict[str, built_in.Split] = {
    built_in.NAME: "train",
    f"{built_in.NAME}/train": "train",
    f"{built_in.NAME}/validation": "validation",
    f"{built_in.NAME}/test": "test",
    f"{built_in.NAME}/retained": "retained",
    f"{built_in.NAME}/preferences": "preferences",
    f"{built_in.NAME}/preferences_validation": "preferences_validation",
}


EVALUATION_SEED: Final = 0
"""Seed that samples test data and data to retain: one for all runs, so that seeds are compared on the same records."""


@dataclass(frozen=True, slots=True)
class DataSource:
    """One part of a mixture.

    Attributes:
        path: A local file, a folder of files, a pattern such as `part-*.jsonl`, a hub id (`owner/name` or
            `owner/name:config`), or `quickstart` with or without `/train`, `/validation`, `/test`, `/retained`,
            `/preferences` or `/preferences_validation`.
        count: Number of records to take, over all files; None for all.
        split: The split of a hub dataset; None for `train`.
    """

    path: str
    count: int | None = None
    split: str | None = None

    @classmethod
    def parse(cls, text: str) -> DataSource:
        """Parses an option value such as `math.jsonl` or `math.jsonl=10000`.

        Raises:
            DataError: The path is missing.
        """
        if text and Path(text).exists():  # its name may contain =
            return cls(text)
        path, separator, digits = text.rpartition("=")
        counted = bool(separator) and digits.isascii() and digits.isdigit() and int(digits) > 0
        source = cls(path, int(digits)) if counted else cls(text)
        if not source.path:
            raise DataError("The data source has no path.", expected="PATH or PATH=COUNT", actual=repr(text))
        return source


def source_files(source: DataSource) -> list[Path] | None:
    """The local files of a source in the order of their names; None for a hub dataset.

    A path that exists is taken literally, even if it reads like a pattern. A folder stands for the data files in it and
    its subfolders, a pattern (`*`, `?`, `[...]`, `**`) for the files that match it; both leave out hidden files.

    Raises:
        DataError: The path is neither an existing file nor a hub id, a folder holds no data file, a pattern matches no
            file, or a split is given for local data.
    """
    if source.path in _BUILT_IN:
        _refuse_split(source)
        return [built_in.data_path(_BUILT_IN[source.path])]
    path = Path(source.path)
    if path.exists():
        _refuse_split(source)
        return data_files(path)
    if source.path.startswith(f"{built_in.NAME}/"):
        raise DataError("The built-in data has no such split.", path=source.path, expected=" | ".join(_BUILT_IN))
    if is_pattern(source):
        _refuse_split(source)
        return _matching_files(source.path)
    if not _is_hub_id(source.path):
        raise DataError("The data file does not exist.", path=path, expected="an existing file or a hub id")
    return None


def is_pattern(source: DataSource) -> bool:
    """Whether a source stands for the files that match its path."""
    return not _PATTERN_CHARACTERS.isdisjoint(source.path) and not Path(source.path).exists()


def local_files(source: DataSource) -> list[Path]:
    """The local files of a source, without an error if there are none; empty for a hub dataset."""
    try:
        return source_files(source) or []
    except DataError:
        return []


def source_places(source: DataSource) -> list[str]:
    """The names with which the places of a source's records begin: those of its files, or of its hub dataset.

    Raises:
        DataError: As for `source_files`.
    """
    files = source_files(source)
    return [f"{source.path}/{_split(source)}"] if files is None else list(map(str, files))


def stream_source(source: DataSource) -> Iterator[Record | DataError]:
    """The records of all files of a source, or of its hub dataset; a malformed record is yielded as its error.

    Read in bounded memory as by `stream_records`, except for message trees, whose messages are all read first.

    Raises:
        DataError: As for `source_files` and `stream_records`, or message trees contain no answer.
    """
    yield from resolve_trees(_stored_records(source), source.path)


def source_content_digest(source: DataSource) -> str:
    """The SHA-256, in hex, of the kinds and bytes of the files of a source in order, or of the rows of a hub dataset.

    Equal for equal content wherever it lies and whatever the files are called, apart from their order.

    Raises:
        DataError: As for `source_files`; a file has an unknown type, cannot be read, or is a pipe or a device, which
            could be read only once.
    """
    files = source_files(source)
    if files is None:
        return rows_digest(_open(source))
    digest = hashlib.sha256()
    for path in files:
        digest.update(file_kind(path).encode() + b"\0")
        try:
            with open_regular(path) as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise unreadable(path, error) from error
    return digest.hexdigest()


def _stored_records(source: DataSource) -> Iterator[Record | DataError]:
    files = source_files(source)
    if files is not None:
        for path in files:
            yield from stream_records(path)
        return
    where = f"{source.path}/{_split(source)}"
    for number, row in enumerate(stream_rows(_open(source)), start=1):
        yield Record(f"{where}, record {number}", row)


def _matching_files(pattern: str) -> list[Path]:
    names = glob.glob(pattern, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern and hidden files
    # Links that lead nowhere are kept, so that reading them fails.
    found = sorted(path for path in map(Path, set(names)) if not path.is_dir())
    if not found:
        raise DataError(
            "No file matches the pattern.",
            path=pattern,
            expected="at least one file",
            actual="none",
            hint="check the folder and the pattern, and quote it for the shell",
        )
    return found


def _is_hub_id(path: str) -> bool:
    found = _HUB_ID.fullmatch(path)
    return found is not None and _FILE_SUFFIX.search(found["identifier"]) is None


def _open(source: DataSource) -> datasets.Dataset:
    identifier, _, configuration = source.path.partition(":")
    return open_hub(identifier, configuration or None, _split(source))


def _split(source: DataSource) -> str:
    return source.split or "train"


def _refuse_split(source: DataSource) -> None:
    if source.split is not None:
        raise DataError(
            "Only hub datasets have splits.",
            path=source.path,
            key=source.split,
            hint=f"name the file of that split, or {built_in.NAME}/{source.split} for the built-in data",
        )
