"""Writes delta files: payloads go to a nameless temporary file until the document that precedes them is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

from mftctl.errors import MaskFileError
from mftctl.files.atomic import Permit, atomic_file
from mftctl.files.ownership import permit_file
from mftctl.masking.delta.delta import is_delta_file
from mftctl.masking.delta.document import DeltaContents, write_document
from mftctl.masking.mask_file.container import Span, write_container


class PayloadSpool(Mapping[str, bytes]):
    """Payloads by name, in a temporary file that has no name and disappears with the process.

    Args:
        stream: An empty binary file, opened for writing and reading.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._spans: dict[str, Span] = {}

    def add(self, name: str, payload: bytes) -> None:
        """Adds a payload."""
        self._stream.seek(0, 2)
        self._spans[name] = Span(self._stream.tell(), len(payload))
        self._stream.write(payload)

    def __getitem__(self, name: str) -> bytes:
        span = self._spans[name]
        self._stream.seek(span.offset_bytes)
        return self._stream.read(span.length_bytes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)


@contextmanager
def payload_spool(path: Path) -> Iterator[PayloadSpool]:
    """A spool in the folder of a delta file that is to be written.

    Args:
        path: The delta file. Missing parent folders are created.

    Raises:
        MaskFileError: The folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent) as stream:
            yield PayloadSpool(stream)
    except OSError as error:
        raise _unwritable(path, error) from error


def write_delta(path: Path, contents: DeltaContents, spool: PayloadSpool, permit: Permit | None) -> None:
    """Writes a delta file, whole or not at all.

    Args:
        path: The file.
        contents: What its document says.
        spool: The payloads that it describes.
        permit: Decides whether an existing file may be replaced; None replaces any file.

    Raises:
        MaskFileError: The file cannot be written.
        MaskFormatError: The format does not allow a value.
        OutputError: The permit refuses.
    """
    document = write_document(contents)
    try:
        with atomic_file(path, permit) as temporary, temporary.open("wb") as stream:
            write_container(stream, document, spool)
    except OSError as error:
        raise _unwritable(path, error) from error


def delta_permit(*, replace: bool) -> Permit:
    """A permit to replace a delta file, but no other file.

    Args:
        replace: Whether the user agreed.
    """
    return permit_file("a delta file", is_delta_file, replace=replace)


def _unwritable(path: Path, error: OSError) -> MaskFileError:
    return MaskFileError(
        "The delta file cannot be written.",
        path=path,
        actual=error.strerror or str(error),
        hint="give another path with -o, or free some space",
    )
