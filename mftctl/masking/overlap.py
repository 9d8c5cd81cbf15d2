"""Agreement between masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from mftctl.errors import MaskMismatchError
from mftctl.masking.mask import Mask
from mftctl.masking.mask_file.codecs import Packed, count_kept
from mftctl.masking.mask_file.document import TensorRecord


@dataclass(frozen=True, slots=True)
class Overlap:
    """The removed sets of two masks, counted over one tensor or over several.

    Attributes:
        weights: The weights that both masks cover.
        removed_a: The weights removed by the first mask.
        removed_b: The weights removed by the second mask.
        removed_both: The weights removed by both.
        expected_both: The expected number removed by both, for two independent random masks with the same counts in
            each tensor.
    """

    weights: int
    removed_a: int
    removed_b: int
    removed_both: int
    expected_both: float

    @property
    def jaccard(self) -> float:
        """Number removed by both over number removed by either, 0 to 1; 1 if neither mask removes anything."""
        return _jaccard(self.removed_a, self.removed_b, self.removed_both)

    @property
    def expected_jaccard(self) -> float:
        """The Jaccard index expected by chance, from the expected count."""
        return _jaccard(self.removed_a, self.removed_b, self.expected_both)


@dataclass(frozen=True, slots=True)
class MaskDifference:
    """The comparison of two masks.

    Attributes:
        tensors: The overlap in each tensor covered by both, in ascending order of name.
        total: The sum over these tensors.
        only_a: Names of the tensors that only the first mask covers.
        only_b: Names of the tensors that only the second mask covers.
    """

    tensors: dict[str, Overlap]
    total: Overlap
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]


def diff(a: Mask, b: Mask) -> MaskDifference:
    """The overlap of two masks, tensor by tensor and in total.

    Raises:
        MaskMismatchError: The masks differ in kind, have no tensor in common, or disagree on the shape of a tensor.
    """
    _require_same_kind(a, b)
    common = [name for name in a.names() if name in b]
    if not common:
        raise MaskMismatchError(
            "The two masks have no tensor in common.",
            expected=f"tensors such as {a.names()[0]}",
            actual=f"tensors such as {b.names()[0]}",
            hint="compare masks of the same model and of overlapping layers",
        )
    tensors = {
        name: _overlap(name, (a.records[name], b.records[name]), (a.packed(name), b.packed(name))) for name in common
    }
    return MaskDifference(
        tensors=tensors,
        total=_sum(tensors.values()),
        only_a=tuple(name for name in a.names() if name not in b),
        only_b=tuple(name for name in b.names() if name not in a),
    )


def pairwise_overlaps(masks: Sequence[Mask]) -> dict[tuple[int, int], Overlap]:
    """The overlap of each pair of masks over the tensors covered by both, keyed by their indices, lower index first.

    Pairs without a common tensor are left out. Only one tensor of each mask is in memory at a time, so open files
    (`open_mask`) suffice, and each is decoded once.

    Raises:
        MaskMismatchError: Two masks differ in kind or disagree on the shape of a tensor.
        MaskFormatError: A mask is in an open file, and its bits violate the format.
    """
    for mask in masks[1:]:
        _require_same_kind(masks[0], mask)
    found: dict[tuple[int, int], list[Overlap]] = {}
    for name in sorted({name for mask in masks for name in mask.records}):
        bits = {place: mask.packed(name) for place, mask in enumerate(masks) if name in mask}
        for a, b in combinations(bits, 2):
            records = masks[a].records[name], masks[b].records[name]
            found.setdefault((a, b), []).append(_overlap(name, records, (bits[a], bits[b])))
    return {pair: _sum(found[pair]) for pair in sorted(found)}


def _require_same_kind(a: Mask, b: Mask) -> None:
    if a.metadata.kind != b.metadata.kind:
        raise MaskMismatchError(
            "The two masks differ in kind: one removes weights, the other resets them to the base's values.",
            key="kind",
            expected=a.metadata.kind,
            actual=b.metadata.kind,
            hint="compare masks of the same kind (shown by mftctl mask info FILE)",
        )


def _overlap(name: str, records: tuple[TensorRecord, TensorRecord], bits: tuple[Packed, Packed]) -> Overlap:
    first, second = records
    if first.shape != second.shape:
        raise MaskMismatchError(
            "The two masks have different shapes for this tensor.",
            key=name,
            expected=first.shape,
            actual=second.shape,
            hint="compare masks of the same model",
        )
    kept_by_either = count_kept(bits[0] | bits[1])
    return Overlap(
        weights=first.weights,
        removed_a=first.removed,
        removed_b=second.removed,
        removed_both=first.weights - kept_by_either,
        expected_both=first.removed * second.removed / first.weights,
    )


def _sum(overlaps: Iterable[Overlap]) -> Overlap:
    parts = list(overlaps)
    return Overlap(
        weights=sum(part.weights for part in parts),
        removed_a=sum(part.removed_a for part in parts),
        removed_b=sum(part.removed_b for part in parts),
        removed_both=sum(part.removed_both for part in parts),
        expected_both=sum(part.expected_both for part in parts),
    )


def _jaccard(removed_a: int, removed_b: int, both: float) -> float:
    either = removed_a + removed_b - both
    return both / either if either else 1.0
