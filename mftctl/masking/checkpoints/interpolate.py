"""The models on the line from a checkpoint through the one fine-tuned from it: base + share * (tuned - base)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mftctl.errors import MaskMismatchError, ModelError
from mftctl.masking.checkpoints.apply_in_memory import stored_parameters
from mftctl.masking.checkpoints.average_match import require_plain_weights
from mftctl.masking.checkpoints.mixture import sum_of_parts, write_mixture
from mftctl.masking.checkpoints.new_checkpoint import Written, permit_output, write_checkpoint
from mftctl.masking.checkpoints.pairing import TensorPair, pair_tensors
from mftctl.masking.checkpoints.tensors import read_tensor
from mftctl.masking.dtypes import bits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def changed_tensors(base: Path, tuned: Path) -> list[TensorPair]:
    """The tensors that fine-tuning changed, in ascending order of name.

    Args:
        base: Folder of the checkpoint before fine-tuning.
        tuned: Folder of the checkpoint after fine-tuning; it may be sharded differently.

    Raises:
        MaskMismatchError: They do not have the same tensors.
        ModelError: They have the same weights, one is quantised, or one cannot be read.
    """
    require_plain_weights(base)
    require_plain_weights(tuned)
    changed = [pair for pair in pair_tensors(base, tuned) if _differ(pair)]
    if not changed:
        raise ModelError(
            "The base and the tuned checkpoint have the same weights, so there is nothing between them.",
            path=tuned,
            expected=f"weights that differ from those in {base}",
            hint="give the checkpoint from before fine-tuning as the base",
        )
    return changed


def weights_of(share: float) -> tuple[float, float]:
    """The weights of the base and of the tuned checkpoint.

    Args:
        share: How far to go from the base to the tuned checkpoint; 0 is the base, 1 the tuned one, more goes beyond.
    """
    return 1 - share, share


def parameters_of(model: PreTrainedModel, pairs: Sequence[TensorPair]) -> Mapping[str, torch.Tensor]:
    """The parameters of a loaded model that hold these tensors, by name in the tuned checkpoint.

    Args:
        model: Loaded from the tuned checkpoint.
        pairs: From `changed_tensors`.

    Raises:
        MaskingError: The model's storage layout cannot be determined.
        ModelError: A tensor is not part of the model.
    """
    try:
        return stored_parameters(model, [pair.name for pair in pairs])
    except MaskMismatchError as error:
        raise ModelError(
            "Fine-tuning changed a tensor that the language model does not use, so its effect cannot be measured.",
            key=error.key,
            expected="changes to the language model only",
        ) from error


def go_to(share: float, parameters: Mapping[str, torch.Tensor], pairs: Sequence[TensorPair]) -> None:
    """Sets a loaded model to the weights at a share, as they would be stored, one tensor at a time.

    Args:
        share: As for `weights_of`.
        parameters: From `parameters_of`; changed in place.
        pairs: From `changed_tensors`.

    Raises:
        ModelError: A weight would not be finite.
    """
    for pair in pairs:
        parameters[pair.name].copy_(sum_of_parts([pair.base, pair.tuned], weights_of(share)))


def write_interpolated(
    share: float,
    pairs: Sequence[TensorPair],
    base: Path,
    tuned: Path,
    output: Path,
    *,
    card: str,
    on_progress: Callable[[int, int], None] | None = None,
    replace: bool = False,
    origin: Mapping[str, str] | None = None,
) -> Written:
    """Writes the checkpoint at a share, with the files and all unchanged tensors of the tuned checkpoint.

    Args:
        share: As for `weights_of`; 1 gives the tuned weights bit for bit, 0 those of the base.
        pairs: From `changed_tensors`.
        base: Folder of the checkpoint before fine-tuning.
        tuned: Folder of the checkpoint after fine-tuning.
        output: The new folder; it appears only when complete.
        card: The model card.
        on_progress: Called with the weight bytes written so far and in total.
        replace: Whether to replace a model at `output` that mftctl wrote.
        origin: How the new checkpoint was produced; recorded in its folder.

    Raises:
        ModelError: A weight is not finite, or the output folder overlaps an input or cannot be written.
        OutputError: `output` holds something that may not be replaced.
    """
    base, tuned, output = base.resolve(), tuned.resolve(), output.resolve()
    permit = permit_output(output, [base, tuned], replace=replace)
    parts = {pair.name: (pair.base, pair.tuned) for pair in pairs}
    return write_checkpoint(
        output,
        permit,
        tuned,
        lambda folder: write_mixture(tuned, parts, weights_of(share), folder, on_progress),
        what="interpolated",
        card=card,
        origin=origin,
    )


def _differ(pair: TensorPair) -> bool:
    return not torch.equal(bits(read_tensor(pair.base)), bits(read_tensor(pair.tuned)))
