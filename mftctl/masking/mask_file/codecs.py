"""Mask bits as bytes: packing in memory, and the codecs of a payload in the mask file.

A packed mask holds weight `i` of the row-major tensor in bit `i % 8` (0 = least significant) of byte `i // 8`; 1 means
keep. The unused high bits of the last byte are zero.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch

from mftctl.errors import MaskFormatError
from mftctl.masking.mask_file.ans import decode_ans, encode_ans

Codec = Literal["packed", "deflate", "ans"]
Packed = npt.NDArray[np.uint8]

MAX_EXPANSION: Final = 8
"""Packed bytes per byte of a Huffman-only DEFLATE stream, never reached: each byte costs a code of at least one bit,
and each block a header and an end code besides."""

_RAW_DEFLATE: Final = -zlib.MAX_WBITS
_MEMORY_LEVEL: Final = 9  # the longest blocks, so the fewest code tables: 0.4776 bits a weight at 10 %, not 0.4795
_DAMAGE_HINT: Final = "copy the file again from where it was made; if it is broken there too, train the mask again"


def packed_size_bytes(weights: int) -> int:
    """The bytes that the bits of `weights` weights take when packed."""
    return (weights + 7) // 8


def pack(keep: torch.Tensor) -> Packed:
    """The bits of `keep`, row by row, `(ceil(numel / 8),)` and read-only.

    Args:
        keep: A bool tensor of any shape on any device, True = keep.
    """
    packed = np.packbits(keep.detach().cpu().contiguous().numpy().reshape(-1), bitorder="little")
    packed.flags.writeable = False
    return packed


def unpack(packed: Packed, weights: int) -> npt.NDArray[np.bool_]:
    """The first `weights` bits of `packed` as bool, `(weights,)`, True = keep."""
    return np.unpackbits(packed, count=weights, bitorder="little").view(np.bool_)


def count_kept(packed: Packed) -> int:
    """The number of one bits in a contiguous array."""
    whole = len(packed) // 8 * 8
    counts = np.bitwise_count(packed[:whole].view(np.uint64)), np.bitwise_count(packed[whole:])
    return sum(int(part.sum(dtype=np.int64)) for part in counts)


def encode(packed: Packed, codec: Codec) -> bytes:
    """The payload that holds `packed`.

    Raises:
        MaskFileError: The codec is "ans", and the package `constriction` is missing.
    """
    if codec == "packed":
        return packed.tobytes()
    if codec == "ans":
        return encode_ans(packed, 8 * len(packed) - count_kept(packed))
    compressor = zlib.compressobj(9, zlib.DEFLATED, _RAW_DEFLATE, _MEMORY_LEVEL, zlib.Z_HUFFMAN_ONLY)
    return compressor.compress(packed.data) + compressor.flush()


def decode(payload: bytes, codec: Codec, weights: int, removed: int, *, path: Path, key: str) -> Packed:
    """The packed bits in `payload`, `(ceil(weights / 8),)` and read-only.

    Args:
        payload: Bytes from an untrusted file. The packed size is allocated only where it is less than
            `MAX_EXPANSION` times theirs ("deflate") or at most 64 times ("ans").
        codec: The codec they claim to be in.
        weights: The number of weights that the tensor's shape claims.
        removed: How many of them its record claims to be removed, at most `weights`. Only "ans" needs it, and the
            bits are not counted here.
        path: The mask file, for the message.
        key: The tensor's name, for the message.

    Raises:
        MaskFormatError: The payload does not hold exactly that many bits, or its padding bits are not zero.
        MaskFileError: The codec is "ans", and the package `constriction` is missing.
    """
    size_bytes = packed_size_bytes(weights)
    packed: bytes | Packed
    if codec == "packed":
        packed = payload
    elif codec == "deflate":
        packed = _inflate(payload, size_bytes, path, key)
    else:
        packed = decode_ans(payload, size_bytes, removed + -weights % 8, path=path, key=key)
    if len(packed) != size_bytes:
        raise MaskFormatError(
            "The payload of this tensor does not fit its shape",
            path=path,
            key=key,
            expected=f"{size_bytes} bytes for {weights} weights",
            actual=f"{len(packed)} bytes",
            hint=_DAMAGE_HINT,
        )
    if weights % 8 and packed[-1] >> (weights % 8):
        raise MaskFormatError(
            "The padding bits after this tensor's last weight are not zero",
            path=path,
            key=key,
            expected=f"{-weights % 8} zero bits",
            actual=f"last byte 0x{packed[-1]:02x}",
            hint=_DAMAGE_HINT,
        )
    return np.frombuffer(packed, dtype=np.uint8)


def _inflate(payload: bytes, size_bytes: int, path: Path, key: str) -> bytes:
    if size_bytes >= MAX_EXPANSION * len(payload):
        raise MaskFormatError(
            "The shape of this tensor claims more weights than its payload can hold",
            path=path,
            key=key,
            expected=f"less than {MAX_EXPANSION * len(payload)} packed bytes in a payload of {len(payload)} bytes",
            actual=f"{size_bytes} packed bytes",
            hint=_DAMAGE_HINT,
        )
    decompressor = zlib.decompressobj(_RAW_DEFLATE)
    try:
        packed = decompressor.decompress(payload, size_bytes + 1)
    except zlib.error as error:
        raise MaskFormatError(
            "The payload of this tensor is no DEFLATE stream",
            path=path,
            key=key,
            actual=str(error),
            hint=_DAMAGE_HINT,
        ) from error
    rest_bytes = len(decompressor.unused_data) + len(decompressor.unconsumed_tail)
    if len(packed) == size_bytes and decompressor.eof and not rest_bytes:
        return packed
    found = f"{len(packed)} bytes" if len(packed) <= size_bytes else "more"
    ending = "" if decompressor.eof else ", with no end of the stream"
    raise MaskFormatError(
        "The DEFLATE stream of this tensor does not fit its shape",
        path=path,
        key=key,
        expected=f"{size_bytes} bytes, then the end of the payload",
        actual=f"{found}{ending}, {rest_bytes} bytes of the payload left over",
        hint=_DAMAGE_HINT,
    )
