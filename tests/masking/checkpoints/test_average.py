"""Averaging checkpoints on disk; the arithmetic is tested in test_mixture."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from mftctl.errors import ModelError, OutputError
from mftctl.files.ownership import read_origin
from mftctl.masking.checkpoints import mixture, shards
from mftctl.masking.checkpoints.average import Averaged, average_checkpoints
from mftctl.masking.checkpoints.mixture import weighted_sum
from mftctl.masking.checkpoints.tensors import CHUNK_BYTES, INDEX_FILE, tensor_index
from mftctl.masking.dtypes import TORCH_DTYPES
from tests.checkpoint_kinds import in_8_bits
from tests.conftest import build_llama
from tests.masking.built_checkpoints import raw_tensors, stored_tensors, write_checkpoint, write_tuned
from tests.masking.combined_numpy import combined

HALVES = (0.5, 0.5)


@pytest.fixture
def first(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint, tmp_path / "first")


@pytest.fixture
def second(first: Path, tmp_path: Path) -> Path:
    return write_tuned(first, tmp_path / "second")


def average(
    folders: list[Path], output: Path, weights: tuple[float, ...] = HALVES, *, replace: bool = False
) -> Averaged:
    names = [f"org/{folder.name}" for folder in folders]
    return average_checkpoints(folders, weights, output, names=names, replace=replace)


def plain(folder: Path, tensors: dict[str, torch.Tensor], *, shards: int = 1) -> Path:
    """A checkpoint of these tensors with an empty configuration and no tokenizer."""
    write_checkpoint(folder, tensors, shards=shards)
    (folder / "config.json").write_text("{}")
    return folder


def refused(folders: list[Path], output: Path, message: str) -> ModelError:
    """The error of an average, after checking that nothing was written."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(ModelError, match=message) as caught:
        average(folders, output)
    assert sorted(output.parent.iterdir()) == before
    return caught.value


def test_every_tensor_is_the_average_and_the_model_loads(first: Path, second: Path, tmp_path: Path) -> None:
    result = average([first, second], tmp_path / "out", (0.25, 0.75))
    raws = [raw_tensors(folder / "model.safetensors") for folder in (first, second, tmp_path / "out")]
    assert raws[2] == {name: combined([raws[0][name], raws[1][name]], (0.25, 0.75), "F32") for name in raws[0]}
    assert result.tensors == len(raws[0])
    assert result.bytes_written == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert loaded(torch.arange(6, 30)[None]).logits.isfinite().all()


@pytest.mark.parametrize(("one", "other"), [(1, 3), (3, 1), (2, 3)])
def test_the_average_does_not_depend_on_the_files(one: int, other: int, tmp_path: Path) -> None:
    tensors = [{f"layers.{n}.w": torch.randn(5, 4) for n in range(6)} for _ in range(2)]
    whole = [plain(tmp_path / f"whole{n}", tensors[n]) for n in range(2)]
    parted = [plain(tmp_path / f"parted{n}", tensors[n], shards=count) for n, count in enumerate((one, other))]
    average(whole, tmp_path / "of-whole")
    average(parted, tmp_path / "of-parted")
    found, expected = stored_tensors(tmp_path / "of-parted"), stored_tensors(tmp_path / "of-whole")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert found.keys() == expected.keys()
    assert (tmp_path / "of-parted" / INDEX_FILE).exists() == (one > 1)


def test_an_average_of_one_model_with_itself_is_that_model(first: Path, tmp_path: Path) -> None:
    average([first, first, first], tmp_path / "out", (1 / 3, 1 / 3, 1 / 3))
    assert raw_tensors(tmp_path / "out" / "model.safetensors") == raw_tensors(first / "model.safetensors")


def test_tokenizer_and_configuration_are_those_of_the_first(first: Path, second: Path, tmp_path: Path) -> None:
    (first / "LICENSE").write_text("of the first")
    (second / "NOTICE").write_text("of the second")
    (second / "generation_config.json").write_text("{}")
    average([first, second], tmp_path / "out")
    names = {path.name for path in first.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"README.md", "mftctl.json"}
    for name in names - {"model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (first / name).read_bytes()
    template = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert template == AutoTokenizer.from_pretrained(first).chat_template


def test_links_out_of_the_first_checkpoint_are_named(first: Path, second: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret")
    (first / "notes.txt").symlink_to(tmp_path / "key")
    assert average([first, second], tmp_path / "out").left_out == ("notes.txt",)


def test_the_card_names_checkpoints_and_weights(first: Path, second: Path, tmp_path: Path) -> None:
    average([first, second], tmp_path / "out", (1.5, -0.5))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == ["org/first", "org/second"]
    assert "| `org/first` | 1.5 |\n| `org/second` | -0.5 |" in card.text


def test_the_origin_is_recorded(first: Path, second: Path, tmp_path: Path) -> None:
    origin = {"state": "averaged", "base": "b", "origin": "o", "digest": ""}
    average_checkpoints([first, second], HALVES, tmp_path / "out", names=["a", "b"], origin=origin)
    assert read_origin(tmp_path / "out") == origin


def test_equal_buffers_of_integers_are_copied(tmp_path: Path) -> None:
    buffers = {"steps": torch.tensor([3, 4]), "mask": torch.tensor([True, False])}
    folders = [plain(tmp_path / str(n), {"w": torch.full((2,), 1.0 + n), **buffers}) for n in range(2)]
    assert average(folders, tmp_path / "out").tensors == 1
    found = stored_tensors(tmp_path / "out")
    assert torch.equal(found["steps"], buffers["steps"])
    assert torch.equal(found["mask"], buffers["mask"])
    assert torch.equal(found["w"], torch.full((2,), 1.5))


@pytest.mark.parametrize("buffer", [torch.tensor([3]), torch.tensor([True])])
def test_buffers_of_integers_that_differ_are_refused(buffer: torch.Tensor, tmp_path: Path) -> None:
    folders = [plain(tmp_path / str(n), {"w": torch.ones(2), "b": buffer * n}) for n in range(2)]
    error = refused(folders, tmp_path / "out", "cannot be averaged differs")
    assert (error.key, error.path) == ("b", str(folders[1] / "model.safetensors"))


@pytest.mark.parametrize(
    ("change", "key", "expected", "actual"),
    [
        ({"b.w": torch.ones(3, 2)}, "b.w", "F32 (2, 3)", "F32 (3, 2)"),
        ({"b.w": torch.ones(2, 3).half()}, "b.w", "F32 (2, 3)", "F16 (2, 3)"),
        ({"b.w": None}, "b.w", "F32 (2, 3)", "no such tensor"),
        ({"a.new": torch.ones(1)}, "a.new", "no such tensor", "F32 (1,)"),
        ({"a.w": torch.ones(4), "b.w": None}, "a.w", "F32 (2,)", "F32 (4,)"),
    ],
)
def test_other_names_shapes_or_dtypes_are_refused_with_the_first_tensor(
    change: dict[str, torch.Tensor | None], key: str, expected: str, actual: str, tmp_path: Path
) -> None:
    tensors = {"a.w": torch.ones(2), "b.w": torch.ones(2, 3)}
    other = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
    folders = [plain(tmp_path / "a", tensors), plain(tmp_path / "b", tensors), plain(tmp_path / "c", other)]
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ModelError, match="do not have the same tensors") as caught:
        average(folders, tmp_path / "out", (0.2, 0.3, 0.5))
    error = caught.value
    assert (error.key, error.path, error.actual) == (key, str(folders[2]), actual)
    assert error.expected == f"{expected}, as in {folders[0]}"
    assert sorted(tmp_path.iterdir()) == before


def test_another_tokenizer_is_refused(first: Path, second: Path, tmp_path: Path) -> None:
    document = json.loads((second / "tokenizer.json").read_text())
    document["model"]["vocab"]["more"] = 999
    (second / "tokenizer.json").write_text(json.dumps(document))
    assert refused([first, second], tmp_path / "out", "different tokenizers").key == "tokenizer.json"


def test_another_chat_template_is_refused(first: Path, second: Path, tmp_path: Path) -> None:
    (second / "chat_template.jinja").write_text("{{ messages }}")
    assert refused([first, second], tmp_path / "out", "different chat templates").key == "chat_template.jinja"


def test_a_quantised_checkpoint_is_refused(first: Path, tmp_path: Path) -> None:
    quantised = in_8_bits(first, tmp_path / "fp8")
    error = refused([first, quantised], tmp_path / "out", "quantised")
    assert (error.key, error.actual, error.path) == ("quantization_config.quant_method", "fp8", str(quantised))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_tensors_of_8_bits_are_refused(dtype: str, tmp_path: Path) -> None:
    folders = [plain(tmp_path / str(n), {"w": torch.ones(4).to(TORCH_DTYPES[dtype])}) for n in range(2)]
    error = refused(folders, tmp_path / "out", "quantised")
    assert (error.key, error.actual) == ("w", dtype)


def test_a_configuration_that_is_not_json_is_refused(first: Path, second: Path, tmp_path: Path) -> None:
    (second / "config.json").write_text("{")
    assert refused([first, second], tmp_path / "out", "cannot be read").path == str(second / "config.json")


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    tensors = {f"layers.{n}.w": torch.ones(4) for n in range(3)}
    folders = [plain(tmp_path / "a", tensors), plain(tmp_path / "b", tensors, shards=2)]
    (folders[1] / "model-00002.safetensors").unlink()
    refused(folders, tmp_path / "out", "is missing")


def test_a_sum_that_is_not_finite_leaves_nothing(tmp_path: Path) -> None:
    folders = [plain(tmp_path / str(n), {"w": torch.tensor([6e4 * (-1) ** n]).half()}) for n in range(2)]
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ModelError, match="not finite"):
        average(folders, tmp_path / "out", (2.0, -1.0))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("place", ["first", "first/out", "second", "."])
def test_an_output_that_overlaps_a_checkpoint_is_refused(place: str, first: Path, second: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ModelError, match="output folder"):
        average([first, second], tmp_path / place, replace=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_is_replaced_only_if_agreed_and_its_own(first: Path, second: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    average([first, second], output)
    with pytest.raises(OutputError, match="result already exists"):
        average([first, second], output)
    average([first, second], output, (1.0, 0.0), replace=True)
    assert raw_tensors(output / "model.safetensors") == raw_tensors(first / "model.safetensors")
    (output / "precious").touch()
    with pytest.raises(OutputError, match="not written by mftctl"):
        average([first, second], output, replace=True)
    assert (output / "precious").exists()


def test_a_full_disk_leaves_nothing(first: Path, second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(ModelError, match="averaged checkpoint could not be written"):
        average([first, second], tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_progress_ends_at_the_size_of_the_weights(first: Path, second: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    average_checkpoints(
        [first, second],
        HALVES,
        tmp_path / "out",
        names=["a", "b"],
        on_progress=lambda done, total: steps.append((done, total)),
    )
    size_bytes = (first / "model.safetensors").stat().st_size
    assert steps == sorted(steps)
    assert steps[-1] == (size_bytes, size_bytes)


@pytest.mark.slow
def test_memory_is_bounded_by_chunks_and_not_by_the_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_MOST_THREADS", 2)
    tensors = {f"layers.{number}.w": torch.full((1024, 1024), 1.0 + number).bfloat16() for number in range(16)}
    folders = [plain(tmp_path / str(n), {name: tensor * (n + 1) for name, tensor in tensors.items()}) for n in range(3)]
    del tensors
    thirds, sizes_bytes = (1 / 3, 1 / 3, 1 / 3), []

    def recorded_sum(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
        sizes_bytes.extend(tensor.nbytes for tensor in tensors)  # tracemalloc does not see the memory of torch
        return weighted_sum(tensors, weights)

    monkeypatch.setattr(mixture, "weighted_sum", recorded_sum)
    average(folders, tmp_path / "warm", thirds)  # does the imports of the measured call
    tracemalloc.start()
    average(folders, tmp_path / "out", thirds)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 16 * CHUNK_BYTES
    assert max(sizes_bytes) == CHUNK_BYTES
    assert (folders[0] / "model.safetensors").stat().st_size > 100 * CHUNK_BYTES


@pytest.mark.slow
def test_a_model_in_bf16_and_several_files_is_averaged(tmp_path: Path) -> None:
    for seed in range(3):
        model = build_llama(seed=seed, layers=3, tie_word_embeddings=False).bfloat16()
        model.save_pretrained(tmp_path / str(seed), max_shard_size="1GB" if seed else "20KB")
    folders, weights = [tmp_path / str(seed) for seed in range(3)], (0.5, 0.75, -0.25)
    average(folders, tmp_path / "out", weights)
    raws = [
        {name: raw for path in folder.glob("*.safetensors") for name, raw in raw_tensors(path).items()}
        for folder in (*folders, tmp_path / "out")
    ]
    assert {stored.dtype for stored in tensor_index(tmp_path / "out").values()} == {"BF16"}
    assert raws[3] == {name: combined([raw[name] for raw in raws[:3]], weights, "BF16") for name in raws[0]}
