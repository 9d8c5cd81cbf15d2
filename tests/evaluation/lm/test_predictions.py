from __future__ import annotations

import json
from pathlib import Path

import pytest

from mftctl.errors import EvaluationError
from mftctl.evaluation.lm.predictions import read_predictions

NAMED = [{"task_id": "T/0"}, {"task_id": "T/1"}]
UNNAMED = [{"question": "a"}, {"question": "b"}]


@pytest.fixture
def written(tmp_path: Path):  # type: ignore[no-untyped-def]  # a function that writes records
    def write(*records: object) -> Path:
        path = tmp_path / "p.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


def test_by_name_whatever_their_order(written) -> None:  # type: ignore[no-untyped-def]
    path = written({"task_id": "T/1", "completion": "b"}, {"task_id": "T/0", "output": "a", "id": "9"})
    assert read_predictions(path, NAMED, limit=None) == [["a"], ["b"]]


def test_by_position_where_problems_have_no_name(written) -> None:  # type: ignore[no-untyped-def]
    path = written({"id": "1", "output": "b"}, {"id": 0, "response": "a"})
    assert read_predictions(path, UNNAMED, limit=None) == [["a"], ["b"]]


def test_the_whole_programs_of_evalplus(written) -> None:  # type: ignore[no-untyped-def]
    path = written({"task_id": "T/0", "solution": "a"}, {"task_id": "T/1", "solution": "b"})
    assert read_predictions(path, NAMED, limit=None) == [["a"], ["b"]]


def test_several_samples_in_one_record_or_in_several(written) -> None:  # type: ignore[no-untyped-def]
    path = written({"id": 0, "outputs": ["a", "b"]}, {"id": 1, "output": "c"}, {"id": 1, "output": "d"})
    assert read_predictions(path, UNNAMED, limit=None) == [["a", "b"], ["c", "d"]]


def test_a_limit_needs_only_the_first_predictions(written) -> None:  # type: ignore[no-untyped-def]
    assert read_predictions(written({"id": 0, "output": "a"}), UNNAMED, limit=1) == [["a"]]


@pytest.mark.parametrize(
    ("records", "message", "key"),
    [
        ([{"id": 0, "output": "a"}], "predictions differs", "problem 1"),
        (
            [{"id": 0, "output": "a"}, {"id": 1, "output": "b"}, {"id": 1, "output": "b"}],
            "predictions differs",
            "problem 1",
        ),
        ([{"id": 5, "output": "a"}], "does not match any problem", "task_id or key or id"),
        ([{"output": "a"}], "does not match any problem", "task_id or key or id"),
        ([{"id": 0}], "has no output", "output or completion or response or solution or outputs"),
        ([{"id": 0, "outputs": [1]}], "has no output", "output or completion or response or solution or outputs"),
    ],
    ids=["missing", "repeated", "unknown", "nameless", "empty", "not text"],
)
def test_mismatched_predictions_are_an_error(written, records: list[object], message: str, key: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(EvaluationError, match=message) as caught:
        read_predictions(written(*records), UNNAMED, limit=None)
    assert caught.value.key == key
