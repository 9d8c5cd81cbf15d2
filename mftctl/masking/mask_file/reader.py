"""The bits of a mask file, read on demand."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mftctl.errors import MaskFormatError
from mftctl.masking.mask_file.codecs import Packed, count_kept, decode
from mftctl.masking.mask_file.container import MaskDigest, read_container
from mftctl.masking.mask_file.document import parse_document, shown


class StoredPayloads:
    """The document and the payloads of a mask file or a delta file, read on demand, from any thread.

    Attributes:
        document: The JSON document, not yet checked.
        names: The names of the payloads.
        size_bytes: The size of the file.

    Args:
        stream: An untrusted file, opened for reading in binary; it must stay open while payloads are read. Its layout
            is checked here.
        path: The file, for the messages.

    Raises:
        MaskFormatError: The file cannot be read or is not laid out as a mask file.
    """

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self._stream, self._path, self._lock = stream, path, threading.Lock()
        with readable(path):
            self._state = self._file_state()
            container = read_container(stream, path)
        self.document, self._digest, self._spans = container.document, container.digest, container.payloads
        self.names, self.size_bytes = set(container.payloads), self._state[0]

    def __getitem__(self, name: str) -> bytes:
        span = self._spans[name]
        with self._lock, readable(self._path):
            self._stream.seek(span.offset_bytes)
            payload = self._stream.read(span.length_bytes)
            state = self._file_state()
        if state != self._state or len(payload) != span.length_bytes:
            raise MaskFormatError(
                "The mask file changed while it was being read.",
                path=self._path,
                key=name,
                hint="wait until nothing writes to the file, then try again",
            )
        return payload

    def length_bytes(self, name: str) -> int:
        """The length of a payload."""
        return self._spans[name].length_bytes

    def require_digest(self) -> None:
        """Checks the digest over the document and all payloads.

        Raises:
            MaskFormatError: It is another one.
        """
        digest = MaskDigest(self.document)
        for name in sorted(self.names):
            digest.add_payload(name, self[name])
        if digest.hexdigest() != self._digest:
            raise MaskFormatError(
                "The mask file is damaged: its contents do not match its digest.",
                path=self._path,
                key="sha256",
                expected=self._digest,
                actual=digest.hexdigest(),
                hint="copy the file again from its source; if the source is damaged too, train the mask again",
            )

    def _file_state(self) -> tuple[int, int]:
        state = os.fstat(self._stream.fileno())
        return state.st_size, state.st_mtime_ns


class StoredBits(Mapping[str, Packed]):
    """The packed bits by tensor name, read, decoded and checked on each access, from any thread.

    Attributes:
        records: The record of each tensor in the file, in ascending order of name.
        metadata: The origin of the mask.

    Args:
        stream: An untrusted mask file, opened for reading in binary; it must stay open while bits are read. Its layout,
            document, names and digest are checked here.
        path: The file, for the messages.

    Raises:
        MaskFormatError: The file cannot be read, is damaged, has an unknown version or is not a mask file.
    """

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self._payloads, self._path = StoredPayloads(stream, path), path
        document = parse_document(self._payloads.document, path)
        require_same_names(set(document.tensors), self._payloads.names, path)
        self.records, self.metadata = document.records(), document.metadata()
        self._codecs = {name: entry.codec for name, entry in document.tensors.items()}
        self._payloads.require_digest()

    def __getitem__(self, name: str) -> Packed:
        record, payload = self.records[name], self._payloads[name]
        packed = decode(payload, self._codecs[name], record.weights, record.removed, path=self._path, key=name)
        require_count(name, packed, record.weights, record.removed, self._path)
        return packed

    def __contains__(self, name: object) -> bool:
        return name in self.records

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns operating system errors while opening or reading a mask file into a `MaskFormatError`."""
    try:
        yield
    except OSError as error:
        raise MaskFormatError(
            "The mask file cannot be read.",
            path=path,
            actual=error.strerror or str(error),
            hint="give the path of a mask file, such as mask.bits",
        ) from error


def require_same_names(recorded: set[str], masked: set[str], path: Path | None) -> None:
    """Checks that the records and the masks have the same names.

    Args:
        recorded: The names of the records.
        masked: The names of the masks.
        path: The mask file, if there is one.

    Raises:
        MaskFormatError: The names differ.
    """
    if recorded == masked:
        return
    name = min(recorded ^ masked)
    raise MaskFormatError(
        "The masks and their records do not have the same names.",
        path=path,
        key=shown(name),
        expected="a mask and a record",
        actual="only a record" if name in recorded else "only a mask",
        hint="train the mask again, or copy the mask file again from its source",
    )


def require_count(name: str, packed: Packed, weights: int, removed: int, path: Path | None) -> None:
    """Checks that a mask removes as many weights as its record states.

    Args:
        name: The tensor's name.
        packed: Its packed bits, with zero padding.
        weights: The number of weights in its record.
        removed: The number of removed weights in its record.
        path: The mask file, if there is one.

    Raises:
        MaskFormatError: It removes more or fewer.
    """
    found = weights - count_kept(packed)
    if found != removed:
        raise MaskFormatError(
            "The number of weights that the mask removes does not match its record.",
            path=path,
            key=name,
            expected=removed,
            actual=found,
            hint="train the mask again, or copy the mask file again from its source",
        )
