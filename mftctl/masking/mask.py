"""Masks in memory (one bit per weight) and the mask file, format version 1.

The words MUST, SHOULD and MAY below are normative. Integers are unsigned and little-endian.

Container
    A mask file MUST be a safetensors file: 8 bytes N, N bytes of header, then the buffer, which ends with the file. N
    MUST be at most 100,000,000 and a multiple of 8. The header MUST be one JSON object in UTF-8 without optional white
    space or optional escapes, followed by the 0 to 7 spaces that make its length a multiple of 8. Objects MUST NOT
    contain duplicate keys. Keys MAY come in any order; mftctl writes them sorted by code point.

    For each masked parameter the header MUST hold one tensor under the parameter's checkpoint name, with dtype "U8" and
    shape `[length]`, whose `data_offsets` span its payload of `length` bytes, at least 1. Names MUST be printable and
    MUST NOT be empty or `__metadata__`.
    Payloads MUST cover the buffer without holes or overlaps and MAY come in any order; mftctl writes them in ascending
    order of name. `__metadata__` MUST hold exactly the strings `mftctl` (the document) and `sha256` (the digest).

Document
    `mftctl` MUST be a JSON object without duplicate keys or unpaired surrogates, with exactly these keys:
    `format_version` (1), `kind` ("weight": out = base * mask; "delta": out = base + mask * (tuned - base)),
    `bit_order` ("little"), `tensors`, `base`
    (`{"model": string, "revision": string or null}`), `method` (string), `ratio` (0 to 1, or null), `threshold` (number
    or null), `layers` (string or null), `seed` (integer from -2^63 to 2^64 - 1, or null), `run_id` (string or null).
    `base.model` and `method` MUST NOT be empty. A document of kind "delta" MUST also have the key `tuned` (an object
    like `base`, under the same rules); one of kind "weight" MUST NOT.

    `tensors` MUST have the names of the tensors in the header, each with an object of exactly these keys: `shape` (1 to
    8 positive integers with a product of at most 2^48), `removed` (the number of zero bits), `codec`, `sha256` (64
    lower-case hex digits: SHA-256 of the base tensor's bytes as stored in its checkpoint), `dtype` (the base tensor's:
    F64, F32, F16, BF16, F8_E4M3, F8_E5M2, F8_E4M3FNUZ or F8_E5M2FNUZ). In a document of kind "delta" each of these
    objects MUST also have the key `tuned_sha256` (the same digest of the tuned tensor, which has the base tensor's
    shape and dtype); in one of kind "weight" it MUST NOT.

Meaning
    Masks are applied without arithmetic. Kind "weight": a kept weight has the base's bits, a removed one is +0.0. Kind
    "delta": a kept weight has the tuned tensor's bits, a removed one the base's; tensors without a mask are the tuned
    checkpoint's. Where the base has no output head because it is tied to the input embeddings, a mask of the head
    refers to the base's input embeddings. A mask MUST only be applied to tensors that have the stated digests.

Payload
    A mask has one bit per weight, 1 = keep, 0 = removed. Weight i in row-major order is bit `i mod 8` (0 = the least
    significant) of byte `i div 8`. The bits after the last weight MUST be zero. These `ceil(weights / 8)` bytes are the
    payload of codec "packed". The payload of codec "deflate" MUST be one raw DEFLATE stream (RFC 1951) of them, ending
    in the payload's last byte. It SHOULD use Huffman codes only, since a mask has no repetitions to exploit. The packed
    size MUST be less than 8 times the payload's size. Every Huffman-only stream satisfies this: each byte costs at
    least one bit, and each block adds a header and an end code. A reader refuses other streams, and so allocates at
    most 8 times the size of its input.

    The payload of codec "ans" is a stack of 32-bit words, the bottom one first. Let S be the packed size, B = 8 S, and
    Z the number of zero bits among these B, that is, `removed` plus the padding. The model assigns a byte b with k zero
    bits the frequency
        f(b) = 1 + floor((2^24 - 256) Z^k (B - Z)^(8 - k) / B^8)
    in exact integers; the difference between 2^24 and the sum of the 256 frequencies is added to f(255) if 2 Z <= B,
    otherwise to f(0). c(b) is the sum of f over all smaller bytes. A coder has a state x, initially 0, and fills it
    from the stack: while x < 2^32 and the stack is not empty, pop the top word w and set x = 2^32 x + w.
    To write, fill x from a stack of
        max(ceil(S / 2^16), ceil(S / 2^8) - floor(min(Z, B - Z) / 16))
    words of value 1, and encode the packed bytes from last to first:
        if floor(x / 2^40) >= f(b): push x mod 2^32, then x = floor(x / 2^32);
        x = 2^24 floor(x / f(b)) + c(b) + (x mod f(b)).
    At the end push x, the low word first, omitting a high word of 0. To read, fill x from the payload, and decode S
    bytes from first to last, filling x after each:
        q = x mod 2^24; b is the byte with c(b) <= q < c(b) + f(b); x = f(b) floor(x / 2^24) + q - c(b).
    Then x and the stack MUST equal those that writing starts from, and the payload's last word MUST NOT be 0. The
    packed size MUST be at most 2^8 times the number of words. The starting words ensure this where the bits have too
    little entropy (below a ratio of 0.8 %). A reader allocates at most 64 times the size of its input, and takes time
    proportional to it.

Digest
    `sha256` MUST be the SHA-256, in 64 lower-case hex digits, of the document in UTF-8, then for each tensor in
    ascending order of name (by UTF-8 bytes) the name in UTF-8 and the payload as stored, each of these items preceded
    by its length as 8 bytes.

A reader MUST check all of this before it uses a mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from mftctl.errors import MaskFileError, MaskFormatError
from mftctl.files.atomic import Permit, atomic_file
from mftctl.files.ownership import permit_file
from mftctl.files.regular import open_regular
from mftctl.masking.mask_file.codecs import Codec, Packed, encode, pack, packed_size_bytes, unpack
from mftctl.masking.mask_file.container import write_container
from mftctl.masking.mask_file.document import MaskMetadata, TensorRecord, build_document
from mftctl.masking.mask_file.reader import StoredBits, readable, require_count, require_same_names


class Mask:
    """The weights that a model keeps: one bool tensor per parameter, True = keep, stored as packed bits.

    Args:
        tensors: The bool masks by checkpoint name, each with the shape in its record.
        records: The record of each masked tensor, under the same names.
        metadata: The origin of the mask.

    Raises:
        MaskFormatError: Names, shapes, dtypes or counts do not match, or the file format does not allow a value.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], records: Mapping[str, TensorRecord], metadata: MaskMetadata
    ) -> None:
        build_document(records, metadata, "packed")
        require_same_names(set(records), set(tensors), path=None)
        packed = {name: _pack_checked(name, tensors[name], records[name]) for name in records}
        self._hold(packed, records, metadata)

    @classmethod
    def from_packed(
        cls, packed: Mapping[str, Packed], records: Mapping[str, TensorRecord], metadata: MaskMetadata
    ) -> Mask:
        """The mask with the given bits, for masks built tensor by tensor.

        Args:
            packed: Packed bits by checkpoint name, as returned by `codecs.pack`.
            records: The record of each masked tensor, under the same names.
            metadata: The origin of the mask.

        Raises:
            MaskFormatError: Names, sizes or counts do not match, or the file format does not allow a value.
        """
        build_document(records, metadata, "packed")
        require_same_names(set(records), set(packed), path=None)
        held = {}
        for name, record in records.items():
            _require_packed(name, packed[name], record)
            require_count(name, packed[name], record, path=None)
            held[name] = packed[name].view()
            held[name].flags.writeable = False
        return cls._holding(held, records, metadata)

    @classmethod
    def _holding(
        cls, packed: Mapping[str, Packed], records: Mapping[str, TensorRecord], metadata: MaskMetadata
    ) -> Mask:
        mask = cls.__new__(cls)
        mask._hold(packed, records, metadata)
        return mask

    def _hold(self, packed: Mapping[str, Packed], records: Mapping[str, TensorRecord], metadata: MaskMetadata) -> None:
        self._packed = packed
        self.records: Mapping[str, TensorRecord] = MappingProxyType({name: records[name] for name in sorted(records)})
        self.metadata = metadata

    def __getitem__(self, name: str) -> torch.Tensor:
        record = self.records[name]
        return torch.from_numpy(unpack(self.packed(name), record.weights)).reshape(record.shape)

    def __contains__(self, name: object) -> bool:
        return name in self.records

    def __len__(self) -> int:
        return len(self.records)

    def names(self) -> list[str]:
        """The masked parameters' checkpoint names in ascending order."""
        return list(self.records)

    def packed(self, name: str) -> Packed:
        """The packed bits of one tensor, `(ceil(weights / 8),)` and read-only, for processing in chunks.

        Raises:
            MaskFormatError: The bits are in an open file and violate the format.
            MaskFileError: The bits are in an open file, and a package needed to decode them is not installed.
        """
        return self._packed[name]

    @property
    def weights(self) -> int:
        """The number of masked weights, kept and removed."""
        return sum(record.weights for record in self.records.values())

    @property
    def removed(self) -> int:
        """The number of removed weights."""
        return sum(record.removed for record in self.records.values())

    @property
    def ratio(self) -> float:
        """The share removed over all masked weights; `metadata.ratio` is the requested share."""
        return self.removed / self.weights


def save_mask(mask: Mask, path: Path | str, codec: Codec = "deflate", *, permit: Permit | None = None) -> None:
    """Writes the mask file atomically, replacing an existing one.

    Args:
        mask: The mask.
        path: The file. Missing parent folders are created.
        codec: "deflate" (0.478 bits per weight at 10 % removed), "packed" (1 bit per weight), or "ans" (0.469 bits, the
            entropy, at 10 %), which needs the package `constriction` for writing and for reading.
        permit: Decides whether an existing file at `path` may be replaced; None replaces any file.

    Raises:
        MaskFormatError: The codec does not exist.
        MaskFileError: The file cannot be written, or a package is not installed.
    """
    path = Path(path)
    document = build_document(mask.records, mask.metadata, codec)
    payloads = {name: encode(mask.packed(name), codec) for name in mask.names()}
    try:
        with atomic_file(path, permit) as temporary, temporary.open("wb") as stream:
            write_container(stream, document.to_json(), payloads)
    except OSError as error:
        raise MaskFileError(
            "The mask file cannot be written",
            path=path,
            actual=error.strerror or str(error),
            hint="give another path with -o, or free some space",
        ) from error


def mask_permit(*, replace: bool) -> Permit:
    """A permit to replace a mask file, but no other file.

    Args:
        replace: Whether the user agreed.
    """
    return permit_file("a mask file", _is_mask_file, replace=replace)


def _is_mask_file(path: Path) -> bool:
    try:
        with open_mask(path):
            return True
    except MaskFormatError:
        return False


def load_mask(path: Path | str) -> Mask:
    """The mask in a file, after all checks that the format requires.

    Args:
        path: A possibly untrusted file. Allocates at most about 9 times its size, or 65 times with codec "ans".

    Raises:
        MaskFormatError: The file cannot be read, is damaged, has an unknown version or is not a mask file.
        MaskFileError: A package needed to decode it is not installed.
    """
    with open_mask(path) as mask:
        return Mask._holding({name: mask.packed(name) for name in mask.names()}, mask.records, mask.metadata)


@contextmanager
def open_mask(path: Path | str) -> Iterator[Mask]:
    """Opens a mask file without loading its bits, so that memory use does not grow with the mask.

    Layout, document, names and digest are checked on opening; the size, padding and count of a tensor's bits on each
    access, which may come from several threads.

    Args:
        path: A possibly untrusted file.

    Yields:
        The mask, valid until the block ends.

    Raises:
        MaskFormatError: The file cannot be read, is damaged, has an unknown version or is not a mask file.
    """
    path = Path(path)
    with readable(path):
        stream = open_regular(path)
    with stream:
        bits = StoredBits(stream, path)
        yield Mask._holding(bits, bits.records, bits.metadata)


def _pack_checked(name: str, keep: torch.Tensor, record: TensorRecord) -> Packed:
    if keep.dtype != torch.bool or tuple(keep.shape) != tuple(record.shape):
        raise MaskFormatError(
            "The mask is not a bool tensor of the recorded shape",
            key=name,
            expected=f"{torch.bool} {tuple(record.shape)}",
            actual=f"{keep.dtype} {tuple(keep.shape)}",
        )
    packed = pack(keep)
    require_count(name, packed, record, path=None)
    return packed


def _require_packed(name: str, packed: Packed, record: TensorRecord) -> None:
    size_bytes = packed_size_bytes(record.weights)
    if packed.dtype != np.uint8 or packed.shape != (size_bytes,):
        raise MaskFormatError(
            "The packed mask does not match the size of the recorded shape",
            key=name,
            expected=f"uint8 ({size_bytes},)",
            actual=f"{packed.dtype} {packed.shape}",
        )
    if record.weights % 8 and int(packed[-1]) >> (record.weights % 8):
        raise MaskFormatError(
            "The padding bits after this tensor's last weight are not zero",
            key=name,
            expected=f"{-record.weights % 8} zero bits",
            actual=f"last byte 0x{packed[-1]:02x}",
        )
