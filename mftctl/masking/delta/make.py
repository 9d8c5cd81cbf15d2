"""Makes a delta file from a base and the checkpoint fine-tuned from it, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Final

import torch

from mftctl.errors import MaskingError
from mftctl.files.atomic import Permit
from mftctl.masking.checkpoints.pairing import TensorPair, pair_base_tensors, same_weights
from mftctl.masking.checkpoints.tensors import read_tensor
from mftctl.masking.delta.carried_files import changed_files
from mftctl.masking.delta.document import DeltaContents
from mftctl.masking.delta.encode import digest_of, encode_change
from mftctl.masking.delta.records import (
    BaseTensor,
    DeltaMetadata,
    LeftOut,
    NamedModel,
)
from mftctl.masking.delta.selection import (
    Part,
    Selection,
    check_rescale,
    excluded_tensors,
    require_digests,
    require_mask_of,
    select_entries,
)
from mftctl.masking.delta.spool import payload_spool
from mftctl.masking.delta.store import Outcome, store_changes, write_with_files
from mftctl.masking.delta.values import ChangeKind
from mftctl.masking.dtypes import bits

_MOST_AT_ONCE: Final = 2
"""Tensors in memory at the same time: while one is hashed and compressed, the next one is selected."""


@dataclass(frozen=True, slots=True)
class DeltaPlan:
    """What to store of a fine-tuning.

    Attributes:
        selection: Which entries of each matrix stay changed.
        values: Kind of the values.
        rescale: Whether to multiply the kept changes by 1 / (1 - ratio).
        exclude: Parts of the model whose changes are left out.
        mask_path: The file of the selection's mask, for messages.
    """

    selection: Selection = field(default_factory=Selection)
    values: ChangeKind = "exact"
    rescale: bool = False
    exclude: tuple[Part, ...] = ()
    mask_path: Path = Path()

    def __post_init__(self) -> None:
        if self.rescale:
            check_rescale(self.selection)

    @property
    def scale(self) -> float | None:
        """The factor of the kept changes; None for 1."""
        mask, ratio = self.selection.mask, self.selection.ratio
        if mask is not None:
            return mask.metadata.scale
        return 1 / (1 - ratio) if self.rescale and ratio > 0 else None


def make_delta(
    base: Path,
    tuned: Path,
    output: Path,
    plan: DeltaPlan,
    *,
    base_model: NamedModel,
    tuned_model: NamedModel,
    run_id: str | None = None,
    permit: Permit | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> DeltaContents:
    """Writes a delta file, whole or not at all; returns what its document says.

    Vectors, such as norms and biases, are stored whole and exactly. The files of the tuned checkpoint that go with its
    weights are stored where they differ from the base's.

    Args:
        base: Folder of the checkpoint before fine-tuning.
        tuned: Folder of the checkpoint after fine-tuning, with the same tensors; it may be sharded differently.
        output: The delta file.
        plan: What to store.
        base_model: Name of the base.
        tuned_model: Name of the tuned model.
        run_id: The run that makes the file.
        permit: Decides whether an existing file at `output` may be replaced; None replaces any file.
        on_progress: Called with the bytes of the base processed so far and in total.

    Raises:
        MaskMismatchError: The checkpoints do not have the same tensors, have the same weights, or the mask is not for
            them.
        MaskingError: Nothing would be kept, or a changed weight is not finite.
        ModelError: A checkpoint cannot be read, or a change is NaN.
        MaskFileError: The file cannot be written.
        OutputError: `output` holds something that may not be replaced.
    """
    pairs = {pair.name: pair for pair in pair_base_tensors(base, tuned)}
    if plan.selection.mask is not None:
        require_mask_of(plan.selection.mask, pairs, plan.mask_path)
    files = changed_files(base, tuned)
    metadata = DeltaMetadata(
        values=plan.values,
        base=base_model,
        tuned=(tuned_model,),
        method=plan.selection.method,
        ratio=plan.selection.ratio,
        scale=plan.scale,
        seed=plan.selection.seed,
        run_id=run_id,
    )
    with payload_spool(output) as spool:
        outcomes = _in_turn(list(pairs.values()), plan, excluded_tensors(pairs, plan.exclude))
        total_bytes = sum(pair.base.length_bytes for pair in pairs.values())
        found = store_changes(base, outcomes, spool, total_bytes, on_progress)
        if not found.tensors:
            raise _nothing_left(base, tuned, found.left_out)
        return write_with_files(output, metadata, found, files, spool, permit)


def _in_turn(pairs: Sequence[TensorPair], plan: DeltaPlan, excluded: set[str]) -> Iterator[tuple[str, Outcome]]:
    """Encodes tensors in order, a few at once."""
    with ThreadPoolExecutor(_MOST_AT_ONCE) as pool:
        waiting = iter(pairs)
        started = [(pair, pool.submit(_encode, pair, plan, excluded)) for pair in islice(waiting, _MOST_AT_ONCE)]
        try:
            while started:
                pair, future = started.pop(0)
                outcome = future.result()
                started += [(one, pool.submit(_encode, one, plan, excluded)) for one in islice(waiting, 1)]
                yield pair.name, outcome
        finally:
            for _, future in started:
                future.cancel()


def _encode(pair: TensorPair, plan: DeltaPlan, excluded: set[str]) -> Outcome:
    """What a delta file holds of one tensor."""
    before, after = read_tensor(pair.base), read_tensor(pair.tuned)
    base_sha256, selection = digest_of(before), plan.selection
    if selection.mask is not None:
        require_digests(selection.mask, pair, base_sha256, digest_of(after))
    same = BaseTensor(pair.base.shape, pair.base.dtype, base_sha256, pair.base.length_bytes)
    if torch.equal(bits(before), bits(after)):
        return same
    if pair.name in excluded:
        return LeftOut(same, "excluded")
    kept = select_entries(pair, before, after, selection, plan.values)
    if kept.kept == 0:
        return LeftOut(same, "dropped")
    return encode_change(pair, before, after, kept, plan.values, scale=plan.scale, base_sha256=base_sha256)


def _nothing_left(base: Path, tuned: Path, left_out: Mapping[str, LeftOut]) -> Exception:
    if not left_out:
        return same_weights(base, tuned, "store")
    reasons = {one.reason for one in left_out.values()}
    return MaskingError(
        "No change of the fine-tuning is left to store.",
        path=tuned,
        expected="a changed entry",
        actual=f"{len(left_out)} changed tensors, all left out ({', '.join(sorted(reasons))})",
        hint="a smaller ratio, or fewer parts in --exclude",
    )
