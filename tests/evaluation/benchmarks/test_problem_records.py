from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from mftctl.errors import DataError
from mftctl.evaluation.benchmarks.published_data import read_problem_records


def test_lines_objects_and_columns_read_alike(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": "1"}\n\n{"x": "2"}\n')
    (tmp_path / "b.json").write_text('{"canary": "c", "examples": [{"x": "1"}, {"x": "2"}]}')
    (tmp_path / "c.csv").write_text("x\n1\n2\n")
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write('{"x": "1"}\n{"x": "2"}\n')
    with gzip.open(tmp_path / "e.v1.csv.gz", "wt") as file:
        file.write("\ufeffx\n1\n2\n")
    for name in ("a.jsonl", "b.json", "c.csv", "d.jsonl.gz", "e.v1.csv.gz"):
        records = [record for _, record in read_problem_records(tmp_path / name)]
        assert {record.pop("file") for record in records} == {"e.v1" if name[0] == "e" else name[0]}
        assert records == [{"x": "1"}, {"x": "2"}]
    assert [where for where, _ in read_problem_records(tmp_path / "a.jsonl")] == [
        f"{tmp_path}/a.jsonl:1",
        f"{tmp_path}/a.jsonl:3",
    ]


def test_a_folder_is_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"x": name}]))
    (tmp_path / "notes.txt").write_text("not data")
    assert [record for _, record in read_problem_records(tmp_path)] == [
        {"file": "a", "x": "a"},
        {"file": "b", "x": "b"},
    ]


def test_a_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data files"):
        list(read_problem_records(tmp_path))


@pytest.mark.parametrize(
    ("name", "text", "message", "where"),
    [
        ("a.json", "{", "malformed", ":1"),
        ("a.json", "[1]", "malformed", ", record 1"),
        ("a.csv", "x,y\n1\n", "a different number of cells", ":2"),
        ("a.csv", "x\n1,2\n", "a different number of cells", ":2"),
        ("a.csv", "x,x\n1,2\n", "Two columns have the same name", ":1"),
        ("a.jsonl", "1\n", "malformed", ":1"),
        ("a.jsonl", "", "contains no records", ""),
        ("a.txt", '{"x": 1}', "unknown type", ""),
    ],
)
def test_anything_but_a_record_is_named(tmp_path: Path, name: str, text: str, message: str, where: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        list(read_problem_records(tmp_path / name))
    assert caught.value.path == f"{tmp_path / name}{where}"


def test_an_object_without_a_list_is_one_record(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"x": [], "y": []}')
    assert [record for _, record in read_problem_records(tmp_path / "a.json")] == [{"file": "a", "x": [], "y": []}]


def test_an_empty_cell_is_a_missing_value_as_in_training_data(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n1,\n")
    assert [record for _, record in read_problem_records(tmp_path / "a.csv")] == [{"file": "a", "x": "1", "y": None}]
