"""Encodes the change of one tensor: which entries stay changed, their values, and the digest of the result."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from mftctl.errors import MaskingError, ModelError
from mftctl.masking.checkpoints.pairing import TensorPair
from mftctl.masking.delta.records import ChangedTensor
from mftctl.masking.delta.selection import Kept
from mftctl.masking.delta.steps import Bits
from mftctl.masking.delta.value_codecs import encode_raw
from mftctl.masking.delta.values import (
    ChangeKind,
    KeptValues,
    Raw,
    RoundedKind,
    decode_values,
    encode_exact,
    encode_rounded,
    wide_dtype,
)
from mftctl.masking.dtypes import TORCH_DTYPES, bits, unsigned_view
from mftctl.masking.mask_file.document import SCALABLE_DTYPES
from mftctl.masking.masked_values import finite_rescaled

_CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class EncodedChange:
    """The change of one tensor as a delta file stores it.

    Attributes:
        record: The tensor's record.
        bits: Payload of the bits; None if all entries are kept.
        values: Payload of the values.
    """

    record: ChangedTensor
    bits: bytes | None
    values: bytes


def encode_change(
    pair: TensorPair,
    before: torch.Tensor,
    after: torch.Tensor,
    kept: Kept,
    kind: ChangeKind,
    *,
    scale: float | None = None,
    base_sha256: str,
) -> EncodedChange:
    """The change of a tensor with at least one kept entry.

    Args:
        pair: The stored tensors.
        before: The base's values.
        after: The tuned values.
        kept: From `select_entries`.
        kind: Kind of the values; a vector is stored exactly in any case.
        scale: The factor of the kept changes; None for 1.
        base_sha256: Digest of the base's values.

    Raises:
        MaskingError: A changed weight is not finite, or weights in 8 bits would be rounded or rescaled.
        ModelError: A change is not finite.

    Source: rescaling as in DARE, Yu et al. 2023 (arXiv 2311.03099), section 3.
    """
    kind = "exact" if before.dim() < 2 else kind
    _require_room(pair, kind, scale if before.dim() >= 2 else None)
    places = [*_places(kept, before.numel())]
    old, new = (_gathered(places, kept.kept, tensor.reshape(-1)) for tensor in (before, after))
    scale = scale if before.dim() >= 2 else None
    if kind == "exact":
        if scale is not None:
            new = finite_rescaled(new, old, scale, pair.name)
        raw = encode_exact(_patterns(old), _patterns(new))
    else:
        raw = _rounded(pair, old, new, kind, scale)
    values = decode_values(kind, raw, kept.kept, pair.base.dtype)
    values_codec, payload = encode_raw(raw)
    record = ChangedTensor(
        shape=pair.base.shape,
        dtype=pair.base.dtype,
        sha256=base_sha256,
        result_sha256=_result_digest(pair, before, places, values, check=kind != "exact"),
        removed=before.numel() - kept.kept,
        codec=kept.codec,
        values=kind,
        values_codec=values_codec,
    )
    return EncodedChange(record, kept.payload, payload)


def digest_of(values: torch.Tensor) -> str:
    """The hex SHA-256 of a tensor's bytes."""
    return hashlib.sha256(values.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _rounded(pair: TensorPair, old: torch.Tensor, new: torch.Tensor, kind: RoundedKind, scale: float | None) -> Raw:
    wide = wide_dtype(old.dtype)
    changes = new.to(wide).sub_(old.to(wide))
    if scale is not None:
        changes.mul_(scale)
    if not torch.isfinite(changes).all():
        raise ModelError(
            "A change made by fine-tuning is not finite.",
            path=pair.tuned.path,
            key=pair.name,
            expected="finite weights in both checkpoints, or --values exact",
            actual=f"{int((~torch.isfinite(changes)).sum())} of {changes.numel()} are not",
            hint="use a checkpoint from before the training diverged",
        )
    return encode_rounded(kind, changes)


def _require_room(pair: TensorPair, kind: ChangeKind, scale: float | None) -> None:
    if pair.base.dtype in SCALABLE_DTYPES or (kind == "exact" and scale is None):
        return
    raise MaskingError(
        "Changes of weights in 8 bits can be neither rounded nor rescaled.",
        path=pair.base.path,
        key=pair.name,
        expected=" | ".join(SCALABLE_DTYPES),
        actual=pair.base.dtype,
        hint="--values exact, without --rescale",
    )


def _places(kept: Kept, weights: int) -> Iterator[npt.NDArray[np.int32]]:
    """Yields the indices of the kept entries in each chunk, of which the first pass over the bits is the only one."""
    for first in range(0, weights, _CHUNK):
        count = min(_CHUNK, weights - first)
        yield np.flatnonzero(kept.bits.part(first, count)).astype(np.int32)


def _gathered(places: Sequence[npt.NDArray[np.int32]], kept: int, flat: torch.Tensor) -> torch.Tensor:
    """The kept entries of a flat tensor."""
    if kept == flat.numel():
        return flat.clone()
    found, done = torch.empty(kept, dtype=flat.dtype), 0
    for number, inside in enumerate(places):
        part = flat[number * _CHUNK : (number + 1) * _CHUNK]
        found[done : done + len(inside)] = part[torch.from_numpy(inside)]
        done += len(inside)
    return found


def _patterns(values: torch.Tensor) -> Bits:
    found = bits(values).numpy()
    return found.view(np.dtype(f"<u{found.dtype.itemsize}"))


def _result_digest(
    pair: TensorPair,
    before: torch.Tensor,
    places: Sequence[npt.NDArray[np.int32]],
    values: KeptValues,
    *,
    check: bool,
) -> str:
    """The digest of the changed tensor, computed from the values as a reader decodes them.

    Raises:
        MaskingError: A changed weight is not finite.
    """
    base = bits(before).reshape(-1).numpy().view(unsigned_view(pair.base.dtype))
    digest, done = hashlib.sha256(), 0
    for number, inside in enumerate(places):
        part = base[number * _CHUNK : (number + 1) * _CHUNK].copy()
        values.put(part, inside, done)
        if check:
            _require_finite(pair, part, inside)
        digest.update(part.data)
        done += len(inside)
    return digest.hexdigest()


def _require_finite(pair: TensorPair, weights: Bits, places: npt.NDArray[np.int32]) -> None:
    changed = weights[places].view(np.dtype(f"<i{weights.dtype.itemsize}"))
    finite = torch.isfinite(torch.from_numpy(changed).view(TORCH_DTYPES[pair.base.dtype]))
    if not finite.all():
        raise MaskingError(
            "A changed weight is not finite.",
            path=pair.tuned.path,
            key=pair.name,
            expected=f"finite weights in {pair.base.dtype}",
            actual=f"{int((~finite).sum())} of {finite.numel()} are not",
            hint="--values exact, a smaller ratio, or no --rescale",
        )
