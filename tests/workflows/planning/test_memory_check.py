"""The check before loading weights stops if GPU memory is insufficient, and how to override it."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from mftctl.errors import DeviceMemoryError
from mftctl.progress import Silence
from mftctl.training.inputs import prepare_training
from mftctl.workflows.planning.memory_check import room_on_gpu
from tests.gpu_emulation.emulated_gpu import emulated_gpu
from tests.vision_models import write_image_records
from tests.workflow_fixtures import make_recipe


class Notes(Silence):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.slow
def test_too_little_memory_is_one_error_before_anything_is_loaded(workspace: Path) -> None:
    recipe = make_recipe(workspace)
    inputs = prepare_training(recipe, str(recipe.model), max_length_tokens=recipe.fft.max_length_tokens)
    with (
        emulated_gpu(),
        mock.patch("torch.cuda.mem_get_info", return_value=(100_000, 100_000)),
        room_on_gpu("fft", recipe, Silence()) as room,
    ):
        with pytest.raises(DeviceMemoryError, match="estimated memory for this fft") as caught:
            room.require(inputs)
        assert "--no-check-memory" in str(caught.value.hint)
        room_on = make_recipe(workspace, check_memory=False)
        with room_on_gpu("fft", room_on, Silence()) as regardless:
            regardless.require(inputs)


@pytest.mark.slow
def test_a_lack_of_memory_is_reported_with_options(workspace: Path) -> None:
    recipe = make_recipe(workspace)
    inputs = prepare_training(recipe, str(recipe.model), max_length_tokens=recipe.fft.max_length_tokens)

    def run_out() -> None:
        with emulated_gpu(), room_on_gpu("fft", recipe, Silence()) as room:
            room.require(inputs)
            raise DeviceMemoryError("The GPU ran out of memory.")

    with pytest.raises(DeviceMemoryError) as caught:
        run_out()
    assert "--batch-size" in str(caught.value.hint)


@pytest.mark.slow
def test_images_count_as_tokens_and_the_rest_is_told(vision_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    data = [str(write_image_records(tmp_path))]
    recipe = make_recipe(tmp_path, model=str(vision_checkpoints["llava"]), data=data, val_data=data)
    inputs = prepare_training(recipe, str(recipe.model), max_length_tokens=recipe.fft.max_length_tokens)
    listener = Notes()
    with emulated_gpu(), room_on_gpu("fft", recipe, listener) as room:
        room.require(inputs)
        [note] = listener.notes
        assert "estimated without the vision tower's work on images" in note
        with (
            mock.patch("torch.cuda.mem_get_info", return_value=(100_000, 100_000)),
            pytest.raises(DeviceMemoryError, match="estimated memory for this fft"),
        ):
            room.require(inputs)
