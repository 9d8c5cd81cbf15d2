"""Packing of mask bits in memory, and the payload codecs of the mask file.

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
"""Upper bound on packed bytes per byte of a Huffman-only DEFLATE stream; never reached, since each byte costs at least
one bit and each block adds a header and an end code."""

_RAW_DEFLATE: Final = -zlib.MAX_WBITS
_MEMORY_LEVEL: Final = 9  # longest blocks, so fewest code tables: 0.4776 instead of 0.4795 bits per weight at 10 %
_DAMAGE_HINT: Final = "copy the file again from its source; if the source is damaged too, train the mask again"


def packed_size_bytes(weights: int) -> int:
    """The size in bytes of the packed mask of `weights` weights."""
    return (weights + 7) // 8


def pack(keep: torch.Tensor) -> Packed:
    """The packed bits of `keep` in row-major order, `(ceil(numel / 8),)` and read-only.

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
    """Encodes `packed` as a payload.

    Raises:
        MaskFileError: The codec is "ans", and the package `constriction` is not installed.
    """
    if codec == "packed":
        return packed.tobytes()
    if codec == "ans":
        return encode_ans(packed, 8 * len(packed) - count_kept(packed))
    return deflate(packed)


def deflate(content: Packed) -> bytes:
    """Encodes bytes as a raw DEFLATE stream with Huffman codes only."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, _RAW_DEFLATE, _MEMORY_LEVEL, zlib.Z_HUFFMAN_ONLY)
    return compressor.compress(content.data) + compressor.flush()


def decode(payload: bytes, codec: Codec, weights: int, removed: int, *, path: Path, key: str) -> Packed:
    """The packed bits in `payload`, `(ceil(weights / 8),)` and read-only.

    Args:
        payload: Bytes from an untrusted file. The packed size is allocated only if it is less than `MAX_EXPANSION`
            times the payload's size ("deflate") or at most 64 times ("ans").
        codec: The codec stated for the payload.
        weights: The number of weights according to the tensor's shape.
        removed: The number of removed weights according to the tensor's record, at most `weights`. Only "ans" needs it;
            the bits are not counted here.
        path: The mask file, for the message.
        key: The tensor's name, for the message.

    Raises:
        MaskFormatError: The payload does not hold exactly that many bits, or its padding bits are not zero.
        MaskFileError: The codec is "ans", and the package `constriction` is not installed.
    """
    size_bytes = packed_size_bytes(weights)
    packed: bytes | Packed
    if codec == "packed":
        packed = payload
    elif codec == "deflate":
        packed = inflate(payload, size_bytes, path, key)
    else:
        packed = decode_ans(payload, size_bytes, removed + -weights % 8, path=path, key=key)
    if len(packed) != size_bytes:
        raise MaskFormatError(
            "The payload of this tensor does not match its shape.",
            path=path,
            key=key,
            expected=f"{size_bytes} bytes for {weights} weights",
            actual=f"{len(packed)} bytes",
            hint=_DAMAGE_HINT,
        )
    if weights % 8 and packed[-1] >> (weights % 8):
        raise MaskFormatError(
            "The padding bits after this tensor's last weight are not zero.",
            path=path,
            key=key,
            expected=f"{-weights % 8} zero bits",
            actual=f"last byte 0x{packed[-1]:02x}",
            hint=_DAMAGE_HINT,
        )
    return np.frombuffer(packed, dtype=np.uint8)


def inflate(payload: bytes, size_bytes: int, path: Path, key: str) -> bytes:
    """The bytes in a stream of `deflate`.

    Args:
        payload: Bytes from an untrusted file.
        size_bytes: The size to expect, allocated only if it is less than `MAX_EXPANSION` times the payload's.
        path: The file, for the message.
        key: The tensor's name, for the message.

    Raises:
        MaskFormatError: The payload does not hold exactly that many bytes.
    """
    if size_bytes >= MAX_EXPANSION * len(payload):
        raise MaskFormatError(
            "The shape of this tensor implies more weights than its payload can hold.",
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
            "The payload of this tensor is not a DEFLATE stream.",
            path=path,
            key=key,
            actual=str(error),
            hint=_DAMAGE_HINT,
        ) from error
    rest_bytes = len(decompressor.unused_data) + len(decompressor.unconsumed_tail)
    if len(packed) == size_bytes and decompressor.eof and not rest_bytes:
        return packed
    found = f"{len(packed)} bytes" if len(packed) <= size_bytes else "more"
    ending = "" if decompressor.eof else ", without an end of stream"
    raise MaskFormatError(
        "The DEFLATE stream of this tensor does not match its shape.",
        path=path,
        key=key,
        expected=f"{size_bytes} bytes, then the end of the payload",
        actual=f"{found}{ending}, {rest_bytes} bytes of the payload left over",
        hint=_DAMAGE_HINT,
    )
