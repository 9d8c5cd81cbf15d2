"""Memory estimates compared with counted bytes of real trainings: several families, every kind of training."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from mftctl.experiments.recipe import Recipe
from mftctl.masking.checkpoints.meta_models import count_layers, read_config
from mftctl.progress import Silence
from mftctl.training import learn_mask
from mftctl.training.held_out import split_validation_records
from mftctl.training.inputs import prepare_training
from mftctl.workflows import fft
from mftctl.workflows.fft import fine_tune
from mftctl.workflows.mask_train import mask_train
from mftctl.workflows.planning.allocation_meter import AllocationMeter, add_up
from mftctl.workflows.planning.command_memory import CommandMemory
from mftctl.workflows.planning.planned_device import PlannedDevice
from tests.conftest import build_llama, build_tokenizer
from tests.gpu_emulation.emulated_gpu import emulated_gpu
from tests.masking.architectures import build
from tests.masking.built_checkpoints import write_tuned
from tests.workflow_fixtures import make_recipe, open_run

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")

_SHORT = {"max_steps": 2, "val_steps": 2, "batch_size": 4}
_SIZES = {
    "layers": 3,
    "vocab_size": 102,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "full": ("llama", "fft", {}),
    "full, accumulation": ("llama", "fft", {"grad_accum_steps": 2}),
    "full, bf16": ("llama", "fft", {"precision": "bf16"}),
    "full, checkpointing": ("llama", "fft", {"gradient_checkpointing": True}),
    "sgd": ("llama", "fft", {"optimizer": "sgd"}),
    "sgd, decay": ("llama", "fft", {"optimizer": "sgd", "weight_decay": 0.1}),
    "rmsprop": ("llama", "fft", {"optimizer": "rmsprop"}),
    "adagrad": ("llama", "fft", {"optimizer": "adagrad"}),
    "adafactor": ("llama", "fft", {"optimizer": "adafactor"}),
    "hft": ("llama", "fft", {"method": "hft"}),
    "lora": ("llama", "fft", {"method": "lora", "lora_rank": 4}),
    "lora, experts": ("mixtral", "fft", {"method": "lora", "lora_rank": 4, "lora_experts": True}),
    "shira": ("llama", "fft", {"method": "shira", "lora_rank": 4}),
    "supertuning": ("llama", "fft", {"method": "supertuning", "ratio": 0.9}),
    "supertuning, bf16": ("llama", "fft", {"method": "supertuning", "ratio": 0.9, "precision": "bf16"}),
    "supertuning, checkpointing": (
        "llama",
        "fft",
        {"method": "supertuning", "ratio": 0.9, "gradient_checkpointing": True},
    ),
    "gmt": ("llama", "fft", {"method": "gmt"}),
    "gmt, momentum": ("llama", "fft", {"method": "gmt", "unselected": "momentum"}),
    "random, global": ("llama", "fft", {"method": "random", "scope": "global"}),
    "gpt2": ("gpt2", "fft", {}),
    "gemma3": ("gemma3", "fft", {}),
    "qwen3": ("qwen3", "fft", {}),
    "mixtral": ("mixtral", "fft", {}),
    "mask": ("llama", "mask-train", {"preset": "default"}),
    "mask, paper": ("llama", "mask-train", {"preset": "paper"}),
    "mask, low memory": ("llama", "mask-train", {"preset": "default", "low_memory": True}),
    "mask, low memory, paper": ("llama", "mask-train", {"preset": "paper", "low_memory": True}),
    "mask, checkpointing": ("llama", "mask-train", {"preset": "default", "gradient_checkpointing": True}),
    "mask, gpt2": ("gpt2", "mask-train", {"preset": "paper"}),
    "mask, mixtral": ("mixtral", "mask-train", {"preset": "paper"}),
    "mask, delta": ("llama", "mask-train", {"preset": "default", "kind": "delta"}),
    "mask, delta, low memory": ("llama", "mask-train", {"preset": "default", "kind": "delta", "low_memory": True}),
    "mask, delta, mixtral": ("mixtral", "mask-train", {"preset": "paper", "kind": "delta"}),
    "gpu: mask": ("llama", "mask-train", {"preset": "default"}),
    "gpu: mask, low memory": ("llama", "mask-train", {"preset": "default", "low_memory": True}),
    "gpu: sgd": ("llama", "fft", {"optimizer": "sgd"}),
    "gpu: rmsprop": ("llama", "fft", {"optimizer": "rmsprop"}),
    "gpu: adafactor": ("llama", "fft", {"optimizer": "adafactor"}),
}
_LOWEST, _HIGHEST = 0.97, 1.08
"""Of estimate to count: measured 0.999 to 1.062. Commands are stopped where 0.85 of the estimate does not fit."""


@pytest.fixture(scope="module")
def ratios() -> Iterator[dict[str, float]]:
    """Estimate divided by count for every case that ran."""
    found: dict[str, float] = {}
    yield found
    if found:
        low, middle, high = min(found.values()), statistics.median(found.values()), max(found.values())
        print(f"\nestimate / count of {len(found)}: min {low:.3f}, median {middle:.3f}, max {high:.3f}")  # noqa: T201


def _recipe(workspace: Path, folder: Path, family: str, command: str, options: dict[str, Any]) -> Recipe:
    if family == "llama":
        build_llama(**_SIZES).save_pretrained(folder / family)
    else:
        build(family).save_pretrained(folder / family)
    build_tokenizer().save_pretrained(folder / family)
    if options.get("kind") == "delta":
        options = {**options, "base": str(write_tuned(folder / family, folder / "base"))}
    # All of the same length, so that a largest batch also coincides with existing optimizer moments.
    record = json.dumps({"question": "12+30? ", "answer": "12+30\n#### 42"}) + "\n"
    for name, count in (("train", 8), ("val", 8)):
        (folder / f"{name}.jsonl").write_text(record * count, encoding="utf-8")
    data = {"data": [str(folder / "train.jsonl")], "val_data": [str(folder / "val.jsonl")]}
    section = "fft" if command == "fft" else "mask_train"
    changes = {f"{section}__{key}": value for key, value in {**_SHORT, **options}.items()}
    return make_recipe(workspace, model=str(folder / family), mask_train__layers="all", **data, **changes)


@contextmanager
def _counting(module: Any) -> Iterator[list[int]]:
    """Appends the peak live bytes of each training inside the block, including the model."""
    peaks: list[int] = []
    train = module.train

    def counted(trainer: Any, *args: Any, **kwargs: Any) -> None:
        own = {*trainer.model.parameters(), *trainer.model.buffers()}
        with AllocationMeter(own) as meter:
            train(trainer, *args, **kwargs)
        peaks.append(sum(item.numel() * item.element_size() for item in own) + add_up(meter.events).peak_bytes)

    with mock.patch.object(module, "train", counted):
        yield peaks


@pytest.mark.slow
@pytest.mark.parametrize("name", _CASES)
def test_estimates_are_close_to_the_counts(
    name: str, workspace: Path, tmp_path: Path, ratios: dict[str, float]
) -> None:
    family, command, options = _CASES[name]
    recipe = _recipe(workspace, tmp_path, family, command, options)
    on_gpu = name.startswith("gpu")
    config = read_config(str(recipe.model))
    inputs = prepare_training(recipe, str(recipe.model), max_length_tokens=recipe.fft.max_length_tokens)
    validation = inputs.validation
    if command == "mask-train":
        validation = split_validation_records(validation, recipe.mask_train)[0]
    device = PlannedDevice("cuda" if on_gpu else "cpu", has_bf16=False)
    memory = CommandMemory(
        command, config, count_layers(config), device, train=inputs.train, validation=validation, seed=recipe.seed
    )
    estimate = memory.estimate(recipe).peak_bytes
    work, module = (fine_tune, fft) if command == "fft" else (mask_train, learn_mask)
    run, source = open_run(tmp_path / "runs", command, recipe)
    with emulated_gpu() if on_gpu else nullcontext(), _counting(module) as peaks:
        work(recipe, source, run, Silence())
    ratios[name] = estimate / peaks[0]
    print(f"{name}: {estimate:,} / {peaks[0]:,} = {ratios[name]:.3f}")  # noqa: T201
    assert _LOWEST <= ratios[name] <= _HIGHEST
    assert torch.is_grad_enabled()
