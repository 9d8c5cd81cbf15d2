"""Results of the commands that combine checkpoints, as stored in `run.json` and read back."""

from __future__ import annotations

from mftctl.experiments.results import Refused, Result
from mftctl.experiments.value_types import Count, Measured, Name, Number, Part, Place


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
