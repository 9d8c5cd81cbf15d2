"""Writes the weight files of a checkpoint, several tensors at once: some are computed, all other bytes are copied.

Copying is done by the kernel where possible.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from io import BufferedReader
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO

from mftctl.masking.checkpoints.tensors import StoredTensor, read_chunks, truncated

Advance = Callable[[int], None]
WriteTensor = Callable[[StoredTensor, Path, Advance], None]
"""Writes one computed tensor to its position in another file, reporting the bytes written."""

_MOST_THREADS = 8
_KERNEL_BYTES = 64 * 2**20  # small enough for visible progress
_TOLD_BYTES = 4 * 2**20
_NOT_BY_THE_KERNEL = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


def write_shards(
    tensors: Iterable[StoredTensor],
    computed: Container[str],
    write_tensor: WriteTensor,
    folder: Path,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Writes every weight file of a checkpoint under its own name.

    Args:
        tensors: All tensors of the checkpoint.
        computed: Names of the tensors that are not copied.
        write_tensor: Writes such a tensor; its length does not change.
        folder: Destination folder, with no weight files yet.
        on_progress: Called with the bytes written so far and in total.

    Raises:
        ModelError: A file was truncated in the meantime.
        MftError: From `write_tensor`.
    """
    shards: dict[Path, list[StoredTensor]] = {}
    for stored in tensors:
        shards.setdefault(stored.path, []).append(stored)
    advance = _counter(sum(path.stat().st_size for path in shards), on_progress)
    copies, writes = [], []
    for path, members in shards.items():
        parts = sorted((item for item in members if item.name in computed), key=lambda item: item.offset_bytes)
        target = _made_in_full_length(folder / path.name, path.stat().st_size)
        copies.append(partial(_copy_around, parts, path, target, advance))
        writes.append([partial(write_tensor, stored, target, advance) for stored in parts])
    in_turn = [part for turn in zip_longest(*writes) for part in turn if part is not None]
    # An unsuitable input shows in its first tensor. Copying comes next, since it takes longest: the kernel lets only
    # one thread at a time write to a file.
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


def _copy_around(computed: list[StoredTensor], path: Path, target: Path, advance: Advance) -> None:
    """Copies the bytes of a file outside its computed tensors."""
    starts = [0, *(stored.offset_bytes + stored.length_bytes for stored in computed)]
    ends = [*(stored.offset_bytes for stored in computed), path.stat().st_size]
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


def _copy(path: Path, target: Path, place: int, end: int, advance: Advance) -> None:
    """Copies the bytes from `place` to `end`, within the kernel if the file systems support it."""
    with opened_at(place, path, target) as (reader, writer):
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
def opened_at(place: int, path: Path, target: Path) -> Iterator[tuple[BufferedReader, BinaryIO]]:
    """Opens both files at the same position, with separate handles for each call so that none moves another's.

    Args:
        place: The position in bytes.
        path: The file to read.
        target: An existing file to write.
    """
    with path.open("rb") as reader, target.open("r+b") as writer:
        reader.seek(place)
        writer.seek(place)
        yield reader, writer
