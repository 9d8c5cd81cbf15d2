"""What each command returns, as it is stored in a `run.json` and read back; the only place that knows the keys.

A class may ask for less than a command writes: `MadeState` reads the one key that it has from any result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field

from mftctl.experiments.measured_lines import Dataset, MetricsLine
from mftctl.experiments.value_types import Count, Exact, Measured, Name, Part, Place, Several

PLACES = ("model", "mask", "output")
"""Keys of results that are paths, which differ between any two runs."""

LABELS = ("name", "dataset", "layers", "step")
"""Keys that tell the entries of a result's list apart, such as a data set's name or a group's layers."""

Refused = Annotated[str | None, Field(default=None, exclude_if=lambda value: value is None)]


class Result(Part):
    """What a command returns, or a part of it."""

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Self:
        """The result in a record.

        Raises:
            pydantic.ValidationError: It lacks something, or something is of another type or out of bounds.
        """
        return cls.model_validate(dict(document))


class Outcome(Result):
    """What is told of a run whatever its command; what its result does not say is None.

    Attributes:
        state: What it made or measured, in the words of the papers; empty where it does not say.
        model: Folder of the model it made, or left as it is under a mask.
        mask: The mask file in its run folder.
        output: The mask file where the user wants it.
        base: What a mask was applied to.
        steps: Optimizer steps.
        best_step: That with the lowest validation loss.
        best_loss: That loss.
        last_loss: After the last step.
        unmasked_loss: Without a mask.
        tokens: Trained on.
        flops_per_token: Of training.
        peak_memory_bytes: Of the device, on a CPU of the process.
    """

    state: Name = ""
    model: Place | None = None
    mask: Place | None = None
    output: Place | None = None
    base: Place | None = None
    steps: Count | None = None
    best_step: Count | None = None
    best_loss: Measured | None = None
    last_loss: Measured | None = None
    unmasked_loss: Measured | None = None
    tokens: Count | None = None
    flops_per_token: Exact | None = None
    peak_memory_bytes: Count | None = None


class MadeState(Result):
    """What any run but a probe names: the state that it made or measured."""

    state: Name


class MadeModel(MadeState):
    """The model that `fft` and `apply` make."""

    model: Place


class MadeMask(MadeState):
    """The mask that `mask-train` makes."""

    mask: Place


class TrainingCost(Result):
    """What a training cost."""

    tokens: Count
    peak_memory_bytes: Count
    flops_per_token: Exact | None = None


class MaskLosses(Result):
    """Validation loss with the mask and without one."""

    best_loss: Measured
    unmasked_loss: Measured


class FftResult(Result):
    """The result of `fft`.

    Attributes:
        state: FFT, continued FFT, GMT, ...
        model: Where the model is.
        output_refused: Why it is not at the run's output; None if it is, or there is none.
        kept: `best` or `last`: which state of the training the model is.
        start_loss: Validation loss per answer token before the first step.
        best_loss: The lowest.
        last_loss: After the last step.
        best_step: That with the lowest loss.
        steps: Optimizer steps taken.
        trained_parameters: How many were trained.
        tokens: Trained on.
        flops_per_token: Of training.
        evaluations: What was measured on the way.
        peak_memory_bytes: Of the device, on a CPU of the process.
    """

    state: Name
    model: Place
    output_refused: Refused
    kept: str
    start_loss: Measured
    best_loss: Measured
    last_loss: Measured
    best_step: Count
    steps: Count
    trained_parameters: Count
    tokens: Count
    flops_per_token: Exact
    evaluations: list[MetricsLine]
    peak_memory_bytes: Count


class PrefixReuse(Part):
    """How the hidden states below the lowest mask were reused.

    Attributes:
        batches: Kept.
        size_bytes: Of these.
        reused: How often one was.
    """

    batches: Count
    size_bytes: Count
    reused: Count


class Group(Part):
    """A group of layers that a probe ranks.

    Attributes:
        layers: Such as `4-7`.
        size: Number of layers.
        change: Of the loss with its mask; of `probe --fast` what the mask promises.
    """

    layers: str
    size: Several
    change: Measured


class TrainedGroup(Group):
    """A group whose mask was trained.

    Attributes:
        start_loss: Validation loss with the mask of the initial scores.
        best_loss: The lowest.
        best_step: That with the lowest loss.
        steps: Optimizer steps taken.
        score: With the best mask; None, as all below, where the loss ranks the groups.
        score_standard_error: Of it; None also where there is none.
        score_change: Against no mask.
        score_rank: The lower, the better.
    """

    start_loss: Measured
    best_loss: Measured
    best_step: Count
    steps: Count
    score: Measured | None = None
    score_standard_error: Measured | None = None
    score_change: Measured | None = None
    score_rank: Measured | None = None


class Score(Part):
    """A figure of a model, under a mask or without one.

    Attributes:
        metric: Its name, such as `exact_match` or `exact_match,strict-match`.
        value: The figure.
        standard_error: Over samples; None where there is none.
        samples: How many records or problems it is of.
        higher_is_better: Whether that is so.
    """

    metric: str
    value: Measured
    standard_error: Measured | None
    samples: Several
    higher_is_better: bool = True

    @property
    def rank(self) -> float:
        """The lower, the better."""
        return -self.value if self.higher_is_better else self.value


class Agreement(Part):
    """How alike a trained probe ranks the groups of `probe --fast`.

    Attributes:
        run: Name of the trained probe.
        groups: How many both have.
        rank_correlation: Spearman's.
    """

    run: str
    groups: Count
    rank_correlation: Measured


class Recommended(Result):
    """The layers that a probe found to gain most from a mask."""

    recommended_layers: str


class ProbeResult(Recommended):
    """The result of `probe`: a `TrainedProbe` or a `FastProbe`.

    Attributes:
        groups: Best first.
    """

    groups: Sequence[Group]

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Self:
        """The result in a record, of the kind that it is of.

        Raises:
            pydantic.ValidationError: It lacks something, or something is of another type or out of bounds.
        """
        if cls is not ProbeResult:
            return super().read(document)
        kind = FastProbe if document.get("fast") else TrainedProbe
        return cast("Self", kind.read(document))


class TrainedProbe(ProbeResult):
    """The result of a probe that trained a mask of each group.

    Attributes:
        groups: Best first.
        by: What ranks them: `loss`, `exact_match` or a benchmark.
        unmasked_loss: Validation loss without a mask.
        unmasked_score: Without a mask; None where the loss ranks the groups.
        prefix_reuse: Of hidden states.
        peak_memory_bytes: Of the device, on a CPU of the process.
    """

    groups: list[TrainedGroup]
    by: str = "loss"
    unmasked_loss: Measured
    unmasked_score: Score | None = Field(default=None, exclude_if=lambda value: value is None)
    prefix_reuse: PrefixReuse | None = None
    peak_memory_bytes: Count | None = None


class FastProbe(ProbeResult):
    """The result of `probe --fast`, which trains nothing.

    Attributes:
        fast: True.
        groups: The best first among groups of one size.
        agreement: With the newest trained probe of the same model; None without one.
        peak_memory_bytes: Of the device, on a CPU of the process.
    """

    fast: Literal[True]
    groups: list[Group]
    agreement: Agreement | None
    peak_memory_bytes: Count | None = None


class Flips(Part):
    """Why a training of a mask came out as it did.

    Attributes:
        turned: How often an entry was turned in all.
        undone_share: The share of that which came to nothing, taken back by validation or turned again later.
        promised: By how much the loss should have fallen, to first order, over all rounds.
        measured: By how much it fell.
        rounds: The lines of the metrics that tell of one.
    """

    turned: Exact
    undone_share: Measured
    promised: Measured
    measured: Measured
    rounds: list[MetricsLine]


class Confirmation(Part):
    """What records that took no part in choosing a mask say of it.

    Attributes:
        records: How many.
        unmasked_loss: On them, without the mask.
        masked_loss: With it.
        change: The second minus the first.
        low: Lower end of the paired 95 % interval.
        high: Upper end.
        confirmed: Whether the whole interval is below 0.
    """

    records: Several
    unmasked_loss: Measured
    masked_loss: Measured
    change: Measured
    low: Measured
    high: Measured
    confirmed: bool


class KeptMask(Result):
    """Where a mask was written, and what it removes.

    Attributes:
        mask: The mask file in the run folder.
        output: The mask file where the user wants it; None for nowhere else.
        output_refused: Why it is not there; None if it is, or is to be nowhere else.
        tensors: Masked.
        weights: In these.
        removed: Of these.
        ratio: The share removed.
    """

    mask: Place
    output: Place | None
    output_refused: Refused
    tensors: Count
    weights: Count
    removed: Count
    ratio: Measured


class MaskTrainResult(KeptMask):
    """The result of `mask-train`: a `MeasuredMask` or a `DroppedMask`.

    Attributes:
        state: MFT, random mask, ...
        model: The model that the mask is for.
        layers: Masked, such as `4-7`.
        layer_ratios: The share removed in each layer, by its number.
        steps: Optimizer steps taken.
        peak_memory_bytes: Of the device, on a CPU of the process.
    """

    state: Name
    model: Place
    layers: str
    layer_ratios: dict[str, Measured]
    steps: Count
    peak_memory_bytes: Count

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Self:
        """The result in a record, of the kind that it is of.

        Raises:
            pydantic.ValidationError: It lacks something, or something is of another type or out of bounds.
        """
        if cls is not MaskTrainResult:
            return super().read(document)
        kind = DroppedMask if "base" in document else MeasuredMask
        return cast("Self", kind.read(document))


class MeasuredMask(MaskTrainResult):
    """The result of a method that measures its masks on the model.

    Attributes:
        unmasked_loss: Validation loss per answer token without a mask.
        start_loss: With the mask of the initial scores.
        best_loss: With this mask.
        best_step: The optimizer step it was found at; 0 is the start.
        tokens: Trained on.
        learning_rate: The peak, the largest where it differs between tensors; None without training.
        helps: Whether the mask lowers the validation loss.
        flips: None without training.
        kept: `best` or `last`; None without training.
        start_std: Of the initial scores, where they are drawn for training.
        flops_per_token: Of training.
        confirmation: None where there is nothing to confirm.
        prefix_reuse: Of hidden states.
        evaluations: What was measured on the way.
    """

    unmasked_loss: Measured
    start_loss: Measured
    best_loss: Measured
    best_step: Count
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


class DroppedMask(MaskTrainResult):
    """The result of the method `drop`, which compares files.

    Attributes:
        base: The model before fine-tuning.
    """

    base: Place


class ApplyResult(Result):
    """The result of `apply`.

    Attributes:
        state: That of the masked model.
        model: Folder of the new checkpoint.
        base: What the mask was applied to.
        bytes_written: Of its weights.
        tensors_masked: Tensors with removed weights.
        removed: Weights removed.
    """

    state: Name
    model: Place
    base: Place
    bytes_written: Count
    tensors_masked: Count
    removed: Count


class EvalResult(Result):
    """The result of `eval`.

    Attributes:
        state: Of the model that was measured.
        datasets: What was measured on each.
        peak_memory_bytes: Of the device, on a CPU of the process.
    """

    state: Name
    datasets: list[Dataset]
    peak_memory_bytes: Count | None = None


class NamedData(Part):
    """What tells data that was measured on from other data."""

    name: str
    digest: str


class MeasuredData(Result):
    """What `eval` measured on."""

    datasets: list[NamedData] = Field(default_factory=list)


class LowestPoints(Part):
    """The points of a loss surface's grid with the lowest losses; None where no point gives a number."""

    train_loss: MetricsLine | None
    test_loss: MetricsLine | None


class SurfaceResult(Result):
    """The result of a loss surface.

    Attributes:
        marks: The three models.
        lowest: The points of the grid with the lowest losses.
        train_answer_tokens: Measured on, of training data.
        test_answer_tokens: The same of test data.
        peak_memory_bytes: Of the device, on a CPU of the process.
    """

    marks: list[MetricsLine]
    lowest: LowestPoints
    train_answer_tokens: Count
    test_answer_tokens: Count
    peak_memory_bytes: Count


RESULTS: Mapping[str, type[Result]] = {
    "fft": FftResult,
    "probe": ProbeResult,
    "mask-train": MaskTrainResult,
    "apply": ApplyResult,
    "eval": EvalResult,
    "surface": SurfaceResult,
}
"""What each command returns."""


def read_result(command: str, document: Mapping[str, Any]) -> Result:
    """A whole result as it is stored, or as it comes from another process.

    Raises:
        pydantic.ValidationError: It is none of that command.
    """
    return RESULTS.get(command, Outcome).read(document)
