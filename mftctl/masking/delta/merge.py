"""Merges the changes of several delta files onto their common base, by TIES or as a plain sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Final, Literal

import torch

from mftctl.errors import ConfigError, MaskingError, MaskMismatchError
from mftctl.files.atomic import Permit
from mftctl.masking.checkpoints.new_checkpoint import Written, permit_output, write_checkpoint
from mftctl.masking.checkpoints.pairing import TensorPair
from mftctl.masking.checkpoints.shards import Advance, write_shards
from mftctl.masking.checkpoints.tensors import StoredTensor, read_tensor
from mftctl.masking.delta.apply import changed_tensor
from mftctl.masking.delta.card import write_merge_card
from mftctl.masking.delta.delta import Delta
from mftctl.masking.delta.document import DeltaContents
from mftctl.masking.delta.encode import digest_of, encode_change
from mftctl.masking.delta.match import require_base
from mftctl.masking.delta.records import BaseTensor, DeltaMetadata, LeftOut, NamedModel
from mftctl.masking.delta.selection import Selection, select_entries
from mftctl.masking.delta.spool import payload_spool
from mftctl.masking.delta.store import Outcome, store_changes, write_with_files
from mftctl.masking.delta.values import ChangeKind, wide_dtype
from mftctl.masking.dtypes import bits
from mftctl.masking.mask_file.document import SCALABLE_DTYPES
from mftctl.text import counted

MergeMethod = Literal["ties", "sum"]

_LARGEST: Final = 1e6


@dataclass(frozen=True, slots=True)
class MergePlan:
    """How to merge changes.

    Attributes:
        weights: One per delta.
        method: "ties": elect a sign for each entry and average the changes that agree with it; "sum": add them.
        scale: Factor of the merged change.
    """

    weights: tuple[float, ...]
    method: MergeMethod = "ties"
    scale: float = 1.0

    @property
    def text(self) -> str:
        """The method as stated in a delta file."""
        weights = "" if set(self.weights) == {1.0} else f", weights {','.join(f'{one:g}' for one in self.weights)}"
        return f"{self.method}{weights}" + ("" if self.scale == 1 else f", scale {self.scale:g}")


def settle_plan(weights: Sequence[float] | None, count: int, method: MergeMethod, scale: float) -> MergePlan:
    """The plan to merge some deltas.

    Args:
        weights: One per delta; None for 1 each.
        count: Number of deltas.
        method: How to merge.
        scale: Factor of the merged change.

    Raises:
        ConfigError: There are fewer than two deltas, or the weights or the scale cannot be used.
    """
    if count < 2:
        raise ConfigError(
            "Merging needs at least two delta files.",
            key="DELTA",
            expected="two or more delta files of the same base",
            actual=count,
            hint="mftctl delta merge FIRST SECOND -o OUT",
        )
    found = (1.0,) * count if weights is None else tuple(weights)
    usable = all(math.isfinite(one) and 0 < abs(one) <= _LARGEST for one in (*found, scale))
    if len(found) != count or not usable or (method == "ties" and min(found) <= 0):
        limits = "above 0" if method == "ties" else "other than 0"
        raise ConfigError(
            "The weights of a merge cannot be used.",
            key="--weights",
            expected=f"{counted(count, 'number')} {limits}, at most {_LARGEST:g}",
            actual=",".join(f"{one:g}" for one in found) + ("" if scale == 1 else f" and --scale {scale:g}"),
            hint="--weights 1,0.5",
        )
    return MergePlan(found, method, scale)


@dataclass(slots=True)
class Conflicts:
    """Number of entries that deltas change, and of those that they change in different directions."""

    changed: int = 0
    opposed: int = 0


@dataclass(frozen=True, slots=True)
class Merge:
    """Several open deltas of one base, checked to be that.

    Attributes:
        deltas: The deltas.
        index: The tensors of the base.
        plan: How to merge.
        conflicts: Counted while tensors are merged.
    """

    deltas: Sequence[Delta]
    index: Mapping[str, StoredTensor]
    plan: MergePlan
    conflicts: Conflicts = field(default_factory=Conflicts)

    @property
    def names(self) -> list[str]:
        """The tensors that a delta changes, in ascending order."""
        return sorted({name for delta in self.deltas for name in delta.contents.tensors})

    def files(self) -> tuple[dict[str, bytes], list[str]]:
        """The files that go with the merged weights, those of the first delta that has them; and which ones differ.

        Raises:
            MaskFormatError: A file is damaged.
        """
        found: dict[str, bytes] = {}
        different: dict[str, None] = {}
        for delta in self.deltas:
            for name in delta.contents.files:
                content = delta.file(name)
                if found.setdefault(name, content) != content:
                    different[name] = None
        return found, list(different)

    def merged(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A tensor of the base, and with the merged changes.

        Raises:
            MaskMismatchError: A changed tensor is not the expected one.
            MaskFormatError: Bits or values violate the format.
            MaskingError: A merged weight is not finite, or has 8 bits.
        """
        stored = self.index[name]
        if stored.dtype not in SCALABLE_DTYPES:
            raise MaskingError(
                "Changes of weights in 8 bits cannot be merged.",
                path=stored.path,
                key=name,
                expected=" | ".join(SCALABLE_DTYPES),
                actual=stored.dtype,
            )
        before = read_tensor(stored)
        changed = [
            (changed_tensor(delta, stored), weight)
            for delta, weight in zip(self.deltas, self.plan.weights, strict=True)
            if name in delta.contents.tensors
        ]
        tensors, weights = [tensor for tensor, _ in changed], [weight for _, weight in changed]
        after = merge_changes(before, tensors, weights, self.plan, self.conflicts)
        if not torch.isfinite(after).all() and torch.isfinite(before).all():
            raise MaskingError(
                "A merged weight is not finite.",
                path=stored.path,
                key=name,
                expected=f"finite weights in {stored.dtype}",
                actual=f"{int((~torch.isfinite(after)).sum())} of {after.numel()} are not",
                hint="smaller --weights",
            )
        return before, after


def open_merge(deltas: Sequence[Delta], base: Path, plan: MergePlan) -> Merge:
    """The merge of some deltas, after checking that all of them were made from this base.

    Args:
        deltas: At least one.
        base: The base's folder.
        plan: How to merge, with one weight per delta.

    Raises:
        MaskMismatchError: A delta was made from another base, or is a soft mask.
        ModelError: The base cannot be read.
    """
    soft = next((delta for delta in deltas if delta.contents.metadata.kind == "scale"), None)
    if soft is not None:
        raise MaskMismatchError(
            "A soft mask is no fine-tuning to merge.",
            path=soft.path,
            key="kind",
            expected="delta files (mftctl delta)",
            actual="a soft mask",
            hint="apply it to a model first, then mftctl delta BASE MASKED",
        )
    first = deltas[0]
    index, expected = require_base(first, base), first.contents.base_tensors()
    for delta in deltas[1:]:
        found = delta.contents.base_tensors()
        name = next((one for one in sorted({*expected, *found}) if expected.get(one) != found.get(one)), None)
        if name is not None:
            raise MaskMismatchError(
                "The delta files were not made from the same base.",
                path=delta.path,
                key=name,
                expected=f"the tensor of {first.contents.metadata.base.label}, as in {first.path}",
                actual=f"that of {delta.contents.metadata.base.label}" if name in found else "no such tensor",
                hint="merge deltas of one base",
            )
    return Merge(deltas, index, plan)


def merge_changes(
    before: torch.Tensor,
    changed: Sequence[torch.Tensor],
    weights: Sequence[float],
    plan: MergePlan,
    conflicts: Conflicts,
) -> torch.Tensor:
    """A tensor with the merged changes, in the base's dtype.

    Changes are differences to the base in fp32 (fp64 for fp64 weights). An entry that only one delta changes, with
    weight and scale 1 or by TIES with scale 1, gets that delta's bits.

    Args:
        before: The base's weights.
        changed: The weights with each delta's changes.
        weights: One per delta.
        plan: Method and scale.
        conflicts: Counts changed entries.

    Source: TIES, Yadav et al. 2023 (arXiv 2306.01708), section 4, steps 2 and 3: "elect sign" and "disjoint merge". Its
        first step, "trim", is the selection that made the deltas. Weights are ours: they multiply the changes before
        the election, and the mean is weighted.
    """
    wide = wide_dtype(before.dtype)
    base = before.to(wide)
    total, above, below = torch.zeros_like(base), torch.zeros_like(base), torch.zeros_like(base)
    weight_above, weight_below = torch.zeros_like(base), torch.zeros_like(base)
    changers = torch.zeros(before.shape, dtype=torch.int16)
    only = before.clone()
    for tensor, weight in zip(changed, weights, strict=True):
        change = (tensor.to(wide) - base).mul_(weight)
        total += change
        above += change.clamp(min=0)
        below += change.clamp(max=0)
        weight_above += weight * (change > 0)
        weight_below += weight * (change < 0)
        differs = bits(tensor) != bits(before)
        changers += differs
        only = torch.where(differs, tensor, only)
    conflicts.changed += int((changers > 0).sum())
    conflicts.opposed += int(((above > 0) & (below < 0)).sum())
    merged = total
    if plan.method == "ties":
        merged = torch.where(total > 0, above / weight_above, torch.where(total < 0, below / weight_below, 0.0))
    after = (base + merged * plan.scale).to(before.dtype)
    after = torch.where((changers == 0) | (merged == 0), before, after)
    is_exact = plan.scale == 1 and (plan.method == "ties" or set(weights) == {1.0})
    return torch.where(changers == 1, only, after) if is_exact else after


def merge_to_delta(
    merge: Merge,
    base: Path,
    output: Path,
    values: ChangeKind,
    *,
    base_model: NamedModel,
    run_id: str | None = None,
    permit: Permit | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> DeltaContents:
    """Writes the merged changes as a delta file, whole or not at all; returns what its document says.

    Args:
        merge: The merge.
        base: The base's folder.
        output: The delta file.
        values: Kind of its values.
        base_model: Name of the base.
        run_id: The run that makes the file.
        permit: Decides whether an existing file at `output` may be replaced; None replaces any file.
        on_progress: Called with the bytes of the base processed so far and in total.

    Raises:
        MaskingError: The merged changes cancel out, or a weight is not finite.
        MftError: As for `Merge.merged`; or the file cannot be written.
    """
    metadata = DeltaMetadata(
        values=values,
        base=base_model,
        tuned=tuple(model for delta in merge.deltas for model in delta.contents.metadata.tuned),
        method=merge.plan.text,
        run_id=run_id,
    )
    total_bytes = sum(merge.index[name].length_bytes for name in merge.names)
    with payload_spool(output) as spool:
        found = store_changes(base, _outcomes(merge, values), spool, total_bytes, on_progress)
        if not found.tensors:
            raise MaskingError(
                "The merged changes cancel out, so there is nothing to store.",
                path=output,
                expected="a changed entry",
                hint="other --weights",
            )
        return write_with_files(output, metadata, found, merge.files()[0], spool, permit)


def _outcomes(merge: Merge, values: ChangeKind) -> Iterator[tuple[str, Outcome]]:
    for name in merge.names:
        before, after = merge.merged(name)
        stored = merge.index[name]
        pair, sha256 = TensorPair(name, stored, stored), digest_of(before)
        kept = select_entries(pair, before, after, Selection(), values)
        if kept.kept == 0:
            yield name, BaseTensor(stored.shape, stored.dtype, sha256, stored.length_bytes)
        else:
            yield name, encode_change(pair, before, after, kept, values, base_sha256=sha256)
    left_out = {name: one for delta in merge.deltas for name, one in delta.contents.left_out.items()}
    for name in sorted(left_out.keys() - set(merge.names)):
        yield name, LeftOut(left_out[name].tensor, left_out[name].reason)


def merge_to_checkpoint(
    merge: Merge,
    base: Path,
    output: Path,
    *,
    base_model: str,
    on_progress: Callable[[int, int], None] | None = None,
    replace: bool = False,
    origin: Mapping[str, str] | None = None,
) -> Written:
    """Writes the base with the merged changes as a new checkpoint.

    Args:
        merge: The merge.
        base: The base's folder.
        output: The new folder; it appears only when complete.
        base_model: Name of the base for the model card.
        on_progress: Called with the weight bytes written so far and in total.
        replace: Whether to replace a model at `output` that mftctl wrote.
        origin: How the new checkpoint was produced; recorded in its folder.

    Raises:
        MftError: As for `Merge.merged`; or the output folder overlaps an input or cannot be written.
    """
    base, output = base.resolve(), output.resolve()
    permit = permit_output(output, [base, *(delta.path.resolve() for delta in merge.deltas)], replace=replace)
    lock = Lock()  # one tensor of all deltas at a time

    def write_tensor(stored: StoredTensor, target: Path, advance: Advance) -> None:
        with lock:
            _, after = merge.merged(stored.name)
        with target.open("r+b") as writer:
            writer.seek(stored.offset_bytes)
            writer.write(after.reshape(-1).view(torch.uint8).numpy().data)
        advance(stored.length_bytes)

    return write_checkpoint(
        output,
        permit,
        base,
        lambda folder: write_shards(merge.index.values(), merge.names, write_tensor, folder, on_progress),
        what="merged",
        card=write_merge_card(merge.deltas, merge.plan.text, base_model=base_model),
        origin=origin,
        beside=merge.files()[0],
    )
