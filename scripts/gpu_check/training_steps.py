"""Measures mask-training and fine-tuning steps on random models: time, and peak memory with its estimate."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mftctl.experiments.model_source import ModelSource
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import parse_recipe
from mftctl.experiments.run_config import to_document
from mftctl.experiments.run_device import device_for
from mftctl.experiments.run_folder import Run, create_run
from mftctl.masking.targets import find_targets, parse_layers
from mftctl.progress import Silence
from mftctl.runtime.peak_memory import free_unreachable, peak_memory_bytes, restart_peak_memory
from mftctl.runtime.stop_request import stop_on_signal
from mftctl.training.held_out import confirm, split_validation_records, validation_loss
from mftctl.training.learn_mask import learn_mask
from mftctl.training.loop import train
from mftctl.training.mask_search import MaskSearch
from mftctl.workflows import fft
from scripts.gpu_check.estimates import estimated_peak_gb
from scripts.gpu_check.findings import Check, Finding, Measurement
from scripts.gpu_check.measuring import GB
from scripts.gpu_check.random_models import in_place_of_checkpoints, random_inputs, random_model
from scripts.gpu_check.scale import Scale, Shape

_ACCUMULATION = 2

MASKS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"preset": "paper"},
    "all layers, low memory": {"layers": "all", "low_memory": True},
}
TUNINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"method": "lora", "learning_rate": 1e-4},
    "gmt": {"method": "gmt"},
}


def mask_steps(scale: Scale) -> Iterator[Finding]:
    """Trains and confirms masks of the large model."""
    for name, changes in MASKS.items():
        yield from mask_training(scale, scale.large, f"mask-train, {name}", changes)


def tuning_steps(scale: Scale) -> Iterator[Finding]:
    """Fine-tunes the small model."""
    for name, changes in TUNINGS.items():
        yield from fine_tuning_steps(scale, scale.small, f"fft, {name}", changes)


def low_memory_tuning(scale: Scale) -> Iterator[Finding]:
    """Fine-tunes all weights of the large model at 8 bytes per weight."""
    yield from fine_tuning_steps(scale, scale.large, "fft --low-memory", {"low_memory": True})


def mask_training(scale: Scale, shape: Shape, name: str, changes: dict[str, Any]) -> Iterator[Finding]:
    """Trains masks and confirms the result.

    Args:
        scale: Sizes.
        shape: Shape of the model.
        name: Name of the training run.
        changes: Keys of the `mask_train` section.
    """
    recipe = _recipe(scale, "mask_train", {"layers": scale.masked_layers, "learning_rate": 1e-3, **changes})
    options = recipe.mask_train
    inputs = random_inputs(scale, shape, _ACCUMULATION)
    layers = parse_layers(options.layers or "all", shape.num_hidden_layers)
    estimate = estimated_peak_gb(shape, options, inputs, layers)
    with _run("mask-train", recipe) as run, in_place_of_checkpoints(shape, emulated=scale.rehearses):
        free_unreachable()  # memory of the previous training run
        restart_peak_memory()
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
        model = random_model(shape, dtype, emulated=scale.rehearses)
        targets = find_targets(model, layers, options.target)
        _, confirming = split_validation_records(inputs.validation, options)
        loss = validation_loss(model, inputs, Silence())
        search = MaskSearch(
            model, targets, options, inputs, run.training, Silence(), loss, 2e-5, recipe.seed, resume=False
        )
        with device_for(run, Silence(), less_memory=[]):
            found = learn_mask(search)
            yield from _speed(name, run, scale)
            yield Measurement(f"{name}: peak", peak_memory_bytes() / GB, "GB", estimate)
            confirmation = confirm(search, found.mask, confirming)
        yield Measurement(f"{name}: change in loss at confirmation", confirmation.change)
        yield Check(f"{name}: the mask is measured", math.isfinite(confirmation.change))


def fine_tuning_steps(scale: Scale, shape: Shape, name: str, changes: dict[str, Any]) -> Iterator[Finding]:
    """Runs fine-tuning steps as the `fft` command does.

    Args:
        scale: Sizes.
        shape: Shape of the model.
        name: Name of the training run.
        changes: Keys of the `fft` section.
    """
    recipe = _recipe(scale, "fft", {"gradient_checkpointing": True, "keep": "last", **changes})
    options = recipe.fft
    inputs = random_inputs(scale, shape, _ACCUMULATION)
    estimate = estimated_peak_gb(shape, options, inputs)
    with _run("fft", recipe) as run, in_place_of_checkpoints(shape, emulated=scale.rehearses):
        free_unreachable()  # memory of the previous training run
        restart_peak_memory()
        with device_for(run, Silence(), less_memory=[]):
            model = fft._trainable_model(inputs, ModelSource("quickstart"), options, recipe.seed, Silence())
            trainer = fft._trainer(model, inputs, recipe, run, Silence())
            with stop_on_signal(Silence()) as stop:
                train(trainer, run.training, stop, patience=None, resume=False)
        yield from _speed(name, run, scale)
        yield Measurement(f"{name}: peak", peak_memory_bytes() / GB, "GB", estimate)


def step_seconds(run: Run) -> float:
    """The median time of all steps but the first."""
    found = [line.step_seconds for line in run.training.metrics() if line.step_seconds is not None]
    return float(median(found[1:] or found))


def _speed(name: str, run: Run, scale: Scale) -> Iterator[Measurement]:
    seconds = step_seconds(run)
    tokens = scale.records * scale.length_tokens * _ACCUMULATION
    yield Measurement(f"{name}: step", 1000 * seconds, "ms")
    yield Measurement(f"{name}: speed", tokens / seconds, "tokens/s")


def _recipe(scale: Scale, section: str, changes: dict[str, Any]) -> Recipe:
    training = {
        "max_steps": scale.steps,
        "val_steps": scale.steps,
        "batch_size": scale.records,
        "grad_accum_steps": _ACCUMULATION,
        "max_length_tokens": scale.length_tokens,
    }
    return parse_recipe({"model": "quickstart", "data": "quickstart", section: {**training, **changes}})


@contextmanager
def _run(command: str, recipe: Recipe) -> Iterator[Run]:
    with tempfile.TemporaryDirectory() as folder:
        yield create_run(Path(folder), command, to_document(recipe), inputs=ModelSource("quickstart").as_inputs())
