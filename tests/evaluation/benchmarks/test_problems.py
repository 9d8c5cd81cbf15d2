from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from mftctl.errors import DataError, EvaluationError
from mftctl.evaluation.benchmarks.problems import fetch_problems, read_problems

GSM8K = {"dataset_path": "openai/gsm8k", "dataset_name": "main", "test_split": "test"}
RECORDS = [{"question": "1 + 1?", "answer": "two\n#### 2"}, {"question": "é?", "answer": "#### 1,000"}]


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_records_in_order_without_further_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", json.dumps({**RECORDS[0], "id": 7}), "", json.dumps(RECORDS[1]))
    problems = read_problems(path, "gsm8k")
    assert list(problems.records) == RECORDS
    assert problems.source == str(path)


def test_the_digest_does_not_depend_on_the_file_format(tmp_path: Path) -> None:
    plain = read_problems(write(tmp_path / "p.jsonl", *map(json.dumps, RECORDS)), "gsm8k")
    spaced = [json.dumps({"id": 1, **record}, ensure_ascii=False, indent=None) + "  " for record in RECORDS]
    with gzip.open(tmp_path / "q.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.write("\n".join(spaced))
    assert read_problems(tmp_path / "q.jsonl.gz", "gsm8k").digest == plain.digest
    swapped = read_problems(write(tmp_path / "r.jsonl", *map(json.dumps, RECORDS[::-1])), "gsm8k")
    assert swapped.digest != plain.digest


def test_the_hubs_copy_has_the_digest_of_a_local_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    hub = datasets.Dataset.from_list([{**record, "id": 1} for record in RECORDS])
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: (asked.append((args, kwargs)), hub)[1])
    fetched = fetch_problems(GSM8K, "gsm8k")
    local = read_problems(write(tmp_path / "p.jsonl", *map(json.dumps, RECORDS)), "gsm8k")
    assert (fetched.records, fetched.digest) == (local.records, local.digest)
    assert fetched.source == "openai/gsm8k/main:test"
    assert asked == [(("openai/gsm8k", "main"), {"data_files": None, "split": "test"})]


def test_a_single_file_on_the_hub_is_named_by_its_address(tmp_path: Path) -> None:
    path = write(tmp_path / "p.json", json.dumps([{**record, "id": 1} for record in RECORDS]))
    config = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"eval": str(path)}}, "test_split": "eval"}
    fetched = fetch_problems(config, "gsm8k")
    assert list(fetched.records) == RECORDS
    assert fetched.source == str(path)


def test_an_unreachable_hub_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="cannot be downloaded") as caught:
        fetch_problems({"dataset_path": "mftctl-nobody/no-such-problems", "test_split": "test"}, "gsm8k")
    assert caught.value.path == "mftctl-nobody/no-such-problems:test"
    assert "--task-data" in str(caught.value)


@pytest.mark.parametrize(
    ("record", "key", "message"),
    [
        ({"prompt": "?", "answer": "#### 1"}, "question", "lacks a required field"),
        ({"question": "?"}, "answer", "lacks a required field"),
        ({"question": "?", "answer": 1}, "answer", "lacks a required field"),
        ({"question": " ", "answer": "#### 1"}, "question", "lacks a required field"),
        ({"question": "?", "answer": "1"}, "answer", "lacks a required field"),
    ],
)
def test_a_wrong_field_is_named_with_its_line(tmp_path: Path, record: object, key: str, message: str) -> None:
    path = write(tmp_path / "p.jsonl", json.dumps(RECORDS[0]), json.dumps(record))
    with pytest.raises(EvaluationError, match=message) as caught:
        read_problems(path, "gsm8k")
    assert caught.value.path == f"{path}:2"
    assert caught.value.key == key


@pytest.mark.parametrize(("line", "message"), [("{", "malformed"), ("[1]", "malformed")])
def test_a_line_that_is_not_a_record_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "p.jsonl", json.dumps(RECORDS[0]), "", line)
    with pytest.raises(DataError, match=message) as caught:
        read_problems(path, "gsm8k")
    assert caught.value.path == f"{path}:3"


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no records"):
        read_problems(write(tmp_path / "p.jsonl", ""), "gsm8k")


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_problems(tmp_path / "none.jsonl", "gsm8k")


def test_a_binary_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8 text"):
        read_problems(tmp_path / "p.jsonl", "gsm8k")


@pytest.mark.parametrize("content", [b"not gzip at all", gzip.compress(b'{"question"' * 99, mtime=0)[:-12]])
def test_a_broken_gzip_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.jsonl.gz").write_bytes(content)
    with pytest.raises(DataError, match="not a complete gzip file"):
        read_problems(tmp_path / "p.jsonl.gz", "gsm8k")


def test_the_parts_of_a_data_set_come_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    parts = {"algebra": "1", "geometry": "2"}
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda _, part, **options: [{"problem": part, "solution": rf"\boxed{{{parts[part]}}}", "level": "Level 1"}],
    )
    fetched = fetch_problems({"dataset_path": "maths", "dataset_name": list(parts), "test_split": "test"}, "math")
    assert [record["problem"] for record in fetched.records] == list(parts)
    assert fetched.source == "maths:test"


def test_a_lone_surrogate_is_one_error_that_names_the_line(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", json.dumps(RECORDS[0]), json.dumps({**RECORDS[1], "question": "\ud800?"}))
    with pytest.raises(EvaluationError, match="surrogate") as caught:
        read_problems(path, "gsm8k")
    assert str(caught.value.path).endswith("p.jsonl:2")
