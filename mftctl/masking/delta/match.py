"""Checks that a checkpoint is the base of a delta file: the same tensors with the same bytes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from mftctl.errors import MaskMismatchError
from mftctl.masking.checkpoints.tensors import StoredTensor, tensor_digest, tensor_index
from mftctl.masking.delta.delta import Delta
from mftctl.masking.delta.records import BaseTensor

_MOST_THREADS: Final = 8


def require_base(delta: Delta, folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by name, after checking that they are those that the delta was made from.

    Args:
        delta: The delta.
        folder: The checkpoint.

    Raises:
        MaskMismatchError: A tensor is missing, not in the delta's base, or has another shape, dtype or bytes.
        ModelError: The checkpoint cannot be read.
    """
    index, expected = tensor_index(folder), delta.contents.base_tensors()
    for name in sorted({*index, *expected}):
        _require_form(name, index.get(name), expected.get(name), delta, folder)
    # Changed tensors first: an unsuitable base shows in them.
    names = [*delta.contents.tensors, *(name for name in expected if name not in delta.contents.tensors)]
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        digests = pool.map(tensor_digest, [index[name] for name in names])
        try:
            for name, digest in zip(names, digests, strict=True):
                _require_digest(digest, index[name], expected, delta)
        finally:
            pool.shutdown(cancel_futures=True)
    return index


def require_result(digest: str, stored: StoredTensor, delta: Delta) -> None:
    """Checks the digest of a changed tensor.

    Args:
        digest: Hex SHA-256 of its bytes.
        stored: The base's tensor.
        delta: The delta.

    Raises:
        MaskMismatchError: It is another one.
    """
    expected = delta.contents.tensors[stored.name].result_sha256
    if digest != expected:
        raise MaskMismatchError(
            "A changed tensor is not the one that the delta file describes.",
            path=stored.path,
            key=stored.name,
            expected=f"SHA-256 {expected}",
            actual=f"SHA-256 {digest}",
            hint="make sure that nothing changes the base meanwhile, and copy the delta file again from its source",
        )


def _require_form(
    name: str, stored: StoredTensor | None, expected: BaseTensor | None, delta: Delta, folder: Path
) -> None:
    if stored is not None and expected is not None and (stored.dtype, stored.shape) == (expected.dtype, expected.shape):
        return
    raise MaskMismatchError(
        "The checkpoint is not the base of this delta file: it does not have the same tensors.",
        path=folder,
        key=name,
        expected="no such tensor" if expected is None else f"{expected.dtype} {expected.shape}",
        actual="no such tensor" if stored is None else f"{stored.dtype} {stored.shape}",
        hint=f"give {delta.contents.metadata.base.label}",
    )


def _require_digest(digest: str, stored: StoredTensor, expected: Mapping[str, BaseTensor], delta: Delta) -> None:
    record = delta.contents.tensors.get(stored.name)
    if digest == expected[stored.name].sha256:
        return
    applied = record is not None and digest == record.result_sha256
    label = delta.contents.metadata.base.label
    raise MaskMismatchError(
        "The delta file is already applied to this checkpoint."
        if applied
        else "The checkpoint is not the base of this delta file: the bytes of a tensor differ.",
        path=stored.path,
        key=stored.name,
        expected=f"SHA-256 {expected[stored.name].sha256}",
        actual=f"SHA-256 {digest}",
        hint=f"use this checkpoint as it is, or give {label}" if applied else f"give {label}",
    )
