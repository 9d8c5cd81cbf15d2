"""Selects the entries of a tensor that stay changed: the largest changes, random ones, or those that a mask keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch

from mftctl.errors import MaskingError, MaskMismatchError
from mftctl.masking.checkpoints.delta_mask import change_sizes
from mftctl.masking.checkpoints.pairing import TensorPair, is_embedding, is_head
from mftctl.masking.checkpoints.tensors import tensor_digest
from mftctl.masking.counter_random import stream_key
from mftctl.masking.delta.keep_bits import AllBits, KeepBits, PackedBits, seeded_bits
from mftctl.masking.delta.records import BitsCodec
from mftctl.masking.delta.values import ChangeKind
from mftctl.masking.dtypes import bits
from mftctl.masking.mask import Mask
from mftctl.masking.mask_file.codecs import Codec, encode, pack
from mftctl.masking.selection import check_ratio, keep_highest, removed_count

Select = Literal["trivial", "random"]
Part = Literal["embeddings", "head", "vectors"]
"""Parts of a model whose changes can be left out; vectors are norms and biases."""

_STREAM: Final = "delta"


@dataclass(frozen=True, slots=True)
class Selection:
    """How to select the entries that stay changed.

    Attributes:
        ratio: Share of the entries of each matrix to reset to the base, in [0, 1).
        select: "trivial" resets the smallest changes, "random" any.
        seed: Together with a tensor's name, decides its random entries.
        mask: A delta mask of the same two checkpoints; it decides for the tensors in it, and the others are selected as
            stated above.
        codec: Codec of the stored bits.
        mask_name: The method of the mask as stated in a delta file; by default that of its own metadata.
    """

    ratio: float = 0.0
    select: Select = "trivial"
    seed: int = 0
    mask: Mask | None = field(default=None)
    codec: Codec = "deflate"
    mask_name: str | None = None

    def __post_init__(self) -> None:
        check_ratio(self.ratio)

    @property
    def method(self) -> str:
        """The method as stated in a delta file."""
        return self.select if self.mask is None else self.mask_name or f"mask {self.mask.metadata.method}"


@dataclass(frozen=True, slots=True)
class Kept:
    """The entries of one tensor that stay changed.

    Attributes:
        bits: Which ones.
        kept: Their number.
        codec: Codec of the bits.
        payload: The encoded bits; None if all entries are kept.
    """

    bits: KeepBits
    kept: int
    codec: BitsCodec
    payload: bytes | None


def select_entries(
    pair: TensorPair, before: torch.Tensor, after: torch.Tensor, selection: Selection, values: ChangeKind
) -> Kept:
    """The entries of a tensor that stay changed.

    Of a vector, all changed entries stay changed. Entries that fine-tuning did not change are never kept, with two
    exceptions: random entries, which follow from a key alone, and signs at a ratio of 0, which BitDelta gives to all.

    Args:
        pair: The stored tensors.
        before: The base's values.
        after: The tuned values.
        selection: How to select.
        values: Kind of the values that will be stored for a matrix.

    Raises:
        MaskMismatchError: The mask is not for these tensors.
        ModelError: A change is NaN.
    """
    if selection.mask is not None and (masked := _masked_name(pair, selection.mask)) is not None:
        return _packed(selection.mask[masked].reshape(-1).numpy() & _changed(before, after), selection.codec)
    if before.dim() < 2:
        return _packed(_changed(before, after), selection.codec)
    if selection.ratio == 0:
        everything = values == "sign"
        return _all(before.numel()) if everything else _packed(_changed(before, after), selection.codec)
    if selection.select == "random":
        kept = before.numel() - removed_count(before.numel(), selection.ratio)
        if kept in (0, before.numel()):
            return _all(kept)
        # For a tied output head, the base's name is that of the embeddings, so that both copies get the same entries.
        seeded, packed = seeded_bits(stream_key(_STREAM, selection.seed, pair.base.name), before.numel(), kept)
        return Kept(PackedBits(packed), kept, "seeded", seeded.payload())
    highest = keep_highest(change_sizes(before, after, pair), selection.ratio)
    return _packed(highest.reshape(-1).numpy() & _changed(before, after), selection.codec)


def excluded_tensors(pairs: Mapping[str, TensorPair], parts: Sequence[Part]) -> set[str]:
    """The names of the tensors that belong to some parts of a model; embeddings and a head tied to them go together.

    Args:
        pairs: All tensors by name.
        parts: The parts.
    """
    members = {
        "embeddings": {name for name in pairs if is_embedding(name)},
        "head": {name for name in pairs if is_head(name)},
        "vectors": {name for name, pair in pairs.items() if len(pair.base.shape) < 2},
    }
    found = {name for part in parts for name in members[part]}
    for head in members["head"]:
        for embeddings in members["embeddings"]:
            if (head in found) != (embeddings in found) and _equal(pairs[head], pairs[embeddings]):
                found |= {head, embeddings}
    return found


def require_mask_of(mask: Mask, pairs: Mapping[str, TensorPair], path: Path) -> None:
    """Checks that a mask can select entries of these tensors; their bytes are checked one by one.

    Args:
        mask: The mask.
        pairs: The pairs by the base's names.
        path: The mask file.

    Raises:
        MaskMismatchError: It is no delta mask, or has a tensor that the checkpoints do not have.
    """
    if mask.metadata.kind != "delta":
        raise MaskMismatchError(
            "A weight mask does not say which changes to keep.",
            path=path,
            key="kind",
            expected="a delta mask (mask-train --kind delta, --method drop)",
            actual=f"a {mask.metadata.kind} mask",
            hint="mftctl apply TUNED MASK -o MASKED, then mftctl delta BASE MASKED",
        )
    known = {name for pair in pairs.values() for name in (pair.name, pair.tuned.name)}
    strange = next((name for name in mask.names() if name not in known), None)
    if strange is not None:
        raise MaskMismatchError(
            "The mask has a tensor that the checkpoints do not have.",
            path=path,
            key=strange,
            hint=f"give {mask.metadata.base_label} and {mask.metadata.tuned_label}",
        )


def require_digests(mask: Mask, pair: TensorPair, base_sha256: str, tuned_sha256: str) -> None:
    """Checks that a mask was made for the bytes of a pair, if it has the tensor.

    Raises:
        MaskMismatchError: It was made for others.
    """
    name = _masked_name(pair, mask)
    if name is None:
        return
    record = mask.records[name]
    for role, stored, expected, actual, label in (
        ("base", pair.base, record.sha256, base_sha256, mask.metadata.base_label),
        ("tuned checkpoint", pair.tuned, record.tuned_sha256, tuned_sha256, mask.metadata.tuned_label),
    ):
        if actual != expected:
            raise MaskMismatchError(
                f"The {role} is not the one this delta mask was made for: the bytes of a tensor differ.",
                path=stored.path,
                key=name,
                expected=f"SHA-256 {expected}",
                actual=f"SHA-256 {actual}",
                hint=f"give {label} as the {role}",
            )


def _masked_name(pair: TensorPair, mask: Mask) -> str | None:
    """The tensor's name in a mask, which uses those of the tuned checkpoint; None if the mask lacks it."""
    return next((name for name in (pair.name, pair.tuned.name) if name in mask), None)


def _equal(one: TensorPair, other: TensorPair) -> bool:
    """True if the base stores the same values twice."""
    if (one.base.dtype, one.base.shape) != (other.base.dtype, other.base.shape):
        return False
    return tensor_digest(one.base) == tensor_digest(other.base)


def _changed(before: torch.Tensor, after: torch.Tensor) -> npt.NDArray[np.bool_]:
    """Which entries differ in any bit."""
    found: npt.NDArray[np.bool_] = (bits(before) != bits(after)).reshape(-1).numpy()
    return found


def _packed(keep: npt.NDArray[np.bool_], codec: Codec) -> Kept:
    kept = int(np.count_nonzero(keep))
    if kept in (0, keep.size):
        return _all(kept)
    packed = pack(torch.from_numpy(keep))
    return Kept(PackedBits(packed), kept, codec, encode(packed, codec))


def _all(kept: int) -> Kept:
    return Kept(AllBits(), kept, "all", None)


def check_rescale(selection: Selection) -> None:
    """Checks that rescaling makes sense for a selection.

    Raises:
        MaskingError: The kept changes are not a random sample.
    """
    if selection.select != "random" or selection.mask is not None:
        raise MaskingError(
            "Only random changes can be rescaled: the others stand for no larger number of changes.",
            key="--rescale",
            expected="--select random",
            actual=selection.method,
            hint="omit --rescale",
        )
