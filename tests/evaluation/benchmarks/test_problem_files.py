from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from mftctl.errors import EvaluationError
from mftctl.evaluation.benchmarks.problem_files import read_records


def test_lines_objects_and_columns_read_alike(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": "1"}\n\n{"x": "2"}\n')
    (tmp_path / "b.json").write_text('{"canary": "c", "examples": [{"x": "1"}, {"x": "2"}]}')
    (tmp_path / "c.csv").write_text("x\n1\n2\n")
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write('{"x": "1"}\n{"x": "2"}\n')
    for name in ("a.jsonl", "b.json", "c.csv", "d.jsonl.gz"):
        records = [record for _, record in read_records(tmp_path / name)]
        assert records == [{"file": name[0], "x": "1"}, {"file": name[0], "x": "2"}]
    assert [where for where, _ in read_records(tmp_path / "a.jsonl")] == [
        f"{tmp_path}/a.jsonl:1",
        f"{tmp_path}/a.jsonl:3",
    ]


def test_a_folder_is_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"x": name}]))
    (tmp_path / "notes.txt").write_text("not data")
    assert [record for _, record in read_records(tmp_path)] == [{"file": "a", "x": "a"}, {"file": "b", "x": "b"}]


def test_a_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no data files"):
        list(read_records(tmp_path))


@pytest.mark.parametrize(
    ("name", "text", "message", "where"),
    [
        ("a.json", "{", "not JSON", ""),
        ("a.json", '{"x": 1}', "no list of records", ""),
        ("a.json", '{"x": [], "y": []}', "no list of records", ""),
        ("a.json", "[1]", "not a JSON object", "#0"),
        ("a.csv", "x,y\n1\n", "another number of columns", ":2"),
        ("a.csv", "x\n1,2\n", "another number of columns", ":2"),
        ("a.jsonl", "1\n", "not a JSON object", ":1"),
    ],
)
def test_what_is_no_record_is_named(tmp_path: Path, name: str, text: str, message: str, where: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(EvaluationError, match=message) as caught:
        list(read_records(tmp_path / name))
    assert caught.value.path == f"{tmp_path / name}{where}"
