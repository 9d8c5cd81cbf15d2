"""Averages checkpoints on disk and writes the result as a new, ordinary checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mftctl.masking.checkpoints.average_match import matching_parts
from mftctl.masking.checkpoints.combined_card import write_average_card
from mftctl.masking.checkpoints.mixture import write_mixture
from mftctl.masking.checkpoints.new_checkpoint import permit_output, write_checkpoint
from mftctl.masking.checkpoints.tokenizer_match import require_same_tokenizer


@dataclass(frozen=True, slots=True)
class Averaged:
    """Summary of what `average_checkpoints` wrote.

    Attributes:
        bytes_written: The total size of the files in the new folder.
        tensors: The number of averaged tensors.
        left_out: Links in the first checkpoint's folder to files outside it, which were not copied.
    """

    bytes_written: int
    tensors: int
    left_out: tuple[str, ...] = ()


def average_checkpoints(
    checkpoints: Sequence[Path],
    weights: Sequence[float],
    output: Path,
    *,
    names: Sequence[str],
    on_progress: Callable[[int, int], None] | None = None,
    replace: bool = False,
    origin: Mapping[str, str] | None = None,
) -> Averaged:
    """Writes the weighted average of checkpoints, with the files and other parts of the first one.

    Everything is checked before anything is written. Floating-point tensors are summed in fp32 in the given order and
    rounded once to their stored dtype; entries that are equal in all checkpoints keep their value.

    Args:
        checkpoints: Their folders; they may be sharded differently.
        weights: From `settled_weights`.
        output: The new folder; it appears only when complete.
        names: Names of the checkpoints for the model card.
        on_progress: Called with the weight bytes written so far and in total.
        replace: Whether to replace a model at `output` that mftctl wrote.
        origin: How the new checkpoint was produced; recorded in its folder.

    Raises:
        ModelError: The checkpoints do not have the same tensors, tokenizer and chat templates, one of them is quantised
            or cannot be read, the average is not finite, or the output folder overlaps one of them or cannot be
            written.
        OutputError: `output` holds something that may not be replaced.
    """
    folders, output = [folder.resolve() for folder in checkpoints], output.resolve()
    permit = permit_output(output, folders, replace=replace)
    parts = matching_parts(folders)
    for folder in folders[1:]:
        require_same_tokenizer(folders[0], folder)
    written = write_checkpoint(
        output,
        permit,
        folders[0],
        lambda folder: write_mixture(folders[0], parts, weights, folder, on_progress),
        what="averaged",
        card=write_average_card(names, weights),
        origin=origin,
    )
    return Averaged(written.bytes_written, len(parts), written.left_out)
