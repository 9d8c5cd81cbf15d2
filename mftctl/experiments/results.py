"""Results of commands as stored in `run.json` and read back; the only module that knows their keys.

Those of commands that combine checkpoints are in `combined_results`.

A class may read less than a command writes: `MadeState` reads a single key from the result of any command but `probe`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field

from mftctl.experiments.measured_lines import Dataset, MetricsLine
from mftctl.experiments.value_types import Count, Exact, Measured, Name, Part, Place, Several

PLACES = ("model", "mask", "output")
"""Keys of results that hold paths, which differ between runs."""

LABELS = ("name", "dataset", "layers", "projection", "step")
"""Keys that identify the entries of a list in a result, such as the name of a dataset or the layers of a group."""

KeptAverage = Annotated[float | None, Field(default=None, exclude_if=lambda value: value is None)]
Kind = Annotated[str | None, Field(default=None, exclude_if=lambda value: value is None)]
OwnRatios = Annotated[dict[str, Measured] | None, Field(default=None, exclude_if=lambda value: value is None)]
Refused = Annotated[str | None, Field(default=None, exclude_if=lambda value: value is None)]


class Result(Part):
    """Result of a command, or part of it."""


class Outcome(Result):
    """Fields common to the results of several commands; None if the result has no such field.

    Attributes:
        state: Label of the state that was made or measured, as in the papers; empty if the result has none.
        model: Folder of the model that was made, or that the mask is for.
        mask: Mask file in the run folder.
        output: Mask file at the requested output path.
        base: Model that a mask was applied to; for a delta mask and `interpolate`, the model before fine-tuning.
        steps: Number of optimizer steps.
        best_step: Step with the lowest validation loss.
        best_loss: Validation loss at that step.
        last_loss: Validation loss after the last step.
        unmasked_loss: Validation loss without a mask.
        tokens: Number of training tokens.
        flops_per_token: FLOPs per training token.
        peak_memory_bytes: Peak memory of the device; on a CPU, of the process.
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
    """State that a run made or measured, in the result of every command but `probe`."""

    state: Name


class MadeModel(MadeState):
    """Model made by `fft`, `apply`, `average` or `interpolate`."""

    model: Place


class BestLoss(Result):
    """Lowest validation loss of a run."""

    best_loss: Measured


class MadeMask(MadeState):
    """Mask made by `mask-train`."""

    mask: Place


class TrainingCost(Result):
    """Cost of training."""

    tokens: Count
    peak_memory_bytes: Count
    flops_per_token: Exact | None = None


class MaskLosses(Result):
    """Validation loss with and without the mask."""

    best_loss: Measured
    unmasked_loss: Measured


class Score(Part):
    """Score of a model, with or without a mask.

    Attributes:
        metric: Name of the metric, such as `exact_match` or `exact_match,strict-match`.
        value: Value of the metric.
        standard_error: Standard error over samples, if known.
        samples: Number of records or problems.
        higher_is_better: Whether higher values are better.
    """

    metric: str
    value: Measured
    standard_error: Measured | None
    samples: Several
    higher_is_better: bool = True

    @property
    def rank(self) -> float:
        """Value to rank by; lower is better."""
        return -self.value if self.higher_is_better else self.value


DecidingScore = Annotated[Score | None, Field(default=None, exclude_if=lambda value: value is None)]


class Rewards(Part):
    """Implicit rewards of preferences: beta times the change of an answer's log-probability.

    Attributes:
        chosen: Mean reward of the chosen answers.
        rejected: Mean reward of the rejected answers.
        accuracy: Share of records whose chosen answer has the higher reward.
        margin: Mean reward of the chosen answers minus that of the rejected ones.
    """

    chosen: Measured
    rejected: Measured
    accuracy: Measured
    margin: Measured


KeptRewards = Annotated[Rewards | None, Field(default=None, exclude_if=lambda value: value is None)]


class RetainedLosses(Part):
    """Loss on held-out records of another domain.

    Attributes:
        records: Number of records.
        start_loss: Loss per answer token of the model that the command started from, without a mask.
        kept_loss: Loss of the model, or with the mask, that was kept.
    """

    records: Several
    start_loss: Measured
    kept_loss: Measured


KeptRetained = Annotated[RetainedLosses | None, Field(default=None, exclude_if=lambda value: value is None)]


class LearnedPreferences(Result):
    """Validation of a training, with its rewards if it was trained on preferences."""

    state: Name = ""
    kept: str | None = None
    best_loss: Measured | None = None
    last_loss: Measured | None = None
    rewards: KeptRewards

    @property
    def kept_loss(self) -> float | None:
        """Validation loss of the model or mask that was kept."""
        return self.last_loss if self.kept == "last" and self.last_loss is not None else self.best_loss


class FftResult(Result):
    """Result of `fft`.

    Attributes:
        state: Label of the state, such as FFT, continued FFT or GMT.
        model: Folder of the model.
        output_refused: Reason why the model is not at the output path; None if it is, or if no path was given.
        kept: Checkpoint that was kept, `best` or `last`.
        start_loss: Validation loss per answer token before the first step.
        best_loss: Validation loss at the best step.
        last_loss: Validation loss after the last step.
        best_step: Step with the lowest validation loss, or the best score if a score decided.
        kept_average: Horizon of the running average that was kept; None if the trained weights themselves were.
        best_score: Score at the best step, if a score decided.
        steps: Number of optimizer steps.
        trained_parameters: Number of trained parameters.
        tokens: Number of training tokens.
        flops_per_token: FLOPs per training token.
        evaluations: Results of evaluations during training.
        peak_memory_bytes: Peak memory of the device; on a CPU, of the process.
        retained: Losses on data of another domain, if there is any.
        rewards: Rewards of the validation records under the kept model, if it was trained on preferences.
    """

    state: Name
    model: Place
    output_refused: Refused
    kept: str
    start_loss: Measured
    best_loss: Measured
    last_loss: Measured
    best_step: Count
    kept_average: KeptAverage
    best_score: DecidingScore
    steps: Count
    trained_parameters: Count
    tokens: Count
    flops_per_token: Exact
    evaluations: list[MetricsLine]
    peak_memory_bytes: Count
    retained: KeptRetained
    rewards: KeptRewards


class PrefixReuse(Part):
    """Use of the cache of hidden states below the first masked layer.

    Attributes:
        batches: Number of cached batches.
        size_bytes: Size of the cached batches.
        reused: Number of cache hits.
    """

    batches: Count
    size_bytes: Count
    reused: Count


class Group(Part):
    """Group of projections ranked by a probe: those of some layers, or of one kind.

    Attributes:
        layers: Layers of the group, such as `4-7`.
        projection: Kind of projection, such as `q_proj`; None for all that are masked.
        size: Number of layers.
        weights: Number of weights that carry the mask; None for a group of layers.
        change: Change of the validation loss with the group's mask; for `probe --fast`, the predicted change.
    """

    layers: str
    projection: Kind
    size: Several
    weights: Annotated[Count | None, Field(default=None, exclude_if=lambda value: value is None)]
    change: Measured

    @property
    def name(self) -> str:
        """Kind of projection, or the layers."""
        return self.projection or self.layers


def group_text(name: str) -> str:
    """Returns the name of a probe's group with what it is a name of: `layers 4-7`, but `q_proj`."""
    return f"layers {name}" if name[:1].isdigit() else name


class TrainedGroup(Group):
    """Group whose mask was trained.

    Attributes:
        start_loss: Validation loss with the mask of the initial scores.
        best_loss: Lowest validation loss.
        best_step: Step with the lowest validation loss.
        steps: Number of optimizer steps.
        score: Score with the best mask; None, like all below, if groups are ranked by loss.
        score_standard_error: Standard error of the score, if known.
        score_change: Change of the score relative to the unmasked model.
        score_rank: Value to rank groups by; lower is better.
    """

    start_loss: Measured
    best_loss: Measured
    best_step: Count
    steps: Count
    score: Measured | None = None
    score_standard_error: Measured | None = None
    score_change: Measured | None = None
    score_rank: Measured | None = None


class Agreement(Part):
    """Agreement between `probe --fast` and a trained probe.

    Attributes:
        run: Run name of the trained probe.
        groups: Number of groups in both.
        rank_correlation: Spearman's rank correlation over these groups.
    """

    run: str
    groups: Count
    rank_correlation: Measured


class Recommended(Result):
    """What a probe recommends to mask.

    Attributes:
        recommended_layers: The layers.
        recommended_projection: Kind of projection; None for all.
    """

    recommended_layers: str
    recommended_projection: Kind


class ProbeResult(Result):
    """Result of `probe`: a `TrainedProbe` or a `FastProbe`, which rank groups, or a `StructureProbe`."""

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Self:
        """Returns the result stored in a record, as the subclass it belongs to.

        Raises:
            pydantic.ValidationError: A value is missing, out of bounds or of the wrong type.
        """
        if cls is GroupProbe or (cls is ProbeResult and "unit" not in document):
            return cast("Self", (FastProbe if document.get("fast") else TrainedProbe).read(document))
        return cast("Self", StructureProbe.read(document)) if cls is ProbeResult else super().read(document)


class GroupProbe(ProbeResult, Recommended):
    """Result of a probe that ranks groups.

    Attributes:
        groups: The groups, best first.
    """

    groups: Sequence[Group]

    @property
    def recommended(self) -> str:
        """Name of the recommended group."""
        return self.recommended_projection or self.recommended_layers


class TrainedProbe(GroupProbe):
    """Result of a probe that trained a mask for each group.

    Attributes:
        groups: The groups, best first.
        by: Ranking criterion: `loss`, `exact_match` or a benchmark.
        unmasked_loss: Validation loss without a mask.
        unmasked_score: Score without a mask; None if groups are ranked by loss.
        prefix_reuse: Use of the cache of hidden states.
        peak_memory_bytes: Peak memory of the device; on a CPU, of the process.
    """

    groups: list[TrainedGroup]
    by: str = "loss"
    unmasked_loss: Measured
    unmasked_score: Score | None = Field(default=None, exclude_if=lambda value: value is None)
    prefix_reuse: PrefixReuse | None = None
    peak_memory_bytes: Count | None = None


class FastProbe(GroupProbe):
    """Result of `probe --fast`, which trains nothing.

    Attributes:
        fast: Always True.
        groups: The groups, best first; groups of layers among those of the same size.
        agreement: Agreement with the latest trained probe of the same model; None if there is none.
        peak_memory_bytes: Peak memory of the device; on a CPU, of the process.
    """

    fast: Literal[True]
    groups: list[Group]
    agreement: Agreement | None
    peak_memory_bytes: Count | None = None


class HeadOrNeuron(Part):
    """An attention head or MLP neuron.

    Attributes:
        layer: Index of its decoder layer.
        index: Its index in the layer.
        change: Predicted change of the training loss with a mask of its weights.
    """

    layer: Count
    index: Count
    change: Measured


class LayerOfUnits(Part):
    """The attention heads or MLP neurons of a layer.

    Attributes:
        layer: Index of the decoder layer.
        units: Number of heads or neurons.
        change: Sum of their predicted changes.
        best: Number of them among the best 10 % of all layers.
        best_share: Share of the predicted change of all layers that these have.
    """

    layer: Count
    units: Several
    change: Measured
    best: Count
    best_share: Measured


class StructureProbe(ProbeResult):
    """Result of `probe --fast --unit head` or `--unit neuron`.

    Attributes:
        fast: Always True.
        unit: `head` or `neuron`.
        file: Name of the file in the run folder with the predicted change of each.
        units: Number of heads or neurons.
        change: Sum of their predicted changes.
        best_units: Number of those that make up the best 10 %.
        best_share: Share of `change` that these have.
        layers: Summary of each layer.
        best: The best ones, with the lowest change first.
        peak_memory_bytes: Peak memory of the device; on a CPU, of the process.
    """

    fast: Literal[True]
    unit: Literal["head", "neuron"]
    file: Name
    units: Several
    change: Measured
    best_units: Several
    best_share: Measured
    layers: list[LayerOfUnits]
    best: list[HeadOrNeuron]
    peak_memory_bytes: Count | None = None


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


class KeptMask(Result):
    """Paths of a mask file, and a summary of the mask.

    Attributes:
        mask: Mask file in the run folder.
        output: Mask file at the output path; None if it is only in the run folder.
        output_refused: Reason why the mask is not at the output path; None if it is, or if no path was given.
        tensors: Number of masked tensors.
        weights: Number of weights in these tensors.
        removed: Number of removed weights.
        ratio: Share of these weights that are removed.
    """

    mask: Place
    output: Place | None
    output_refused: Refused
    tensors: Count
    weights: Count
    removed: Count
    ratio: Measured


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


class ApplyResult(Result):
    """Result of `apply`.

    Attributes:
        state: Label of the state of the masked model.
        model: Folder of the new checkpoint.
        base: Model that the mask was applied to.
        bytes_written: Size of the weights written.
        tensors_masked: Number of tensors with removed or changed weights.
        removed: Number of removed weights; of a delta file, those that keep the base's values in changed tensors.
        changed: Number of weights that a delta file changed; None for a mask.
    """

    state: Name
    model: Place
    base: Place
    bytes_written: Count
    tensors_masked: Count
    removed: Count
    changed: Annotated[int | None, Field(default=None, exclude_if=lambda value: value is None)]


class EvalResult(Result):
    """Result of `eval`.

    Attributes:
        state: Label of the state of the evaluated model.
        datasets: Metrics on each dataset or benchmark.
        peak_memory_bytes: Peak memory of the device; on a CPU, of the process.
    """

    state: Name
    datasets: list[Dataset]
    peak_memory_bytes: Count | None = None


class NamedData(Part):
    """Name and digest that identify evaluation data."""

    name: str
    digest: str


class MeasuredData(Result):
    """Data that `eval` measured on."""

    datasets: list[NamedData] = Field(default_factory=list)


class LowestPoints(Part):
    """Grid points of a loss surface with the lowest losses; None if no point has a finite loss."""

    train_loss: MetricsLine | None
    test_loss: MetricsLine | None


class SurfaceResult(Result):
    """Result of `surface`.

    Attributes:
        marks: Losses of the three models that span the surface.
        lowest: Grid points with the lowest losses.
        train_answer_tokens: Number of answer tokens in the training data that was measured.
        test_answer_tokens: Number of answer tokens in the test data that was measured.
        peak_memory_bytes: Peak memory of the device; on a CPU, of the process.
    """

    marks: list[MetricsLine]
    lowest: LowestPoints
    train_answer_tokens: Count
    test_answer_tokens: Count
    peak_memory_bytes: Count
