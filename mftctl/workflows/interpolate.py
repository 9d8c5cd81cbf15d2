"""The `interpolate` workflow: chooses by validation how far to go from a model to the one fine-tuned from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mftctl.errors import ConfigError, OutputError, TrainingError
from mftctl.experiments.combined_results import InterpolateResult, ShareLoss
from mftctl.experiments.model_origin import origin_of
from mftctl.experiments.model_source import ModelSource, known_base
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.run_device import device_for
from mftctl.experiments.run_folder import Run
from mftctl.experiments.state_names import INTERPOLATED
from mftctl.masking.checkpoints.combined_card import write_interpolated_card
from mftctl.masking.checkpoints.companions import tell_left_out
from mftctl.masking.checkpoints.interpolate import changed_tensors, go_to, parameters_of, write_interpolated
from mftctl.masking.checkpoints.load import evaluation_dtype, load_model
from mftctl.masking.checkpoints.locate import resolve_checkpoint
from mftctl.masking.checkpoints.pairing import TensorPair
from mftctl.progress import Listener, Progress
from mftctl.runtime.peak_memory import peak_memory_bytes, restart_peak_memory
from mftctl.training.held_out import validation_loss
from mftctl.training.inputs import TrainingInputs, prepare_training


def interpolate(
    recipe: Recipe, source: ModelSource, run: Run, listener: Listener, *, may_replace: bool = False
) -> InterpolateResult:
    """Measures the models between the base and the fine-tuned model, and writes the one with the lowest loss.

    Nothing is trained. The validation records are those of `fft`, and so is their maximum length. The loss on data to
    retain is measured too, but does not decide.

    Args:
        recipe: Provides the `interpolate` section, the data and the seed.
        source: The fine-tuned model.
        run: Open run; receives metrics, and the model unless the run has another output path.
        listener: Receives progress updates.
        may_replace: Whether to replace a model that mftctl wrote at the run's output path.

    Raises:
        ConfigError: The model before fine-tuning is unknown, the source has a mask, or the recipe names no data.
        DataError: A data file or record cannot be used.
        MaskMismatchError: The two models do not have the same tensors.
        ModelError: A model cannot be loaded.
        TrainingError: No share gives a finite loss.
        DeviceMemoryError: The GPU runs out of memory.

    Source: WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903), section 3, with shares beyond 1.
    """
    base_model = known_base(source, recipe.interpolate.base, key="interpolate.base", what="interpolate")
    if source.mask is not None:
        raise ConfigError(
            "interpolate needs a checkpoint without a separate mask.",
            key="model",
            expected="a fine-tuned model, or a model that a mask was applied to",
            actual=source.mask,
            hint="mftctl apply first",
        )
    length = recipe.fft.max_length_tokens
    with device_for(
        run,
        listener,
        less_memory=[f"fft.max_length_tokens below {length}"],
        device=recipe.device,
        attention=recipe.attention,
    ):
        restart_peak_memory()
        inputs = prepare_training(
            recipe, source.model, max_length_tokens=length, retain_weight=0.0, now=run.started, listener=listener
        )
        run.update(inputs={**source.as_inputs(), **inputs.summary()})
        ends = _Ends(base_model, resolve_checkpoint(base_model), source, inputs)
        pairs = changed_tensors(ends.base, inputs.checkpoint)
        losses = _losses(recipe.interpolate.shares, pairs, inputs, run, listener)
        kept = _lowest(losses, run)
        folder, refused = _save(kept, pairs, ends, run, listener, may_replace=may_replace)
        return InterpolateResult(
            state=INTERPOLATED,
            model=str(folder.resolve()),
            output_refused=refused,
            base=base_model,
            share=kept.share,
            best_loss=kept.loss,
            losses=losses,
            tensors=len(pairs),
            peak_memory_bytes=peak_memory_bytes(),
        )


@dataclass(frozen=True, slots=True)
class _Ends:
    """The two models between which to interpolate.

    Attributes:
        base_model: Name of the model before fine-tuning.
        base: Its folder.
        source: The fine-tuned model.
        inputs: Its folder and the data.
    """

    base_model: str
    base: Path
    source: ModelSource
    inputs: TrainingInputs


def _losses(
    shares: Sequence[float],
    pairs: Sequence[TensorPair],
    inputs: TrainingInputs,
    run: Run,
    listener: Listener,
) -> list[ShareLoss]:
    """The losses at each share, in the given order; the model is loaded once."""
    run.training.rewind(-1)  # a run started again repeats all of them
    model = load_model(inputs.checkpoint, dtype=evaluation_dtype(inputs.checkpoint))
    parameters = parameters_of(model, pairs)
    found = []
    for number, share in enumerate(shares):
        go_to(share, parameters, pairs)
        entry = ShareLoss(share=share, loss=validation_loss(model, inputs, listener))
        told = f"Share {share:g}: validation loss {entry.loss:.4f}"
        line = {"step": number, "share": share, "eval_loss": entry.loss}
        if inputs.retained is not None:
            loss = validation_loss(model, replace(inputs, validation=inputs.retained.measured), listener)
            entry = entry.model_copy(update={"retained_loss": loss})
            line["retained_loss"] = loss
            told += f", retained loss {loss:.4f}"
        run.training.log(line)
        listener.note(told)
        found.append(entry)
    return found


def _lowest(losses: Sequence[ShareLoss], run: Run) -> ShareLoss:
    """The share with the lowest loss; of equal ones, the one closest to 1, then the larger."""
    finite = [entry for entry in losses if math.isfinite(entry.loss)]
    if not finite:
        raise TrainingError(
            "No share gives a finite validation loss.",
            path=run.folder,
            key="interpolate.shares",
            expected="a finite loss for at least one share",
            actual=", ".join(f"{entry.share:g}: {entry.loss}" for entry in losses),
            hint="use a checkpoint from before training diverged",
        )
    return min(finite, key=lambda entry: (entry.loss, abs(entry.share - 1), -entry.share))


def _save(
    kept: ShareLoss, pairs: Sequence[TensorPair], ends: _Ends, run: Run, listener: Listener, *, may_replace: bool
) -> tuple[Path, str | None]:
    """Writes the model to the run's output path, or to the run folder if that path has since been taken.

    Returns:
        Its folder, and the reason why it is not at the output path.
    """
    own = run.folder / "model"
    if run.record.output is None:
        _write(kept, pairs, ends, own, listener, replace=True)
        return own, None
    output = Path(run.record.output)
    try:
        _write(kept, pairs, ends, output, listener, replace=may_replace)
    except OutputError as error:
        _write(kept, pairs, ends, own, listener, replace=True)
        return own, str(error)
    return output, None


def _write(
    kept: ShareLoss, pairs: Sequence[TensorPair], ends: _Ends, folder: Path, listener: Listener, *, replace: bool
) -> None:
    model, records = ends.source.model, len(ends.inputs.validation)
    written = write_interpolated(
        kept.share,
        pairs,
        ends.base,
        ends.inputs.checkpoint,
        folder,
        card=write_interpolated_card(ends.base_model, model, share=kept.share, loss=kept.loss, records=records),
        on_progress=lambda done, total: listener.progress(Progress("writing", done, total)),
        replace=replace,
        origin=origin_of(INTERPOLATED, model, ends.source.origin).as_document(),
    )
    tell_left_out(written.left_out, listener)
