"""Writes a soft mask as a file of kind `scale`: which weights are multiplied, and by what."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from transformers import PreTrainedModel

from mftctl.errors import MaskingError
from mftctl.masking.checkpoints.apply_in_memory import target_names
from mftctl.masking.checkpoints.tensors import StoredTensor, read_tensor, tensor_index
from mftctl.masking.delta.document import DeltaContents
from mftctl.masking.delta.encode import EncodedChange, digest_of
from mftctl.masking.delta.records import ChangedTensor, DeltaMetadata
from mftctl.masking.delta.spool import payload_spool
from mftctl.masking.delta.store import store_changes, write_with_files
from mftctl.masking.delta.value_codecs import encode_raw
from mftctl.masking.delta.values import encode_multipliers
from mftctl.masking.dtypes import TORCH_DTYPES, bits
from mftctl.masking.mask_file.codecs import encode, pack
from mftctl.masking.mask_file.document import SCALABLE_DTYPES
from mftctl.masking.soft_mask import IDENTITY_CODES, Limit, multiplied
from mftctl.masking.targets import MaskTarget

_CODEC: Final = "deflate"


def stored_dtypes(targets: Sequence[MaskTarget], model: PreTrainedModel, checkpoint: Path) -> dict[str, torch.dtype]:
    """The dtype of each target's weight in a checkpoint, by target name.

    Args:
        targets: From `find_targets` on the model.
        model: The model in memory.
        checkpoint: Its folder.

    Raises:
        MaskMismatchError: A parameter is not in the checkpoint.
        MaskingError: A weight cannot be multiplied.
    """
    index = tensor_index(checkpoint)
    found = {target: index[name] for target, name in target_names(targets, model, index).items()}
    for stored in found.values():
        if stored.dtype not in SCALABLE_DTYPES:
            raise MaskingError(
                "A soft mask cannot multiply weights in this data type.",
                path=stored.path,
                key=stored.name,
                expected=" | ".join(SCALABLE_DTYPES),
                actual=stored.dtype,
                hint="--mask hard",
            )
    return {target: TORCH_DTYPES[stored.dtype] for target, stored in found.items()}


def write_soft_mask(
    codes: Mapping[str, torch.Tensor],
    limit: Limit,
    targets: Sequence[MaskTarget],
    model: PreTrainedModel,
    checkpoint: Path,
    output: Path,
    metadata: DeltaMetadata,
) -> DeltaContents:
    """Writes a soft mask, whole or not at all; returns what its document says.

    Args:
        codes: uint8 codes by target name, on the CPU.
        limit: The largest multiplier.
        targets: From `find_targets` on the model.
        model: The model in memory.
        checkpoint: Its folder.
        output: The file; an existing one is replaced.
        metadata: Its origin.

    Raises:
        MaskMismatchError: A parameter is not in the checkpoint.
        ModelError: The checkpoint cannot be read.
        MaskFileError: The file cannot be written.
    """
    index = tensor_index(checkpoint)
    named = {name: codes[target] for target, name in target_names(targets, model, index).items()}
    total_bytes = sum(index[name].length_bytes for name in named)
    with payload_spool(output) as spool:
        outcomes = ((name, _encoded(index[name], own, limit)) for name, own in named.items())
        found = store_changes(checkpoint, outcomes, spool, total_bytes, None)
        return write_with_files(output, metadata, found, {}, spool, None)


def _encoded(stored: StoredTensor, codes: torch.Tensor, limit: Limit) -> EncodedChange:
    weight = read_tensor(stored)
    places = codes != IDENTITY_CODES[limit]
    values_codec, values = encode_raw(encode_multipliers(codes[places], limit))
    record = ChangedTensor(
        shape=stored.shape,
        dtype=stored.dtype,
        sha256=digest_of(weight),
        result_sha256=hashlib.sha256(bits(multiplied(weight, codes, limit)).numpy().data).hexdigest(),
        removed=int((~places).sum()),
        codec=_CODEC,
        values="scale",
        values_codec=values_codec,
    )
    return EncodedChange(record, encode(pack(places), _CODEC), values)
