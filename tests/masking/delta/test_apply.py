"""Delta files applied to checkpoints and to loaded models."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from mftctl.errors import MaskMismatchError, ModelError, OutputError
from mftctl.masking.checkpoints.tensors import INDEX_FILE
from mftctl.masking.delta.apply import DeltaApplied, apply_delta, apply_delta_to_checkpoint
from mftctl.masking.delta.delta import open_delta
from mftctl.masking.delta.either import apply_in_memory, checkpoint_files, open_applicable
from mftctl.masking.mask import save_mask
from tests.conftest import build_llama
from tests.masking.built_checkpoints import learn_mask, projections, stored_tensors, write_tuned
from tests.masking.delta.made_deltas import make, moved, plan, random_tensors, raw_checkpoint, write_pair

INPUT_IDS = torch.arange(6, 30).reshape(2, 12)


def apply(base: Path, delta: Path, output: Path, *, replace: bool = False) -> DeltaApplied:
    with open_delta(delta) as opened:
        return apply_delta_to_checkpoint(base, opened, output, base_model="org/base", replace=replace)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=INPUT_IDS).logits


@pytest.fixture
def pair(tiny_checkpoint: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A tiny Llama and a copy with changes, in other shards."""
    base = shutil.copytree(tiny_checkpoint, tmp_path / "base")
    return base, write_tuned(base, tmp_path / "tuned", shards=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "tied", "kind"),
    [(torch.float32, True, "exact"), (torch.bfloat16, False, "int8"), (torch.bfloat16, True, "exact")],
)
def test_a_loaded_model_computes_the_same_as_the_applied_checkpoint(
    dtype: torch.dtype, tied: bool, kind: str, tmp_path: Path
) -> None:
    base, output = tmp_path / "base", tmp_path / "out"
    build_llama(layers=3, tie_word_embeddings=tied).to(dtype).save_pretrained(base, max_shard_size="20KB")
    tuned = write_tuned(base, tmp_path / "tuned")
    make(base, tuned, tmp_path / "change.delta", plan(0.5, values=kind))
    result = apply(base, tmp_path / "change.delta", output)
    assert result.bytes_written == sum(path.stat().st_size for path in output.iterdir())
    assert (output / INDEX_FILE).exists()
    for loaded_dtype in {dtype, torch.float32}:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=loaded_dtype)
        before = logits(model)
        with open_delta(tmp_path / "change.delta") as delta:
            apply_delta(model, delta, base)
        expected = logits(AutoModelForCausalLM.from_pretrained(output, dtype=loaded_dtype))
        assert torch.equal(logits(model), expected)
        assert not torch.equal(before, expected)


def test_the_result_has_the_headers_and_the_shards_of_the_base(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    make(base, tuned, tmp_path / "change.delta")
    apply(base, tmp_path / "change.delta", tmp_path / "out")
    content, original = ((folder / "model.safetensors").read_bytes() for folder in (tmp_path / "out", base))
    header_bytes = len(original) - sum(map(len, raw_checkpoint(base).values()))
    assert content[:header_bytes] == original[:header_bytes]
    assert len(content) == len(original)
    found, expected = stored_tensors(tmp_path / "out"), stored_tensors(tuned)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()


def test_another_base_is_refused_before_anything_is_written(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    make(base, tuned, tmp_path / "change.delta")
    (tmp_path / "elsewhere").mkdir()
    other = write_tuned(base, tmp_path / "elsewhere" / "other", seed=11)
    with pytest.raises(MaskMismatchError, match="not the base of this delta file: the bytes") as caught:
        apply(other, tmp_path / "change.delta", tmp_path / "elsewhere" / "out")
    assert "org/base at revision abc" in str(caught.value.hint)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["other"]


def test_a_base_that_differs_only_in_a_tensor_without_a_change_is_refused(tmp_path: Path) -> None:
    before = random_tensors(torch.float32)
    after = {name: tensor if name == "conv" else moved(before)[name] for name, tensor in before.items()}
    base, tuned = write_pair(tmp_path, before, after)
    make(base, tuned, tmp_path / "change.delta")
    (tmp_path / "other").mkdir()
    other, _ = write_pair(tmp_path / "other", {**before, "conv": before["conv"] + 1}, after)
    with pytest.raises(MaskMismatchError, match="bytes of a tensor differ") as caught:
        apply(other, tmp_path / "change.delta", tmp_path / "out")
    assert caught.value.key == "conv"


def test_the_changed_model_itself_is_recognised(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    make(base, tuned, tmp_path / "change.delta")
    with pytest.raises(MaskMismatchError, match="already applied to this checkpoint"):
        apply(tuned, tmp_path / "change.delta", tmp_path / "out")


@pytest.mark.parametrize("how", ["missing", "more", "dtype", "shape"])
def test_a_base_with_other_tensors_is_refused(how: str, tmp_path: Path) -> None:
    before = random_tensors(torch.float32)
    base, tuned = write_pair(tmp_path, before, moved(before))
    make(base, tuned, tmp_path / "change.delta")
    other = {
        "missing": {name: tensor for name, tensor in before.items() if name != "positions"},
        "more": {**before, "z": torch.ones(2)},
        "dtype": {**before, "conv": before["conv"].double()},
        "shape": {**before, "conv": before["conv"].reshape(5, 6)},
    }[how]
    (tmp_path / "other").mkdir()
    folder, _ = write_pair(tmp_path / "other", other, other)
    with pytest.raises(MaskMismatchError, match="does not have the same tensors"):
        apply(folder, tmp_path / "change.delta", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_result_other_than_the_recorded_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if something changed the base after its check."""
    before = random_tensors(torch.float32)
    base, tuned = write_pair(tmp_path, before, moved(before))
    make(base, tuned, tmp_path / "change.delta")
    (tmp_path / "other").mkdir()
    other, _ = write_pair(tmp_path / "other", moved(before, seed=5), before)
    with monkeypatch.context() as patch:
        patch.setattr("mftctl.masking.delta.match._require_digest", lambda *_: None)
        with pytest.raises(MaskMismatchError, match="A changed tensor is not the one") as caught:
            apply(other, tmp_path / "change.delta", tmp_path / "out")
    assert caught.value.key in before
    assert not (tmp_path / "out").exists()


def test_the_output_must_not_touch_an_input(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    make(base, tuned, tmp_path / "change.delta")
    with pytest.raises(ModelError, match="inside an input's folder"):
        apply(base, tmp_path / "change.delta", base / "out")
    with pytest.raises(ModelError, match="contains an input"):
        apply(base, tmp_path / "change.delta", tmp_path)
    apply(base, tmp_path / "change.delta", tmp_path / "out")
    with pytest.raises(OutputError, match="already exists"):
        apply(base, tmp_path / "change.delta", tmp_path / "out")
    apply(base, tmp_path / "change.delta", tmp_path / "out", replace=True)


def test_a_loaded_model_without_the_tensor_is_refused_unchanged(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    make(base, tuned, tmp_path / "change.delta")
    model = build_llama(layers=1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with (
        open_delta(tmp_path / "change.delta") as delta,
        pytest.raises(MaskMismatchError, match="masked tensor is not in the model"),
    ):
        apply_delta(model, delta, base)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_the_card_names_what_was_kept_and_left_out(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    make(base, tuned, tmp_path / "change.delta", plan(0.5, exclude=("embeddings",)))
    apply(base, tmp_path / "change.delta", tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.base_model, card.data.tags) == ("org/base", ["delta", "mftctl"])
    digest = hashlib.sha256((tmp_path / "change.delta").read_bytes()).hexdigest()
    for text in (digest, "| Requested ratio | 0.5 |", "`model.embed_tokens.weight` (excluded)", "`org/tuned`"):
        assert text in card.text


# Files that go with the weights


def with_files(tuned: Path) -> None:
    """Gives a tuned checkpoint its own template and stop tokens, and a configuration that differs in form only."""
    (tuned / "chat_template.jinja").write_text("{{ messages }}!")
    (tuned / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps({**config, "transformers_version": "0.0"}, indent=7))
    (tuned / "modeling_evil.py").write_text("raise SystemExit")


def test_files_that_differ_come_with_the_weights(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    with_files(tuned)
    contents = make(base, tuned, tmp_path / "change.delta")
    assert list(contents.files) == ["generation_config.json", "chat_template.jinja"]
    apply(base, tmp_path / "change.delta", tmp_path / "out")
    for name in contents.files:
        assert (tmp_path / "out" / name).read_bytes() == (tuned / name).read_bytes()
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert not (tmp_path / "out" / "modeling_evil.py").exists()


def test_a_tokenizer_with_other_tokens_comes_along(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    document = json.loads((tuned / "tokenizer.json").read_text())
    (tuned / "tokenizer.json").write_text(json.dumps({**document, "truncation": {"max_length": 5}}))
    assert "tokenizer.json" not in make(base, tuned, tmp_path / "same.delta").files
    first = next(iter(document["model"]["vocab"]))
    document["model"]["vocab"]["changed"] = document["model"]["vocab"].pop(first)
    (tuned / "tokenizer.json").write_text(json.dumps(document))
    assert "tokenizer.json" in make(base, tuned, tmp_path / "change.delta").files


def test_a_file_that_is_too_large_is_refused(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = pair
    with_files(tuned)
    monkeypatch.setattr("mftctl.masking.delta.carried_files.MAX_FILE_BYTES", 10)
    with pytest.raises(ModelError, match="too large for a delta file"):
        make(base, tuned, tmp_path / "change.delta")


def test_a_model_in_memory_gets_the_files_too(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    with_files(tuned)
    make(base, tuned, tmp_path / "change.delta")
    with open_applicable(tmp_path / "change.delta") as delta, checkpoint_files(base, delta) as folder:
        assert folder != base
        assert AutoTokenizer.from_pretrained(folder).chat_template == "{{ messages }}!"
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.generation_config.eos_token_id == [1, 2]
        assert delta is not None
        apply_in_memory(model, delta, base)
    assert not folder.exists()
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tuned)))


def test_without_files_the_checkpoint_itself_is_used_and_masks_work_as_before(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, tuned = pair
    make(base, tuned, tmp_path / "change.delta")
    with open_applicable(tmp_path / "change.delta") as delta, checkpoint_files(base, delta) as folder:
        assert folder == base
    mask = learn_mask(projections(base))
    save_mask(mask, tmp_path / "mask.bits")
    model = AutoModelForCausalLM.from_pretrained(base)
    with open_applicable(tmp_path / "mask.bits") as opened, checkpoint_files(base, opened) as folder:
        assert folder == base
        assert opened is not None
        apply_in_memory(model, opened, base)
    name = mask.names()[0]
    assert not model.get_parameter(name)[~mask[name]].any()
    with open_applicable(None) as nothing:
        assert nothing is None
