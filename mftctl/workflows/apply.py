"""The `apply` workflow: writes base and mask as one normal checkpoint."""

from __future__ import annotations

from pathlib import Path

from mftctl.errors import ConfigError
from mftctl.experiments.model_origin import origin_of
from mftctl.experiments.model_source import Source
from mftctl.experiments.results import ApplyResult
from mftctl.experiments.run_folder import Run
from mftctl.masking.checkpoints.apply import apply_to_checkpoint
from mftctl.masking.checkpoints.locate import resolve_checkpoint
from mftctl.masking.mask import open_mask
from mftctl.progress import Listener, Progress


def apply(
    source: Source, run: Run, listener: Listener, *, base: str | None = None, replace: bool = False
) -> ApplyResult:
    """The result of applying a mask: the folder of the new checkpoint and what was removed.

    Args:
        source: The model and its mask; for a delta mask the tuned model, whose base the mask names.
        run: Open run; gets the checkpoint as `model/` unless the run has an output elsewhere.
        listener: Hears progress.
        base: For a delta mask: the model before fine-tuning; by default the one that the mask names.
        replace: Whether a model of mftctl at the run's output is replaced.

    Raises:
        MftError: Anything known that can go wrong.
    """
    if source.mask is None:
        raise ConfigError("apply needs a mask.", key="MASK", expected="a mask file", actual="none")
    path = Path(source.mask)
    folder = Path(run.record.output) if run.record.output else run.folder / "model"
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
            # What is in the run's own folder can only be its own.
            replace=replace or run.record.output is None,
            origin=origin_of(source.state, source.model, source.origin).as_document(),
        )
    if done.left_out:
        listener.warn(
            f"Not copied: {', '.join(done.left_out)}. They are links to files outside the model's folder; "
            "copy them yourself if they belong to it."
        )
    return ApplyResult(
        state=source.state,
        model=str(folder.resolve()),
        base=base_model,
        bytes_written=done.bytes_written,
        tensors_masked=done.tensors_masked,
        removed=done.removed,
    )
