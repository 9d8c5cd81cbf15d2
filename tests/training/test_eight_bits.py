"""An 8-bit checkpoint is trained and written in bf16."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mftctl.experiments.run_folder import load_run
from mftctl.masking.checkpoints.load import load_model
from mftctl.masking.checkpoints.load_weights import stored_dtype
from mftctl.masking.checkpoints.tensors import tensor_index
from mftctl.workflows.fft import fine_tune
from tests.checkpoint_kinds import PROJECTION, in_8_bits
from tests.workflow_fixtures import Interrupter, make_recipe, open_run


@pytest.mark.slow
def test_fine_tuned_checkpoint_is_in_bf16(workspace: Path, tmp_path: Path) -> None:
    source_folder = in_8_bits(workspace / "tiny", tmp_path / "narrow")
    assert stored_dtype(source_folder) == torch.bfloat16
    recipe = make_recipe(workspace, model=str(source_folder), fft__max_steps=1, fft__learning_rate=1e-6)
    run, source = open_run(tmp_path / "runs", "fft", recipe)
    listener = Interrupter(-1)
    fine_tune(recipe, source, run, listener)
    assert sum("stored in 8 bits" in note for note in listener.notes) == 1
    assert "stored in 8 bits" in load_run(run.folder).record.inputs["model_remarks"][0]
    written = run.folder / "model"
    assert {stored.dtype for stored in tensor_index(written).values()} == {"BF16"}
    config = json.loads((written / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    before = load_model(source_folder, dtype=torch.float32).get_parameter(PROJECTION)
    after = load_model(written, dtype=torch.float32).get_parameter(PROJECTION)
    assert torch.allclose(before, after, rtol=0.01, atol=1e-3)
