"""Masks and checkpoints: finding a base, and writing base + mask as a new checkpoint that any server loads.

The shards are streamed: bytes outside the masked tensors are copied as they are, those inside pass through memory in
pieces of a few MiB, and the digest of each masked tensor is compared with the mask's record on the way. A mismatch
discards the output, which appears under its name only when it is complete.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from mftctl.atomic import atomic_folder
from mftctl.errors import MaskMismatchError, ModelError
from mftctl.masking.bits import Mask
from mftctl.masking.checkpoint_source import resolve_checkpoint
from mftctl.masking.dtypes import item_bytes, unsigned_view
from mftctl.masking.in_memory import DELTA_MESSAGE, apply_mask, checkpoint_names
from mftctl.masking.model_card import write_model_card
from mftctl.masking.safetensors_files import (
    INDEX_FILE,
    WEIGHTS_FILE,
    StoredTensor,
    read_chunks,
    read_tensor,
    tensor_digest,
    tensor_index,
)

__all__ = [
    "ApplyResult",
    "StoredTensor",
    "apply_mask",
    "apply_to_checkpoint",
    "checkpoint_names",
    "read_tensor",
    "resolve_checkpoint",
    "tensor_digest",
    "tensor_index",
]

_CARD_FILE: Final = "README.md"
_TEMPLATE_FOLDER: Final = "additional_chat_templates"
_WEIGHT_SUFFIXES: Final = frozenset(
    ".safetensors .bin .pt .pth .ckpt .h5 .msgpack .gguf .onnx .onnx_data .ot .pkl .npz .tflite .bits".split()
)
_WEIGHT_INDEX_SUFFIX: Final = ".index.json"


@dataclass(frozen=True, slots=True)
class ApplyResult:
    """What `apply_to_checkpoint` wrote.

    Attributes:
        bytes_written: The size of all files in the new folder.
        tensors_masked: The number of masked tensors.
        removed: The number of weights set to zero.
    """

    bytes_written: int
    tensors_masked: int
    removed: int


def apply_to_checkpoint(
    base: Path,
    mask: Mask,
    output: Path,
    *,
    mask_path: Path | None,
    base_model: str,
    on_progress: Callable[[int, int], None] | None = None,
    replace: bool = False,
) -> ApplyResult:
    """Writes a new checkpoint: the base with the removed weights set to +0.0, its other files and a model card.

    Args:
        base: The base's folder. Its top-level files that hold no weights, and its chat templates, are copied.
        mask: A mask of kind "weight", learned on this base.
        output: The new folder; it appears only when it is complete.
        mask_path: The mask file, whose digest the model card states.
        base_model: Name of the base for the model card.
        on_progress: Called with the weight bytes written so far and in all.
        replace: Whether an existing non-empty `output` is replaced.

    Raises:
        MaskMismatchError: The mask is not of kind "weight", or was learned on other tensors than these. A base to
            which the mask was applied already is refused too.
        ModelError: The base cannot be read, or the output folder is not empty, overlaps an input or cannot be written.
    """
    base, output = base.resolve(), output.resolve()
    _require_free(output, replace)
    _require_apart(output, base, mask_path)
    index = tensor_index(base)
    _require_same_tensors(mask, index, base)
    try:
        with atomic_folder(output) as folder:
            _write_weights(index.values(), mask, folder, on_progress)
            _copy_companions(base, folder, sharded=not (base / WEIGHTS_FILE).is_file())
            card = write_model_card(mask, base_model=base_model, mask_path=mask_path)
            (folder / _CARD_FILE).write_text(card, encoding="utf-8")
            bytes_written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except OSError as error:
        raise ModelError(
            "The masked checkpoint could not be written; nothing was left behind",
            path=output,
            actual=str(error),
            hint="free some space or give another folder with -o",
        ) from error
    return ApplyResult(bytes_written, len(mask), mask.removed)


def _require_free(output: Path, replace: bool) -> None:
    if output.is_dir() and (replace or not any(output.iterdir())):
        return
    if output.exists():
        raise ModelError(
            "The output folder is not empty" if output.is_dir() else "The output folder is a file",
            path=output,
            expected="a new or an empty folder",
            hint="give another folder with -o" + (", or replace this one with --yes" if output.is_dir() else ""),
        )


def _require_apart(output: Path, base: Path, mask_path: Path | None) -> None:
    inputs = [base] if mask_path is None else [base, mask_path.resolve()]
    for path in inputs:
        if path.is_relative_to(output):
            raise ModelError(
                "The output folder holds an input, which would be lost",
                path=output,
                actual=str(path),
                hint="give another folder with -o",
            )
    if output.is_relative_to(base):
        raise ModelError(
            "The output folder lies inside the base's folder",
            path=output,
            actual=f"base {base}",
            hint="give a folder outside it with -o",
        )


def _require_same_tensors(mask: Mask, index: dict[str, StoredTensor], base: Path) -> None:
    if mask.metadata.kind != "weight":
        raise MaskMismatchError(
            DELTA_MESSAGE, key="kind", expected="weight", actual=mask.metadata.kind, hint="use a weight mask"
        )
    for name, record in mask.records.items():
        stored = index.get(name)
        if stored is None or (stored.dtype, stored.shape) != (record.dtype, record.shape):
            raise MaskMismatchError(
                "The base has no such tensor" if stored is None else "The base's tensor has another form",
                path=base,
                key=name,
                expected=f"{record.dtype} {record.shape}",
                actual=None if stored is None else f"{stored.dtype} {stored.shape}",
                hint=_base_hint(mask),
            )


def _write_weights(
    tensors: Iterable[StoredTensor], mask: Mask, folder: Path, on_progress: Callable[[int, int], None] | None
) -> None:
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
        _write_shard(path, masked, mask, folder / path.name, advance)


def _write_shard(
    path: Path, masked: list[StoredTensor], mask: Mask, target: Path, advance: Callable[[int], None]
) -> None:
    with path.open("rb") as reader, target.open("xb") as writer:
        end_bytes = path.stat().st_size
        for stored in masked:
            _copy(reader, writer, stored.offset_bytes - reader.tell(), path, advance)
            _copy_masked(reader, writer, stored, mask, advance)
        _copy(reader, writer, end_bytes - reader.tell(), path, advance)
        writer.flush()
        os.fsync(writer.fileno())


def _copy(
    reader: BufferedReader, writer: BinaryIO, length_bytes: int, path: Path, advance: Callable[[int], None]
) -> None:
    for chunk in read_chunks(reader, length_bytes, path):
        writer.write(chunk)
        advance(len(chunk))


def _copy_masked(
    reader: BufferedReader, writer: BinaryIO, stored: StoredTensor, mask: Mask, advance: Callable[[int], None]
) -> None:
    """Copies one tensor with its removed weights as zero bits, unless it is not the one the mask was learned on."""
    digest = hashlib.sha256()
    packed, first = mask.packed(stored.name), 0
    removed_bits = False
    for chunk in read_chunks(reader, stored.length_bytes, stored.path):
        digest.update(chunk)
        weights = np.frombuffer(chunk, dtype=unsigned_view(stored.dtype))
        # A full chunk holds a multiple of 8 weights, so each chunk starts at a whole byte of the mask.
        keep = np.unpackbits(packed[first // 8 :], count=len(weights), bitorder="little")
        removed_bits = removed_bits or bool(np.any(weights[keep == 0]))
        weights *= keep
        first += len(chunk) // item_bytes(stored.dtype)
        writer.write(chunk)
        advance(len(chunk))
    record = mask.records[stored.name]
    if digest.hexdigest() == record.sha256:
        return
    applied = bool(record.removed) and not removed_bits
    raise MaskMismatchError(
        "The mask seems to be applied to this base already: every removed weight of a tensor is zero"
        if applied
        else "The base is not the one this mask was learned on: a tensor has other bytes",
        path=stored.path,
        key=stored.name,
        expected=f"SHA-256 {record.sha256}",
        actual=f"SHA-256 {digest.hexdigest()}",
        hint=f"use this checkpoint as it is, or {_base_hint(mask)}" if applied else _base_hint(mask),
    )


def _copy_companions(base: Path, folder: Path, *, sharded: bool) -> None:
    for path in sorted(base.iterdir()):
        if path.is_file() and not _is_of_weights(path, sharded=sharded) and path.name != _CARD_FILE:
            shutil.copyfile(path, folder / path.name)
    if (base / _TEMPLATE_FOLDER).is_dir():
        shutil.copytree(base / _TEMPLATE_FOLDER, folder / _TEMPLATE_FOLDER)


def _is_of_weights(path: Path, *, sharded: bool) -> bool:
    """Whether a file holds weights, or is an index of shards that the new folder does not have."""
    if path.name == INDEX_FILE:
        return not sharded
    return path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(_WEIGHT_INDEX_SUFFIX)


def _base_hint(mask: Mask) -> str:
    revision = mask.metadata.base_revision
    return f"apply it to {mask.metadata.base_model}" + (f" at revision {revision}" if revision else "")
