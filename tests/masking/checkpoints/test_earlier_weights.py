"""The weights before fine-tuning, matched by name and read in the form of the present ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mftctl.errors import MaskMismatchError, ModelError
from mftctl.masking.checkpoints.earlier_weights import pair_targets, read_base
from mftctl.masking.checkpoints.load import load_model
from mftctl.masking.targets import find_targets
from tests.conftest import build_llama
from tests.masking.architectures import build
from tests.masking.built_checkpoints import stored_tensors, write_tuned


def base_and_tuned(folder: Path, family: str = "llama") -> tuple[Path, Path]:
    model = build_llama(layers=2) if family == "llama" else build(family)
    model.save_pretrained(folder / "base")
    return folder / "base", write_tuned(folder / "base", folder / "tuned", shards=2)


def changed_file(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Replaces or removes a tensor of a checkpoint in one file."""
    path = folder / "model.safetensors"
    tensors = {key: value for key, value in load_file(path).items() if key != name}
    save_file({**tensors, **({} if tensor is None else {name: tensor})}, path, {"format": "pt"})


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_target_gets_its_own_stored_tensor(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, tuned = base_and_tuned(tmp_path, family)
    model = load_model(tuned, dtype=dtype)
    targets = find_targets(model, [1])
    pairs = pair_targets(targets, model, base, tuned)
    before = stored_tensors(base)
    read = read_base(targets, pairs)
    assert read.keys() == {target.name for target in targets}
    for target in targets:
        assert pairs[target.name].base.name == pairs[target.name].tuned.name
        assert torch.equal(read[target.name], before[pairs[target.name].base.name].to(dtype))
        assert read[target.name].shape == target.weight.shape
        assert not torch.equal(read[target.name], target.weight)


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "other", [None, torch.zeros(3, 32), torch.zeros(64, 32).bfloat16()], ids=["missing", "shape", "dtype"]
)
def test_a_base_of_another_form(other: torch.Tensor | None, tmp_path: Path) -> None:
    base, tuned = base_and_tuned(tmp_path)
    changed_file(base, NAME, other)
    model = load_model(tuned, dtype=torch.float32)
    with pytest.raises(MaskMismatchError, match="do not have the same tensors") as caught:
        pair_targets(find_targets(model), model, base, tuned)
    assert caught.value.key == NAME
    assert pair_targets(find_targets(model, [0]), model, base, tuned)  # only masked tensors matter


def test_a_base_with_the_same_weights_where_the_mask_lies(tmp_path: Path) -> None:
    base, _ = base_and_tuned(tmp_path)
    shutil.copytree(base, tmp_path / "partly")
    changed_file(tmp_path / "partly", NAME, load_file(base / "model.safetensors")[NAME] + 1)
    model = load_model(tmp_path / "partly", dtype=torch.float32)
    with pytest.raises(MaskMismatchError, match="the same weights, so there is nothing to reset") as caught:
        pair_targets(find_targets(model, [0]), model, base, tmp_path / "partly")
    assert caught.value.path == str(tmp_path / "partly")
    assert len(pair_targets(find_targets(model, [0, 1]), model, base, tmp_path / "partly")) == 14


def test_weights_in_8_bits(tmp_path: Path) -> None:
    base, tuned = base_and_tuned(tmp_path)
    model = load_model(tuned, dtype=torch.float32)
    for folder in (base, tuned):
        tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in stored_tensors(folder).items()}
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="cannot be learned for weights in 8 bits") as caught:
        pair_targets(find_targets(model), model, base, tuned)
    assert caught.value.actual == "F8_E4M3"
