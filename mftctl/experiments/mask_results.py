"""Results of `mask-train` as stored in `run.json` and read back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self, cast

from pydantic import Field

from mftctl.experiments.measured_lines import MetricsLine
from mftctl.experiments.results import (
    DecidingScore,
    KeptAverage,
    KeptRetained,
    KeptRewards,
    PrefixReuse,
    Refused,
    Result,
)
from mftctl.experiments.value_types import Count, Exact, Measured, Name, Part, Place, Several

OwnRatios = Annotated[dict[str, Measured] | None, Field(default=None, exclude_if=lambda value: value is None)]


class Flips(Part):
    """Summary of mask flips during training.

    Attributes:
        turned: Total number of flips.
        undone_share: Share of flips that had no lasting effect, as they were reverted later.
        promised: Predicted decrease of the loss over all rounds, to first order.
        measured: Measured decrease of the loss.
        rounds: The lines of `metrics.jsonl` that describe a round.
    """

    turned: Exact
    undone_share: Measured
    promised: Measured
    measured: Measured
    rounds: list[MetricsLine]


class Confirmation(Part):
    """Effect of a mask on records that were not used to choose it.

    Attributes:
        records: Number of these records.
        unmasked_loss: Their loss without the mask.
        masked_loss: Their loss with the mask.
        change: Masked minus unmasked loss.
        low: Lower end of the paired 95 % interval of the change.
        high: Upper end of that interval.
        confirmed: Whether the whole interval is below 0.
    """

    records: Several
    unmasked_loss: Measured
    masked_loss: Measured
    change: Measured
    low: Measured
    high: Measured
    confirmed: bool


class SoftMask(Part):
    """Summary of a soft mask.

    Attributes:
        max_multiplier: The largest multiplier that was allowed.
        changed: Number of weights whose multiplier is not 1.
        mean: Mean multiplier.
        mean_change: Mean distance of multipliers from 1.
        file_bytes: Size of the mask file.
    """

    max_multiplier: Count
    changed: Exact
    mean: Measured
    mean_change: Measured
    file_bytes: Exact


class Softness(Result):
    """Whether a mask is soft."""

    soft: SoftMask | None = None


class KeptMask(Result):
    """Paths of a mask file, and a summary of the mask.

    Attributes:
        mask: Mask file in the run folder.
        output: Mask file at the output path; None if it is only in the run folder.
        output_refused: Reason why the mask is not at the output path; None if it is, or if no path was given.
        tensors: Number of masked tensors.
        weights: Number of weights in these tensors.
        removed: Number of removed weights; of a soft mask, those with multiplier 0.
        ratio: Share of these weights that are removed.
        soft: Summary of a soft mask; None for a hard one.
    """

    mask: Place
    output: Place | None
    output_refused: Refused
    tensors: Count
    weights: Count
    removed: Count
    ratio: Measured
    soft: Annotated[SoftMask | None, Field(default=None, exclude_if=lambda value: value is None)]


class MaskTrainResult(KeptMask):
    """Result of `mask-train`: a `MeasuredMask` or a `DroppedMask`.

    Attributes:
        state: Label of the state, such as MFT or random mask.
        model: Model that the mask is for.
        layers: Masked layers, such as `4-7`.
        layer_ratios: Share of weights removed in each layer, by layer index.
        steps: Number of optimizer steps.
        peak_memory_bytes: Peak memory of the device; on a CPU, of the process.
    """

    state: Name
    model: Place
    layers: str
    layer_ratios: dict[str, Measured]
    steps: Count
    peak_memory_bytes: Count

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Self:
        """Returns the result stored in a record, as the subclass it belongs to.

        Raises:
            pydantic.ValidationError: A value is missing, out of bounds or of the wrong type.
        """
        if cls is not MaskTrainResult:
            return super().read(document)
        kind = DroppedMask if "base" in document and "unmasked_loss" not in document else MeasuredMask
        return cast("Self", kind.read(document))


class MeasuredMask(MaskTrainResult):
    """Result of a method that evaluates its masks on the model.

    Attributes:
        unmasked_loss: Validation loss per answer token without a mask.
        start_loss: Validation loss with the mask of the initial scores.
        best_loss: Validation loss with this mask.
        best_step: Optimizer step at which this mask was found; 0 is the start.
        kept_average: Horizon of the running average of the scores that gave this mask; None for the scores themselves.
        unmasked_score: Score without a mask, if a score decided between masks.
        best_score: Score with this mask.
        tokens: Number of training tokens.
        learning_rate: Peak learning rate, the largest if it differs between tensors; None without training.
        helps: Whether the mask improves the deciding score, or without one lowers the validation loss.
        flips: Summary of mask flips; None without training.
        kept: Mask that was kept, `best` or `last`; None without training.
        start_std: Standard deviation of the initial scores, if they were drawn from a normal distribution.
        flops_per_token: FLOPs per training token.
        confirmation: Effect on records not used to choose the mask; None if there is nothing to confirm.
        prefix_reuse: Use of the cache of hidden states.
        evaluations: Results of evaluations during training.
        base: Model before fine-tuning, for a delta mask.
        retained: Losses on data of another domain, if there is any.
        tensor_ratios: With ratio auto, the share of weights removed from each tensor; None otherwise.
        projection_ratios: With ratio auto, that share by kind of projection, such as `q_proj`.
        rewards: Rewards of the validation records with this mask, if it was trained on preferences.
    """

    unmasked_loss: Measured
    start_loss: Measured
    best_loss: Measured
    best_step: Count
    kept_average: KeptAverage
    unmasked_score: DecidingScore
    best_score: DecidingScore
    tokens: Count
    learning_rate: Measured | None
    helps: bool
    flips: Flips | None
    kept: str | None
    start_std: Measured | None
    flops_per_token: Exact
    confirmation: Confirmation | None
    prefix_reuse: PrefixReuse
    evaluations: list[MetricsLine]
    base: Annotated[Place | None, Field(default=None, exclude_if=lambda value: value is None)]
    retained: KeptRetained
    tensor_ratios: OwnRatios
    projection_ratios: OwnRatios
    rewards: KeptRewards


class DroppedMask(MaskTrainResult):
    """Result of the method `drop`, which only compares files.

    Attributes:
        base: Model before fine-tuning.
    """

    base: Place
