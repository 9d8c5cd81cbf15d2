"""Models that are too large for a single GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mftctl.errors import DeviceMemoryError
from mftctl.masking.checkpoints import gpu_maps
from mftctl.masking.checkpoints.gpu_maps import gpu_map, spread_over
from mftctl.masking.checkpoints.load import load_model
from mftctl.masking.checkpoints.tensors import tensor_index
from mftctl.workflows.eval import evaluate
from tests.conftest import build_llama
from tests.workflow_fixtures import make_recipe, open_run
from tests.workflows.loss_surface.test_corners import Notes


def stored_bytes(folder: Path) -> int:
    return sum(stored.length_bytes for stored in tensor_index(folder).values())


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "auto"])
def test_whole_layers_are_placed_on_both_gpus(tmp_path: Path, tied: bool, dtype: torch.dtype | str) -> None:
    build_llama(layers=8, tie_word_embeddings=tied).save_pretrained(tmp_path)
    size = stored_bytes(tmp_path) // (2 if dtype == torch.bfloat16 else 1)
    assert spread_over(tmp_path, dtype, {0: 2 * size, 1: 2 * size}) is None
    found = spread_over(tmp_path, dtype, {0: size, 1: size})
    assert found is not None
    assert set(found.values()) == {0, 1}
    model = build_llama(layers=8, tie_word_embeddings=tied)
    places: dict[torch.Tensor, set[int]] = {}
    loads = {0: 0, 1: 0}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        (place,) = {gpu for path, gpu in found.items() if not path or name.startswith(f"{path}.")}
        loads[place] += 0 if parameter in places else parameter.nbytes
        places.setdefault(parameter, set()).add(place)
    assert all(len(gpus) == 1 for gpus in places.values())  # tied weights are on one GPU
    assert max(loads.values()) < 0.9 * stored_bytes(tmp_path)


def test_gpus_that_are_too_small_together(tmp_path: Path) -> None:
    build_llama().save_pretrained(tmp_path)
    size = stored_bytes(tmp_path)
    with pytest.raises(DeviceMemoryError, match="too large for the available GPUs") as caught:
        spread_over(tmp_path, torch.float32, {0: size // 3, 1: size // 3})
    assert "GPU 1" in str(caught.value.actual)


def test_one_device_needs_no_map(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_map(tiny_checkpoint, torch.float32) is None  # on a CPU
    monkeypatch.setattr(gpu_maps, "best_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10, 10))
    with pytest.raises(DeviceMemoryError):
        gpu_map(tiny_checkpoint, torch.float32)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert gpu_map(tiny_checkpoint, torch.float32) is None
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert gpu_map(tiny_checkpoint, torch.float32) is None
    monkeypatch.setattr(gpu_maps, "best_device", lambda: torch.device("cuda:1"))
    assert gpu_map(tiny_checkpoint, torch.float32) is None  # that GPU was requested explicitly


@pytest.mark.slow
def test_an_evaluation_uses_the_map_and_reports_it(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(workspace, eval__generate=False)
    run, source = open_run(tmp_path, "eval", recipe)
    expected = evaluate(recipe, source, run, notes := Notes()).document()
    asked = []

    def load(folder: Path, *, dtype: torch.dtype, device_map: dict[str, int]) -> torch.nn.Module:
        asked.append(device_map)
        return load_model(folder, dtype=dtype, device_map=dict.fromkeys(device_map, "cpu"))  # type: ignore[arg-type]

    size = stored_bytes(workspace / "tiny")
    monkeypatch.setattr(
        "mftctl.workflows.evaluation_engines.gpu_map", lambda *found: spread_over(*found, {0: size, 1: size})
    )
    monkeypatch.setattr("mftctl.workflows.evaluation_engines.load_model", load)
    found = evaluate(recipe, source, run, notes).document()
    assert set(asked[0].values()) == {0, 1}
    assert [note for note in notes.notes if "its layers are on 2 GPUs" in note]
    assert found["datasets"][0]["metrics"] == expected["datasets"][0]["metrics"]
