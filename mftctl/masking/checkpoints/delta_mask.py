"""One-off drop: a delta mask that resets a share of the fine-tuning changes, without training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch

from mftctl.errors import MaskingError, ModelError
from mftctl.masking.checkpoints.pairing import TensorPair, pair_tensors, same_weights
from mftctl.masking.checkpoints.tensors import read_tensor, tensor_digest
from mftctl.masking.mask import Mask
from mftctl.masking.mask_file.codecs import pack
from mftctl.masking.mask_file.document import SCALABLE_DTYPES, MaskMetadata, TensorRecord
from mftctl.masking.selection import check_ratio, keep_highest, removed_count

Strategy = Literal["trivial", "salient", "random"]


def drop_mask(
    base: Path,
    tuned: Path,
    ratio: float,
    strategy: Strategy,
    *,
    rescale: bool = False,
    base_model: str,
    base_revision: str | None = None,
    tuned_model: str,
    tuned_revision: str | None = None,
    seed: int = 0,
    run_id: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Mask:
    """The delta mask that resets exactly the given share of each floating-point tensor to the base's values.

    One tensor of each checkpoint is in memory at a time. Differences are computed in fp32, or in fp64 for F64 tensors.
    Equal differences are reset lowest flat index first. A tied output head is reset at the same entries as the
    embeddings, even if the tuned checkpoint stores both.

    Args:
        base: Folder of the checkpoint before fine-tuning.
        tuned: Folder of the checkpoint after fine-tuning, with the same tensors; it may be sharded differently.
        ratio: Share of the differences to reset, in [0, 1).
        strategy: `trivial` resets the smallest absolute differences first, `salient` the largest, `random` any.
        rescale: Whether applying the mask multiplies the kept differences by 1 / (1 - ratio).
        base_model: Name of the base for the mask file.
        base_revision: Its revision on the hub.
        tuned_model: Name of the tuned model for the mask file.
        tuned_revision: Its revision on the hub.
        seed: Together with a tensor's name, decides its random entries.
        run_id: The run that creates the mask.
        on_progress: Called with the bytes of the tuned checkpoint processed so far and in total.

    Raises:
        MaskingError: The ratio is out of range, the strategy does not exist, or weights in 8 bits would be rescaled.
        MaskMismatchError: The two checkpoints do not have the same tensors, or have the same weights.
        ModelError: One of them cannot be read, or a difference is NaN.

    Source: GMT, section 4, "Analysis of Drop Strategy", and figure 3. Rescaled random drop: DARE, Yu et al. 2023
        (arXiv 2311.03099), section 3; there each entry is dropped independently with that probability.
    """
    check_ratio(ratio)
    if strategy not in get_args(Strategy):
        raise MaskingError("There is no such strategy.", key="strategy", expected=get_args(Strategy), actual=strategy)
    pairs = pair_tensors(base, tuned)
    scale = 1 / (1 - ratio) if rescale and ratio > 0 else None
    if scale is not None:
        _require_scalable(pairs)
    total_bytes, done_bytes = sum(pair.tuned.length_bytes for pair in pairs), 0
    packed, records = {}, {}
    for pair in pairs:
        values = _random_values(pair, seed) if strategy == "random" else _sizes(pair, strategy)
        packed[pair.name] = pack(keep_highest(values, ratio))
        records[pair.name] = _record(pair, ratio)
        done_bytes += pair.tuned.length_bytes
        if on_progress is not None:
            on_progress(done_bytes, total_bytes)
    if all(record.sha256 == record.tuned_sha256 for record in records.values()):
        raise same_weights(base, tuned)
    metadata = MaskMetadata(
        kind="delta",
        base_model=base_model,
        base_revision=base_revision,
        method=f"drop-{strategy}",
        ratio=ratio,
        threshold=None,
        layers=None,
        seed=seed,
        run_id=run_id,
        tuned_model=tuned_model,
        tuned_revision=tuned_revision,
        scale=scale,
    )
    return Mask.from_packed(packed, records, metadata)


def _require_scalable(pairs: Sequence[TensorPair]) -> None:
    narrow = next((pair for pair in pairs if pair.tuned.dtype not in SCALABLE_DTYPES), None)
    if narrow is not None:
        raise MaskingError(
            "Changes of weights in 8 bits cannot be rescaled.",
            path=narrow.tuned.path,
            key=narrow.name,
            expected=" | ".join(SCALABLE_DTYPES),
            actual=narrow.tuned.dtype,
            hint="drop without --rescale",
        )


def change_sizes(before: torch.Tensor, after: torch.Tensor, pair: TensorPair) -> torch.Tensor:
    """The absolute differences, in fp32, or fp64 for fp64 weights.

    Args:
        before: The base's weights.
        after: The tuned weights, of the same shape and dtype.
        pair: Where they are stored, for the error.

    Raises:
        ModelError: A difference is NaN.
    """
    wide = torch.float64 if after.dtype == torch.float64 else torch.float32
    sizes = (after.to(wide) - before.to(wide)).abs_()
    if torch.isnan(sizes).any():
        raise ModelError(
            "The difference between the base and the tuned checkpoint is NaN.",
            path=pair.tuned.path,
            key=pair.name,
            expected="finite weights in both",
            actual=f"{int(torch.isnan(sizes).sum())} NaN of {sizes.numel()}",
            hint="use a checkpoint from before the training diverged",
        )
    return sizes


def _sizes(pair: TensorPair, strategy: Literal["trivial", "salient"]) -> torch.Tensor:
    """The absolute differences, negated if the largest are to be reset first."""
    sizes = change_sizes(read_tensor(pair.base), read_tensor(pair.tuned), pair)
    return sizes if strategy == "trivial" else sizes.neg_()


def _random_values(pair: TensorPair, seed: int) -> torch.Tensor:
    # For a tied output head, the base's name is that of the embeddings, so that both copies get the same mask.
    digest = hashlib.sha256(f"{seed}:{pair.base.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.rand(pair.tuned.shape, generator=generator)


def _record(pair: TensorPair, ratio: float) -> TensorRecord:
    shape = pair.tuned.shape
    return TensorRecord(
        shape=shape,
        removed=removed_count(torch.Size(shape).numel(), ratio),
        sha256=tensor_digest(pair.base),
        dtype=pair.tuned.dtype,
        tuned_sha256=tensor_digest(pair.tuned),
    )
