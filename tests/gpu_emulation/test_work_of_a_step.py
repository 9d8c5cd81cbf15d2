"""Work that a training step gives a GPU, as counts of kernels and host synchronisations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mftctl.masking import device_selection
from mftctl.workflows.fft import fine_tune
from mftctl.workflows.mask_train import mask_train
from mftctl.workflows.planning.memory_check import RoomOnGpu
from tests.conftest import build_llama
from tests.gpu_emulation.counting import StepsCounted, counted_work
from tests.gpu_emulation.emulated_gpu import emulated_gpu
from tests.workflow_fixtures import make_recipe, open_run

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")

WAITS = 8
"""Of any step: the answer tokens, the loss and the norm of the gradient for the log."""
WAITS_A_TENSOR = 2
PROJECTIONS, TENSORS = 7, 9
"""Of a layer."""
KERNELS_A_LAYER = 150
"""Of a forward and a backward pass, and an optimizer that is not fused."""


@pytest.fixture(autouse=True)
def small_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes selection treat tensors of 8,000 entries like those of millions."""
    for name, value in {"_SORT_ALL": 1 << 10, "_STRIDE": 7, "_INSIDE_SHARE": 4}.items():
        monkeypatch.setattr(device_selection, name, value)


@pytest.fixture(autouse=True)
def no_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves time: what precedes the first step is not counted."""
    monkeypatch.setattr(RoomOnGpu, "require", lambda *_, **__: None)


def work_of_a_step(workspace: Path, root: Path, layers: int, command: str, changes: dict[str, Any]) -> tuple[int, int]:
    """Kernels and waits of the second training step, in which no loss is measured."""
    section = command.replace("-", "_")
    folder = root / "model"
    build_llama(layers=layers, hidden_size=128, intermediate_size=256).save_pretrained(folder)
    for file in (workspace / "tiny").iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    steps = {f"{section}__max_steps": 2, f"{section}__val_steps": 2, f"{section}__batch_size": 1}
    recipe = make_recipe(
        workspace, model=str(folder), **steps, **{f"{section}__{key}": changes[key] for key in changes}
    )
    with emulated_gpu(), counted_work() as work:
        listener = StepsCounted(work)
        run, source = open_run(root, command, recipe)
        {"fft": fine_tune, "mask-train": mask_train}[command](recipe, source, run, listener)
        kernels, waits = listener.of_step(2)
    return kernels.total(), waits.total()


MASKS: dict[str, tuple[dict[str, Any], int, int]] = {
    "default": ({"preset": "default"}, 0, 0),
    "low memory": ({"preset": "default", "low_memory": True}, 0, 50),
    "paper": ({"preset": "paper"}, WAITS_A_TENSOR, 60),
    "low memory, ratio": ({"preset": "paper", "low_memory": True}, WAITS_A_TENSOR, 140),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "name"), [(2, "default"), (2, "low memory"), (2, "paper"), (2, "low memory, ratio"), (8, "paper")]
)
def test_mask_train(workspace: Path, tmp_path: Path, layers: int, name: str) -> None:
    changes, waits, kernels = MASKS[name]
    found = work_of_a_step(workspace, tmp_path, layers, "mask-train", {**changes, "layers": "all"})
    assert found[0] <= 100 + (KERNELS_A_LAYER + PROJECTIONS * kernels) * layers
    assert found[1] <= WAITS + PROJECTIONS * waits * layers


TUNINGS: dict[str, tuple[dict[str, Any], int, int]] = {
    "full": ({}, 0, 0),
    "gmt": ({"method": "gmt", "ratio": 0.2}, WAITS_A_TENSOR, 60),
    "gmt, global": ({"method": "gmt", "ratio": 0.2, "scope": "global"}, 1, 45),
    "random": ({"method": "random", "ratio": 0.2}, WAITS_A_TENSOR, 85),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "name"), [(2, "full"), (2, "gmt"), (2, "gmt, global"), (2, "random"), (8, "gmt, global")]
)
def test_fft(workspace: Path, tmp_path: Path, layers: int, name: str) -> None:
    changes, waits, kernels = TUNINGS[name]
    found = work_of_a_step(workspace, tmp_path, layers, "fft", changes)
    assert found[0] <= 300 + (KERNELS_A_LAYER + TENSORS * kernels) * layers
    assert found[1] <= WAITS + 4 + TENSORS * waits * layers
