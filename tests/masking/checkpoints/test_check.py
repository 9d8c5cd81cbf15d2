"""A checkpoint matches its configuration, or one error names the mismatch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

from mftctl.errors import ModelError
from mftctl.masking.checkpoints.check import CheckpointCheck, check_checkpoint, check_lengths, tell_remarks
from mftctl.masking.checkpoints.load import load_model
from tests.checkpoint_kinds import (
    PROJECTION,
    build_composite,
    copied,
    in_8_bits,
    with_config,
    with_own_code,
    with_weights,
)
from tests.conftest import build_tokenizer
from tests.workflow_fixtures import Interrupter


def refused(folder: Path, **options: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        check_checkpoint(folder, **options)
    return caught.value


def test_valid_checkpoint_has_no_findings(tiny_checkpoint: Path, tokenizer: Any) -> None:
    assert check_checkpoint(tiny_checkpoint, tokenizer) == CheckpointCheck()


def test_missing_tensor(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = with_weights(
        tiny_checkpoint, tmp_path / "m", lambda weights: {k: v for k, v in weights.items() if k != PROJECTION}
    )
    assert refused(folder).actual == f"1 missing: {PROJECTION}"
    with pytest.raises(ModelError, match="tensors do not match the model"):  # loading without a prior check fails too
        load_model(folder, dtype=torch.float32)


def test_unexpected_tensor(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = with_weights(tiny_checkpoint, tmp_path / "m", lambda weights: {**weights, "odd.weight": torch.ones(2)})
    assert refused(folder).actual == "1 unexpected: odd.weight"


def test_tensor_of_another_shape(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = with_weights(
        tiny_checkpoint, tmp_path / "m", lambda weights: {**weights, PROJECTION: weights[PROJECTION][:, 1:].clone()}
    )
    assert refused(folder).actual == f"1 of the wrong shape: {PROJECTION} (32, 63) for (32, 64)"
    with pytest.raises(ModelError, match="tensors do not match the model"):
        load_model(folder, dtype=torch.float32)


def test_all_tensors_under_another_prefix(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = with_weights(
        tiny_checkpoint, tmp_path / "m", lambda weights: {f"language_model.{k}": v for k, v in weights.items()}
    )
    found = str(refused(folder).actual)
    assert "missing: lm_head.weight, model.embed_tokens.weight" in found
    assert "unexpected: language_model.model.embed_tokens.weight" in found


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fbgemm_fp8", "compressed-tensors"])
def test_quantised_weights(tiny_checkpoint: Path, tmp_path: Path, method: str) -> None:
    folder = with_config(copied(tiny_checkpoint, tmp_path / "m"), quantization_config={"quant_method": method})
    error = refused(folder)
    assert "can be neither fine-tuned nor masked" in error.message
    assert error.actual == method


@pytest.mark.slow
def test_weights_in_8_bits_are_loaded_with_their_scales(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = in_8_bits(tiny_checkpoint, tmp_path / "m")
    assert "stored in 8 bits" in check_checkpoint(folder).remarks[0]
    model = load_model(folder, dtype=torch.float32)
    wanted = load_model(tiny_checkpoint, dtype=torch.float32).get_parameter(PROJECTION)
    assert type(model.get_submodule(PROJECTION.removesuffix(".weight"))) is torch.nn.Linear
    assert torch.allclose(model.get_parameter(PROJECTION), wanted, rtol=0.07, atol=2e-3)
    assert getattr(model.config, "quantization_config", None) is None


def test_lfs_pointer(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = copied(tiny_checkpoint, tmp_path / "m")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 12\n")
    assert "git-lfs pointer" in str(refused(folder).hint)


def test_index_without_metadata(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = copied(tiny_checkpoint, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_checkpoint).save_pretrained(folder, max_shard_size="40KB")
    assert check_checkpoint(folder) == CheckpointCheck()
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    del document["metadata"]
    index.write_text(json.dumps(document))
    error = refused(folder)
    assert error.key == "metadata"
    assert '"metadata": {}' in str(error.hint)


def test_configuration_that_cannot_be_read(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = copied(tiny_checkpoint, tmp_path / "m")
    (folder / "config.json").write_text("{")
    assert "cannot be read" in refused(folder).message
    (folder / "config.json").write_text("[]")
    assert "expected a JSON object, got list" in str(refused(folder).actual)


def test_type_that_transformers_does_not_know(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = with_config(copied(tiny_checkpoint, tmp_path / "m"), model_type="nothing")
    error = refused(folder)
    assert "model cannot be loaded" in error.message
    assert "`nothing`" in str(error.actual)


@pytest.mark.slow
def test_audio_type_without_a_language_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = with_config(copied(tiny_checkpoint, tmp_path / "m"), model_type="qwen2_audio", audio_config={})
    error = refused(folder)
    assert error.actual == "qwen2_audio"
    assert "save its language model on its own" in str(error.hint)


def test_own_code_is_not_run(tiny_checkpoint: Path, tmp_path: Path) -> None:
    error = refused(with_own_code(copied(tiny_checkpoint, tmp_path / "m")))
    assert error.actual == "configuration_own.py, modeling_own.py"
    assert "--trust-remote-code" in str(error.hint)


def test_tokenizer_with_more_tokens_than_the_model(tiny_checkpoint: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<|more|>"])
    error = refused(tiny_checkpoint, tokenizer=tokenizer)
    assert (error.expected, error.actual) == ("at most 102", "103")


def test_separate_head_where_the_configuration_ties_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def with_head(weights: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
        return {**weights, "lm_head.weight": weights["model.embed_tokens.weight"] * scale}

    other = with_weights(tiny_checkpoint, tmp_path / "other", lambda weights: with_head(weights, 2.0))
    (remark,) = check_checkpoint(other).remarks
    assert "lm_head.weight differs from model.embed_tokens.weight" in remark
    same = with_weights(tiny_checkpoint, tmp_path / "same", lambda weights: with_head(weights, 1.0))
    assert check_checkpoint(same) == CheckpointCheck()


def test_head_that_is_left_out_is_reported(tmp_path: Path, tokenizer: Any) -> None:
    (remark,) = check_checkpoint(build_composite(tmp_path / "m", tokenizer)).remarks
    assert "1 tensor that the model in memory does not have, such as mtp.fc.weight" in remark


def test_remarks_are_reported_once() -> None:
    listener = Interrupter(-1)
    tell_remarks(CheckpointCheck(("one", "two")), listener)
    assert listener.notes == ["Model: one.", "Model: two."]


def test_learned_positions(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=102, n_embd=32, n_layer=1, n_head=2, n_positions=24, bos_token_id=1, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    check = check_checkpoint(tmp_path / "gpt2")
    assert check.max_positions == 24
    check_lengths(check, [24, 3], tmp_path)
    check_lengths(check, [], tmp_path)
    with pytest.raises(ModelError, match="longer than the model's learned positions") as caught:
        check_lengths(check, [3, 25], tmp_path)
    assert caught.value.hint == "--max-length 24"


def test_log_level_of_transformers_is_restored(tiny_checkpoint: Path) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    check_checkpoint(tiny_checkpoint)
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before


def test_loading_is_silent(tiny_checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    check_checkpoint(tiny_checkpoint)
    load_model(tiny_checkpoint, dtype=torch.float32)
    assert capfd.readouterr() == ("", "")
