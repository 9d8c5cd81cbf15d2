"""Masks in memory, one bit per weight, and the mask file that holds them.

docs/reference/mask-file-format.md defines the file.
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
from mftctl.masking.delta.delta import is_soft_mask
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
            require_count(name, packed[name], record.weights, record.removed, path=None)
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
            "The mask file cannot be written.",
            path=path,
            actual=error.strerror or str(error),
            hint="give another path with -o, or free some space",
        ) from error


def mask_permit(*, replace: bool) -> Permit:
    """A permit to replace a mask file, hard or soft, but no other file.

    Args:
        replace: Whether the user agreed.
    """
    return permit_file("a mask file", _is_mask_file, replace=replace)


def _is_mask_file(path: Path) -> bool:
    if is_soft_mask(path):
        return True
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
            "The mask is not a bool tensor of the recorded shape.",
            key=name,
            expected=f"{torch.bool} {tuple(record.shape)}",
            actual=f"{keep.dtype} {tuple(keep.shape)}",
        )
    packed = pack(keep)
    require_count(name, packed, record.weights, record.removed, path=None)
    return packed


def _require_packed(name: str, packed: Packed, record: TensorRecord) -> None:
    size_bytes = packed_size_bytes(record.weights)
    if packed.dtype != np.uint8 or packed.shape != (size_bytes,):
        raise MaskFormatError(
            "The packed mask does not match the size of the recorded shape.",
            key=name,
            expected=f"uint8 ({size_bytes},)",
            actual=f"{packed.dtype} {packed.shape}",
        )
    if record.weights % 8 and int(packed[-1]) >> (record.weights % 8):
        raise MaskFormatError(
            "The padding bits after this tensor's last weight are not zero.",
            key=name,
            expected=f"{-record.weights % 8} zero bits",
            actual=f"last byte 0x{packed[-1]:02x}",
        )
