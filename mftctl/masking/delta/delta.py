"""Delta files: opening them, and the change of a tensor, applied chunk by chunk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mftctl.errors import MaskFormatError
from mftctl.files.regular import open_regular
from mftctl.masking.delta.document import (
    FILE,
    VALUES,
    DeltaContents,
    is_delta_document,
    kind_of_document,
    parse_delta_document,
    require_payloads,
)
from mftctl.masking.delta.keep_bits import (
    SEEDED_BYTES,
    AllBits,
    KeepBits,
    PackedBits,
    SeededBits,
)
from mftctl.masking.delta.records import ChangedTensor
from mftctl.masking.delta.steps import Bits
from mftctl.masking.delta.value_codecs import decode_file, decode_raw
from mftctl.masking.delta.values import KeptValues, decode_values, values_size_bytes
from mftctl.masking.mask_file.codecs import decode
from mftctl.masking.mask_file.document import parse_fields
from mftctl.masking.mask_file.reader import StoredPayloads, readable, require_count

DELTA_SUFFIX = ".delta"
"""The usual end of a delta file's name."""

_DAMAGE_HINT = "copy the file again from its source; if the source is damaged too, make it again"


@dataclass(slots=True)
class TensorChange:
    """The change of one tensor, applied to its weights from first to last.

    Attributes:
        record: The tensor's record.
        bits: Which entries stay changed.
        values: Their values.
        path: The delta file, for messages.
        name: The tensor's name, for messages.
    """

    record: ChangedTensor
    bits: KeepBits
    values: KeptValues
    path: Path
    name: str
    _weights_done: int = 0
    _kept_done: int = 0

    def apply_to(self, weights: Bits) -> None:
        """Changes the next weights in place.

        Args:
            weights: Bit patterns of the base; all but the last part have a multiple of 8 weights.

        Raises:
            MaskFormatError: More entries are kept than have values.
        """
        places = np.flatnonzero(self.bits.part(self._weights_done, len(weights)))
        if self._kept_done + len(places) > self.record.kept:
            raise self._other_count(self._kept_done + len(places))
        self.values.put(weights, places, self._kept_done)
        self._weights_done += len(weights)
        self._kept_done += len(places)

    def require_all_used(self) -> None:
        """Checks that every value had its entry.

        Raises:
            MaskFormatError: Fewer entries are kept than have values.
        """
        if self._kept_done != self.record.kept:
            raise self._other_count(self._kept_done)

    def _other_count(self, found: int) -> MaskFormatError:
        return MaskFormatError(
            "The number of changed entries does not match the tensor's record.",
            path=self.path,
            key=self.name,
            expected=self.record.kept,
            actual=found,
            hint=_DAMAGE_HINT,
        )


class Delta:
    """An open delta file; payloads are read on demand, from any thread.

    Attributes:
        path: The file.
        contents: What its document says.
        size_bytes: Its size.
    """

    def __init__(self, path: Path, contents: DeltaContents, payloads: StoredPayloads) -> None:
        self.path, self.contents, self.size_bytes = path, contents, payloads.size_bytes
        self._payloads = payloads

    def change(self, name: str) -> TensorChange:
        """The change of a tensor, for one pass over its weights.

        Raises:
            MaskFormatError: Its bits or values violate the format.
            MaskFileError: A package needed to decode them is not installed.
        """
        record = self.contents.tensors[name]
        size_bytes = values_size_bytes(record.values, record.kept, record.dtype)
        payload = self._payloads[VALUES + name]
        raw = decode_raw(payload, record.values_codec, size_bytes, path=self.path, key=name)
        try:
            values = decode_values(record.values, raw, record.kept, record.dtype)
        except ValueError as error:
            raise MaskFormatError(
                "The values of this tensor violate the format.",
                path=self.path,
                key=name,
                actual=str(error),
                hint=_DAMAGE_HINT,
            ) from error
        return TensorChange(record, self._bits(name, record), values, self.path, name)

    def bits(self, name: str) -> KeepBits:
        """Which entries of a tensor stay changed.

        Raises:
            MaskFormatError: The bits violate the format.
            MaskFileError: A package needed to decode them is not installed.
        """
        return self._bits(name, self.contents.tensors[name])

    def file(self, name: str) -> bytes:
        """The content of a carried file.

        Raises:
            MaskFormatError: It does not match its record.
        """
        record, payload = self.contents.files[name], self._payloads[FILE + name]
        content = decode_file(payload, record.size_bytes, path=self.path, key=name)
        digest = hashlib.sha256(content).hexdigest()
        if digest != record.sha256:
            raise MaskFormatError(
                "A file in the delta file does not match its digest.",
                path=self.path,
                key=name,
                expected=record.sha256,
                actual=digest,
                hint=_DAMAGE_HINT,
            )
        return content

    def payload_bytes(self, name: str) -> tuple[int, int]:
        """The stored bytes of a tensor's bits and of its values."""
        is_stored = self.contents.tensors[name].codec != "all"
        bits_bytes = self._payloads.length_bytes(name) if is_stored else 0
        return bits_bytes, self._payloads.length_bytes(VALUES + name)

    def _bits(self, name: str, record: ChangedTensor) -> KeepBits:
        if record.codec == "all":
            return AllBits()
        payload = self._payloads[name]
        if record.codec == "seeded":
            return self._seeded(name, payload)
        packed = decode(payload, record.codec, record.weights, record.removed, path=self.path, key=name)
        require_count(name, packed, record.weights, record.removed, self.path)
        return PackedBits(packed)

    def _seeded(self, name: str, payload: bytes) -> SeededBits:
        if len(payload) == SEEDED_BYTES:
            return SeededBits.of_payload(payload)
        raise MaskFormatError(
            "The key of this tensor's random entries has the wrong size.",
            path=self.path,
            key=name,
            expected=f"{SEEDED_BYTES} bytes",
            actual=f"{len(payload)} bytes",
            hint=_DAMAGE_HINT,
        )


@contextmanager
def open_delta(path: Path | str) -> Iterator[Delta]:
    """Opens a delta file without loading its values, so that memory use does not grow with it.

    Layout, document, names and digest are checked on opening; the bits and values of a tensor on each access.

    Args:
        path: A possibly untrusted file.

    Yields:
        The delta, valid until the block ends.

    Raises:
        MaskFormatError: The file cannot be read, is damaged, has an unknown version or is not a delta file.
    """
    path = Path(path)
    with readable(path):
        stream = open_regular(path)
    with stream:
        payloads = StoredPayloads(stream, path)
        contents = parse_delta_document(payloads.document, path)
        require_payloads(contents, payloads.names, path)
        payloads.require_digest()
        yield Delta(path, contents, payloads)


def is_delta_file(path: Path | str) -> bool:
    """True if a file has the layout and the version of a delta file, valid or not; False if it cannot be read."""
    document = _document(Path(path))
    return document is not None and is_delta_document(document, Path(path))


def is_soft_mask(path: Path | str) -> bool:
    """True if a file is laid out as a soft mask, valid or not; False if it cannot be read."""
    document = _document(Path(path))
    return document is not None and kind_of_document(document, Path(path)) == "scale"


def _document(path: Path) -> bytes | None:
    """The document of a file; None if it cannot be read or is no JSON."""
    try:
        with readable(path):
            stream = open_regular(path)
        with stream:
            document = StoredPayloads(stream, path).document
            parse_fields(document, path)
            return document
    except MaskFormatError:
        return None
