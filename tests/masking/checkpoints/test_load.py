"""Loading checkpoints, and messages when it fails."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from mftctl.errors import ModelError
from mftctl.masking.checkpoints.load import load_model, load_tokenizer
from mftctl.runtime.peak_memory import peak_memory_bytes, restart_peak_memory


def test_a_model_comes_in_evaluation_mode_and_the_dtype_asked_for(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint, dtype=torch.bfloat16)
    assert not model.training
    assert model.dtype == torch.bfloat16


def test_a_damaged_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(ModelError, match="model cannot be loaded") as caught:
        load_model(tmp_path / "model", dtype=torch.float32)
    assert caught.value.path == str(tmp_path / "model")


def test_a_checkpoint_without_a_tokenizer(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="tokenizer cannot be loaded") as caught:
        load_tokenizer(tmp_path / "model")
    assert "tokenizer.json" in str(caught.value.hint)


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel keeps no such count")
def test_peak_memory_is_reset_for_each_piece_of_work() -> None:
    held = torch.ones(256 << 20, dtype=torch.uint8)
    most = peak_memory_bytes()
    del held
    restart_peak_memory()
    assert peak_memory_bytes() < most - (200 << 20)


def test_peak_memory_grows_with_allocated_memory() -> None:
    before = peak_memory_bytes()
    held = torch.ones(100_000_000, dtype=torch.uint8)
    assert peak_memory_bytes() >= max(before, held.numel())
