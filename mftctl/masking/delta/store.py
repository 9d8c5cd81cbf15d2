"""Collects the changes of all tensors and writes them as a delta file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mftctl.files.atomic import Permit
from mftctl.masking.checkpoints.tensors import tensor_digest, tensor_index
from mftctl.masking.delta.document import FILE, VALUES, DeltaContents
from mftctl.masking.delta.encode import EncodedChange
from mftctl.masking.delta.records import BaseTensor, CarriedFile, ChangedTensor, DeltaMetadata, LeftOut
from mftctl.masking.delta.spool import PayloadSpool, write_delta
from mftctl.masking.delta.value_codecs import encode_file

Outcome = EncodedChange | BaseTensor | LeftOut
"""What becomes of a tensor of the base: changed, unchanged, or changed by fine-tuning but left out."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What became of each tensor of the base.

    Attributes:
        tensors: The changed tensors, whose payloads are in the spool.
        unchanged: The unchanged tensors.
        left_out: The tensors whose change is left out.
    """

    tensors: dict[str, ChangedTensor]
    unchanged: dict[str, BaseTensor]
    left_out: dict[str, LeftOut]


def store_changes(
    base: Path,
    outcomes: Iterable[tuple[str, Outcome]],
    spool: PayloadSpool,
    total_bytes: int,
    on_progress: Callable[[int, int], None] | None,
) -> Stored:
    """Adds the payloads of changed tensors to a spool as they come; returns what became of every tensor.

    Args:
        base: The base's folder.
        outcomes: Names of the base's tensors with their outcomes; tensors without one are unchanged.
        spool: Receives the payloads.
        total_bytes: Bytes of the tensors with an outcome in the base.
        on_progress: Called with the bytes of the base processed so far and in total.

    Raises:
        MftError: From the outcomes.
    """
    found, done_bytes, index = Stored({}, {}, {}), 0, tensor_index(base)
    for name, outcome in outcomes:
        match outcome:
            case EncodedChange():
                found.tensors[name] = outcome.record
                if outcome.bits is not None:
                    spool.add(name, outcome.bits)
                spool.add(VALUES + name, outcome.values)
            case LeftOut():
                found.left_out[name] = outcome
            case BaseTensor():
                found.unchanged[name] = outcome
        done_bytes += index[name].length_bytes
        if on_progress is not None:
            on_progress(done_bytes, total_bytes)
    for name, stored in sorted(index.items()):
        if name not in found.tensors and name not in found.unchanged and name not in found.left_out:
            found.unchanged[name] = BaseTensor(stored.shape, stored.dtype, tensor_digest(stored), stored.length_bytes)
    return found


def write_with_files(
    output: Path,
    metadata: DeltaMetadata,
    found: Stored,
    files: Mapping[str, bytes],
    spool: PayloadSpool,
    permit: Permit | None,
) -> DeltaContents:
    """Writes a delta file, whole or not at all; returns what its document says.

    Args:
        output: The file.
        metadata: Its origin.
        found: From `store_changes`.
        files: The files that go with the weights.
        spool: The payloads of the changed tensors.
        permit: Decides whether an existing file may be replaced; None replaces any file.

    Raises:
        MaskFileError: The file cannot be written.
        OutputError: The permit refuses.
    """
    for name, content in files.items():
        spool.add(FILE + name, encode_file(content))
    records = {name: CarriedFile(len(text), hashlib.sha256(text).hexdigest()) for name, text in files.items()}
    contents = DeltaContents(metadata, found.tensors, found.unchanged, found.left_out, records)
    write_delta(output, contents, spool, permit)
    return contents
