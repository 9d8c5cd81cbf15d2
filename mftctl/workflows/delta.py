"""The `delta` workflow: stores what fine-tuning changed in a model as a small file."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from mftctl.errors import ConfigError, OutputError
from mftctl.experiments.combined_results import DeltaResult, KeptDelta
from mftctl.experiments.model_source import ModelSource, known_base
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.run_folder import Run
from mftctl.experiments.state_names import delta_state
from mftctl.files.atomic import copy_file
from mftctl.masking.checkpoints.locate import resolve_checkpoint
from mftctl.masking.delta.document import DeltaContents
from mftctl.masking.delta.make import DeltaPlan, make_delta
from mftctl.masking.delta.records import NamedModel
from mftctl.masking.delta.selection import Select, Selection
from mftctl.masking.delta.spool import delta_permit
from mftctl.masking.mask import Mask, open_mask
from mftctl.progress import Listener, Progress
from mftctl.runtime.peak_memory import peak_memory_bytes, restart_peak_memory

DELTA_FILE = "change.delta"
"""Name of the delta file in a run folder, and of the default output."""


def store_delta(
    recipe: Recipe, source: ModelSource, run: Run, listener: Listener, *, may_replace: bool = False
) -> DeltaResult:
    """Stores a fine-tuning as a delta file; returns its paths and a summary.

    Args:
        recipe: With the `delta` section.
        source: The fine-tuned model; a delta mask on it decides for the tensors in it, unless the recipe names one.
            With `select` learned or fisher, the recipe's data decides.
        run: Open run; receives the file, which is also copied to the run's output path.
        listener: Receives progress updates.
        may_replace: Whether to replace a delta file at the run's output path.

    Raises:
        ConfigError: The model before fine-tuning is unknown, or a mask is given together with rescaling.
        MaskMismatchError: The checkpoints do not match, or have the same weights.
        MaskFileError: The mask cannot be used, or the file cannot be written.
        MaskingError: Nothing would be stored, or a changed weight is not finite.
        ModelError: A checkpoint cannot be read.
    """
    restart_peak_memory()
    options = recipe.delta
    base = known_base(source, options.base, key="delta.base", what="A delta file")
    run.update(inputs=source.as_inputs())
    mask_path = options.mask or source.mask
    with ExitStack() as files:
        mask = None if mask_path is None else files.enter_context(open_mask(mask_path))
        if options.needs_data:
            mask = _mask_by_data(recipe, source, base, run, listener)
        contents = make_delta(
            resolve_checkpoint(base),
            resolve_checkpoint(source.model, recipe.revision),
            run.folder / DELTA_FILE,
            _plan(recipe, mask, mask_path),
            base_model=NamedModel(base),
            tuned_model=NamedModel(source.model, recipe.revision),
            run_id=run.name,
            on_progress=lambda done, total: listener.progress(Progress("comparing", done, total)),
        )
    kept = keep_delta(contents, delta_state(options), base, run, may_replace=may_replace)
    _tell_left_out(contents, listener)
    return DeltaResult(**kept.document(), tuned=source.model, peak_memory_bytes=peak_memory_bytes())


def keep_delta(contents: DeltaContents, state: str, base: str, run: Run, *, may_replace: bool) -> KeptDelta:
    """Copies the delta file of a run to its output path; returns both paths and a summary.

    Args:
        contents: What the document of the file says.
        state: Label of the state of the base with the changes.
        base: The model that the file changes.
        run: Open run with the file, with or without an output path.
        may_replace: Whether to replace a delta file at the output path.
    """
    path = run.folder / DELTA_FILE
    output, refused = run.record.output, None
    if output is not None:
        try:
            copy_file(path, Path(output), delta_permit(replace=may_replace))
        except OutputError as error:
            output, refused = None, str(error)
    return KeptDelta(
        state=state,
        model=base,
        mask=str(path.resolve()),
        output=output,
        output_refused=refused,
        file_bytes=path.stat().st_size,
        checkpoint_bytes=contents.base_bytes,
        tensors=len(contents.tensors),
        weights=sum(record.weights for record in contents.tensors.values()),
        kept=sum(record.kept for record in contents.tensors.values()),
        values=contents.metadata.values,
        left_out={name: one.reason for name, one in contents.left_out.items()},
        files=list(contents.files),
    )


def _mask_by_data(recipe: Recipe, source: ModelSource, base: str, run: Run, listener: Listener) -> Mask:
    from mftctl.workflows.delta_masks import fisher_mask, learned_mask  # the trainer takes seconds to import

    if source.mask is not None or not recipe.data:
        raise ConfigError(
            f"--select {recipe.delta.select} chooses the changes by their effect on data.",
            key="delta.select",
            expected="data, and a fine-tuned model without a mask",
            actual="a mask" if source.mask is not None else "no data",
            hint="--data FILE" if source.mask is None else "name the fine-tuned model itself",
        )
    make = learned_mask if recipe.delta.select == "learned" else fisher_mask
    return make(recipe, source, base, run, listener)


def _plan(recipe: Recipe, mask: Mask | None, mask_path: str | None) -> DeltaPlan:
    options = recipe.delta
    if mask is not None and options.rescale:
        raise ConfigError(
            "With a mask, changes are rescaled if the mask says so.",
            key="delta.rescale",
            expected="false, with a mask",
            actual="true",
            hint="mask-train --method drop --strategy random --rescale makes a mask that rescales",
        )
    select: Select = "random" if options.select == "random" else "trivial"
    name = options.select if options.needs_data else None
    selection = Selection(options.ratio, select, recipe.seed, mask, options.codec, name)
    return DeltaPlan(selection, options.values, options.rescale, options.exclude, Path(mask_path or ""))


def _tell_left_out(contents: DeltaContents, listener: Listener) -> None:
    for reason, text in (("excluded", "as requested"), ("dropped", "because the ratio keeps none of their entries")):
        names = [name for name, one in contents.left_out.items() if one.reason == reason]
        if names:
            more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            listener.note(f"Changes left out, {text}: {names[0]}{more}")
