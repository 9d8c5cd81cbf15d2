"""Packed mask bits through an entropy coder: asymmetric numeral systems, as the `constriction` package has them.

The bytes of a packed mask are coded as symbols of one fixed model, in which every bit is zero with the share of zero
bits of the whole tensor. The model is made of integers alone, so that a payload is the same on every machine; its
layout is defined in `bits.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mftctl.errors import MaskFileError, MaskFormatError

WORD_BYTES: Final = 4
MAX_BYTES_A_WORD: Final = 2**8
"""Packed bytes for each word of a payload, at most: what bounds a reader's time and memory."""

_BYTES_A_START_WORD: Final = 2**16
_MINORITY_BITS_A_WORD: Final = 16  # each costs 2 bits or more

_TOTAL: Final = 2**24
_SYMBOLS: Final = 256
_CHUNK_BYTES: Final = 2**18  # symbols are 4 bytes each to the coder
_DAMAGE_HINT: Final = "copy the file again from where it was made; if it is broken there too, train the mask again"


def encode_ans(packed: npt.NDArray[np.uint8], zeros: int) -> bytes:
    """The payload that holds `packed`.

    Args:
        packed: The bytes of a packed mask.
        zeros: Their zero bits, padding included.

    Raises:
        MaskFileError: The package `constriction` is missing.
    """
    stream, model = _stream(), _model(len(packed), zeros)
    coder = stream.stack.AnsCoder(_start(len(packed), zeros))
    # A stack: the last symbol goes in first.
    for first in reversed(range(0, len(packed), _CHUNK_BYTES)):
        coder.encode_reverse(packed[first : first + _CHUNK_BYTES].astype(np.int32), model)
    return bytes(coder.get_compressed().astype("<u4").tobytes())


def decode_ans(payload: bytes, size_bytes: int, zeros: int, *, path: Path, key: str) -> npt.NDArray[np.uint8]:
    """The packed bytes in `payload`, `(size_bytes,)` and read-only.

    Args:
        payload: Bytes from an untrusted file.
        size_bytes: The packed size that the tensor's shape claims. It is allocated if it is at most 64 times the
            payload, and refused otherwise.
        zeros: The zero bits that the tensor's record claims, padding included; at most `8 * size_bytes`.
        path: The mask file, for the message.
        key: The tensor's name, for the message.

    Raises:
        MaskFormatError: The payload is not that of so many bytes.
        MaskFileError: The package `constriction` is missing.
    """
    least_bytes = WORD_BYTES * max(_start_words(size_bytes, zeros), -(-size_bytes // MAX_BYTES_A_WORD))
    if len(payload) < least_bytes or len(payload) % WORD_BYTES or not any(payload[-WORD_BYTES:]):
        raise MaskFormatError(
            "The payload of this tensor is no ANS stream for its shape",
            path=path,
            key=key,
            expected=f"words of {WORD_BYTES} bytes, {least_bytes} bytes or more, the last word not 0",
            actual=f"{len(payload)} bytes that end in 0x{payload[-WORD_BYTES:].hex()}",
            hint=_DAMAGE_HINT,
        )
    stream, model = _stream(path, key), _model(size_bytes, zeros)
    coder = stream.stack.AnsCoder(np.frombuffer(payload, dtype="<u4").astype(np.uint32))
    packed = np.empty(size_bytes, dtype=np.uint8)
    for first in range(0, size_bytes, _CHUNK_BYTES):
        chunk = packed[first : first + _CHUNK_BYTES]
        chunk[:] = coder.decode(model, len(chunk))
    rest = coder.get_compressed()
    if not np.array_equal(rest, _start(size_bytes, zeros)):
        raise MaskFormatError(
            "The ANS stream of this tensor does not fit its shape and its number of removed weights",
            path=path,
            key=key,
            expected=f"the coder's starting words after {size_bytes} bytes",
            actual=f"{len(rest)} other words",
            hint=_DAMAGE_HINT,
        )
    packed.flags.writeable = False
    return packed


def frequencies(size_bytes: int, zeros: int) -> list[int]:
    """How often of 2^24 times the model expects each byte: 256 positive integers in the order of the bytes.

    Args:
        size_bytes: The packed size of a mask.
        zeros: Its zero bits, padding included.
    """
    bits, free = 8 * size_bytes, _TOTAL - _SYMBOLS
    by_zeros = [1 + free * zeros**count * (bits - zeros) ** (8 - count) // bits**8 for count in range(9)]
    found = [by_zeros[8 - byte.bit_count()] for byte in range(_SYMBOLS)]
    found[0xFF if 2 * zeros <= bits else 0] += _TOTAL - sum(found)
    return found


def _start_words(size_bytes: int, zeros: int) -> int:
    """The words that the stack starts with: so many that the payload of a mask with next to no entropy has its size."""
    minority = min(zeros, 8 * size_bytes - zeros)
    lacking = -(-size_bytes // MAX_BYTES_A_WORD) - minority // _MINORITY_BITS_A_WORD
    return max(-(-size_bytes // _BYTES_A_START_WORD), lacking)


def _start(size_bytes: int, zeros: int) -> npt.NDArray[np.uint32]:
    return np.ones(_start_words(size_bytes, zeros), dtype=np.uint32)


def _model(size_bytes: int, zeros: int) -> Any:
    # The coder gives each symbol 1 and shares out the rest by weight. These weights add up to the rest, so that the
    # shares are the weights themselves, without rounding.
    weights = np.array(frequencies(size_bytes, zeros), dtype=np.float64) - 1
    return _stream().model.Categorical(weights, lazy=False, perfect=False)


def _stream(path: Path | None = None, key: str | None = None) -> Any:
    try:
        import constriction
    except ImportError as error:
        raise MaskFileError(
            "The codec ans needs the package constriction, which is not installed",
            path=path,
            key=key,
            hint="pip install 'mftctl[ans]'" + (", or use codec deflate" if path is None else ""),
        ) from error
    return constriction.stream
