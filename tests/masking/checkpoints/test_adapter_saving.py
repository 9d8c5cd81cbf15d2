"""Adapters are saved whole and without the network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import save_and_load
from safetensors.torch import load_file

from mftctl.experiments.fft_options import FftOptions
from mftctl.masking.checkpoints.adapter_saving import without_lookup
from mftctl.masking.checkpoints.adapters import load_adapter
from mftctl.training.updates.adapters import add_adapter
from tests.conftest import build_llama, build_tokenizer

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def looked_up(*_: object) -> None:
        pytest.fail("the base was looked up on the Hub")

    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", looked_up)
    build_llama(layers=1, tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize(
    "options", [{"method": "lora"}, {"method": "shira", "lora_rank": 2}, {"method": "supertuning", "ratio": 0.9}]
)
def test_a_new_adapter_is_saved_without_looking_up_its_base(
    base: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    model = build_llama(layers=1)
    adapted = add_adapter(model, FftOptions.model_validate(options), base="quickstart", seed=0)
    with without_lookup(adapted):
        adapted.save_pretrained(tmp_path / "saved")
    assert "save_pretrained" not in vars(adapted)
    assert not [name for name in load_file(tmp_path / "saved" / WEIGHTS) if "embed" in name or "lm_head" in name]


@pytest.mark.parametrize("embeddings", [(), ("embed_tokens",), ("lm_head",)])
def test_a_loaded_adapter_is_saved_whole(base: Path, tmp_path: Path, embeddings: tuple[str, ...]) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", *embeddings], task_type="CAUSAL_LM", init_lora_weights=False)
    other = get_peft_model(build_llama(layers=1, tie_word_embeddings=False), config)
    other.peft_config["default"].base_model_name_or_path = str(base)
    other.save_pretrained(str(tmp_path / "other"), save_embedding_layers=bool(embeddings))

    adapted = load_adapter(tmp_path / "other", dtype=torch.float32, trainable=True)
    adapted.peft_config["default"].base_model_name_or_path = "quickstart"
    with without_lookup(adapted):
        adapted.save_pretrained(tmp_path / "saved")
    assert "save_pretrained" not in vars(adapted)
    before, after = (load_file(tmp_path / folder / WEIGHTS) for folder in ("other", "saved"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
