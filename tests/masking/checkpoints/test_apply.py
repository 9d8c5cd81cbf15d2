from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from mftctl.errors import MaskMismatchError, ModelError, OutputError
from mftctl.masking.checkpoints import shards
from mftctl.masking.checkpoints.apply import ApplyResult, apply_to_checkpoint
from mftctl.masking.checkpoints.apply_in_memory import apply_mask
from mftctl.masking.checkpoints.tensors import INDEX_FILE
from mftctl.masking.mask import Mask, load_mask, save_mask
from tests.conftest import build_llama
from tests.masking.built_checkpoints import learn_mask, projections, raw_tensors, stored_tensors, write_tuned

INPUT_IDS = torch.arange(6, 30).reshape(2, 12)


@pytest.fixture
def base(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint, tmp_path / "base")


def apply(base: Path, mask: Mask, output: Path, *, replace: bool = False) -> ApplyResult:
    return apply_to_checkpoint(base, mask, output, mask_path=None, base_model="org/base", replace=replace)


def check_bytes(base: Path, output: Path, mask: Mask) -> None:
    """Checks all bytes of all weight files: headers, kept weights and other tensors unchanged, removed weights zero."""
    for path in base.glob("*.safetensors"):
        before, after = raw_tensors(path), raw_tensors(output / path.name)
        header_bytes = path.stat().st_size - sum(map(len, before.values()))
        assert (output / path.name).read_bytes()[:header_bytes] == path.read_bytes()[:header_bytes]
        assert before.keys() == after.keys()
        for name, content in before.items():
            if name not in mask:
                assert after[name] == content
                continue
            keep = mask[name].reshape(-1, 1).numpy()
            items = np.frombuffer(content, np.uint8).reshape(len(keep), -1)
            assert after[name] == np.where(keep, items, 0).astype(np.uint8).tobytes()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=INPUT_IDS).logits


def check_model(base: Path, output: Path, mask: Mask) -> None:
    """Checks that the output loads like any checkpoint and computes the same as the masked base, bit for bit."""
    masked = AutoModelForCausalLM.from_pretrained(base)
    unmasked = logits(masked)
    apply_mask(masked, mask)
    loaded = logits(AutoModelForCausalLM.from_pretrained(output))
    assert torch.equal(loaded, logits(masked))
    assert not torch.equal(loaded, unmasked)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("max_shard_size", "tied"), [("1GB", True), ("20KB", True), ("20KB", False)])
def test_output_is_the_base_with_zeros(dtype: torch.dtype, max_shard_size: str, tied: bool, tmp_path: Path) -> None:
    base, output = tmp_path / "base", tmp_path / "out"
    build_llama(layers=3, tie_word_embeddings=tied).to(dtype).save_pretrained(base, max_shard_size=max_shard_size)
    mask = learn_mask(projections(base))
    result = apply(base, mask, output)
    assert (result.tensors_masked, result.removed) == (14, mask.removed)
    assert result.bytes_written == sum(path.stat().st_size for path in output.iterdir())
    assert (output / INDEX_FILE).exists() == (max_shard_size == "20KB")
    check_bytes(base, output, mask)
    check_model(base, output, mask)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_are_masked(dtype: torch.dtype, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_file({"w": torch.randn(9, 7).to(dtype), "v": torch.randn(3).to(dtype)}, base / "model.safetensors")
    mask = learn_mask({"w": stored_tensors(base)["w"]})
    apply(base, mask, tmp_path / "out")
    check_bytes(base, tmp_path / "out", mask)


def test_tensor_larger_than_a_piece_is_masked_throughout(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    weights = torch.randn(1100, 1000, generator=torch.Generator().manual_seed(0))
    save_file({"w": weights, "after": torch.ones(5)}, base / "model.safetensors")
    mask = learn_mask({"w": weights})
    apply(base, mask, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after["w"], torch.where(mask["w"], weights, 0.0))
    assert torch.equal(after["after"], torch.ones(5))


def test_gpt2_checkpoint_without_the_prefix_is_masked(tmp_path: Path) -> None:
    base, output = tmp_path / "base", tmp_path / "out"
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=2, n_head=2)).save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, base / "model.safetensors", {"format": "pt"})
    mask = learn_mask(projections(base))
    assert "h.1.attn.c_attn.weight" in mask
    apply(base, mask, output)
    check_bytes(base, output, mask)
    check_model(base, output, mask)


def test_configuration_tokenizer_and_template_are_copied_and_other_weight_files_are_not(
    base: Path, tmp_path: Path
) -> None:
    mask = learn_mask(projections(base))
    others = ["pytorch_model.bin", "optimizer.pt", "model.gguf", "consolidated.safetensors", "model.onnx", "old.bits"]
    for name in [*others, "pytorch_model.bin.index.json", INDEX_FILE, "LICENSE", "modeling_custom.py", "README.md"]:
        (base / name).write_text(name)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("x")
    (base / "checkpoint-10").mkdir()
    apply(base, mask, tmp_path / "out")
    missing = {path.name for path in base.iterdir()} - {path.name for path in (tmp_path / "out").iterdir()}
    assert missing == {*others, "pytorch_model.bin.index.json", INDEX_FILE, "checkpoint-10"}
    for name in ["config.json", "generation_config.json", "tokenizer.json", "LICENSE", "modeling_custom.py"]:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert (tmp_path / "out" / "additional_chat_templates" / "tools.jinja").exists()
    assert (tmp_path / "out" / "README.md").read_text() != "README.md"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template


def test_linked_files_of_a_hub_snapshot_become_files(base: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in base.iterdir():
        shutil.copyfile(path, blobs / f"of-{path.name}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"of-{path.name}")
    mask = learn_mask(projections(base))
    apply(snapshot, mask, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    check_model(base, tmp_path / "out", mask)


def test_links_out_of_the_base_are_not_followed(base: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret")
    (base / "notes.txt").symlink_to(tmp_path / "key")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").symlink_to(tmp_path / "key")
    (base / "inside.txt").symlink_to("config.json")
    done = apply(base, learn_mask(projections(base)), tmp_path / "out")
    assert done.left_out == ("additional_chat_templates/tools.jinja", "notes.txt")
    assert (tmp_path / "out" / "inside.txt").read_bytes() == (base / "config.json").read_bytes()
    assert not any(path.read_bytes() == b"secret" for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_configuration_that_is_a_link_out_of_the_base_is_refused(base: Path, tmp_path: Path) -> None:
    (base / "config.json").rename(tmp_path / "config.json")
    (base / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(ModelError, match="configuration is a link"):
        apply(base, learn_mask(projections(base)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_model_card_names_the_base_and_the_mask(base: Path, tmp_path: Path) -> None:
    mask_path = tmp_path / "mask.bits"
    save_mask(learn_mask(projections(base)), mask_path)
    mask = load_mask(mask_path)
    apply_to_checkpoint(base, mask, tmp_path / "out", mask_path=mask_path, base_model="org/name")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "org/name"
    assert hashlib.sha256(mask_path.read_bytes()).hexdigest() in card.text
    for fact in ["learned", "0.25", "4-7", "0003-mask-train", f"{mask.removed:,} of {mask.weights:,}", *mask.names()]:
        assert fact in card.text


def test_progress_ends_at_the_size_of_the_weights(base: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    apply_to_checkpoint(
        base,
        learn_mask(projections(base)),
        tmp_path / "out",
        mask_path=None,
        base_model="org/base",
        on_progress=lambda done, total: steps.append((done, total)),
    )
    size_bytes = (base / "model.safetensors").stat().st_size
    assert steps == sorted(steps)
    assert steps[-1] == (size_bytes, size_bytes)


@pytest.mark.slow
def test_memory_is_bounded_by_a_piece_and_not_by_the_checkpoint(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    tensors = {f"layers.{number}.w": torch.full((1024, 1024), 1.0 + number).bfloat16() for number in range(32)}
    save_file(tensors, base / "model.safetensors")
    del tensors
    mask = learn_mask(projections(base))
    assert (base / "model.safetensors").stat().st_size > 64 * 2**20
    tracemalloc.start()
    apply(base, mask, tmp_path / "out")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 16 * 2**20


def test_wrong_base_is_refused_and_leaves_nothing(base: Path, tmp_path: Path) -> None:
    mask = learn_mask(projections(base))
    other = tmp_path / "other"
    build_llama(seed=1).save_pretrained(other)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(MaskMismatchError, match="not the one this mask was learned on") as caught:
        apply(other, mask, tmp_path / "out")
    assert caught.value.key in mask
    assert caught.value.expected == f"SHA-256 {mask.records[str(caught.value.key)].sha256}"
    assert str(caught.value.actual).startswith("SHA-256 ")
    assert caught.value.hint == "apply it to org/base at revision abc123"
    assert sorted(tmp_path.iterdir()) == before


def test_one_changed_bit_of_a_masked_tensor_is_found(base: Path, tmp_path: Path) -> None:
    mask = learn_mask(projections(base))
    name = mask.names()[-1]
    tensors = load_file(base / "model.safetensors")
    tensors[name].view(torch.int32)[-1, -1] ^= 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(MaskMismatchError) as caught:
        apply(base, mask, tmp_path / "out")
    assert caught.value.key == name


def test_base_the_mask_was_applied_to_is_refused_as_that(base: Path, tmp_path: Path) -> None:
    mask = learn_mask(projections(base))
    apply(base, mask, tmp_path / "once")
    with pytest.raises(MaskMismatchError, match="already applied to this base") as caught:
        apply(tmp_path / "once", mask, tmp_path / "twice")
    assert "use this checkpoint as it is" in str(caught.value.hint)
    assert not (tmp_path / "twice").exists()


def test_base_without_a_masked_tensor_is_refused(base: Path, tmp_path: Path) -> None:
    mask = learn_mask({"model.layers.9.mlp.up_proj.weight": torch.ones(2, 2)})
    with pytest.raises(MaskMismatchError, match="no such tensor") as caught:
        apply(base, mask, tmp_path / "out")
    assert caught.value.key == "model.layers.9.mlp.up_proj.weight"


@pytest.mark.parametrize("form", [torch.ones(64, 33), torch.ones(64, 32, dtype=torch.bfloat16)])
def test_base_with_a_tensor_of_another_form_is_refused(form: torch.Tensor, base: Path, tmp_path: Path) -> None:
    with pytest.raises(MaskMismatchError, match="differs in dtype or shape") as caught:
        apply(base, learn_mask({"model.layers.1.mlp.up_proj.weight": form}), tmp_path / "out")
    assert caught.value.actual == "F32 (64, 32)"


def test_integer_tensor_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_file({"w": torch.ones(2, 2, dtype=torch.int32)}, base / "model.safetensors")
    with pytest.raises(MaskMismatchError, match="differs in dtype or shape"):
        apply(base, learn_mask({"w": torch.ones(2, 2)}), tmp_path / "out")


def apply_delta(base: Path, tuned: Path, mask: Mask, output: Path) -> ApplyResult:
    return apply_to_checkpoint(base, mask, output, mask_path=None, base_model="org/base", tuned=tuned)


def test_delta_mask_makes_the_tuned_checkpoint_with_its_own_configuration(base: Path, tmp_path: Path) -> None:
    tuned, output = write_tuned(base, tmp_path / "tuned", shards=3), tmp_path / "out"
    (tuned / "NOTICE").write_text("of the tuned model")
    (base / "base.json").write_text("{}")
    mask = learn_mask(projections(base), tuned=projections(tuned))
    result = apply_delta(base, tuned, mask, output)
    assert (result.tensors_masked, result.removed) == (len(mask), mask.removed)
    assert {path.name for path in output.iterdir()} == {path.name for path in tuned.iterdir()} | {
        "README.md",
        "mftctl.json",
    }
    in_memory = AutoModelForCausalLM.from_pretrained(tuned)
    apply_mask(in_memory, mask, base)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(output)), logits(in_memory))


def test_model_card_of_a_delta_mask_names_both_models(base: Path, tmp_path: Path) -> None:
    tuned = write_tuned(base, tmp_path / "tuned")
    mask = learn_mask(projections(base), tuned=projections(tuned))
    apply_delta(base, tuned, mask, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == ["org/base", "org/tuned"]
    for fact in ["This is `org/tuned`", "values of `org/base`", "drop-trivial", "def456", f"{mask.removed:,} of"]:
        assert fact in card.text


def test_delta_mask_without_its_tuned_checkpoint_is_refused(base: Path, tmp_path: Path) -> None:
    mask = learn_mask(projections(base), tuned=projections(base))
    with pytest.raises(MaskMismatchError, match="needs the tuned checkpoint") as caught:
        apply(base, mask, tmp_path / "out")
    assert caught.value.expected == "org/tuned at revision def456"


def test_weight_mask_with_a_tuned_checkpoint_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(MaskMismatchError, match="to its base only") as caught:
        apply_delta(base, base, learn_mask(projections(base)), tmp_path / "out")
    assert caught.value.path == str(base)


@pytest.mark.parametrize("place", ["tuned", "tuned/out", "."])
def test_output_that_overlaps_the_tuned_checkpoint_is_refused(place: str, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "inputs"
    folder.mkdir()
    tuned = write_tuned(base, folder / "tuned")
    mask = learn_mask(projections(base), tuned=projections(tuned))
    before = sorted(folder.rglob("*"))
    with pytest.raises(ModelError, match="output folder"):
        apply_to_checkpoint(
            base, mask, folder / place, mask_path=None, base_model="org/base", tuned=tuned, replace=True
        )
    assert sorted(folder.rglob("*")) == before


def test_output_that_is_not_empty_is_refused_unless_replaced(base: Path, tmp_path: Path) -> None:
    mask, output = learn_mask(projections(base)), tmp_path / "out"
    apply(base, mask, output)
    with pytest.raises(OutputError, match="result already exists") as caught:
        apply(base, mask, output)
    assert "--yes" in str(caught.value.hint)
    apply(base, mask, output, replace=True)
    check_bytes(base, output, mask)
    (output / "precious").touch()
    with pytest.raises(OutputError, match="not written by mftctl") as caught:
        apply(base, mask, output, replace=True)
    assert caught.value.actual == "precious"
    assert (output / "precious").exists()


def test_empty_output_is_used(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    apply(base, learn_mask(projections(base)), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_output_that_is_a_file_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(OutputError, match="a file exists there"):
        apply(base, learn_mask(projections(base)), tmp_path / "out", replace=True)


@pytest.mark.parametrize("place", [".", "masked"])
def test_output_in_the_base_is_refused(place: str, base: Path) -> None:
    before = sorted(base.iterdir())
    with pytest.raises(ModelError, match="output folder"):
        apply(base, learn_mask(projections(base)), base / place, replace=True)
    assert sorted(base.iterdir()) == before


def test_output_that_holds_the_base_is_refused(base: Path) -> None:
    with pytest.raises(ModelError, match="contains an input"):
        apply(base, learn_mask(projections(base)), base.parent, replace=True)
    assert base.exists()


def test_output_that_holds_the_mask_file_is_refused(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    mask = learn_mask(projections(base))
    save_mask(mask, output / "mask.bits")
    with pytest.raises(ModelError, match="contains an input"):
        apply_to_checkpoint(base, mask, output, mask_path=output / "mask.bits", base_model="org/base", replace=True)
    assert (output / "mask.bits").exists()


def test_full_disk_leaves_nothing_and_keeps_the_old_output(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    output = tmp_path / "out"
    apply(base, learn_mask(projections(base)), output)
    before, old = sorted(tmp_path.iterdir()), sorted(output.iterdir())
    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(ModelError, match="could not be written") as caught:
        apply(base, learn_mask(projections(base)), output, replace=True)
    assert "No space left" in str(caught.value.actual)
    assert sorted(tmp_path.iterdir()) == before
    assert sorted(output.iterdir()) == old


def test_missing_shard_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = tmp_path / "base"
    build_llama(layers=3).save_pretrained(base, max_shard_size="20KB")
    mask = learn_mask(projections(base))
    weight_map = json.loads((base / INDEX_FILE).read_text())["weight_map"]
    (base / sorted(set(weight_map.values()))[0]).unlink()
    with pytest.raises(ModelError, match="is missing"):
        apply(base, mask, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == [base]
