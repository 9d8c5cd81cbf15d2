"""The weights before fine-tuning of the projections that a delta mask covers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mftctl.errors import ModelError
from mftctl.masking.checkpoints.apply_in_memory import target_names
from mftctl.masking.checkpoints.pairing import TensorPair, pair_named, same_weights
from mftctl.masking.checkpoints.tensors import read_tensor, tensor_digest, tensor_index

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mftctl.masking.targets import MaskTarget


def pair_targets(
    targets: Sequence[MaskTarget], model: PreTrainedModel, base: Path, tuned: Path
) -> dict[str, TensorPair]:
    """The stored tensors of each target before and after fine-tuning, by target name.

    Args:
        targets: From `find_targets` on this model.
        model: Loaded from the tuned checkpoint.
        base: Folder of the checkpoint before fine-tuning.
        tuned: Folder of the tuned checkpoint.

    Raises:
        MaskMismatchError: A tensor is missing, differs in dtype or shape, or none differs in its values.
        MaskingError: A weight is stored as several tensors.
        ModelError: A checkpoint cannot be read, or has weights in 8 bits.
    """
    names = target_names(targets, model, tensor_index(tuned))
    stored = pair_named(names.values(), base, tuned)
    for pair in stored.values():
        if pair.tuned.dtype.startswith("F8"):
            raise ModelError(
                "A delta mask cannot be learned for weights in 8 bits, whose scales differ between the checkpoints.",
                path=pair.tuned.path,
                key=pair.name,
                expected="BF16, F16 or F32",
                actual=pair.tuned.dtype,
                hint="save both checkpoints in bf16",
            )
    if all(tensor_digest(pair.base) == tensor_digest(pair.tuned) for pair in stored.values()):
        raise same_weights(base, tuned)
    return {target: stored[name] for target, name in names.items()}


def read_base(targets: Sequence[MaskTarget], pairs: Mapping[str, TensorPair]) -> dict[str, torch.Tensor]:
    """The weight before fine-tuning of each target, by its name, with the dtype and device of its present weight.

    Args:
        targets: From `find_targets` on the model of `pair_targets`.
        pairs: The pair of each target.
    """
    return {
        target.name: read_tensor(pairs[target.name].base).to(target.weight.device, target.weight.dtype)
        for target in targets
    }
