"""The stream reader gives what a reader of whole files gives, goes on after bad records, and stays small."""

from __future__ import annotations

import csv
import datetime as dt
import gzip
import json
import tracemalloc
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import psutil
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from mftctl.data.files import Record, read_records, stream_records
from mftctl.errors import DataError
from tests.data.whole_text_reader import Stop, read_whole

RECORD = st.dictionaries(
    st.sampled_from(["text", "question", "a\u2028b"]), st.text(max_size=5) | st.integers(), max_size=2
)
JSON = st.recursive(
    RECORD | st.integers() | st.text(max_size=3), lambda value: st.lists(value, max_size=2), max_leaves=3
)
JSON_PIECE = st.one_of(
    st.builds(
        lambda value, plain: json.dumps(value, ensure_ascii=plain).encode("utf-8", "replace"), JSON, st.booleans()
    ),
    RECORD.map(lambda record: json.dumps(record, indent=1).encode()),
    RECORD.map(lambda record: json.dumps({"data": [record], "text": [1]}).encode()),
    st.sampled_from(
        [b"", b" ", b"\r", b"{", b'{"text": ', b"\xe9", b'{"text": "\xff"}', b"\xe3\x80\x80", b"]", b"\xef\xbb"]
    ),
)
JSON_FILE = st.builds(
    lambda mark, pieces, ends: mark + b"".join(piece + end for piece, end in zip(pieces, ends, strict=False)),
    st.sampled_from([b"", b"", b"\xef\xbb\xbf", b"["]),
    st.lists(JSON_PIECE, max_size=6),
    st.lists(st.sampled_from([b"\n", b"\n", b"\r\n", b"\n\n", b"", b","]), min_size=6, max_size=6),
)
CSV_PIECE = st.sampled_from(
    [
        b"a",
        b"b",
        b"a,b",
        b",",
        b'"',
        b'""',
        b'"a"',
        b'"a,\nb"',
        b"\n",
        b"\r\n",
        b"\n",
        b"\r",
        b"\xe9",
        b"\xc3\xa9",
        b"\x00",
    ]
)
CSV_FILE = st.builds(
    lambda mark, header, pieces: mark + header + b"".join(pieces),
    st.sampled_from([b"", b"\xef\xbb\xbf"]),
    st.sampled_from([b"a,b\n", b"a\r\n", b"a,a\n", b'"a\nb",c\n', b"\n", b""]),
    st.lists(CSV_PIECE, max_size=12),
)


def whole(path: Path, content: bytes) -> tuple[list[Any], tuple[str, object] | None]:
    """The records up to the first error, and the error."""
    found: list[Any] = []
    try:
        found.extend(read_whole(path, content))
    except Stop as stop:
        return found, stop.args
    return found, None if found else (str(path), "none")


def streamed(path: Path) -> tuple[list[Any], list[tuple[str, object]]]:
    """The records, and all errors."""
    found, errors = [], []
    try:
        for record in stream_records(path):
            if isinstance(record, DataError):
                errors.append((record.path, record.actual))
            else:
                found.append(tuple(record))
    except DataError as error:
        errors.append((error.path, error.actual))
    return found, errors


def check_same(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    expected, stop = whole(path, content)
    found, errors = streamed(path)
    if stop is None:
        assert (found, errors) == (expected, [])
        return
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        # The reader of whole files sees such a byte before it parses anything.
        assert stop in errors or damage(path)
    else:
        assert errors[0] == stop
        assert found[: len(expected)] == expected
    with pytest.raises(DataError) as caught:
        read_records(path)
    assert (caught.value.path, caught.value.actual) == errors[0]


def damage(path: Path) -> list[DataError]:
    """The error that ends the reading, if any."""
    try:
        list(stream_records(path))
    except DataError as error:
        return [error]
    return []


@given(JSON_FILE, st.sampled_from(["a.jsonl", "a.json"]))
def test_json_is_read_as_from_the_whole_text(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str
) -> None:
    check_same(tmp_path_factory.getbasetemp() / name, content)


@given(CSV_FILE)
def test_csv_is_read_as_from_the_whole_text(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    # A lone carriage return ends a CSV line, but not a line of the text that the place of a bad byte was counted in.
    if b"\xe9" in content:
        content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    check_same(tmp_path_factory.getbasetemp() / "a.csv", content)


def test_reading_goes_on_after_bad_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": \n[1]\n{"text": "\xe9"}\n\n{"text": "b"}\n')
    first, syntax, kind, encoding, last = stream_records(path)
    assert (first, last) == (Record(f"{path}:1", {"text": "a"}), Record(f"{path}:6", {"text": "b"}))
    assert [(error.path, error.actual) for error in (syntax, kind, encoding)] == [
        (f"{path}:2", "Expecting value at column 10"),
        (f"{path}:3", "a JSON list"),
        (f"{path}:4", "the byte 0xe9"),
    ]
    with pytest.raises(DataError) as caught:
        read_records(path)
    assert caught.value.path == f"{path}:2"


def test_reading_goes_on_after_bad_csv_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'question,answer\n1,2,3\n"\xe9\n\xe8",5\n6,7\n')
    width, encoding, last = stream_records(path)
    assert (width.path, width.expected, width.actual) == (f"{path}:2", 2, 3)
    assert (encoding.path, encoding.actual) == (f"{path}:3", "the byte 0xe9")
    assert last == Record(f"{path}:5", {"question": "6", "answer": "7"})


def test_reading_goes_on_after_a_bad_value_of_a_json_list(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[5, {"text": "a"}]')
    bad, good = stream_records(path)
    assert (bad.path, bad.actual) == (f"{path}, record 1", "a JSON int")
    assert good == Record(f"{path}, record 2", {"text": "a"})


def test_csv_header_that_is_not_utf8_ends_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"question,\xe9\n1,2\n")
    with pytest.raises(DataError, match="not UTF-8") as caught:
        next(stream_records(path))
    assert caught.value.path == f"{path}:1"
    assert str(path) not in {file.path for file in psutil.Process().open_files()}


def test_json_text_that_is_not_utf8_ends_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text":\n"\xe9"}]')
    with pytest.raises(DataError, match="not UTF-8") as caught:
        next(stream_records(path))
    assert caught.value.path == f"{path}:2"


def test_damage_after_good_records_ends_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 99_999, mtime=0)[:-20])
    records = stream_records(path)
    assert next(records) == Record(f"{path}:1", {"text": "a"})
    with pytest.raises(DataError, match="not a complete gzip file"):
        list(records)


def test_file_of_bad_records_only_is_not_called_empty(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("5\n6\n")
    assert [record.path for record in stream_records(path)] == [f"{path}:1", f"{path}:2"]


QUESTION, ANSWER = "What is it? " * 20, "It is that. " * 60
BYTES = 30_000_000


def write_large(path: Path) -> None:
    """A file whose records are about `BYTES` of text together."""
    count = BYTES // (len(QUESTION) + len(ANSWER))
    rows: Iterable[tuple[str, str]] = ((f"{number} {QUESTION}", f"{ANSWER}{number}") for number in range(count))
    if path.suffix == ".parquet":
        columns = [pyarrow.array(list(column)) for column in zip(*rows, strict=True)]
        parquet.write_table(pyarrow.table(columns, names=["question", "answer"]), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("question", "answer"), *rows])
    else:
        text = "".join(
            json.dumps({"question": question, "answer": answer}) + "\n" for question, answer in rows
        ).encode()
        compressed = {
            ".gz": lambda: gzip.compress(text, 1),
            ".zst": lambda: pyarrow.Codec("zstd").compress(text, asbytes=True),
        }
        path.write_bytes(compressed.get(path.suffix, lambda: text)())


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_large(path)
    pool = pyarrow.default_memory_pool()
    of_arrow = most_of_arrow = pool.bytes_allocated()
    tracemalloc.start()
    try:
        for number, _ in enumerate(stream_records(path)):
            if number % 64 == 0:
                most_of_arrow = max(most_of_arrow, pool.bytes_allocated())
        most_of_python = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert number > 30_000
    assert most_of_python < 3_000_000
    assert most_of_arrow - of_arrow < 12_000_000


def test_parquet_rows_equal_those_of_datasets(tmp_path: Path) -> None:
    day, moment = dt.date(2020, 1, 2), dt.datetime(2020, 1, 2, 3, 4, 5, 6)
    turns = [{"role": "user", "content": "a\u2028b", "weight": None}]
    columns = {
        "text": pyarrow.array(["a", None, "2020-01-01"], pyarrow.large_string()),
        "view": pyarrow.array(["a", None, "b"], pyarrow.string_view()),
        "coded": pyarrow.array(["a", None, "a"]).dictionary_encode(),
        "day": pyarrow.array([day, None, day]),
        "moment": pyarrow.array([moment, None, moment], pyarrow.timestamp("us")),
        "zoned": pyarrow.array([moment, None, moment], pyarrow.timestamp("ns", "UTC")),
        "time": pyarrow.array([dt.time(1), None, dt.time(2)]),
        "exact": pyarrow.array([Decimal("1.10"), None, Decimal("2.00")]),
        "messages": pyarrow.array([turns, None, []]),
        "nested": pyarrow.array([{"a": 1, "b": [1.5, None]}, None, {"a": None, "b": None}]),
        "number": pyarrow.array([1, None, 2**60]),
        "flag": pyarrow.array([True, None, False]),
        "bytes": pyarrow.array([b"a", None, b"\xff"], pyarrow.large_binary()),
        "lists": pyarrow.array([["a"], None, []], pyarrow.large_list(pyarrow.string())),
        "pair": pyarrow.array([[1, 2]] * 3, pyarrow.list_(pyarrow.int32(), 2)),
        "json": pyarrow.array(['{"a": [1]}', None, '"x"'], pyarrow.json_()),
        "none": pyarrow.array([None] * 3),
    }
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    expected = list(datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True))
    assert [record.fields for record in read_records(path)] == expected
    assert expected[0]["json"] == {"a": [1]}


def test_parquet_of_datasets_with_json_in_lists(tmp_path: Path) -> None:
    features = datasets.Features(
        {"label": datasets.ClassLabel(names=["no", "yes"]), "calls": datasets.List({"arguments": datasets.Json()})}
    )
    rows = [{"label": 1, "calls": [{"arguments": {"a": 1}}, {"arguments": "x"}]}, {"label": 0, "calls": []}]
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    assert [record.fields for record in read_records(path)] == rows


def test_parquet_with_maps_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = {"text": ["a"], "scores": pyarrow.array([[("x", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64()))}
    parquet.write_table(pyarrow.table(columns), path)
    assert read_records(path) == [Record(f"{path}, record 1", {"text": "a", "scores": [("x", 1)]})]


def test_pictures_are_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    table = pyarrow.table({"text": ["a"], "image": [{"bytes": b"no picture", "path": None}]})
    parquet.write_table(table.cast(features.arrow_schema), path)
    (record,) = read_records(path)
    assert record.fields["image"] == {"bytes": b"no picture", "path": None}


def test_damaged_page_of_a_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [f"text {number}" for number in range(999)]}), path)
    content = bytearray(path.read_bytes())
    content[4:400] = b"\xff" * 396
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a valid Parquet file"):
        list(stream_records(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.parquet"])
def test_file_that_vanished(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="cannot be read") as caught:
        next(stream_records(tmp_path / name))
    assert caught.value.path == str(tmp_path / name)
    assert "No such file" in str(caught.value.actual)
