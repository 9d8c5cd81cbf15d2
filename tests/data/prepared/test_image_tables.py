"""Prepared data with images: references in the cache, kept for the versions of the image files that were read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from mftctl.data.batching import any_images
from mftctl.data.prepared.examples import data_digest
from mftctl.data.prepared.load import load_examples
from mftctl.data.prepared.records import PreparedRecords, encode_prepared
from mftctl.data.record_issues import RecordIssues
from mftctl.data.sources import DataSource
from mftctl.errors import DataError
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.record_encoding import load_encoder
from mftctl.progress import Silence
from tests.vision_models import made_image, write_image_records


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MFTCTL_CACHE", str(tmp_path / "cache"))


def prepare(path: Path, model: Path, *, issues: RecordIssues | None = None) -> PreparedRecords:
    issues = issues or RecordIssues()
    examples = load_examples([DataSource(str(path))], issues=issues)
    return encode_prepared(examples, load_encoder(model, Recipe()), 256, issues, Silence())


def write_parquet(jsonl: Path) -> Path:
    """The same records with the bytes of their images, in the form of the feature Image of `datasets`."""
    rows: list[dict[str, Any]] = []
    for line in jsonl.read_text().splitlines():
        record = json.loads(line)
        paths = [jsonl.parent / path for path in record.pop("images", [])]
        rows.append({**record, "images": [{"bytes": path.read_bytes(), "path": path.name} for path in paths]})
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("prompt", pa.string()), ("completion", pa.string()), ("images", pa.list_(image))])
    path = jsonl.with_suffix(".parquet")
    parquet.write_table(pa.Table.from_pylist(rows, schema), path)
    return path


def test_records_hold_references_and_the_cache_no_pixels(tmp_path: Path, vision_checkpoints: dict[str, Path]) -> None:
    path = write_image_records(tmp_path / "data")
    records = prepare(path, vision_checkpoints["llava"]).records
    assert [len(record.images) for record in records] == [1, 0, 2, 1]
    assert any_images(records)
    assert records[0].images[0].path == str(tmp_path / "data" / "images" / "0-0.png")
    tables = [table for table in (tmp_path / "cache").rglob("*.arrow")]
    assert {name for table in tables for name in pa.ipc.open_file(table).schema.names} >= {"image_paths", "input_ids"}
    again = prepare(path, vision_checkpoints["llava"]).records
    assert [(record.input_ids, record.images) for record in again] == [
        (record.input_ids, record.images) for record in records
    ]
    assert [record.images for record in again[1:3]] == [record.images for record in records][1:3]


def test_bytes_in_parquet_equal_files(tmp_path: Path, vision_checkpoints: dict[str, Path]) -> None:
    path = write_image_records(tmp_path / "data")
    by_path = prepare(path, vision_checkpoints["llava"])
    by_bytes = prepare(write_parquet(path), vision_checkpoints["llava"])
    assert data_digest(by_path.examples) == data_digest(by_bytes.examples)
    assert np.array_equal(by_path.examples.digests, by_bytes.examples.digests)
    for one, other in zip(by_path.records, by_bytes.records, strict=True):
        assert (one.input_ids, one.labels) == (other.input_ids, other.labels)
        for first, second in zip(one.images, other.images, strict=True):
            assert (second.path, bool(second.content)) == ("", True)
            assert first.sha256 == second.sha256
            assert first.pixels("x").tobytes() == second.pixels("x").tobytes()


def test_changed_image_is_other_data(tmp_path: Path, vision_checkpoints: dict[str, Path]) -> None:
    path = write_image_records(tmp_path / "data")
    before = prepare(path, vision_checkpoints["qwen2_vl"])
    changed = tmp_path / "data" / "images" / "0-0.png"
    made_image(9, 32, 32).save(changed)
    with pytest.raises(DataError, match="has changed since"):
        before.records[0].images[0].pixels("x")
    after = prepare(path, vision_checkpoints["qwen2_vl"])
    assert data_digest(before.examples) != data_digest(after.examples)
    assert len(after.records[0].input_ids) > len(before.records[0].input_ids)
    same = [before.records[number].input_ids == after.records[number].input_ids for number in range(4)]
    assert same == [False, True, True, True]


def test_touched_image_is_the_same_data(tmp_path: Path, vision_checkpoints: dict[str, Path]) -> None:
    path = write_image_records(tmp_path / "data")
    before = prepare(path, vision_checkpoints["llava"])
    os.utime(tmp_path / "data" / "images" / "0-0.png", (1, 1))
    assert data_digest(prepare(path, vision_checkpoints["llava"]).examples) == data_digest(before.examples)


def test_missing_image_is_one_refused_record_until_it_is_there(
    tmp_path: Path, vision_checkpoints: dict[str, Path]
) -> None:
    path = write_image_records(tmp_path / "data")
    image = tmp_path / "data" / "images" / "2-1.png"
    content = image.read_bytes()
    image.unlink()
    issues = RecordIssues()
    assert len(prepare(path, vision_checkpoints["llava"], issues=issues).records) == 3
    (error,) = issues.refused
    assert (error.message, error.path, error.key) == ("An image cannot be read.", f"{path}:3", str(image))
    image.write_bytes(content)
    assert len(prepare(path, vision_checkpoints["llava"]).records) == 4


def test_text_for_a_vision_language_model_needs_no_processor(
    tmp_path: Path, vision_checkpoints: dict[str, Path]
) -> None:
    path = write_image_records(tmp_path / "data", [0, 0])
    records = prepare(path, vision_checkpoints["smolvlm"]).records
    assert not any_images(records)
    assert records[0].image_inputs is None
