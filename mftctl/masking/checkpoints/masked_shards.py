"""Copies the weight files of a checkpoint and masks some tensors, processing several tensors at once.

Bytes outside the masked tensors are copied unchanged, by the kernel where possible. The digest of each masked tensor is
compared with the mask's record after its last chunk.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from io import BufferedReader
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from mftctl.errors import MaskMismatchError
from mftctl.masking.checkpoints.mask_match import require_digest
from mftctl.masking.checkpoints.tensors import StoredTensor, read_chunks, truncated
from mftctl.masking.dtypes import unsigned_view
from mftctl.masking.mask import Mask
from mftctl.masking.mask_file.codecs import Packed

Advance = Callable[[int], None]
MaskTensor = Callable[[StoredTensor, Path, Advance], None]
"""Copies one masked tensor to its position in another file, reporting the bytes written."""

_MOST_THREADS = 8
_KERNEL_BYTES = 64 * 2**20  # small enough for visible progress
_TOLD_BYTES = 4 * 2**20
_NOT_BY_THE_KERNEL = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


def write_shards(
    tensors: Iterable[StoredTensor],
    mask: Mask,
    mask_tensor: MaskTensor,
    folder: Path,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Writes every weight file of a checkpoint under its own name.

    Args:
        tensors: All tensors of the checkpoint.
        mask: Provides the names of the masked tensors.
        mask_tensor: Copies a masked tensor.
        folder: Destination folder, with no weight files yet.
        on_progress: Called with the bytes written so far and in total.

    Raises:
        MaskMismatchError: A masked tensor does not match the mask's record.
        ModelError: A file was truncated in the meantime.
    """
    shards: dict[Path, list[StoredTensor]] = {}
    for stored in tensors:
        shards.setdefault(stored.path, []).append(stored)
    advance = _counter(sum(path.stat().st_size for path in shards), on_progress)
    copies, masked = [], []
    for path, members in shards.items():
        parts = sorted((item for item in members if item.name in mask), key=lambda item: item.offset_bytes)
        target = _made_in_full_length(folder / path.name, path.stat().st_size)
        copies.append(partial(_copy_around, parts, path, target, advance))
        masked.append([partial(mask_tensor, stored, target, advance) for stored in parts])
    in_turn = [part for turn in zip_longest(*masked) for part in turn if part is not None]
    # A wrong base shows in its first tensor. Copying comes next, since it takes longest: the kernel lets only one
    # thread at a time write to a file.
    _run_together([*in_turn[:1], *copies, *in_turn[1:]])


def _run_together(parts: list[Callable[[], None]]) -> None:
    """Runs functions in several threads; after a failure, starts no more and raises the first error."""
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        started = [pool.submit(part) for part in parts]
        try:
            wait(started, return_when=FIRST_EXCEPTION)
        finally:
            for part in started:
                part.cancel()
    for part in started:
        if not part.cancelled():
            part.result()


def _made_in_full_length(target: Path, size_bytes: int) -> Path:
    with target.open("xb") as made:
        made.truncate(size_bytes)
    return target


def _copy_around(masked: list[StoredTensor], path: Path, target: Path, advance: Advance) -> None:
    """Copies the bytes of a file outside its masked tensors."""
    starts = [0, *(stored.offset_bytes + stored.length_bytes for stored in masked)]
    ends = [*(stored.offset_bytes for stored in masked), path.stat().st_size]
    for start, end in zip(starts, ends, strict=True):
        _copy(path, target, start, end, advance)


def _counter(total_bytes: int, on_progress: Callable[[int, int], None] | None) -> Advance:
    """Sums the bytes written by all threads and reports them from time to time, from one thread at a time."""
    written_bytes, told_bytes, lock = 0, 0, threading.Lock()

    def advance(chunk_bytes: int) -> None:
        nonlocal written_bytes, told_bytes
        with lock:
            written_bytes += chunk_bytes
            is_due = written_bytes - told_bytes >= _TOLD_BYTES or written_bytes == total_bytes
            if on_progress is not None and is_due:
                told_bytes = written_bytes
                on_progress(written_bytes, total_bytes)

    return advance


def without_removed(mask: Mask) -> MaskTensor:
    """A copy function that sets the removed weights of a weight mask to zero bits."""

    def mask_tensor(stored: StoredTensor, target: Path, advance: Advance) -> None:
        digest = hashlib.sha256()
        packed, first = mask.packed(stored.name), 0
        with _opened_at(stored.offset_bytes, stored.path, target) as (reader, writer):
            for chunk in read_chunks(reader, stored.length_bytes, stored.path):
                digest.update(chunk)
                weights = np.frombuffer(chunk, dtype=unsigned_view(stored.dtype))
                weights *= _keep_bits(packed, first, len(weights))
                first += len(weights)
                writer.write(chunk)
                advance(len(chunk))
        _require_learned_on(digest.hexdigest(), stored, mask)

    return mask_tensor


def with_base_values(mask: Mask, base: Mapping[str, StoredTensor]) -> MaskTensor:
    """A copy function for a tuned checkpoint that takes the removed weights of a delta mask from the base.

    Args:
        mask: A mask of kind "delta".
        base: The base's tensor for each masked name, of the same dtype and shape.
    """

    def mask_tensor(stored: StoredTensor, target: Path, advance: Advance) -> None:
        digest, base_digest = hashlib.sha256(), hashlib.sha256()
        packed, first, origin = mask.packed(stored.name), 0, base[stored.name]
        with (
            _opened_at(stored.offset_bytes, stored.path, target) as (reader, writer),
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
                np.copyto(weights, np.frombuffer(base_chunk, dtype=weights.dtype), where=removed)
                first += len(weights)
                writer.write(chunk)
                advance(len(chunk))
        require_digest(base_digest.hexdigest(), origin, stored.name, mask, "base")
        require_digest(digest.hexdigest(), stored, stored.name, mask, "tuned checkpoint")

    return mask_tensor


def _copy(path: Path, target: Path, place: int, end: int, advance: Advance) -> None:
    """Copies the bytes from `place` to `end`, within the kernel if the file systems support it."""
    with _opened_at(place, path, target) as (reader, writer):
        while place < end and hasattr(os, "copy_file_range"):
            try:
                copied = os.copy_file_range(
                    reader.fileno(), writer.fileno(), min(end - place, _KERNEL_BYTES), place, place
                )
            except OSError as error:
                if error.errno not in _NOT_BY_THE_KERNEL:
                    raise
                break
            if copied == 0:
                raise truncated(path)
            place += copied
            advance(copied)
        reader.seek(place)
        writer.seek(place)
        for chunk in read_chunks(reader, end - place, path):
            writer.write(chunk)
            advance(len(chunk))


@contextmanager
def _opened_at(place: int, path: Path, target: Path) -> Iterator[tuple[BufferedReader, BinaryIO]]:
    """Opens both files at the same position, with separate handles for each call so that none moves another's."""
    with path.open("rb") as reader, target.open("r+b") as writer:
        reader.seek(place)
        writer.seek(place)
        yield reader, writer


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
