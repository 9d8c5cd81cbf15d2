"""Masks tensors while the weight files of a checkpoint are written.

The digest of each masked tensor is compared with the mask's record after its last chunk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from mftctl.errors import MaskMismatchError
from mftctl.masking.checkpoints.mask_match import require_digest
from mftctl.masking.checkpoints.shards import Advance, WriteTensor, opened_at
from mftctl.masking.checkpoints.tensors import StoredTensor, read_chunks
from mftctl.masking.dtypes import TORCH_DTYPES, unsigned_view
from mftctl.masking.mask import Mask
from mftctl.masking.mask_file.codecs import Packed
from mftctl.masking.masked_values import finite_rescaled


def without_removed(mask: Mask) -> WriteTensor:
    """A copy function that sets the removed weights of a weight mask to zero bits."""

    def mask_tensor(stored: StoredTensor, target: Path, advance: Advance) -> None:
        digest = hashlib.sha256()
        packed, first = mask.packed(stored.name), 0
        with opened_at(stored.offset_bytes, stored.path, target) as (reader, writer):
            for chunk in read_chunks(reader, stored.length_bytes, stored.path):
                digest.update(chunk)
                weights = np.frombuffer(chunk, dtype=unsigned_view(stored.dtype))
                weights *= _keep_bits(packed, first, len(weights))
                first += len(weights)
                writer.write(chunk)
                advance(len(chunk))
        _require_learned_on(digest.hexdigest(), stored, mask)

    return mask_tensor


def with_base_values(mask: Mask, base: Mapping[str, StoredTensor]) -> WriteTensor:
    """A copy function for a tuned checkpoint that takes the removed weights of a delta mask from the base.

    Kept changes are rescaled if the mask says so.

    Args:
        mask: A mask of kind "delta".
        base: The base's tensor for each masked name, of the same dtype and shape.
    """
    scale = mask.metadata.scale

    def mask_tensor(stored: StoredTensor, target: Path, advance: Advance) -> None:
        digest, base_digest = hashlib.sha256(), hashlib.sha256()
        packed, first, origin = mask.packed(stored.name), 0, base[stored.name]
        with (
            opened_at(stored.offset_bytes, stored.path, target) as (reader, writer),
            origin.path.open("rb") as base_reader,
        ):
            base_reader.seek(origin.offset_bytes)
            chunks = read_chunks(reader, stored.length_bytes, stored.path)
            base_chunks = read_chunks(base_reader, origin.length_bytes, origin.path)
            for chunk, base_chunk in zip(chunks, base_chunks, strict=True):
                digest.update(chunk)
                base_digest.update(base_chunk)
                weights = np.frombuffer(chunk, dtype=unsigned_view(stored.dtype))
                removed = _keep_bits(packed, first, len(weights)) == 0
                if scale is not None:
                    _rescale(chunk, base_chunk, ~removed, stored, scale)
                np.copyto(weights, np.frombuffer(base_chunk, dtype=weights.dtype), where=removed)
                first += len(weights)
                writer.write(chunk)
                advance(len(chunk))
        require_digest(base_digest.hexdigest(), origin, stored.name, mask, "base")
        require_digest(digest.hexdigest(), stored, stored.name, mask, "tuned checkpoint")

    return mask_tensor


def _rescale(
    chunk: memoryview, base_chunk: memoryview, keep: npt.NDArray[np.bool_], stored: StoredTensor, scale: float
) -> None:
    """Rescales the change of the kept weights of a chunk in place."""
    dtype = TORCH_DTYPES[stored.dtype]
    weights, base = (torch.frombuffer(part, dtype=dtype) for part in (chunk, base_chunk))
    kept = torch.from_numpy(keep)
    weights[kept] = finite_rescaled(weights[kept], base[kept], scale, stored.name)


def _keep_bits(packed: Packed, first: int, count: int) -> npt.NDArray[np.uint8]:
    """The mask's values from weight `first` on: 1 = keep."""
    # A full chunk holds a multiple of 8 weights, so each chunk starts on a byte boundary of the mask.
    return np.unpackbits(packed[first // 8 :], count=count, bitorder="little")


def _require_learned_on(digest: str, stored: StoredTensor, mask: Mask) -> None:
    """Checks that the base's tensor has the digest in a weight mask's record."""
    record = mask.records[stored.name]
    if digest == record.sha256:
        return
    applied = bool(record.removed) and _is_applied(stored, mask.packed(stored.name))
    hint = f"apply it to {mask.metadata.base_label}"
    raise MaskMismatchError(
        "The mask seems to be already applied to this base: every removed weight of a tensor is zero."
        if applied
        else "The base is not the one this mask was learned on: the bytes of a tensor differ.",
        path=stored.path,
        key=stored.name,
        expected=f"SHA-256 {record.sha256}",
        actual=f"SHA-256 {digest}",
        hint=f"use this checkpoint as it is, or {hint}" if applied else hint,
    )


def _is_applied(stored: StoredTensor, packed: Packed) -> bool:
    """True if all removed weights are zero bits."""
    first = 0
    with stored.path.open("rb") as reader:
        reader.seek(stored.offset_bytes)
        for chunk in read_chunks(reader, stored.length_bytes, stored.path):
            weights = np.frombuffer(chunk, dtype=unsigned_view(stored.dtype))
            if np.any(weights[_keep_bits(packed, first, len(weights)) == 0]):
                return False
            first += len(weights)
    return True
