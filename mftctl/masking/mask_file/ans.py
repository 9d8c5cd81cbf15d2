"""Entropy coding of packed mask bits with asymmetric numeral systems (ANS), by the `constriction` package.

The bytes of a packed mask are coded as symbols of one fixed model, in which each bit is zero with a probability equal
to the share of zero bits in the whole tensor. The model uses only integers, so a payload is the same on every machine;
docs/reference/mask-file-format.md defines its layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mftctl.errors import MaskFileError, MaskFormatError

WORD_BYTES: Final = 4
MAX_BYTES_A_WORD: Final = 2**8
"""Maximum packed bytes per word of a payload; limits a reader's time and memory."""

_BYTES_A_START_WORD: Final = 2**16
_MINORITY_BITS_A_WORD: Final = 16  # each costs at least 2 bits

_TOTAL: Final = 2**24
_SYMBOLS: Final = 256
_CHUNK_BYTES: Final = 2**18  # the coder takes 4 bytes per symbol
_DAMAGE_HINT: Final = "copy the file again from its source; if the source is damaged too, train the mask again"


def encode_ans(packed: npt.NDArray[np.uint8], zeros: int) -> bytes:
    """Encodes `packed` as a payload.

    Args:
        packed: The bytes of a packed mask.
        zeros: The number of zero bits, padding included.

    Raises:
        MaskFileError: The package `constriction` is not installed.
    """
    stream, model = _stream(), _model(len(packed), zeros)
    coder = stream.stack.AnsCoder(_start(len(packed), zeros))
    # A stack: the last symbol goes in first.
    for first in reversed(range(0, len(packed), _CHUNK_BYTES)):
        coder.encode_reverse(packed[first : first + _CHUNK_BYTES].astype(np.int32), model)
    return bytes(coder.get_compressed().astype("<u4").tobytes())


def decode_ans(payload: bytes, size_bytes: int, zeros: int, *, path: Path, key: str) -> npt.NDArray[np.uint8]:
    """Decodes a payload to packed bytes, `(size_bytes,)` and read-only.

    Args:
        payload: Bytes from an untrusted file.
        size_bytes: The packed size according to the tensor's shape. It is allocated if it is at most 64 times the
            payload's size, and refused otherwise.
        zeros: The number of zero bits according to the tensor's record, padding included; at most `8 * size_bytes`.
        path: The mask file, for the message.
        key: The tensor's name, for the message.

    Raises:
        MaskFormatError: The payload does not decode to that many bytes.
        MaskFileError: The package `constriction` is not installed.
    """
    least_bytes = WORD_BYTES * max(_start_words(size_bytes, zeros), -(-size_bytes // MAX_BYTES_A_WORD))
    if len(payload) < least_bytes or len(payload) % WORD_BYTES or not any(payload[-WORD_BYTES:]):
        raise MaskFormatError(
            "The payload of this tensor is not an ANS stream for its shape.",
            path=path,
            key=key,
            expected=f"words of {WORD_BYTES} bytes, at least {least_bytes} bytes, and a last word other than 0",
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
            "The ANS stream of this tensor does not match its shape and its number of removed weights.",
            path=path,
            key=key,
            expected=f"the coder's starting words after {size_bytes} bytes",
            actual=f"{len(rest)} different words",
            hint=_DAMAGE_HINT,
        )
    packed.flags.writeable = False
    return packed


def frequencies(size_bytes: int, zeros: int) -> list[int]:
    """The model's frequency of each byte out of 2^24: 256 positive integers in the order of the bytes.

    Args:
        size_bytes: The packed size of a mask.
        zeros: Its number of zero bits, padding included.
    """
    bits, free = 8 * size_bytes, _TOTAL - _SYMBOLS
    by_zeros = [1 + free * zeros**count * (bits - zeros) ** (8 - count) // bits**8 for count in range(9)]
    found = [by_zeros[8 - byte.bit_count()] for byte in range(_SYMBOLS)]
    found[0xFF if 2 * zeros <= bits else 0] += _TOTAL - sum(found)
    return found


def _start_words(size_bytes: int, zeros: int) -> int:
    """The number of starting words on the stack, so that even a mask with almost no entropy has the minimum size."""
    minority = min(zeros, 8 * size_bytes - zeros)
    lacking = -(-size_bytes // MAX_BYTES_A_WORD) - minority // _MINORITY_BITS_A_WORD
    return max(-(-size_bytes // _BYTES_A_START_WORD), lacking)


def _start(size_bytes: int, zeros: int) -> npt.NDArray[np.uint32]:
    return np.ones(_start_words(size_bytes, zeros), dtype=np.uint32)


def _model(size_bytes: int, zeros: int) -> Any:
    # The coder assigns 1 to each symbol and distributes the rest by weight. These weights add up to the rest, so
    # that the shares equal the weights exactly.
    weights = np.array(frequencies(size_bytes, zeros), dtype=np.float64) - 1
    return _stream().model.Categorical(weights, lazy=False, perfect=False)


def _stream(path: Path | None = None, key: str | None = None) -> Any:
    try:
        import constriction
    except ImportError as error:
        raise MaskFileError(
            "The codec ans needs the package constriction, which is not installed.",
            path=path,
            key=key,
            hint="pip install 'mftctl[ans]'" + (", or use codec deflate" if path is None else ""),
        ) from error
    return constriction.stream
