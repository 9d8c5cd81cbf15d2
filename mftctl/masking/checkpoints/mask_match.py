"""Checks that a checkpoint's tensors are those that a mask was made for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from mftctl.errors import MaskMismatchError
from mftctl.masking.checkpoints.pairing import counterpart
from mftctl.masking.checkpoints.tensors import StoredTensor, tensor_index
from mftctl.masking.mask import Mask
from mftctl.masking.mask_file.document import TensorRecord

Role = Literal["base", "tuned checkpoint"]


def masked_tensors(mask: Mask, folder: Path, role: Role) -> dict[str, StoredTensor]:
    """The stored tensor for each masked name, after checking its dtype and shape, but not its bytes.

    Args:
        mask: The mask.
        folder: A checkpoint.
        role: Its role for the mask. If a base has no output head, its input embeddings take the head's place.

    Raises:
        MaskMismatchError: A tensor is missing or has the wrong dtype or shape.
        ModelError: The checkpoint cannot be read.
    """
    index = tensor_index(folder)
    return {name: _require_form(name, record, index, mask, folder, role) for name, record in mask.records.items()}


def require_shapes(mask: Mask, folder: Path) -> None:
    """Checks that a checkpoint has every masked tensor in the mask's shape, in any dtype and with any values.

    Args:
        mask: The mask.
        folder: A checkpoint. If it has no output head, its input embeddings take the head's place.

    Raises:
        MaskMismatchError: A tensor is missing or has another shape.
        ModelError: The checkpoint cannot be read.
    """
    index = tensor_index(folder)
    for name, record in mask.records.items():
        stored = counterpart(name, index)
        if stored is None or stored.shape != record.shape:
            raise MaskMismatchError(
                "The model lacks a masked tensor." if stored is None else "A masked tensor has another shape.",
                path=folder,
                key=name,
                expected=record.shape,
                actual=None if stored is None else stored.shape,
                hint=f"a mask for this model; this one was made for {label_of(mask, 'base')}",
            )


def require_digest(actual: str, stored: StoredTensor, name: str, mask: Mask, role: Role) -> None:
    """Checks that a tensor has the digest in a delta mask's record.

    Args:
        actual: Hex SHA-256 of its bytes.
        stored: The stored tensor.
        name: The masked name.
        mask: A mask of kind "delta".
        role: The checkpoint that the tensor is part of.

    Raises:
        MaskMismatchError: The digest differs.
    """
    record = mask.records[name]
    expected = record.sha256 if role == "base" else record.tuned_sha256
    if actual != expected:
        raise MaskMismatchError(
            f"The {role} is not the one this delta mask was made for: the bytes of a tensor differ.",
            path=stored.path,
            key=name,
            expected=f"SHA-256 {expected}",
            actual=f"SHA-256 {actual}",
            hint=f"give {label_of(mask, role)} as the {role}",
        )


def label_of(mask: Mask, role: Role) -> str:
    """The model in that role, with its revision, as named in the mask."""
    return mask.metadata.base_label if role == "base" else str(mask.metadata.tuned_label)


def _require_form(
    name: str, record: TensorRecord, index: Mapping[str, StoredTensor], mask: Mask, folder: Path, role: Role
) -> StoredTensor:
    stored = counterpart(name, index) if mask.metadata.kind == "delta" and role == "base" else index.get(name)
    if stored is None or (stored.dtype, stored.shape) != (record.dtype, record.shape):
        raise MaskMismatchError(
            f"The {role} has no such tensor." if stored is None else f"The {role}'s tensor differs in dtype or shape.",
            path=folder,
            key=name,
            expected=f"{record.dtype} {record.shape}",
            actual=None if stored is None else f"{stored.dtype} {stored.shape}",
            hint=f"apply it to {label_of(mask, role)}",
        )
    return stored
