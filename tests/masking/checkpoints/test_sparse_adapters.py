"""Positions of the weights that SHiRA and Super-Tuning adapters change, in memory and in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, ShiraConfig, SupertuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from mftctl.errors import ModelError
from mftctl.experiments.fft_options import FftOptions
from mftctl.masking.checkpoints.adapters import adapter_method
from mftctl.masking.checkpoints.load import load_model
from mftctl.masking.checkpoints.sparse_adapters import (
    pad_for_peft,
    rely_on_positions,
    shared_sparsity,
    super_tuning_layers,
    trained_positions,
    trim_padding,
)
from mftctl.training.updates.sparse_adapter import add_sparse_adapter
from tests.conftest import build_llama

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
IDS = torch.arange(4, 40)[None]


@st.composite
def sizes(draw: st.DrawFn) -> list[tuple[int, int]]:
    weights = draw(st.lists(st.integers(1, 10**9), min_size=1, max_size=6))
    return [(count, draw(st.integers(1, count))) for count in weights]


@given(sizes())
def test_one_sparsity_has_room_for_all_and_no_more_than_needed(found: list[tuple[int, int]]) -> None:
    sparsity = shared_sparsity(found)
    assert 0 <= sparsity < 1
    SupertuningConfig(sparsity=sparsity)  # accepted
    allocated = [int(weights * (1 - sparsity)) for weights, _ in found]  # as peft does
    assert all(room >= trained for room, (_, trained) in zip(allocated, found, strict=True))
    fullest = max(found, key=lambda item: item[1] / item[0])
    assert int(fullest[0] * (1 - sparsity)) <= fullest[1] + 1


@given(st.integers(1, 10**6), st.integers(1, 8))
def test_equal_shares_need_no_padding(weights: int, times: int) -> None:
    trained = max(1, weights // 7)
    sparsity = shared_sparsity([(weights, trained), (weights * times, trained * times)])
    assert int(weights * (1 - sparsity)) == trained


def adapted(counts: dict[str, int]) -> PeftModel:
    positions = {name: torch.arange(3, 3 + 2 * count, 2) for name, count in counts.items()}
    model = add_sparse_adapter(build_llama(layers=2), FftOptions(method="supertuning"), positions)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(generator=generator)
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def test_padding_changes_nothing_and_is_removed_again() -> None:
    model = adapted({UP: 10, DOWN: 200})
    before, values = trained_positions(model), {name: p.clone() for name, p in model.named_parameters()}
    expected = logits(model)
    pad_for_peft(model)
    padded = trained_positions(model)
    assert {name: len(found) for name, found in padded.items()} == {UP: 200, DOWN: 200}
    assert set(padded[UP].tolist()) == set(before[UP].tolist())
    assert torch.equal(logits(model), expected)
    trim_padding(model)
    after = trained_positions(model)
    assert all(torch.equal(positions, after[name]) for name, positions in before.items())
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in values.items())


def test_a_repeated_position_that_was_trained_elsewhere_keeps_its_effect() -> None:
    model = adapted({UP: 10, DOWN: 200})
    pad_for_peft(model)
    for _, layer in super_tuning_layers(model):
        layer.supertuning_values["default"].data[-1] += 0.25
    expected = logits(model)
    trim_padding(model)
    assert {name: len(found) for name, found in trained_positions(model).items()} == {UP: 10, DOWN: 200}
    torch.testing.assert_close(logits(model), expected)


CONFIGS: dict[str, Any] = {
    "SHIRA": ShiraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM", random_seed=1),
    "SUPERTUNING": SupertuningConfig(sparsity=0.9, target_modules=["up_proj"], task_type="CAUSAL_LM"),
}
INDICES = {"SHIRA": "shira_indices", "SUPERTUNING": "supertuning_indices"}


@pytest.fixture(params=CONFIGS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def foreign(kind: str, tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """An adapter that plain peft made, with random changes."""
    rely_on_positions()  # silences a warning of torch
    torch.manual_seed(1)
    model = get_peft_model(load_model(tiny_checkpoint, dtype=torch.float32), CONFIGS[kind])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    model.peft_config["default"].base_model_name_or_path = str(tiny_checkpoint)
    model.save_pretrained(str(tmp_path / "adapter"))
    torch.save(logits(model.eval()), tmp_path / "logits.pt")
    return tmp_path / "adapter"


def change_weights(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in map(change, load_file(path).items()) if name}, path)


def refused(folder: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load_model(folder, dtype=torch.float32)
    return caught.value


def test_an_adapter_of_plain_peft(foreign: Path, kind: str, tmp_path: Path) -> None:
    assert adapter_method(foreign) == kind.lower()
    found = logits(load_model(foreign, dtype=torch.float32))
    torch.testing.assert_close(found, torch.load(tmp_path / "logits.pt"))


@pytest.mark.parametrize("number", [-1, 64 * 32])
def test_positions_outside_a_weight(foreign: Path, kind: str, number: int) -> None:
    def change(item: tuple[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
        name, tensor = item
        if name.endswith(INDICES[kind]) and ".2." in name:
            tensor.view(-1)[3] = number
        return name, tensor

    change_weights(foreign, change)
    error = refused(foreign)
    assert error.message == "The adapter changes weights that its base does not have."
    assert error.key == "model.layers.2.mlp.up_proj"


def test_fewer_positions_than_changes(foreign: Path, kind: str) -> None:
    def change(item: tuple[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
        name, tensor = item
        return name, tensor[..., :-1].contiguous() if name.endswith(INDICES[kind]) else tensor

    change_weights(foreign, change)
    refused(foreign)


def test_no_positions(foreign: Path, kind: str) -> None:
    change_weights(foreign, lambda item: ("", None) if item[0].endswith(INDICES[kind]) else item)
    error = refused(foreign)
    assert error.message == "The adapter does not say which weights it changes."
    assert ("save_precomputed_indices" in str(error.hint)) == (kind == "SUPERTUNING")


def test_positions_that_peft_would_choose_again(foreign: Path, kind: str) -> None:
    file = foreign / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "save_precomputed_indices": False}))
    assert refused(foreign).key == "save_precomputed_indices"


def test_weights_that_are_no_safetensors(foreign: Path) -> None:
    (foreign / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
    assert refused(foreign).message == "The adapter's weights cannot be read."
