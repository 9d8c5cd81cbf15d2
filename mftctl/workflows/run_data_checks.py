"""Checks of the data of all jobs and seeds of an experiment before its first job starts."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

from mftctl.errors import MftError
from mftctl.evaluation.suite import encode_test_data, read_test_data, require_local_images
from mftctl.experiments.jobs import Job
from mftctl.experiments.record_encoding import load_encoder
from mftctl.masking.checkpoints.check import check_checkpoint, check_lengths
from mftctl.masking.checkpoints.locate import resolve_checkpoint
from mftctl.masking.checkpoints.remote_code import trusting_code
from mftctl.progress import Listener, Progress, Silence
from mftctl.training.inputs import prepare_training
from mftctl.workflows.planning.data_uses import DataUse, data_uses
from mftctl.workflows.planning.problem_list import describe


def data_problems(jobs: Sequence[Job], listener: Listener) -> Iterator[str]:
    """The problems with the data of jobs, which a later seed or stage would otherwise meet after hours of training.

    Data is read and tokenised as the jobs do it; training data then stays in the cache for them. A problem is
    reported once, for the first job that meets it.

    Args:
        jobs: The jobs that will run.
        listener: Receives progress updates.
    """
    uses: dict[Hashable, tuple[Job, DataUse]] = {}
    for job in jobs:
        for use in data_uses(job):
            uses.setdefault(use.key, (job, use))
    has_seeds = len({job.seed for job in jobs}) > 1
    told: set[str] = set()
    for job, use in uses.values():
        try:
            with trusting_code(use.recipe.trust_remote_code):
                _check(use, _OnlyProgress(listener))
        except MftError as error:
            problem = describe(error)
            if problem not in told:
                told.add(problem)
                yield f"seed {job.seed}, {job.name}: {problem}" if has_seeds else f"{job.name}: {problem}"


def _check(use: DataUse, listener: Listener) -> None:
    """Reads and tokenises data as a job will do it.

    Raises:
        MftError: The job could not use the data.
    """
    recipe, model = use.recipe, use.recipe.model or ""
    if use.kind is not None:
        prepare_training(
            recipe,
            model,
            max_length_tokens=use.max_length_tokens,
            data_fraction=use.data_fraction,
            adapters=True,
            retain_weight=use.retain_weight,
            kind=use.kind,
            listener=listener,
        )
        return
    checkpoint = resolve_checkpoint(model, recipe.revision, adapters=True)
    recipe = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"limit": use.limit})})
    encoder = load_encoder(checkpoint, recipe)
    records = encode_test_data(read_test_data(recipe, listener), recipe, encoder, listener)
    require_local_images(recipe, records)
    check_lengths(check_checkpoint(checkpoint, encoder.tokenizer), records.lengths_tokens, checkpoint)


class _OnlyProgress(Silence):
    """Passes on progress, not the notes and warnings about records, which each job gives itself."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def progress(self, state: Progress) -> None:
        """Shows the progress of a task."""
        self._listener.progress(state)
