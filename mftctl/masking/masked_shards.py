"""Copies the weight files of a checkpoint with some tensors masked on the way, in pieces of a few MiB.

Bytes outside the masked tensors are copied as they are. The digest of each masked tensor is compared with the mask's
record when its last piece has passed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from mftctl.errors import MaskMismatchError
from mftctl.masking.bits import Mask
from mftctl.masking.codecs import Packed
from mftctl.masking.dtypes import unsigned_view
from mftctl.masking.record_checks import require_digest
from mftctl.masking.safetensors_files import StoredTensor, read_chunks

Advance = Callable[[int], None]
CopyTensor = Callable[[BufferedReader, BinaryIO, StoredTensor, Advance], None]
"""Copies one masked tensor from the reader's position, telling the bytes it wrote."""


def write_shards(
    tensors: Iterable[StoredTensor],
    mask: Mask,
    copy_tensor: CopyTensor,
    folder: Path,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Writes every weight file of a checkpoint under its own name.

    Args:
        tensors: All tensors of the checkpoint.
        mask: Names the tensors that are masked.
        copy_tensor: How those are copied.
        folder: Where to; without such files so far.
        on_progress: Called with the bytes written so far and in all.

    Raises:
        MaskMismatchError: A masked tensor is not the one in the mask's record.
        ModelError: A file became shorter meanwhile.
    """
    shards: dict[Path, list[StoredTensor]] = {}
    for stored in tensors:
        shards.setdefault(stored.path, []).append(stored)
    total_bytes = sum(path.stat().st_size for path in shards)
    written_bytes = 0

    def advance(chunk_bytes: int) -> None:
        nonlocal written_bytes
        written_bytes += chunk_bytes
        if on_progress is not None:
            on_progress(written_bytes, total_bytes)

    for path, members in shards.items():
        masked = sorted((stored for stored in members if stored.name in mask), key=lambda stored: stored.offset_bytes)
        _write_shard(path, masked, copy_tensor, folder / path.name, advance)


def without_removed(mask: Mask) -> CopyTensor:
    """The copying that sets the removed weights of a weight mask to zero bits."""

    def copy_tensor(reader: BufferedReader, writer: BinaryIO, stored: StoredTensor, advance: Advance) -> None:
        digest = hashlib.sha256()
        packed, first = mask.packed(stored.name), 0
        removed_bits = False
        for chunk in read_chunks(reader, stored.length_bytes, stored.path):
            digest.update(chunk)
            weights = np.frombuffer(chunk, dtype=unsigned_view(stored.dtype))
            keep = _keep_bits(packed, first, len(weights))
            removed_bits = removed_bits or bool(np.any(weights[keep == 0]))
            weights *= keep
            first += len(weights)
            writer.write(chunk)
            advance(len(chunk))
        applied = bool(mask.records[stored.name].removed) and not removed_bits
        _require_learned_on(digest.hexdigest(), stored, mask, applied=applied)

    return copy_tensor


def with_base_values(mask: Mask, base: Mapping[str, StoredTensor]) -> CopyTensor:
    """The copying of a tuned checkpoint that takes the removed weights of a delta mask from the base.

    Args:
        mask: A mask of kind "delta".
        base: The base's tensor for each masked name, of the same dtype and shape.
    """

    def copy_tensor(reader: BufferedReader, writer: BinaryIO, stored: StoredTensor, advance: Advance) -> None:
        digest, base_digest = hashlib.sha256(), hashlib.sha256()
        packed, first, origin = mask.packed(stored.name), 0, base[stored.name]
        with origin.path.open("rb") as base_reader:
            base_reader.seek(origin.offset_bytes)
            chunks = read_chunks(reader, stored.length_bytes, stored.path)
            base_chunks = read_chunks(base_reader, origin.length_bytes, origin.path)
            for chunk, base_chunk in zip(chunks, base_chunks, strict=True):
                digest.update(chunk)
                base_digest.update(base_chunk)
                weights = np.frombuffer(chunk, dtype=unsigned_view(stored.dtype))
                removed = _keep_bits(packed, first, len(weights)) == 0
                np.copyto(weights, np.frombuffer(base_chunk, dtype=weights.dtype), where=removed)
                first += len(weights)
                writer.write(chunk)
                advance(len(chunk))
        require_digest(base_digest.hexdigest(), origin, stored.name, mask, "base")
        require_digest(digest.hexdigest(), stored, stored.name, mask, "tuned checkpoint")

    return copy_tensor


def _write_shard(
    path: Path, masked: list[StoredTensor], copy_tensor: CopyTensor, target: Path, advance: Advance
) -> None:
    with path.open("rb") as reader, target.open("xb") as writer:
        end_bytes = path.stat().st_size
        for stored in masked:
            _copy(reader, writer, stored.offset_bytes - reader.tell(), path, advance)
            copy_tensor(reader, writer, stored, advance)
        _copy(reader, writer, end_bytes - reader.tell(), path, advance)
        writer.flush()
        os.fsync(writer.fileno())


def _copy(reader: BufferedReader, writer: BinaryIO, length_bytes: int, path: Path, advance: Advance) -> None:
    for chunk in read_chunks(reader, length_bytes, path):
        writer.write(chunk)
        advance(len(chunk))


def _keep_bits(packed: Packed, first: int, count: int) -> npt.NDArray[np.uint8]:
    """The mask's values from weight `first` on: 1 = keep."""
    # A full chunk holds a multiple of 8 weights, so each chunk starts at a whole byte of the mask.
    return np.unpackbits(packed[first // 8 :], count=count, bitorder="little")


def _require_learned_on(digest: str, stored: StoredTensor, mask: Mask, *, applied: bool) -> None:
    """Nothing, if the base's tensor has the digest that a weight mask's record states."""
    record = mask.records[stored.name]
    if digest == record.sha256:
        return
    hint = f"apply it to {mask.metadata.base_label}"
    raise MaskMismatchError(
        "The mask seems to be applied to this base already: every removed weight of a tensor is zero"
        if applied
        else "The base is not the one this mask was learned on: a tensor has other bytes",
        path=stored.path,
        key=stored.name,
        expected=f"SHA-256 {record.sha256}",
        actual=f"SHA-256 {digest}",
        hint=f"use this checkpoint as it is, or {hint}" if applied else hint,
    )
