from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mftctl.errors import ModelError
from mftctl.masking.checkpoints import tensors
from mftctl.masking.checkpoints.tensors import INDEX_FILE, read_tensor, tensor_digest, tensor_index
from tests.conftest import build_llama
from tests.masking.built_checkpoints import raw_tensors, stored_tensors


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    build_llama(layers=2).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_index_of_a_single_file_agrees_with_the_library(tiny_checkpoint: Path) -> None:
    index = tensor_index(tiny_checkpoint)
    expected = stored_tensors(tiny_checkpoint)
    raw = raw_tensors(tiny_checkpoint / "model.safetensors")
    content = (tiny_checkpoint / "model.safetensors").read_bytes()
    assert index.keys() == expected.keys()
    for name, stored in index.items():
        assert (stored.name, stored.dtype, stored.shape) == (name, "F32", tuple(expected[name].shape))
        assert content[stored.offset_bytes :][: stored.length_bytes] == raw[name]


def test_index_of_shards_names_the_file_of_each_tensor(sharded: Path) -> None:
    index = tensor_index(sharded)
    weight_map = json.loads((sharded / INDEX_FILE).read_text())["weight_map"]
    assert {name: stored.path.name for name, stored in index.items()} == weight_map
    assert all(torch.equal(read_tensor(index[name]), tensor) for name, tensor in stored_tensors(sharded).items())


def test_digest_is_that_of_the_stored_bytes(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "CHUNK_BYTES", 1000)
    raw = raw_tensors(tiny_checkpoint / "model.safetensors")
    for name, stored in tensor_index(tiny_checkpoint).items():
        assert tensor_digest(stored) == hashlib.sha256(raw[name]).hexdigest()


def test_single_file_wins_over_an_index(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "both")
    (folder / INDEX_FILE).write_text("{}")
    assert tensor_index(folder).keys() == tensor_index(tiny_checkpoint).keys()


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no safetensors weights"):
        tensor_index(tmp_path)


def test_missing_shard_is_refused(sharded: Path) -> None:
    missing = sorted(sharded.glob("*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(ModelError, match="is missing") as caught:
        tensor_index(sharded)
    assert caught.value.path == str(missing)


def test_tensor_only_in_the_index_is_refused(sharded: Path) -> None:
    index = json.loads((sharded / INDEX_FILE).read_text())
    index["weight_map"]["ghost.weight"] = next(iter(index["weight_map"].values()))
    (sharded / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(ModelError, match="does not hold this tensor") as caught:
        tensor_index(sharded)
    assert (caught.value.key, caught.value.actual) == ("ghost.weight", "in no shard")


def test_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    shutil.copyfile(first, second)
    with pytest.raises(ModelError, match="Two shards"):
        tensor_index(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "\xff", "[" * 100_000])
def test_index_that_cannot_be_read_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match="cannot be read"):
        tensor_index(tmp_path)


@pytest.mark.parametrize("weight_map", [{}, {"w": 3}])
def test_index_without_file_names_is_refused(weight_map: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match="names no files"):
        tensor_index(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", ".."])
def test_shard_outside_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ModelError, match=r"outside|missing"):
        tensor_index(tmp_path)


def test_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="not a complete safetensors file") as caught:
        tensor_index(tmp_path)
    assert caught.value.path == str(path)


def test_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(100)}, path)
    stored = tensor_index(tmp_path)["w"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="was truncated"):
        tensor_digest(stored)
