"""What is planned for the stages of a recipe: their steps and tokens, and their memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mftctl.experiments.recipe import Command
from mftctl.workflows.planning.batches import Batches
from mftctl.workflows.planning.memory import MemoryEstimate
from mftctl.workflows.planning.room import Verdict


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """A stage with its counts; None for everything that does not apply to it or is unknown.

    Attributes:
        stage: Name of the stage.
        command: Its command.
        of: Stage whose result is applied or evaluated.
        method: Training method.
        records: Training records.
        trainings: Number of trainings, one per group of a probe.
        steps: Optimizer steps of all trainings.
        records_per_step: Records per optimizer step.
        tokens_per_step: Mean tokens per optimizer step.
        tokens: Training tokens of all trainings.
        layers: Masked layers in words.
    """

    stage: str
    command: Command
    of: str | None = None
    method: str | None = None
    records: int | None = None
    trainings: int | None = None
    steps: int | None = None
    records_per_step: int | None = None
    tokens_per_step: int | None = None
    tokens: int | None = None
    layers: str | None = None

    def document(self) -> dict[str, Any]:
        """Returns everything that is known as plain data."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Room:
    """An estimate compared with the memory of the device.

    Attributes:
        free_bytes: Memory available to a command.
        fits: Whether the estimate fits.
        options: Options with which it would fit; None if it fits, or if no options make it fit.
    """

    free_bytes: int
    fits: Verdict
    options: str | None


@dataclass(frozen=True, slots=True)
class StageMemory:
    """The memory estimate of a stage.

    Attributes:
        stage: Name of the stage.
        records: Records in the largest batch, for generation if the stage generates.
        length_tokens: Tokens of its longest record.
        batches: The largest batches; None for an evaluation without test data.
        estimate: The estimated memory.
        room: The available memory; None if unknown.
    """

    stage: str
    records: int
    length_tokens: int
    batches: Batches | None
    estimate: MemoryEstimate
    room: Room | None

    def document(self) -> dict[str, Any]:
        """Returns the estimate as plain data."""
        return {
            "stage": self.stage,
            **({} if self.batches is None else asdict(self.batches)),
            "records": self.records,
            "length_tokens": self.length_tokens,
            **asdict(self.estimate),
            **({} if self.room is None else {**asdict(self.room), "fits": self.room.fits.value}),
        }
