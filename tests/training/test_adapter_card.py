"""The cards of adapters and of models with an adapter merged."""

from __future__ import annotations

import pytest
import yaml
from peft import LoraConfig, PeftConfig, ShiraConfig, SupertuningConfig

from mftctl.training.adapter_card import write_adapter_card


def card(adapter: PeftConfig, *, mask: str | None = None, merged: bool = False, quantized: bool = False) -> str:
    adapter.base_model_name_or_path = "org/<b>|x"
    return write_adapter_card(
        adapter, trained=1234, mask=mask, merged=merged, held="bfloat16", quantized=quantized, template="a|b"
    )


@pytest.mark.parametrize(
    ("adapter", "tag", "row"),
    [
        (LoraConfig(r=4, lora_alpha=8), "lora", "| LoRA | |\n| --- | --- |\n| Rank | 4 |\n| Alpha | 8 |\n"),
        (ShiraConfig(), "shira", "| SHiRA | |\n| --- | --- |\n| Trained weights | 1,234, random |\n"),
        (SupertuningConfig(), "super-tuning", "| Trained weights | 1,234, the largest |\n"),
    ],
)
def test_it_names_method_base_and_template(adapter: PeftConfig, tag: str, row: str) -> None:
    written = card(adapter)
    _, front_matter, body = written.split("---\n", 2)
    described = yaml.safe_load(front_matter)
    assert (described["tags"][0], described["library_name"]) == (tag, "peft")
    assert described["base_model"] == "org/<b>|x"
    assert row in body
    assert "| Chat template | a\\|b |" in body
    assert "<b>" not in body.replace("`org/<b>|x`", "")


def test_it_names_the_mask_that_chose_the_weights() -> None:
    assert "| Trained weights | 1,234, kept by `runs/m.bits` |" in card(SupertuningConfig(), mask="runs/m.bits")


def test_a_merged_model_is_loaded_by_transformers() -> None:
    written = card(ShiraConfig(), merged=True)
    assert "library_name: transformers" in written
    assert "with a merged SHiRA adapter" in written


def test_a_quantised_base_and_experts_are_named() -> None:
    written = card(LoraConfig(target_parameters=["mlp.experts.down_proj"]), quantized=True)
    assert "- qlora\n" in written
    assert "| Experts | adapted too |" in written
