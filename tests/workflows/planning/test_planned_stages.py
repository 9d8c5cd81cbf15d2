"""The stages and their memory as in the JSON of `validate`."""

from __future__ import annotations

from dataclasses import asdict

from mftctl.workflows.planning.batches import Batches
from mftctl.workflows.planning.memory import MemoryEstimate
from mftctl.workflows.planning.planned_stages import PlannedStage, Room, StageMemory
from mftctl.workflows.planning.room import Verdict

ESTIMATE = MemoryEstimate(weights_bytes=4, peak_bytes=9)


def test_a_stage_tells_only_what_is_known() -> None:
    assert PlannedStage("scores", "eval", "mft").document() == {"stage": "scores", "command": "eval", "of": "mft"}
    assert PlannedStage("mft", "mask-train", steps=0).document() == {
        "stage": "mft",
        "command": "mask-train",
        "steps": 0,
    }


def test_memory_with_the_largest_batch_and_the_room() -> None:
    batches = Batches(8, 20, True, 4, 10, 40, 30)
    document = StageMemory("mft", 2, 50, batches, ESTIMATE, Room(8, Verdict.NO, "--batch-size 1")).document()
    assert list(document.items()) == [
        ("stage", "mft"),
        *(asdict(batches) | {"records": 2, "length_tokens": 50}).items(),
        *asdict(ESTIMATE).items(),
        ("free_bytes", 8),
        ("fits", "no"),
        ("options", "--batch-size 1"),
    ]


def test_memory_without_test_data_and_with_unknown_room() -> None:
    document = StageMemory("scores", 1, 0, None, ESTIMATE, None).document()
    assert list(document) == ["stage", "records", "length_tokens", *asdict(ESTIMATE)]
