"""Unsupported ZeRO settings are refused by name; results are compared with one process in `test_processes.py`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mftctl.errors import ConfigError
from mftctl.experiments.fft_options import FftOptions
from mftctl.experiments.run_inputs import RunInputs
from mftctl.training.sharding.zero import check_plan
from mftctl.training.updates.optimizers import check_memory_options
from mftctl.workflows.adapted_model import check_adapter


def plugin(stage: int, *, fp16: bool = False) -> SimpleNamespace:
    """A DeepSpeed configuration as accelerate stores it."""
    return SimpleNamespace(zero_stage=stage, hf_ds_config=SimpleNamespace(is_true=lambda key: fp16))


@pytest.mark.parametrize("stage", [2, 3])
def test_supported_plans(stage: int) -> None:
    check_plan(plugin(stage))


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_that_partitions_no_gradients(stage: int) -> None:
    with pytest.raises(ConfigError, match="must shard") as caught:
        check_plan(plugin(stage))
    assert caught.value.actual == stage


def test_a_scaled_loss() -> None:
    with pytest.raises(ConfigError, match="skip steps") as caught:
        check_plan(plugin(2, fp16=True))
    assert caught.value.key == "mixed_precision"


@pytest.mark.parametrize("library", ["DEEPSPEED", "FSDP"])
def test_lora(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{library}", "true")
    with pytest.raises(ConfigError, match="worth sharding") as caught:
        check_adapter(FftOptions(method="lora"), Path(), RunInputs())
    assert caught.value.key == "fft.method"


def test_an_optimizer_that_needs_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="flat tensors") as caught:
        check_memory_options(FftOptions(optimizer="adafactor"), torch.device("cpu"))
    assert caught.value.actual == "adafactor"


@pytest.mark.parametrize("library", ["DEEPSPEED", "FSDP"])
@pytest.mark.parametrize(
    ("options", "key"),
    [({"low_memory": True}, "fft.low_memory"), ({"optimizer": "adamw_8bit"}, "fft.optimizer")],
)
def test_fewer_bits(monkeypatch: pytest.MonkeyPatch, library: str, options: dict[str, Any], key: str) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{library}", "true")
    with pytest.raises(ConfigError, match="require all of them in each process") as caught:
        check_memory_options(FftOptions(**options), torch.device("cpu"))
    assert caught.value.key == key
