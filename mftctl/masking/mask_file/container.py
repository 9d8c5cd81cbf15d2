"""The safetensors container of a mask file: a byte-exact writer and a reader for untrusted files.

The safetensors library writes metadata entries in random order, so mask files are laid out here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mftctl.errors import MaskFormatError
from mftctl.masking.mask_file.document import shown
from mftctl.masking.mask_file.strict_json import parse_strict_json, write_compact_json

MAX_HEADER_BYTES: Final = 100_000_000
"""The same limit as in the safetensors library."""

_LENGTH_BYTES: Final = 8
_ALIGNMENT_BYTES: Final = 8
_PICKLE_STARTS: Final = (b"PK\x03\x04", b"\x80")
_DAMAGE_HINT: Final = "copy the file again from its source; if the source is damaged too, train the mask again"


@dataclass(frozen=True, slots=True)
class Span:
    """The position of a payload in the file, in bytes from the start of the file."""

    offset_bytes: int
    length_bytes: int


@dataclass(frozen=True, slots=True)
class MaskContainer:
    """The parts of a mask file with a valid layout.

    Attributes:
        document: The JSON document, not yet checked.
        digest: The hex digest stated in the file, not yet verified.
        payloads: Position of each payload by tensor name.
    """

    document: bytes
    digest: str
    payloads: dict[str, Span]


class MaskDigest:
    """The SHA-256 of a document and its payloads, each preceded by its length."""

    def __init__(self, document: bytes) -> None:
        self._sha256 = hashlib.sha256()
        self._add(document)

    def add_payload(self, name: str, payload: bytes) -> None:
        """Adds one payload. Names MUST come in ascending order."""
        self._add(name.encode("utf-8"))
        self._add(payload)

    def hexdigest(self) -> str:
        """64 lower-case hex digits."""
        return self._sha256.hexdigest()

    def _add(self, item: bytes) -> None:
        self._sha256.update(len(item).to_bytes(8, "little"))
        self._sha256.update(item)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Metadata(_Strict):
    mftctl: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Entry(_Strict):
    dtype: Literal["U8"]
    shape: Annotated[list[int], Field(min_length=1, max_length=1)]
    data_offsets: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]


class _Header(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    __pydantic_extra__: dict[str, _Entry]
    metadata: Annotated[_Metadata, Field(alias="__metadata__")]


def write_container(stream: BinaryIO, document: bytes, payloads: Mapping[str, bytes]) -> None:
    """Writes a complete mask file; equal arguments give equal bytes.

    Args:
        stream: An empty binary file.
        document: The JSON document.
        payloads: The payloads by tensor name, in any order; each is looked up twice, so a mapping may read them from a
            file.

    Raises:
        MaskFormatError: There are too many tensors.
    """
    names = sorted(payloads)
    digest = MaskDigest(document)
    header: dict[str, object] = {}
    offset_bytes = 0
    for name in names:
        payload = payloads[name]
        length_bytes = len(payload)
        digest.add_payload(name, payload)
        header[name] = {
            "dtype": "U8",
            "shape": [length_bytes],
            "data_offsets": [offset_bytes, offset_bytes + length_bytes],
        }
        offset_bytes += length_bytes
    header["__metadata__"] = {"mftctl": document.decode("utf-8"), "sha256": digest.hexdigest()}
    text = write_compact_json(header, sort_keys=True)
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    if len(text) > MAX_HEADER_BYTES:
        raise MaskFormatError(
            "The mask has too many tensors for one file.",
            expected=f"a header of at most {MAX_HEADER_BYTES} bytes",
            actual=f"{len(text)} bytes",
        )
    stream.write(len(text).to_bytes(_LENGTH_BYTES, "little"))
    stream.write(text)
    for name in names:
        stream.write(payloads[name])


def read_container(stream: BinaryIO, path: Path) -> MaskContainer:
    """The layout of an untrusted mask file, which covers the file without gaps or overlaps.

    Args:
        stream: The file, opened for reading in binary.
        path: The file, for the messages.

    Raises:
        MaskFormatError: The file is not laid out as a mask file.
    """
    file_bytes = os.fstat(stream.fileno()).st_size
    text = _read_header(stream, file_bytes, path)
    header = _parse_header(text, path)
    entries = header.__pydantic_extra__
    payloads = _place_payloads(entries, _LENGTH_BYTES + len(text), file_bytes, path)
    return MaskContainer(header.metadata.mftctl.encode("utf-8"), header.metadata.sha256, payloads)


def _read_header(stream: BinaryIO, file_bytes: int, path: Path) -> bytes:
    start = stream.read(_LENGTH_BYTES)
    length_bytes = int.from_bytes(start, "little")
    room_bytes = file_bytes - _LENGTH_BYTES
    if len(start) == _LENGTH_BYTES and length_bytes <= min(room_bytes, MAX_HEADER_BYTES):
        return stream.read(length_bytes)
    if file_bytes and start.startswith(_PICKLE_STARTS):
        raise MaskFormatError(
            "This is a pickle (a torch.save file), not a mask file.",
            path=path,
            expected="a mask file written by mftctl",
            hint="a pickle can run code when opened, so mftctl does not read it; save the mask with mftctl.save_mask",
        )
    raise MaskFormatError(
        "The file is truncated or is not a mask file." if file_bytes else "The file is empty.",
        path=path,
        expected="a header length of 8 bytes, then that many bytes (at most 100,000,000)",
        actual=f"{file_bytes} bytes, header length {length_bytes}" if len(start) == 8 else f"{file_bytes} bytes",
        hint=_DAMAGE_HINT,
    )


def _parse_header(text: bytes, path: Path) -> _Header:
    bare = text.rstrip(b" ")
    try:
        fields = parse_strict_json(bare)
        compact = write_compact_json(fields, sort_keys=False)
    except ValueError as error:
        raise MaskFormatError(
            "The header is not valid JSON.", path=path, actual=shown(error), hint=_DAMAGE_HINT
        ) from error
    if bare != compact or len(text) != len(bare) + -len(bare) % _ALIGNMENT_BYTES:
        raise MaskFormatError(
            "The header is not in the canonical form that the format requires.",
            path=path,
            expected="compact JSON, padded with spaces to a multiple of 8 bytes",
            hint=_DAMAGE_HINT,
        )
    try:
        return _Header.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise MaskFormatError(
            "The header is not that of a mask file.",
            path=path,
            key=shown(".".join(map(str, first["loc"]))),
            expected=first["msg"],
            actual=shown(first["input"]),
            hint="give a file written by mftctl mask-train, not a model's own safetensors file",
        ) from error


def _place_payloads(entries: Mapping[str, _Entry], start_bytes: int, file_bytes: int, path: Path) -> dict[str, Span]:
    spans: dict[str, Span] = {}
    end_bytes = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        first, last = entry.data_offsets
        if first != end_bytes or last <= first or entry.shape != [last - first]:
            raise MaskFormatError(
                "The payload of this tensor does not start where the previous one ends, or has the wrong size.",
                path=path,
                key=shown(name),
                expected=f"from byte {end_bytes}, {shown(entry.shape)} bytes",
                actual=f"bytes {first} to {last}",
                hint=_DAMAGE_HINT,
            )
        spans[name] = Span(start_bytes + first, last - first)
        end_bytes = last
    if start_bytes + end_bytes != file_bytes:
        raise MaskFormatError(
            "The payloads do not fill the file.",
            path=path,
            expected=f"{start_bytes + end_bytes} bytes",
            actual=f"{file_bytes} bytes",
            hint=_DAMAGE_HINT,
        )
    return spans
