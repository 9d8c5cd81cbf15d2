"""Masks as packed bits in numpy archives, as distributed by MaskLLM."""

from __future__ import annotations

import lzma
import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, BinaryIO, Final

import numpy as np
from numpy.lib import format as npy

from mftctl.errors import MaskFormatError, MaskMismatchError
from mftctl.masking.mask import Mask
from mftctl.masking.mask_file.codecs import Packed, packed_size_bytes
from mftctl.masking.mask_file.document import shown
from mftctl.text import counted

MASK_SUFFIX: Final = ".mask"
"""The suffix that MaskLLM appends to a weight's name."""

_MEMBER_SUFFIX: Final = ".npy"
# numpy packs the first weight into the highest bit of a byte, mftctl into the lowest bit.
_REVERSED_BYTES: Final = np.packbits(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1), axis=1, bitorder="little"
).reshape(-1)
# Raised by zipfile, its decompressors and numpy for damaged or malicious archives.
_READ_ERRORS: Final = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    OSError,
    ValueError,
    LookupError,
    EOFError,
    RuntimeError,
)
_DAMAGE_HINT: Final = "copy the file again from its source"


class NpzMasks:
    """The masks in an `.npz` file, read one at a time; nothing in it is unpickled.

    Args:
        file: A possibly untrusted file. No more is read or allocated than the model's weights require.

    Raises:
        MaskFormatError: It is damaged, or holds something other than numpy arrays.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.namelist()
        except _READ_ERRORS as error:
            raise self._damaged(None, error) from error
        for member in members:
            if not member.endswith(_MEMBER_SUFFIX):
                raise MaskFormatError(
                    "The archive contains something that is not a numpy array.",
                    path=file,
                    key=shown(member),
                    expected=f"names that end in {_MEMBER_SUFFIX}",
                    hint="give an .npz file of packed masks as distributed by MaskLLM",
                )
        self._members = members

    def names(self) -> list[str]:
        """The names in the file, in file order; duplicates are repeated."""
        return [member.removesuffix(_MEMBER_SUFFIX) for member in self._members]

    def packed(self, name: str, shape: tuple[int, ...]) -> Packed:
        """The packed bits of one mask, in the form returned by `codecs.pack`.

        Args:
            name: One of `names()`.
            shape: The shape of the weight it masks.

        Raises:
            MaskFormatError: It is damaged, not an array of packed bits, or its padding bits are not zero.
            MaskMismatchError: Its size does not match the weight.
        """
        size_bytes = packed_size_bytes(math.prod(shape))
        try:
            with zipfile.ZipFile(self._file) as archive, archive.open(name + _MEMBER_SUFFIX) as stream:
                found_shape, dtype = _read_header(stream)
                payload = stream.read(size_bytes + 1)
        except _READ_ERRORS as error:
            raise self._damaged(name, error) from error
        if dtype != np.uint8 or len(found_shape) != 1:
            raise MaskFormatError(
                "An array in the file does not hold packed bits.",
                path=self._file,
                key=shown(name),
                expected="uint8, one dimension",
                actual=f"{dtype}, {counted(len(found_shape), 'dimension')}",
                hint="pack each mask with numpy.packbits",
            )
        if found_shape != (size_bytes,):
            raise MaskMismatchError(
                "The size of a mask does not match the base's weight.",
                path=self._file,
                key=shown(name),
                expected=f"{size_bytes} bytes for {shape}",
                actual=f"{found_shape[0]} bytes",
                hint="with -m, give the base that the mask was learned on",
            )
        if len(payload) != size_bytes:
            raise self._damaged(name, ValueError("the array does not have the size stated in its header"))
        packed: Packed = _REVERSED_BYTES[np.frombuffer(payload, dtype=np.uint8)]
        self._require_zero_padding(name, packed, math.prod(shape))
        return packed

    def _require_zero_padding(self, name: str, packed: Packed, weights: int) -> None:
        if weights % 8 and int(packed[-1]) >> (weights % 8):
            raise MaskFormatError(
                "The padding bits after a mask's last weight are not zero.",
                path=self._file,
                key=shown(name),
                expected=counted(-weights % 8, "zero bit"),
                hint="with -m, give the base that the mask was learned on, or copy the file again",
            )

    def _damaged(self, name: str | None, error: Exception) -> MaskFormatError:
        return MaskFormatError(
            "The numpy archive is damaged.",
            path=self._file,
            key=None if name is None else shown(name),
            actual=shown(error),
            hint=_DAMAGE_HINT,
        )


def write_npz(mask: Mask, stream: BinaryIO) -> None:
    """Writes the packed bits of each tensor under its name plus `.mask`; equal masks give equal bytes.

    Args:
        mask: The mask.
        stream: An empty binary file.
    """
    arrays = {name + MASK_SUFFIX: _REVERSED_BYTES[mask.packed(name)] for name in mask.names()}
    np.savez_compressed(stream, allow_pickle=False, **arrays)


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = npy.read_magic(stream)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype
