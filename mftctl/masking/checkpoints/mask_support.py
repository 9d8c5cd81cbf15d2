"""The weights that a mask keeps, as the weights that an adapter may change."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from mftctl.errors import MaskMismatchError
from mftctl.masking.checkpoints.apply_in_memory import spellings
from mftctl.masking.checkpoints.load_weights import listed
from mftctl.masking.checkpoints.mask_match import require_shapes
from mftctl.masking.mask import Mask, open_mask
from mftctl.masking.parameter_layout import stored_parts
from mftctl.masking.targets import linear_projections


@dataclass(frozen=True, slots=True)
class Support:
    """The weights that a mask keeps in the linear projections of a model.

    Attributes:
        counts: Number of kept weights by path of the projection.
        names: Name of the masked tensor by path of the projection.
        left_out: Masked tensors that are not linear projections of decoder layers, such as embeddings or experts.
    """

    counts: dict[str, int]
    names: dict[str, str]
    left_out: tuple[str, ...]


def check_support(file: Path, folder: Path) -> None:
    """Checks that a mask fits a checkpoint and leaves something to train, without reading bits or weights.

    Args:
        file: The mask.
        folder: The checkpoint. Its dtypes and values may differ from those that the mask was made for.

    Raises:
        MaskFormatError: The file is damaged or not a mask.
        MaskMismatchError: The checkpoint lacks a masked tensor or has it in another shape, or the mask keeps nothing of
            a tensor.
        ModelError: The checkpoint cannot be read.
    """
    with open_mask(file) as mask:
        require_shapes(mask, folder)
        for name, record in mask.records.items():
            if record.removed == record.weights:
                raise MaskMismatchError(
                    "The mask keeps no weight of a tensor, so there is nothing to train.",
                    path=file,
                    key=name,
                    expected=f"at least 1 of {record.weights:,} weights",
                    actual="0",
                    hint="a mask with a lower ratio",
                )


def read_support(file: Path, model: PreTrainedModel) -> Support:
    """What a mask keeps of a model, from its records alone.

    Args:
        file: The mask, as checked by `check_support`.
        model: The model, possibly without data.

    Raises:
        MaskFormatError: The file is damaged or not a mask.
        MaskMismatchError: It masks no linear projection of the model.
    """
    with open_mask(file) as mask:
        names = _masked_projections(mask.names(), model)
        if not names:
            raise MaskMismatchError(
                "The mask covers no linear projection, and adapters of individual weights change only these.",
                path=file,
                expected="attention or MLP projections that are nn.Linear modules",
                actual=listed(mask.names()),
            )
        counts = {path: mask.records[name].weights - mask.records[name].removed for path, name in names.items()}
        return Support(counts, names, tuple(sorted(set(mask.names()) - set(names.values()))))


def kept_positions(file: Path, support: Support) -> dict[str, torch.Tensor]:
    """The flat indices of the kept weights of each projection: int64, ascending, `(kept,)`.

    Args:
        file: The mask.
        support: From `read_support` of the same file.

    Raises:
        MaskFormatError: The file is damaged.
    """
    with open_mask(file) as mask:
        return {path: _positions(mask, name) for path, name in support.names.items()}


def left_out_text(support: Support) -> str | None:
    """Returns a remark on the masked tensors that an adapter cannot train; None if there are none.

    Args:
        support: From `read_support`.
    """
    if not support.left_out:
        return None
    return (
        f"Of the mask's tensors, {len(support.left_out)} are not trained, since peft adapts individual weights only in "
        f"linear layers: {listed(support.left_out)}"
    )


def _positions(mask: Mask, name: str) -> torch.Tensor:
    return mask[name].flatten().nonzero().squeeze(1)


def _masked_projections(masked: Collection[str], model: PreTrainedModel) -> dict[str, str]:
    """The name of the masked tensor for the path of each linear projection that is masked."""
    weights = {name: f"{name}.weight" for name, _ in linear_projections(model)}
    prefix, found = model.base_model_prefix, dict[str, str]()
    for path, weight in weights.items():
        spelled = next((name for name in spellings(weight, prefix) if name in masked), None)
        if spelled is not None:
            found[path] = spelled
    unknown = {weight: model.get_parameter(weight) for path, weight in weights.items() if path not in found}
    if unknown and set(masked) - set(found.values()):
        for weight, parts in stored_parts(model, unknown).items():  # stored under another name
            if len(parts) == 1 and parts[0].name in masked:
                found[weight.removesuffix(".weight")] = parts[0].name
    return {path: found[path] for path in weights if path in found}
