"""Results of commands as stored in `run.json` and read back; no other part of the package knows their keys.

Those of `probe`, of `mask-train` and of commands that combine checkpoints are in `probe_results`, `mask_results` and
`combined_results`.

A class may read less than a command writes: `MadeState` reads a single key from the result of any command but `probe`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mftctl.experiments.measured_lines import Dataset, MetricsLine
from mftctl.experiments.value_types import Count, Exact, Measured, Name, Part, Place, Several

PLACES = ("model", "mask", "output")
"""Keys of results that hold paths, which differ between runs."""

LABELS = ("name", "dataset", "layers", "projection", "step")
"""Keys that identify the entries of a list in a result, such as the name of a dataset or the layers of a group."""

KeptAverage = Annotated[float | None, Field(default=None, exclude_if=lambda value: value is None)]
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
