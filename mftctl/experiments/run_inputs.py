"""Inputs of all commands as stored in `run.json` and read back; the only module that knows their keys.

`RunInputs` reads what may be missing. The other classes require all that they read, so a class may read less than a
command writes: `Parents` reads a single key.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mftctl.experiments.value_types import Count, Measured, Number, Part, Place

PLACES = ("model", "mask", "origin")
"""Keys of inputs that hold paths."""

_Points = Annotated[int, Field(ge=2, le=10_000)]
_Optional = Field(default=None, exclude_if=lambda value: value is None)


class Digests(Part):
    """SHA-256 of the examples of each part of the data; None for a part that a command does not use.

    `retained` covers the held-out records of the data to retain.
    """

    train: str | None = None
    validation: str | None = None
    test: str | None = None
    retained: str | None = None


class TemplateRecord(Part):
    """The chat template.

    Attributes:
        source: How it was chosen; None without a template, like all below.
        args: Arguments passed to it.
        merge_system: Whether the system prompt is merged into the first question.
        digest: SHA-256 of its text.
        now: The time it may use; None if it uses none.
    """

    source: str | None = None
    args: dict[str, bool | int | float | str] = Field(default_factory=dict)
    merge_system: bool = False
    digest: str | None = None
    now: Annotated[str | None, _Optional] = None


class CornerRun(Part):
    """Run that made a corner of a loss surface."""

    run: str


class Corner(Part):
    """Corner of a loss surface.

    Attributes:
        state: Label of the state.
        run: Name of the run that made it.
        model: Its model.
        mask: Mask file to apply to it, or None.
        fingerprint: Digest of the model's files; None if they are not in a folder.
        mask_digest: SHA-256 of the mask file; None without one.
    """

    state: str
    run: str
    model: str
    mask: str | None
    fingerprint: str | None
    mask_digest: str | None


class Parents(Part):
    """Names of the runs that made the model, oldest first."""

    parents: list[str]


class Origin(Part):
    """The model that the first run in the lineage started from."""

    origin: Place


class Lineage(Origin, Parents):
    """The runs that made the model, and the model that the first of them started from."""


class UsedModel(Part):
    """Checkpoint folder, hub id or `quickstart`."""

    model: Place


class StartingState(UsedModel):
    """The model and the label of its state."""

    state: str


class AppliedMask(UsedModel):
    """The model and the mask file applied to it."""

    mask: Place


class Source(Part):
    """The source model of a command, with the attributes of `ModelSource`."""

    model: Place
    mask: Place | None
    state: str
    parents: list[str]
    origin: Place
    base: Annotated[Place | None, _Optional] = None


class AveragedCheckpoints(Part):
    """The checkpoints that `average` read, and the weights it was given for them.

    Attributes:
        checkpoints: Checkpoint folders, hub ids or `quickstart`.
        weights: The weights as given; None for equal ones.
    """

    checkpoints: list[Place]
    weights: list[Number] | None = None


class MergedDeltas(Part):
    """The delta files that `delta merge` read, and how it merged them.

    Attributes:
        deltas: Delta files.
        method: `ties` or `sum`.
        weights: The weight of each.
        scale: Factor of the merged change.
        values: Kind of the values of the merged delta file.
    """

    deltas: list[Place]
    method: str
    weights: list[Number]
    scale: Number = 1.0
    values: str = "exact"


class TrainRecords(Part):
    """Number of training records."""

    train_records: Count


class TrainingData(TrainRecords):
    """The data of a training run.

    Attributes:
        train_records: Number of training records.
        validation_records: Number of validation records.
        train_answer_tokens: Answer tokens of the training records.
        digests: Digests of both parts.
        chat_template: The chat template.
        record_issues: Number of records in each part that were refused, truncated and so on.
        model_remarks: Remarks on the checkpoint.
        fft_learning_rate: Learning rate of the model's fine-tuning; None for `fft`.
    """

    validation_records: Count
    train_answer_tokens: Count
    digests: Digests
    chat_template: TemplateRecord
    record_issues: dict[str, dict[str, int]]
    model_remarks: list[str]
    fft_learning_rate: Annotated[float | None, _Optional] = None


class TrainedSupport(Part):
    """SHA-256 of the mask whose kept weights an adapter trains; None without one."""

    support_sha256: Annotated[str | None, _Optional] = None


class EvaluationData(Part):
    """The data of an evaluation, as in `TrainingData`."""

    chat_template: TemplateRecord
    record_issues: dict[str, dict[str, int]]
    model_remarks: list[str]


class UsedServer(Part):
    """The server that an evaluation asked.

    Attributes:
        url: Its URL, which contains no password.
        model: Name of the model there.
        owner: What the server said of itself, such as `vllm`.
        context_tokens: Maximum tokens of prompt and answer, if the server said so.
    """

    url: str
    model: str
    owner: Annotated[str | None, _Optional] = None
    context_tokens: Annotated[Count | None, _Optional] = None


class KnownData(TrainRecords):
    """Number and digest of the training records."""

    digests: Digests


class SurfaceSize(Part):
    """Points along each side of a loss surface, and the number of records to measure it on."""

    points: _Points
    records: Count


class SurfaceInputs(SurfaceSize):
    """Inputs of a loss surface.

    Attributes:
        points: Points along each side.
        records: Number of records asked for in each part.
        train_records: Number of training records used.
        test_records: Number of test records used.
        corners: Its three corners.
        digests: Digests of both parts.
    """

    train_records: Count
    test_records: Count
    corners: list[Corner]
    digests: Digests


class MeasuredSurface(Part):
    """What the figure of a loss surface needs of its inputs."""

    corners: list[CornerRun]
    points: _Points
    train_records: Count
    test_records: Count


class RunInputs(Part):
    """All inputs that a command reads from an earlier run; None or empty if the record has none.

    Attributes:
        model: Checkpoint folder, hub id or `quickstart`.
        mask: Mask file to apply to it.
        state: Label of its state.
        parents: Names of the runs that made it, oldest first.
        origin: The model that the first of these runs started from.
        base: The model that this one was made from, if known only from its own folder.
        digests: Digests of the data.
        chat_template: The chat template.
        train_records: Number of training records.
        validation_records: Number of validation records.
        test_records: Number of test records.
        corners: Corners of a loss surface.
        points: Points along each side of a loss surface.
        records: Number of records to measure it on.
        fft_learning_rate: Learning rate of the model's fine-tuning.
        support_sha256: SHA-256 of the mask whose kept weights an adapter trains.
    """

    model: Place | None = None
    mask: Place | None = None
    state: str = ""
    parents: list[str] = Field(default_factory=list)
    origin: Place = ""
    base: Place | None = None
    digests: Digests = Digests()
    chat_template: TemplateRecord = TemplateRecord()
    train_records: Count | None = None
    validation_records: Count | None = None
    test_records: Count | None = None
    corners: list[CornerRun] = Field(default_factory=list)
    points: _Points | None = None
    records: Count | None = None
    fft_learning_rate: Measured | None = None
    support_sha256: str | None = None

    def of_part(self, part: Literal["train", "validation"]) -> tuple[str | None, int | None]:
        """Returns digest and number of records of a part of the data.

        Args:
            part: Name of the part.
        """
        if part == "train":
            return self.digests.train, self.train_records
        return self.digests.validation, self.validation_records
