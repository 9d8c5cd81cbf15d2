"""Results of the commands that combine checkpoints, as stored in `run.json` and read back."""

from __future__ import annotations

from mftctl.experiments.results import Refused, Result
from mftctl.experiments.value_types import Count, Measured, Name, Number, Part, Place, Several


class AverageResult(Result):
    """Result of `average`; its checkpoints are among the inputs of the run.

    Attributes:
        state: Label of the state of the averaged model.
        model: Folder of the new checkpoint.
        weights: Weight of each checkpoint, in the order of the inputs; their sum is 1.
        tensors_averaged: Number of averaged tensors.
        bytes_written: Size of the files written.
    """

    state: Name
    model: Place
    weights: list[Number]
    tensors_averaged: Count
    bytes_written: Count


class ShareLoss(Part):
    """Validation loss at one share of the way from the base to the fine-tuned model.

    Attributes:
        share: The share; 1 is the fine-tuned model.
        loss: Validation loss per answer token.
        retained_loss: Loss per answer token on the held-out records of the data to retain; None without such data.
    """

    share: Number
    loss: Measured
    retained_loss: Measured | None = None


class InterpolateResult(Result):
    """Result of `interpolate`.

    Attributes:
        state: Label of the state of the interpolated model.
        model: Folder of the new checkpoint.
        output_refused: Reason why the model is not at the output path; None if it is, or if no path was given.
        base: Model before fine-tuning.
        share: Share that was kept: the model is base + share * (tuned - base).
        best_loss: Validation loss at that share, the lowest.
        losses: Validation loss at each share.
        tensors: Number of tensors that fine-tuning changed.
        peak_memory_bytes: Peak memory of the device; on a CPU, of the process.
    """

    state: Name
    model: Place
    output_refused: Refused
    base: Place
    share: Number
    best_loss: Measured
    losses: list[ShareLoss]
    tensors: Count
    peak_memory_bytes: Count

    @property
    def tuned_loss(self) -> float | None:
        """Validation loss of the fine-tuned model itself; None if its share, 1, was not measured."""
        return next((entry.loss for entry in self.losses if entry.share == 1), None)


class KeptDelta(Result):
    """Paths of a delta file, and a summary of what it holds.

    Attributes:
        state: Label of the state of the base with the changes.
        model: Model that the file changes, the base.
        mask: Delta file in the run folder.
        output: Delta file at the output path; None if it is only in the run folder.
        output_refused: Reason why the file is not at the output path; None if it is, or if no path was given.
        file_bytes: Size of the file.
        checkpoint_bytes: Size of the base's tensors.
        tensors: Number of changed tensors.
        weights: Number of weights in these tensors.
        kept: Number of changed weights.
        values: Kind of the values.
        left_out: Tensors whose change the file leaves out, each with the reason.
        files: Names of the files of the fine-tuned model that it holds.
    """

    state: Name
    model: Place
    mask: Place
    output: Place | None
    output_refused: Refused
    file_bytes: Count
    checkpoint_bytes: Several
    tensors: Count
    weights: Count
    kept: Count
    values: str
    left_out: dict[str, str]
    files: list[str]


class DeltaResult(KeptDelta):
    """Result of `delta`.

    Attributes:
        tuned: Fine-tuned model.
        peak_memory_bytes: Peak memory of the process.
    """

    tuned: Place
    peak_memory_bytes: Count


class MergeResult(Result):
    """Result of `delta merge`: a delta file or a checkpoint.

    Attributes:
        state: Label of the state of the merged model.
        model: Folder of the new checkpoint; for a delta file, the base.
        mask: Delta file in the run folder; None for a checkpoint.
        output: Delta file at the output path; None if there is none.
        base: Model that the changes were merged onto.
        method: `ties` or `sum`.
        weights: Weight of each delta.
        tensors: Number of changed tensors.
        kept: Number of changed weights.
        conflicts: Number of weights that the deltas change in different directions.
        bytes_written: Size of the files written.
    """

    state: Name
    model: Place
    mask: Place | None
    output: Place | None
    base: Place
    method: str
    weights: list[Number]
    tensors: Count
    kept: Count
    conflicts: Count
    bytes_written: Count
