"""Masks and checkpoints: resolving a base, and writing base and mask as a new, ordinary checkpoint.

The weight files are streamed, so memory use does not grow with the model. The output appears under its name only when
complete, and is discarded if a tensor does not match the mask's record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mftctl.errors import MaskMismatchError
from mftctl.masking.checkpoints.mask_match import masked_tensors
from mftctl.masking.checkpoints.masked_shards import with_base_values, without_removed
from mftctl.masking.checkpoints.model_card import write_model_card
from mftctl.masking.checkpoints.new_checkpoint import permit_output, write_checkpoint
from mftctl.masking.checkpoints.shards import write_shards
from mftctl.masking.checkpoints.tensors import tensor_index
from mftctl.masking.mask import Mask


@dataclass(frozen=True, slots=True)
class ApplyResult:
    """Summary of what `apply_to_checkpoint` wrote.

    Attributes:
        bytes_written: The total size of the files in the new folder.
        tensors_masked: The number of masked tensors.
        removed: The number of weights set to zero or reset to the base's values.
        left_out: Links in the base's folder to files outside it, which were not copied.
    """

    bytes_written: int
    tensors_masked: int
    removed: int
    left_out: tuple[str, ...] = ()


def apply_to_checkpoint(
    base: Path,
    mask: Mask,
    output: Path,
    *,
    mask_path: Path | None,
    base_model: str,
    tuned: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    replace: bool = False,
    origin: Mapping[str, str] | None = None,
) -> ApplyResult:
    """Writes a new checkpoint with removed weights set to +0.0, or reset to the base's values for a delta mask.

    A weight mask yields the base without its removed weights; a delta mask yields the tuned checkpoint with them reset.
    All other bytes of the weight files are unchanged. A model card is added.

    Args:
        base: The base's folder.
        mask: A mask made for this base, and for this tuned checkpoint if it is a delta mask.
        output: The new folder; it appears only when complete. Chat templates and top-level files other than weights are
            copied from the base or the tuned checkpoint, except links to files outside it.
        mask_path: The mask file, whose digest the model card states.
        base_model: Name of the base for the model card.
        tuned: Folder of the tuned checkpoint, for a delta mask only; it may be sharded differently from the base.
        on_progress: Called with the weight bytes written so far and in total.
        replace: Whether to replace a model at `output` that mftctl wrote.
        origin: How the new checkpoint was produced; recorded in its folder.

    Raises:
        MaskMismatchError: The mask was made for different tensors or was already applied to the base, or a tuned
            checkpoint is missing or was given for a weight mask.
        ModelError: An input cannot be read, or the output folder overlaps an input or cannot be written.
        OutputError: `output` holds something that may not be replaced.
    """
    _require_tuned_for_delta(mask, tuned)
    base, output = base.resolve(), output.resolve()
    source = base if tuned is None else tuned.resolve()
    permit = permit_output(
        output, [base, source, *([] if mask_path is None else [mask_path.resolve()])], replace=replace
    )
    copy_tensor = without_removed(mask)
    originals = masked_tensors(mask, base, "base")
    if tuned is not None:
        masked_tensors(mask, source, "tuned checkpoint")
        copy_tensor = with_base_values(mask, originals)
    written = write_checkpoint(
        output,
        permit,
        source,
        lambda folder: write_shards(tensor_index(source).values(), mask, copy_tensor, folder, on_progress),
        what="masked",
        card=write_model_card(mask, base_model=base_model, mask_path=mask_path),
        origin=origin,
    )
    return ApplyResult(written.bytes_written, len(mask), mask.removed, written.left_out)


def _require_tuned_for_delta(mask: Mask, tuned: Path | None) -> None:
    if mask.metadata.kind == "delta" and tuned is None:
        raise MaskMismatchError(
            "A delta mask needs the tuned checkpoint in addition to the base.",
            key="tuned",
            expected=mask.metadata.tuned_label,
            actual="only the base",
            hint=f"give {mask.metadata.tuned_label} as the tuned checkpoint",
        )
    if mask.metadata.kind == "weight" and tuned is not None:
        raise MaskMismatchError(
            "A weight mask applies to its base only, but a tuned checkpoint was given.",
            path=tuned,
            key="tuned",
            expected="no tuned checkpoint",
            hint=f"apply it to {mask.metadata.base_label} only, or give a delta mask",
        )
