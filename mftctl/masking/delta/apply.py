"""Applies a delta file to its base: as a new checkpoint, streamed, or to a loaded model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mftctl.masking.checkpoints.apply_in_memory import stored_parameters
from mftctl.masking.checkpoints.new_checkpoint import permit_output, write_checkpoint
from mftctl.masking.checkpoints.shards import Advance, WriteTensor, opened_at, write_shards
from mftctl.masking.checkpoints.tensors import StoredTensor, read_chunks, read_tensor
from mftctl.masking.delta.card import write_delta_card
from mftctl.masking.delta.delta import Delta
from mftctl.masking.delta.match import require_base, require_result
from mftctl.masking.dtypes import bits, unsigned_view


@dataclass(frozen=True, slots=True)
class DeltaApplied:
    """Summary of what `apply_delta_to_checkpoint` wrote.

    Attributes:
        bytes_written: The total size of the files in the new folder.
        left_out: Links in the base's folder to files outside it, which were not copied.
    """

    bytes_written: int
    left_out: tuple[str, ...] = ()


def apply_delta_to_checkpoint(
    base: Path,
    delta: Delta,
    output: Path,
    *,
    base_model: str,
    on_progress: Callable[[int, int], None] | None = None,
    replace: bool = False,
    origin: Mapping[str, str] | None = None,
) -> DeltaApplied:
    """Writes the base with the changes of a delta file as a new checkpoint.

    The base is checked before anything is written, and every changed tensor afterwards.

    Args:
        base: The base's folder.
        delta: A delta made from this base.
        output: The new folder; it appears only when complete. Its other files are those in the delta, otherwise those
            of the base, except links to files outside the base's folder.
        base_model: Name of the base for the model card.
        on_progress: Called with the weight bytes written so far and in total.
        replace: Whether to replace a model at `output` that mftctl wrote.
        origin: How the new checkpoint was produced; recorded in its folder.

    Raises:
        MaskMismatchError: The delta was made from another base, or a changed tensor is not the expected one.
        MaskFormatError: The bits or values of a tensor violate the format.
        ModelError: The base cannot be read, or the output folder overlaps an input or cannot be written.
        OutputError: `output` holds something that may not be replaced.
    """
    base, output = base.resolve(), output.resolve()
    permit = permit_output(output, [base, delta.path.resolve()], replace=replace)
    index = require_base(delta, base)
    files = {name: delta.file(name) for name in delta.contents.files}
    written = write_checkpoint(
        output,
        permit,
        base,
        lambda folder: write_shards(index.values(), delta.contents.tensors, with_changes(delta), folder, on_progress),
        what="changed",
        card=write_delta_card(delta, base_model=base_model),
        origin=origin,
        beside=files,
    )
    return DeltaApplied(written.bytes_written, written.left_out)


def with_changes(delta: Delta) -> WriteTensor:
    """A copy function for the base's tensors that applies their change."""

    def write_tensor(stored: StoredTensor, target: Path, advance: Advance) -> None:
        digest, change = hashlib.sha256(), delta.change(stored.name)
        with opened_at(stored.offset_bytes, stored.path, target) as (reader, writer):
            for chunk in read_chunks(reader, stored.length_bytes, stored.path):
                change.apply_to(np.frombuffer(chunk, dtype=unsigned_view(stored.dtype)))
                digest.update(chunk)
                writer.write(chunk)
                advance(len(chunk))
        change.require_all_used()
        require_result(digest.hexdigest(), stored, delta)

    return write_tensor


def changed_tensor(delta: Delta, stored: StoredTensor) -> torch.Tensor:
    """A tensor of the base with its change.

    Args:
        delta: The delta.
        stored: The base's tensor, checked to be the one that the delta was made from.

    Raises:
        MaskMismatchError: The changed tensor is not the expected one.
        MaskFormatError: Its bits or values violate the format.
    """
    weights, change = read_tensor(stored), delta.change(stored.name)
    patterns = bits(weights).reshape(-1).numpy().view(unsigned_view(stored.dtype))
    for first in range(0, len(patterns), _CHUNK):
        change.apply_to(patterns[first : first + _CHUNK])
    change.require_all_used()
    require_result(hashlib.sha256(patterns.data).hexdigest(), stored, delta)
    return weights


_CHUNK = 2**20


@torch.no_grad()
def apply_delta(model: torch.nn.Module, delta: Delta, base: Path, names: Iterable[str] | None = None) -> None:
    """Changes the weights of a loaded model in place, so that they equal those of the applied checkpoint.

    The base is checked before the first weight changes. One of its tensors is in memory at a time.

    Args:
        model: A transformers model loaded from the base, in any dtype.
        delta: A delta made from this base.
        base: The base's folder.
        names: Tensors to change; all by default.

    Raises:
        MaskMismatchError: The delta was made from another base, or changes a tensor that the model does not have.
        MaskFormatError: The bits or values of a tensor violate the format.
        MaskingError: The model's storage layout cannot be determined.
        ModelError: The base cannot be read.
    """
    chosen = list(delta.contents.tensors if names is None else names)
    parameters = stored_parameters(model, chosen)
    index = require_base(delta, base)
    for name in chosen:
        changed = changed_tensor(delta, index[name])
        parameters[name].copy_(changed.to(parameters[name].dtype))
