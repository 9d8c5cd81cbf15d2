"""Masks pickled by `torch.save`, as written by the reference implementation of Mask Fine-Tuning."""

from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from typing import BinaryIO, Final

import torch

from mftctl.errors import MaskFormatError, MaskMismatchError
from mftctl.masking.mask import Mask
from mftctl.masking.mask_file.codecs import Packed, pack
from mftctl.masking.mask_file.document import shown
from mftctl.runtime.torch_failures import failure_of_writing
from mftctl.text import counted, first_line

_DTYPES: Final = (torch.bool, torch.bfloat16, torch.float16, torch.float32, torch.float64)
_EXPORT_HINT: Final = 'in the reference implementation, save it with: torch.save(masks, "masks.pt")'
# Raised by torch.load for files that are damaged, malicious or not masks.
_LOAD_ERRORS: Final = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    EOFError,
    OSError,
    AssertionError,
    struct.error,
)


class TorchMasks:
    """The masks in a `.pt` file, loaded without running any code in it and memory-mapped where possible.

    Args:
        file: A possibly untrusted file.

    Raises:
        MaskFormatError: It is damaged, contains more than plain tensors, or is not a dict of tensors by name.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        loaded = _load(file)
        if not isinstance(loaded, dict) or not loaded or not all(isinstance(name, str) for name in loaded):
            raise MaskFormatError(
                "The pickle contains no masks.",
                path=file,
                expected="a dict from module name to mask, with at least one entry",
                actual=shown(type(loaded).__name__ if not isinstance(loaded, dict) else [*loaded][:3]),
                hint=_EXPORT_HINT,
            )
        self._tensors: dict[str, object] = loaded

    def names(self) -> list[str]:
        """The names in the file, in file order."""
        return list(self._tensors)

    def packed(self, name: str, shape: tuple[int, ...]) -> Packed:
        """The packed bits of one mask, in the form returned by `codecs.pack`.

        Args:
            name: One of `names()`.
            shape: The shape of the weight it masks.

        Raises:
            MaskFormatError: It is not a bool or floating-point tensor, or a value is neither 0 nor 1.
            MaskMismatchError: Its shape does not match.
        """
        tensor = self._tensors[name]
        if not isinstance(tensor, torch.Tensor) or not _is_plain(tensor):
            raise MaskFormatError(
                "An entry of the pickle is not a mask.",
                path=self._file,
                key=shown(name),
                expected="a bool tensor, or a float tensor of 0 and 1",
                actual=_kind_of(tensor),
                hint=_EXPORT_HINT,
            )
        if tuple(tensor.shape) != shape:
            raise MaskMismatchError(
                "The shape of a mask does not match the base's weight.",
                path=self._file,
                key=shown(name),
                expected=shape,
                actual=tuple(tensor.shape),
                hint="with -m, give the base that the mask was learned on",
            )
        other = tensor[(tensor != 0) & (tensor != 1)]
        if other.numel():
            raise MaskFormatError(
                "A mask has values other than 0 and 1.",
                path=self._file,
                key=shown(name),
                expected="0 (removed) and 1 (keep)",
                actual=f"{counted(other.numel(), 'other')}, such as {float(other.reshape(-1)[0]):g}",
                hint=f"scores are not a mask; {_EXPORT_HINT}",
            )
        return pack(tensor != 0)


def write_torch(mask: Mask, stream: BinaryIO) -> None:
    """Writes float32 masks under the names of their modules; holds 4 bytes per weight in memory.

    Args:
        mask: The mask.
        stream: An empty binary file.

    Raises:
        OSError: The file cannot be written.
    """
    masks = {name.removesuffix(".weight"): mask[name].float() for name in mask.names()}
    try:
        torch.save(masks, stream)
    except RuntimeError as error:
        failure = failure_of_writing(error)
        if failure is None:
            raise
        raise failure from error


def _kind_of(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}, {value.layout}, on {value.device}"
    return type(value).__name__


def _is_plain(tensor: torch.Tensor) -> bool:
    is_dense = tensor.layout == torch.strided and not tensor.is_nested  # a nested tensor claims to be strided
    return is_dense and tensor.device.type == "cpu" and tensor.dtype in _DTYPES


def _load(file: Path) -> object:
    try:
        # torch warns and asks for bug reports about files that it then refuses anyway.
        with warnings.catch_warnings(action="ignore"):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except _LOAD_ERRORS as error:
        raise MaskFormatError(
            "The pickle is damaged, or contains more than tensors, which could run code.",
            path=file,
            expected="a dict of tensors written by torch.save",
            actual=shown(first_line(error)),
            hint="copy the file again; if it contains other objects, save only the dict of tensors",
        ) from error
