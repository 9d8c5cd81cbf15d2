"""Issues with records are counted, and reported once."""

from __future__ import annotations

import math

import pytest

from mftctl.data.record_issues import RecordIssues
from mftctl.errors import DataError


def issues_of(count: int) -> RecordIssues:
    issues = RecordIssues()
    issues.records = 10
    issues.refused = [DataError("It is bad.", path=f"d:{n}", key="k", actual="x", hint="mend it") for n in range(count)]
    return issues


def test_nothing_is_wrong() -> None:
    issues = issues_of(0)
    issues.settle("error")
    assert issues.lines(100) == []


def test_one_record_is_its_own_error() -> None:
    with pytest.raises(DataError, match="It is bad") as caught:
        issues_of(1).settle("error")
    assert caught.value.hint == "mend it; to skip it, pass --bad-records skip"


def test_several_records_are_counted_and_the_first_named() -> None:
    with pytest.raises(DataError, match="5 of 10 records cannot be used") as caught:
        issues_of(5).settle("error")
    named = [f"d:{number}: k: It is bad (x)" for number in range(3)]
    assert caught.value.actual == "; ".join([*named, "and 2 more"])


@pytest.mark.parametrize(("hints", "remedy"), [(["do this", "do this"], "do this"), (["do this", None], "fix them")])
def test_a_common_remedy_is_named(hints: list[str | None], remedy: str) -> None:
    issues = issues_of(2)
    for error, hint in zip(issues.refused, hints, strict=True):
        error.hint = hint
    with pytest.raises(DataError) as caught:
        issues.settle("error")
    assert caught.value.hint == f"{remedy}, or skip them with --bad-records skip"


def test_skipped_records_are_reported() -> None:
    issues = issues_of(2)
    issues.settle("skip")
    assert issues.lines(100)[0].startswith("2 of 10 records skipped as unusable: d:0: k: It is bad (x); d:1")


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("overlong", "the prompt alone is longer than --max-length 64"),
        ("cut", "3 of 10 answers (30.0%) truncated at --max-length 64"),
        ("without_thinking", "drops the thinking"),
        ("last_only", "answers that the chat template changes later are not trained on"),
        ("tools_as_text", "JSON text"),
        ("open_turns", "does not end earlier answers"),
    ],
)
def test_each_count_is_reported(field: str, words: str) -> None:
    issues = issues_of(0)
    setattr(issues, field, 3)
    (line,) = issues.lines(64)
    assert words in line


def test_ignored_fields_are_named_once() -> None:
    issues = issues_of(0)
    issues.ignored.update(["source", "id", "id"])
    assert issues.lines(64) == ["ignored fields: id, source"]


def test_answers_without_an_end_are_counted_among_used_records_only() -> None:
    issues = issues_of(5)  # these were never tokenised
    issues.tokenised, issues.used, issues.cut = 5, 5, 2
    assert not issues.learns_no_end
    issues.cut = 5
    assert issues.learns_no_end


@pytest.mark.parametrize(("refused", "overlong", "records"), [(3, 0, 200), (0, 3, 200), (1, 0, 3)])
def test_more_than_a_few_unusable_records_are_an_error(refused: int, overlong: int, records: int) -> None:
    issues = issues_of(refused)
    issues.records = issues.tokenised = records
    if overlong:
        issues.count_overlong(overlong, "train.jsonl:17")
    with pytest.raises(DataError, match="Training data: too many records cannot be used") as caught:
        issues.settle("skip", 0.01, part="Training data")
    assert caught.value.path == ("train.jsonl:17" if overlong else issues.refused[0].path)
    assert caught.value.key == "--bad-records-max"
    assert caught.value.expected == f"at most 1% of {records} records"
    assert str(caught.value.actual).startswith(f"{max(refused, overlong)} (")
    share = max(refused, overlong) / records
    assert str(caught.value.hint).endswith(f"--bad-records-max {math.ceil(100 * share)}%")
    issues.settle("skip", 0.4)


def test_a_few_unusable_records_are_left_out() -> None:
    issues = issues_of(2)
    issues.records = issues.tokenised = 200
    issues.count_overlong(2, "train.jsonl:17")
    issues.settle("skip", 0.01)
    assert [line.split(" skipped")[0] for line in issues.lines(64)] == ["2 of 200 records", "2 of 200 records"]
