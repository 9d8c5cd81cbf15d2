"""The `delta merge` workflow: merges the changes of several delta files onto their base."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from mftctl.experiments.combined_results import MergeResult
from mftctl.experiments.delta_options import DeltaValues
from mftctl.experiments.model_origin import origin_of
from mftctl.experiments.model_source import ModelSource
from mftctl.experiments.run_folder import Run
from mftctl.experiments.run_inputs import MergedDeltas
from mftctl.experiments.state_names import MERGED_DELTAS
from mftctl.masking.checkpoints.companions import tell_left_out
from mftctl.masking.checkpoints.locate import resolve_checkpoint
from mftctl.masking.delta.delta import DELTA_SUFFIX, open_delta
from mftctl.masking.delta.merge import Merge, MergePlan, merge_to_checkpoint, merge_to_delta, open_merge
from mftctl.masking.delta.records import NamedModel
from mftctl.masking.delta.spool import delta_permit
from mftctl.progress import Listener, Progress


def makes_delta(output: Path) -> bool:
    """True if a merge is written as a delta file and not as a checkpoint, by the name of its output."""
    return output.suffix == DELTA_SUFFIX


def merge_deltas(
    paths: Sequence[Path],
    source: ModelSource,
    plan: MergePlan,
    values: DeltaValues,
    output: Path,
    run: Run,
    listener: Listener,
    *,
    replace: bool = False,
) -> MergeResult:
    """Merges delta files; returns where the delta file or the checkpoint is.

    Args:
        paths: The delta files.
        source: Their base.
        plan: How to merge, with one weight per file.
        values: Kind of the values of a delta file.
        output: A delta file if its name ends in `.delta`, otherwise a checkpoint.
        run: Open run.
        listener: Receives progress updates.
        replace: Whether to replace what mftctl wrote at the output.

    Raises:
        MaskFormatError: A file is damaged or not a delta file.
        MaskMismatchError: A delta was made from another base.
        MaskingError: The changes cancel out, or a merged weight is not finite.
        ModelError: The base cannot be read, or the checkpoint cannot be written.
        OutputError: The output holds something that may not be replaced.
    """
    given = MergedDeltas(
        deltas=[str(path) for path in paths],
        method=plan.method,
        weights=list(plan.weights),
        scale=plan.scale,
        values=values,
    )
    run.update(inputs={**source.as_inputs(), **given.document()})
    base = resolve_checkpoint(source.model)
    with ExitStack() as files:
        deltas = [files.enter_context(open_delta(path)) for path in paths]
        merge = open_merge(deltas, base, plan)
        different = merge.files()[1]
        if different:
            listener.warn(f"The deltas hold different files; those of the first are kept: {', '.join(different)}.")
        write = _write_delta if makes_delta(output) else _write_checkpoint
        return write(merge, base, source, values, output, run, listener, replace)


def _write_delta(
    merge: Merge,
    base: Path,
    source: ModelSource,
    values: DeltaValues,
    output: Path,
    run: Run,
    listener: Listener,
    replace: bool,
) -> MergeResult:
    contents = merge_to_delta(
        merge,
        base,
        output,
        values,
        base_model=NamedModel(source.model),
        run_id=run.name,
        permit=delta_permit(replace=replace),
        on_progress=lambda done, total: listener.progress(Progress("merging", done, total)),
    )
    path = str(output.resolve())
    return _result(merge, source, source.model, output.stat().st_size).model_copy(
        update={
            "mask": path,
            "output": path,
            "tensors": len(contents.tensors),
            "kept": sum(record.kept for record in contents.tensors.values()),
        }
    )


def _write_checkpoint(
    merge: Merge,
    base: Path,
    source: ModelSource,
    values: DeltaValues,
    output: Path,
    run: Run,
    listener: Listener,
    replace: bool,
) -> MergeResult:
    done = merge_to_checkpoint(
        merge,
        base,
        output,
        base_model=source.model,
        on_progress=lambda done, total: listener.progress(Progress("writing", done, total)),
        replace=replace,
        origin=origin_of(MERGED_DELTAS, source.model, source.origin).as_document(),
    )
    tell_left_out(done.left_out, listener)
    return _result(merge, source, str(output.resolve()), done.bytes_written)


def _result(merge: Merge, source: ModelSource, model: str, bytes_written: int) -> MergeResult:
    return MergeResult(
        state=MERGED_DELTAS,
        model=model,
        mask=None,
        output=None,
        base=source.model,
        method=merge.plan.method,
        weights=list(merge.plan.weights),
        tensors=len(merge.names),
        kept=merge.conflicts.changed,
        conflicts=merge.conflicts.opposed,
        bytes_written=bytes_written,
    )
