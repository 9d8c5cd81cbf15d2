"""The `fft` workflow: supervised fine-tuning of all weights, up to the best validation point."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mftctl.atomic import atomic_folder
from mftctl.config import Recipe
from mftctl.lineage import Source, fine_tuned_state
from mftctl.models import load_model, peak_memory_bytes
from mftctl.preparation import prepare_training
from mftctl.progress import Listener
from mftctl.runs import Run
from mftctl.training import SftTrainer, stop_on_signal, total_steps, train, training_arguments, uses_bf16


def fine_tune(recipe: Recipe, source: Source, run: Run, listener: Listener, *, resume: bool = False) -> dict[str, Any]:
    """The result of fine-tuning: where the model is, and its losses per answer token.

    Args:
        recipe: With the `fft` section, the data and the seed.
        source: The model to start from.
        run: Open run; gets metrics and checkpoints, and the model unless the run has an output elsewhere.
        listener: Hears progress.
        resume: Go on from the newest checkpoint of the run.

    Raises:
        MftError: Anything known that can go wrong.

    Source: MFT, section 2, equation 1. The loss is the mean over all answer tokens of an optimizer step.
    """
    options = recipe.fft
    inputs = prepare_training(recipe, source.model, max_length_tokens=options.max_length_tokens)
    run.update(inputs={**source.as_inputs(), **inputs.summary()})
    # Weights stay in fp32 while they are trained: updates are smaller than what bf16 can hold.
    model = load_model(inputs.checkpoint, dtype=torch.float32)
    steps = total_steps(len(inputs.train), options)
    arguments = training_arguments(
        run.training.checkpoints,
        options,
        steps=steps,
        learning_rate=options.learning_rate,
        seed=recipe.seed,
        bf16=uses_bf16(options.precision),
    )
    arguments.load_best_model_at_end = options.keep == "best"
    trainer = SftTrainer(model, arguments, inputs.train, inputs.validation, inputs.tokenizer, listener)
    with stop_on_signal(listener) as stop:
        train(trainer, run.training, stop, patience=options.patience, resume=resume)
    folder = Path(run.record.output) if run.record.output else run.folder / "model"
    save_model(model, inputs.tokenizer, folder)
    shutil.rmtree(run.training.checkpoints, ignore_errors=True)
    validation = [line["eval_loss"] for line in run.training.metrics() if "eval_loss" in line]
    return {
        "state": fine_tuned_state(source),
        "model": str(folder.resolve()),
        "kept": options.keep,
        "start_loss": trainer.start_loss,
        "best_loss": trainer.state.best_metric,
        "last_loss": validation[-1],
        "best_step": trainer.state.best_global_step,
        "steps": trainer.state.global_step,
        "tokens": int(trainer.state.num_input_tokens_seen),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a checkpoint with its tokenizer, whole or not at all."""
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
