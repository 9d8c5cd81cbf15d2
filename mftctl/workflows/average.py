"""The `average` workflow: averages checkpoints and writes an ordinary checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mftctl.experiments.combined_results import AverageResult
from mftctl.experiments.model_origin import origin_of
from mftctl.experiments.model_source import ModelSource, combined_source
from mftctl.experiments.run_folder import Run
from mftctl.experiments.run_inputs import AveragedCheckpoints
from mftctl.experiments.state_names import AVERAGED
from mftctl.masking.checkpoints.average import average_checkpoints
from mftctl.masking.checkpoints.average_weights import settled_weights
from mftctl.masking.checkpoints.companions import tell_left_out
from mftctl.masking.checkpoints.locate import resolve_checkpoint
from mftctl.progress import Listener, Progress


def average(
    sources: Sequence[ModelSource],
    weights: Sequence[float] | None,
    run: Run,
    listener: Listener,
    *,
    replace: bool = False,
) -> AverageResult:
    """Averages checkpoints and returns the folder of the new one.

    Args:
        sources: The checkpoints, in order.
        weights: The weight of each, which are divided by their sum; None for equal weights.
        run: Open run; the checkpoint is written to its `model/` unless the run has another output path.
        listener: Receives progress updates.
        replace: Whether to replace a model that mftctl wrote at the run's output path.

    Raises:
        ConfigError: There are fewer than two checkpoints, or the weights cannot be used.
        ModelError: The checkpoints do not match, or one of them cannot be read.
        OutputError: The output path holds something that may not be replaced.
    """
    normalised = settled_weights(weights, len(sources))
    names = [source.model for source in sources]
    combined = combined_source(sources)
    given = AveragedCheckpoints(checkpoints=names, weights=None if weights is None else list(weights))
    run.update(inputs={**combined.as_inputs(), **given.document()})
    folder = Path(run.record.output) if run.record.output else run.folder / "model"
    done = average_checkpoints(
        [resolve_checkpoint(name) for name in names],
        normalised,
        folder,
        names=names,
        on_progress=lambda done, total: listener.progress(Progress("writing", done, total)),
        # Anything in the run's own folder was written by the run itself.
        replace=replace or run.record.output is None,
        origin=origin_of(AVERAGED, combined.model, combined.origin).as_document(),
    )
    tell_left_out(done.left_out, listener)
    return AverageResult(
        state=AVERAGED,
        model=str(folder.resolve()),
        weights=list(normalised),
        tensors_averaged=done.tensors,
        bytes_written=done.bytes_written,
    )
