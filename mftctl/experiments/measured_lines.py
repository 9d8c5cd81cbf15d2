"""Lines of `metrics.jsonl` and of samples files, and the metrics of one dataset."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from mftctl.experiments.value_types import Count, Exact, Measured, Number, Part, Place, Several


class Metric(Part):
    """Metric of a model on a dataset or benchmark.

    Attributes:
        name: Name of the metric, such as `loss` or `exact_match,strict-match`.
        value: Value of the metric; NaN or infinite if the model diverged.
        standard_error: Standard error over samples, if known.
        samples: Number of records or problems.
    """

    name: str
    value: Measured
    standard_error: Measured | None
    samples: Several


class MetricsLine(Part):
    """Line of `metrics.jsonl`: the values measured at one step; None for values not measured there.

    Attributes:
        step: Optimizer step, or index of a point on a loss surface or of a share.
        epoch: Passes over the training data so far.
        loss: Training loss.
        eval_loss: Validation loss.
        average_losses: Validation loss of each running average, by its horizon.
        retained_loss: Loss on held-out records of another domain.
        average_retained_losses: The same for each running average, by its horizon.
        rewards: Rewards of the validation records, if they are preferences; see `Rewards`.
        average_rewards: The same for each running average, by its horizon.
        divergence: Divergence from the model before fine-tuning at the last step, per retained answer token.
        num_input_tokens_seen: Training tokens so far.
        train_runtime: Seconds since training started or was resumed.
        train_tokens_per_second: Average over that time.
        step_seconds: Duration of this step.
        share: Share of the change made by fine-tuning, in an interpolation.
        dataset: Dataset or benchmark of an evaluation during training.
        digest: Digest of that data.
        metrics: Metrics on that data.
        removed: Number of weights that the mask newly removes since the last validation.
        restored: Number of weights that the mask no longer removes.
        promised: Predicted decrease of the loss by these flips, to first order.
        measured: Measured decrease of the loss.
        mark: Model at a point of a loss surface; None for a grid point.
        column: Column of the grid.
        row: Row of the grid.
        x: Distance from FFT along the first axis.
        y: Distance from FFT along the second axis.
        train_loss: Loss on training data at this point; None if not finite.
        test_loss: Loss on test data at this point; None if not finite.
    """

    model_config = ConfigDict(extra="allow")

    step: Count
    epoch: Exact | None = None
    loss: Measured | None = None
    eval_loss: Measured | None = None
    average_losses: dict[str, Measured] = Field(default_factory=dict)
    retained_loss: Measured | None = None
    average_retained_losses: dict[str, Measured] = Field(default_factory=dict)
    rewards: dict[str, Measured] = Field(default_factory=dict)
    average_rewards: dict[str, dict[str, Measured]] = Field(default_factory=dict)
    divergence: Measured | None = None
    num_input_tokens_seen: Exact | None = None
    train_runtime: Exact | None = None
    train_tokens_per_second: Exact | None = None
    step_seconds: Exact | None = None
    share: Exact | None = None
    dataset: str | None = None
    digest: str | None = None
    metrics: list[Metric] = Field(default_factory=list)
    removed: Exact | None = None
    restored: Exact | None = None
    promised: Measured | None = None
    measured: Measured | None = None
    mark: str | None = None
    column: Count | None = None
    row: Count | None = None
    x: Exact | None = None
    y: Exact | None = None
    train_loss: Measured | None = None
    test_loss: Measured | None = None

    @property
    def is_place(self) -> bool:
        """True if the line fully describes a point on a loss surface."""
        return {"x", "y", "train_loss", "test_loss"} <= self.model_fields_set

    def without_epoch(self) -> MetricsLine:
        """The same line without its epoch."""
        return MetricsLine.model_validate(self.model_dump(exclude_unset=True, exclude={"epoch"}))


class Sample(Part):
    """Line of an evaluation's samples file; only the fields that comparisons read.

    Attributes:
        id: Identifier, the same in every evaluation of the same data.
        prompt: The question; None if it was not saved.
        reference: The reference answer, if there is one.
        output: The generated answer; None if nothing was generated, or several answers were.
        scores: Scores by metric.
        weights: Weights by metric; 1 for metrics not listed.
    """

    id: str
    prompt: str | None = None
    reference: str | None = None
    output: str | None = None
    scores: dict[str, Measured]
    weights: dict[str, Annotated[Number, Field(ge=0)]] = Field(default_factory=dict)


class Dataset(Part):
    """Results of an evaluation on one data file or benchmark.

    Attributes:
        name: Name of the file or benchmark.
        digest: Digest of the data; for a benchmark, also of its settings.
        samples: Samples file in the run folder.
        task: Task of lm-eval; None for a data file, like all fields below except `max_new_tokens` and `metrics`.
        prompts: Form of the prompts, `lm-eval` or `olmes`.
        task_version: Version of the task.
        lm_eval_version: Version of lm-eval.
        engine: Engine that generated the answers.
        mftctl_version: Version of mftctl.
        shots: Number of solved examples in the prompt.
        chat_template: Whether the chat template was applied to the prompts.
        max_new_tokens: Maximum tokens per answer.
        temperature: Sampling temperature.
        samples_a_problem: Answers per problem.
        data: Local file, or dataset on the hub.
        metrics: Metrics, one per metric and filter.
        seconds: Time taken to generate the answers.
        generated_tokens: Number of tokens in all answers.
    """

    name: str
    digest: str
    samples: Place
    task: str | None = None
    prompts: str | None = None
    task_version: str | None = None
    lm_eval_version: str | None = None
    engine: str | None = None
    mftctl_version: str | None = None
    shots: Count | None = None
    chat_template: bool | None = None
    max_new_tokens: Count | None = None
    temperature: Number | None = None
    samples_a_problem: Count | None = None
    data: str | None = None
    metrics: list[Metric]
    seconds: Number | None = None
    generated_tokens: Count | None = None
