"""The `apply` workflow: applies a mask or a delta file to a base model and writes an ordinary checkpoint."""

from __future__ import annotations

from pathlib import Path

from mftctl.errors import ConfigError
from mftctl.experiments.model_origin import origin_of
from mftctl.experiments.model_source import ModelSource
from mftctl.experiments.results import ApplyResult
from mftctl.experiments.run_folder import Run
from mftctl.masking.checkpoints.apply import apply_to_checkpoint
from mftctl.masking.checkpoints.companions import tell_left_out
from mftctl.masking.checkpoints.locate import resolve_checkpoint
from mftctl.masking.delta.apply import apply_delta_to_checkpoint
from mftctl.masking.delta.delta import is_delta_file, open_delta
from mftctl.masking.mask import open_mask
from mftctl.progress import Listener, Progress


def apply(
    source: ModelSource, run: Run, listener: Listener, *, base: str | None = None, replace: bool = False
) -> ApplyResult:
    """Applies a mask or a delta file; returns the folder of the new checkpoint and a summary of what changed.

    Args:
        source: The model and its mask; for a delta mask the tuned model (the mask names its base), for a delta file the
            base.
        run: Open run; the checkpoint is written to its `model/` unless the run has another output path.
        listener: Receives progress updates.
        base: For a delta mask, the model before fine-tuning; by default the one named in the mask.
        replace: Whether to replace a model that mftctl wrote at the run's output path.

    Raises:
        ConfigError: No mask is given.
        MaskFormatError: The mask file is damaged or not a mask file.
        MaskMismatchError: The mask was not made for this model.
        ModelError: A checkpoint cannot be read.
        OutputError: The output path holds something that may not be replaced.
    """
    if source.mask is None:
        raise ConfigError("apply needs a mask.", key="MASK", expected="a mask file", actual="none")
    path = Path(source.mask)
    folder = Path(run.record.output) if run.record.output else run.folder / "model"
    # Anything in the run's own folder was written by the run itself.
    replace = replace or run.record.output is None
    if is_delta_file(path):
        return _apply_delta(path, source, folder, listener, replace=replace)
    with open_mask(path) as mask:
        metadata = mask.metadata
        is_delta = metadata.kind == "delta"
        base_model = (base or metadata.base_model) if is_delta else source.model
        done = apply_to_checkpoint(
            resolve_checkpoint(base_model, metadata.base_revision),
            mask,
            folder,
            tuned=resolve_checkpoint(source.model, metadata.tuned_revision) if is_delta else None,
            mask_path=path,
            base_model=base_model,
            on_progress=lambda done, total: listener.progress(Progress("writing", done, total)),
            replace=replace,
            origin=origin_of(source.state, source.model, source.origin).as_document(),
        )
    tell_left_out(done.left_out, listener)
    return ApplyResult(
        state=source.state,
        model=str(folder.resolve()),
        base=base_model,
        bytes_written=done.bytes_written,
        tensors_masked=done.tensors_masked,
        removed=done.removed,
        changed=None,
    )


def _apply_delta(path: Path, source: ModelSource, folder: Path, listener: Listener, *, replace: bool) -> ApplyResult:
    with open_delta(path) as delta:
        base = resolve_checkpoint(source.model, delta.contents.metadata.base.revision)
        done = apply_delta_to_checkpoint(
            base,
            delta,
            folder,
            base_model=source.model,
            on_progress=lambda done, total: listener.progress(Progress("writing", done, total)),
            replace=replace,
            origin=origin_of(source.state, source.model, source.origin).as_document(),
        )
        tensors = delta.contents.tensors.values()
    tell_left_out(done.left_out, listener)
    return ApplyResult(
        state=source.state,
        model=str(folder.resolve()),
        base=source.model,
        bytes_written=done.bytes_written,
        tensors_masked=len(tensors),
        removed=sum(record.removed for record in tensors),
        changed=sum(record.kept for record in tensors),
    )
