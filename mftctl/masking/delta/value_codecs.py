"""Compression of values and of carried files in a delta file."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Final, Literal

import numpy as np

from mftctl.errors import MaskFormatError
from mftctl.masking.delta.values import Raw
from mftctl.masking.mask_file.codecs import deflate, inflate

ValuesCodec = Literal["raw", "deflate"]

_RAW_DEFLATE: Final = -zlib.MAX_WBITS
_DAMAGE_HINT: Final = "copy the file again from its source; if the source is damaged too, make it again"


def encode_raw(raw: Raw) -> tuple[ValuesCodec, bytes]:
    """The shorter of the bytes themselves and their Huffman codes, with its name."""
    coded = deflate(raw)
    return ("deflate", coded) if len(coded) < len(raw) else ("raw", raw.tobytes())


def decode_raw(payload: bytes, codec: ValuesCodec, size_bytes: int, *, path: Path, key: str) -> Raw:
    """The bytes of values, `(size_bytes,)` and read-only.

    Args:
        payload: Bytes from an untrusted file. The size is allocated only if it is less than 8 times theirs.
        codec: The codec stated for them.
        size_bytes: The size according to the tensor's record.
        path: The delta file, for the message.
        key: The tensor's name, for the message.

    Raises:
        MaskFormatError: The payload does not hold exactly that many bytes.
    """
    found = payload if codec == "raw" else inflate(payload, size_bytes, path, key)
    if len(found) != size_bytes:
        raise MaskFormatError(
            "The values of this tensor do not match the number of its changed entries.",
            path=path,
            key=key,
            expected=f"{size_bytes} bytes",
            actual=f"{len(found)} bytes",
            hint=_DAMAGE_HINT,
        )
    return np.frombuffer(found, dtype=np.uint8)


def encode_file(content: bytes) -> bytes:
    """The compressed content of a text file."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, _RAW_DEFLATE)
    return compressor.compress(content) + compressor.flush()


def decode_file(payload: bytes, size_bytes: int, *, path: Path, key: str) -> bytes:
    """The content of a carried file.

    Args:
        payload: Bytes from an untrusted file.
        size_bytes: The size stated for the file, which bounds what is allocated.
        path: The delta file, for the message.
        key: The file's name, for the message.

    Raises:
        MaskFormatError: The payload does not hold exactly that many bytes.
    """
    decompressor = zlib.decompressobj(_RAW_DEFLATE)
    try:
        content = decompressor.decompress(payload, size_bytes + 1)
    except zlib.error as error:
        raise _damaged_file(path, key, size_bytes, str(error)) from error
    if len(content) != size_bytes or not decompressor.eof or decompressor.unused_data:
        raise _damaged_file(path, key, size_bytes, f"{len(content)} bytes")
    return content


def _damaged_file(path: Path, key: str, size_bytes: int, actual: str) -> MaskFormatError:
    return MaskFormatError(
        "A file in the delta file cannot be unpacked.",
        path=path,
        key=key,
        expected=f"a DEFLATE stream of {size_bytes} bytes",
        actual=actual,
        hint=_DAMAGE_HINT,
    )
