"""Mapping of stored tensors to parts of parameters, compared with files written by transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import Concatenate, Interleave, MergeModulelist, Transpose, WeightConverter

from mftctl.errors import MaskingError
from mftctl.masking.parameter_layout import StoredPart, stored_parts
from tests.masking.architectures import ARCHITECTURES, EXPERTS, build
from tests.masking.built_checkpoints import stored_tensors


def parameters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def stored_as(model: PreTrainedModel, *converters: WeightConverter) -> PreTrainedModel:
    """The model as if loaded with these conversions, which the next save reverts."""
    model._weight_conversions = list(converters)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_part_has_the_values_of_the_file(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    stored = stored_tensors(tmp_path)
    for known in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        parameters = parameters_of(known)
        parts = {part.name: part for found in stored_parts(known, parameters).values() for part in found}
        assert parts.keys() == stored.keys()
        assert all(torch.equal(part.of(parameters[part.parameter]), stored[name]) for name, part in parts.items())


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_that_are_fused_on_disk_are_one_tensor(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path, save_original_format=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    fused = "model.layers.1.mlp.experts.gate_up_proj"
    assert fused in stored_tensors(tmp_path)
    assert stored_parts(model, {fused: model.get_parameter(fused)}) == {fused: [StoredPart(fused, fused)]}


def test_parts_come_in_the_order_of_the_parameter() -> None:
    model = build("mixtral")
    fused = "model.layers.0.mlp.experts.gate_up_proj"
    start = "model.layers.0.block_sparse_moe.experts"
    assert stored_parts(model, {fused: model.get_parameter(fused)})[fused] == [
        StoredPart(f"{start}.{expert}.{name}.weight", fused, (expert, rows))
        for expert in range(4)
        for name, rows in (("w1", slice(0, 48)), ("w3", slice(48, 96)))
    ]


def test_a_model_without_weights_has_the_same_layout() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(build("mixtral").config)
        found = stored_parts(model, dict(model.named_parameters()))
    assert sum(map(len, found.values())) == len(dict(model.named_parameters())) - 4 + 2 * 4 * 3


def test_any_other_module_is_stored_as_it_is() -> None:
    model = nn.Linear(3, 2)
    assert stored_parts(model, parameters_of(model)) == {
        "weight": [StoredPart("weight", "weight")],
        "bias": [StoredPart("bias", "bias")],
    }


def test_an_attention_projection_that_is_stored_as_three_tensors() -> None:
    model = stored_as(build("llama"), WeightConverter(["q", "k", "v"], "fused", operations=[Concatenate(dim=0)]))
    parts = stored_parts(model, {"fused": torch.zeros(24, 8)})["fused"]
    assert [(part.name, part.index) for part in parts] == [
        ("q", (slice(0, 8),)),
        ("k", (slice(8, 16),)),
        ("v", (slice(16, 24),)),
    ]


def test_experts_with_three_tensors_each() -> None:
    operations = [MergeModulelist(dim=0), Concatenate(dim=1)]
    model = stored_as(build("llama"), WeightConverter(["x.*.a", "x.*.b", "x.*.c"], "fused", operations=operations))
    parts = stored_parts(model, {"fused": torch.zeros(4, 24, 8)})["fused"]
    assert len(parts) == 12
    assert (parts[4].name, parts[4].index) == ("x.1.b", (1, slice(8, 16)))


@pytest.mark.parametrize(
    "operations",
    [[Transpose(0, 1)], [Interleave(dim=0)]],
    ids=["transposed", "interleaved"],
)
def test_rows_that_are_not_rows_on_disk_are_refused(operations: list[object]) -> None:
    model = stored_as(build("llama"), WeightConverter("stored", "weight", operations=operations))
    with pytest.raises(MaskingError, match="masks do not support") as caught:
        stored_parts(model, {"weight": torch.zeros(24, 8)})
    assert caught.value.key == "weight"
    assert "stored on disk" in str(caught.value.actual)


def test_rows_that_cannot_be_split_evenly_are_refused() -> None:
    model = stored_as(build("llama"), WeightConverter(["a", "b"], "weight", operations=[Concatenate(dim=0)]))
    with pytest.raises(MaskingError, match="masks do not support"):
        stored_parts(model, {"weight": torch.zeros(7, 8)})


def test_a_parameter_that_is_not_written_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.core_model_loading.revert_weight_conversion", lambda model, state: {})
    with pytest.raises(MaskingError, match="masks do not support") as caught:
        stored_parts(build("llama"), {"weight": torch.zeros(7, 8)})
    assert caught.value.actual == "(7, 8) in memory, nothing on disk"


def test_a_conversion_that_fails_on_a_stand_in_is_refused() -> None:
    converter = WeightConverter("stored", "weight", operations=[Transpose(0, 3)])
    with pytest.raises(MaskingError, match="Cannot determine") as caught:
        stored_parts(stored_as(build("llama"), converter), {"weight": torch.zeros(24, 8)})
    assert caught.value.key == "LlamaForCausalLM"
