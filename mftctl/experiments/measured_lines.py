"""The lines of a run's `metrics.jsonl` and of an evaluation's file of samples."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from mftctl.experiments.value_types import Count, Exact, Measured, Number, Part, Place, Several


class Metric(Part):
    """A metric of a model on some data.

    Attributes:
        name: Such as `loss` or `exact_match,strict-match`.
        value: NaN or infinite of a model that diverged.
        standard_error: Over samples; None where there is none.
        samples: How many records or problems it is of.
    """

    name: str
    value: Measured
    standard_error: Measured | None
    samples: Several


class MetricsLine(Part):
    """A line of `metrics.jsonl`, which tells of a step what was measured there; what was not is None.

    Attributes:
        step: Of the optimizer, or the number of a place on a loss surface.
        epoch: How often the data was seen.
        loss: Of training.
        eval_loss: Of validation.
        num_input_tokens_seen: Trained on so far.
        train_runtime: Seconds since the training was begun or resumed.
        train_tokens_per_second: Over that time.
        step_seconds: Of this step alone.
        dataset: What an evaluation during the training measured on.
        digest: Of that data.
        metrics: What it measured.
        removed: Weights that the mask has come to remove since the last validation.
        restored: Weights that it no longer removes.
        promised: By how much that should lower the loss, to first order.
        measured: By how much it did.
        mark: The model at a place of a loss surface; None for a point of the grid.
        column: Of the grid.
        row: Of the grid.
        x: Distance of a place from FFT along the first axis.
        y: The same along the second.
        train_loss: At that place; None where the model gives no number.
        test_loss: The same on test data.
    """

    model_config = ConfigDict(extra="allow")

    step: Count
    epoch: Exact | None = None
    loss: Measured | None = None
    eval_loss: Measured | None = None
    num_input_tokens_seen: Exact | None = None
    train_runtime: Exact | None = None
    train_tokens_per_second: Exact | None = None
    step_seconds: Exact | None = None
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
        """Whether it tells of a place on a loss surface all that there is to be told."""
        return {"x", "y", "train_loss", "test_loss"} <= self.model_fields_set

    def without_epoch(self) -> MetricsLine:
        """The same line without its epoch."""
        return MetricsLine.model_validate(self.model_dump(exclude_unset=True, exclude={"epoch"}))


class Sample(Part):
    """A line of an evaluation's file of samples, as far as a comparison reads it.

    Attributes:
        id: The same in every evaluation of the same data.
        scores: By metric.
        weights: By metric; one that is not there is 1.
    """

    id: str
    scores: dict[str, Measured]
    weights: dict[str, Annotated[Number, Field(ge=0)]] = Field(default_factory=dict)


class Dataset(Part):
    """What an evaluation says of one data file or benchmark.

    Attributes:
        name: The file's name, or that of the benchmark.
        digest: Of the data, and of a benchmark also the settings it was measured with.
        samples: The file of samples in the run folder.
        task: The task of lm-eval that was asked; None of a data file, and so is all that follows but
            `max_new_tokens` and `metrics`.
        prompts: Whose prompts.
        task_version: Of the task.
        lm_eval_version: Of lm-eval.
        engine: What generated.
        mftctl_version: Of mftctl.
        shots: Solved examples in the prompt.
        chat_template: Whether the prompt went through the chat template.
        max_new_tokens: Where an unfinished answer was cut.
        temperature: Of sampling.
        samples_a_problem: Answers to each problem.
        data: The file, or the hub's data set.
        metrics: Under every filter.
        seconds: That answering took.
        generated_tokens: In all answers.
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
