"""Whether the tensors of a checkpoint are those that a mask was made for."""

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
    """The stored tensor of each masked name, with the recorded dtype and shape; bytes are not looked at.

    Args:
        mask: The mask.
        folder: A checkpoint.
        role: What it is to the mask. A base without an output head has its input embeddings in the head's place.

    Raises:
        MaskMismatchError: A tensor is missing or of another dtype or shape.
        ModelError: The checkpoint cannot be read.
    """
    index = tensor_index(folder)
    return {name: _require_form(name, record, index, mask, folder, role) for name, record in mask.records.items()}


def require_digest(actual: str, stored: StoredTensor, name: str, mask: Mask, role: Role) -> None:
    """Nothing, if a tensor has the digest that a delta mask's record states.

    Args:
        actual: Hex SHA-256 of its bytes.
        stored: Where it is.
        name: The masked name.
        mask: A mask of kind "delta".
        role: Which of the two checkpoints it is part of.

    Raises:
        MaskMismatchError: It has another.
    """
    record = mask.records[name]
    expected = record.sha256 if role == "base" else record.tuned_sha256
    if actual != expected:
        raise MaskMismatchError(
            f"The {role} is not the one this delta mask was made for: a tensor has other bytes",
            path=stored.path,
            key=name,
            expected=f"SHA-256 {expected}",
            actual=f"SHA-256 {actual}",
            hint=f"give {label_of(mask, role)} as the {role}",
        )


def label_of(mask: Mask, role: Role) -> str:
    """The model in that role, with its revision, as the mask names it."""
    return mask.metadata.base_label if role == "base" else str(mask.metadata.tuned_label)


def _require_form(
    name: str, record: TensorRecord, index: Mapping[str, StoredTensor], mask: Mask, folder: Path, role: Role
) -> StoredTensor:
    stored = counterpart(name, index) if mask.metadata.kind == "delta" and role == "base" else index.get(name)
    if stored is None or (stored.dtype, stored.shape) != (record.dtype, record.shape):
        raise MaskMismatchError(
            f"The {role} has no such tensor" if stored is None else f"The {role}'s tensor has another form",
            path=folder,
            key=name,
            expected=f"{record.dtype} {record.shape}",
            actual=None if stored is None else f"{stored.dtype} {stored.shape}",
            hint=f"apply it to {label_of(mask, role)}",
        )
    return stored
