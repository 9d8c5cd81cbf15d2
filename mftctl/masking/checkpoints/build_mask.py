"""Builds a mask from the kept entries of projections, under the names of the checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from mftctl.masking.checkpoints.apply_in_memory import target_names
from mftctl.masking.checkpoints.pairing import TensorPair
from mftctl.masking.checkpoints.tensors import tensor_digest, tensor_index
from mftctl.masking.mask import Mask
from mftctl.masking.mask_file.document import MaskMetadata, TensorRecord
from mftctl.masking.targets import MaskTarget


def build_mask(
    keep: Mapping[str, torch.Tensor],
    targets: Sequence[MaskTarget],
    model: PreTrainedModel,
    base: Path,
    metadata: MaskMetadata,
    pairs: Mapping[str, TensorPair] | None = None,
) -> Mask:
    """The mask of some projections under the names, shapes and digests of the base checkpoint's tensors.

    Args:
        keep: Bool keep mask by target name.
        targets: From `find_targets` on the model without masks.
        model: The model in memory.
        base: Its checkpoint folder.
        metadata: The origin stated in the mask file.
        pairs: For a delta mask, from `pair_targets`.

    Raises:
        MaskMismatchError: A parameter is not in the checkpoint.
        MaskingError: A weight is stored as several tensors.
    """
    index = tensor_index(base)
    names = target_names(targets, model, index)
    tensors, records = {}, {}
    for target, bits in keep.items():
        name = names[target]
        stored = index[name]
        tensors[name] = bits
        removed = bits.numel() - int(bits.sum())
        digest = tensor_digest(stored)
        records[name] = TensorRecord(stored.shape, removed, digest, stored.dtype)
        if pairs is not None:
            before = tensor_digest(pairs[target].base)
            records[name] = replace(records[name], sha256=before, tuned_sha256=digest)
    return Mask(tensors, records, metadata)
