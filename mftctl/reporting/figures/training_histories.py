"""Metrics recorded while models and masks were trained, aligned so that training runs can be compared."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mftctl.errors import RunError
from mftctl.experiments.fft_options import FftOptions
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.experiments.results import EvalResult, MadeState, Outcome
from mftctl.experiments.run_contents import told
from mftctl.experiments.run_folder import Run
from mftctl.experiments.run_inputs import Lineage, Parents, RunInputs, StartingState
from mftctl.experiments.run_record import RunStatus
from mftctl.experiments.state_names import FFT, fine_tuned_state, known_state, mask_state

_SECTIONS = {"fft": "fft", "mask-train": "mask_train"}
_WITHOUT_TRAINING = ("-apply", "-average", "-interpolate")
"""Ends of the names of runs that make a model without training it."""
DECIDES_NOTHING = ("prefix_cache_gb", "benchmark_every", "benchmark_limit")


class Measure(NamedTuple):
    """One metric of one dataset, on a given number of samples."""

    dataset: str
    digest: str
    metric: str
    samples: int


@dataclass(frozen=True, slots=True)
class History:
    """One training run, or one mask that was not trained.

    Attributes:
        run: The run.
        state: State of the resulting model, as named in the report.
        seed: The seed.
        family: The pre-trained model and the data of the first training in the lineage, as JSON.
        method: Recipe, stage and settings, which are the same for all seeds of a method.
        first_step: Optimizer steps taken before this run, up to the model it started from.
        kept_step: The run's step whose state was kept; the best so far if unfinished.
        losses: Validation loss per answer token, or per preference, by the run's own step.
        reference_loss: Loss of the best FFT, or of the unmasked model without one, on the same records; None if
            unknown.
        scores: Values by the run's own step, for each measure.
        standard_errors: Largest standard error of a value, for each measure.
        is_trained: False for a mask that takes no steps, such as a random mask.
    """

    run: Run
    state: str
    seed: int
    family: tuple[str, str]
    method: str
    first_step: int
    kept_step: int
    losses: Mapping[int, float]
    reference_loss: float | None
    scores: Mapping[Measure, Mapping[int, float]]
    standard_errors: Mapping[Measure, float]
    is_trained: bool

    @property
    def is_finished(self) -> bool:
        """True if the run has finished."""
        return self.run.record.status == RunStatus.FINISHED

    @property
    def is_of_preferences(self) -> bool:
        """True if it was trained on preferences, whose loss is no loss of answers."""
        state = known_state(self.state)
        return state is not None and state.is_preference

    @property
    def stage(self) -> str:
        """The stage of the experiment, or else the run's name."""
        return self.run.record.stage or self.run.name


@dataclass(frozen=True, slots=True)
class _Measured:
    """The metrics and settings of one run.

    Attributes:
        run: The run.
        state: State of the resulting model.
        losses: Loss by step.
        scores: Score by measure and step.
        standard_errors: Largest standard error by measure.
        kept_step: The step whose state was kept.
        parents: Runs that made the model it started from.
        before: State of that model.
        origin: The pre-trained model.
        validation: Digest of the validation records.
        seed: The seed.
        method: Recipe, stage and settings, as JSON.
        unmasked_loss: For a mask, the loss without it on the same records; None if not known yet.
        data: Training data, as JSON.
    """

    run: Run
    state: str
    losses: dict[int, float]
    scores: dict[Measure, dict[int, float]]
    standard_errors: dict[Measure, float]
    kept_step: int
    parents: tuple[str, ...]
    before: str
    origin: str
    validation: str | None
    seed: int
    method: str
    unmasked_loss: float | None
    data: str

    @property
    def is_fft(self) -> bool:
        return self.state == FFT

    @property
    def kept_loss(self) -> float | None:
        return self.losses.get(self.kept_step)


def read_histories(runs: Sequence[Run]) -> tuple[list[History], list[str]]:
    """The history of each `fft` and `mask-train` run that has recorded metrics.

    Of runs with the same method and seed, the latest finished one counts, or else the latest.

    Args:
        runs: The runs, oldest first.

    Returns:
        The histories, and one line per run that cannot be used or placed.
    """
    measured: dict[str, _Measured] = {}
    problems = []
    for run in runs:
        if run.record.command in _SECTIONS and run.record.status != RunStatus.FAILED:
            try:
                found = _measured(run)
            except (RunError, ValueError, KeyError, TypeError, AttributeError) as error:
                problems.append(told(error, f"{run.folder}: the metrics of this training run cannot be read"))
                continue
            if found is not None:
                measured[run.name] = found
    _add_evaluations(runs, measured)
    unmasked = _unmasked_losses(runs)
    newest: dict[tuple[object, ...], History] = {}
    for item in measured.values():
        if missing := _missing_parents(item, measured):
            place = "drawn from step 0, since the run it started from is missing"
            problems.append(f"{item.run.folder}: {place}: {missing[0]}")
        history = _placed(item, measured, unmasked)
        key = (history.family, history.state, history.method, history.seed)
        if key not in newest or history.is_finished or not newest[key].is_finished:
            newest[key] = history
    return list(newest.values()), problems


def _measured(run: Run) -> _Measured | None:
    """The metrics and settings of a run; None if it has recorded no metrics yet."""
    record, result = run.record, run.result(Outcome)
    lines = run.training.metrics()
    losses = {line.step: line.eval_loss for line in lines if line.eval_loss is not None}
    if not losses and result.best_loss is not None:
        losses = {result.best_step or 0: result.best_loss}
    if not losses and record.status != RunStatus.FINISHED:
        return None
    scores: dict[Measure, dict[int, float]] = {}
    standard_errors: dict[Measure, float] = {}
    for line in lines:
        for metric in line.metrics:
            if not math.isfinite(metric.value):
                continue
            measure = Measure(line.dataset or "", line.digest or "", metric.name, metric.samples)
            scores.setdefault(measure, {})[line.step] = metric.value
            error = metric.standard_error or 0.0
            error = error if math.isfinite(error) else 0.0
            standard_errors[measure] = max(error, standard_errors.get(measure, 0.0))
    losses = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
    best = min(losses, key=lambda step: losses[step], default=0)
    is_last = record.config.get("fft", {}).get("keep") == "last" and record.command == "fft"
    lineage = Lineage.read(record.inputs)
    return _Measured(
        run=run,
        state=run.result(MadeState).state if record.status == RunStatus.FINISHED else _expected_state(run),
        losses=losses,
        scores=scores,
        standard_errors=standard_errors,
        kept_step=max(losses) if is_last and losses else best,
        parents=tuple(lineage.parents),
        before=StartingState.read(record.inputs).state,
        origin=lineage.origin,
        validation=RunInputs.read(record.inputs).digests.validation,
        seed=int(record.config.get("seed", 0)),
        method=_method(run),
        unmasked_loss=_finite(result.unmasked_loss),
        data=json.dumps(record.config.get("data", [])),
    )


def _finite(loss: float | None) -> float | None:
    """The loss if it is finite; None for a diverged model."""
    return None if loss is None or not math.isfinite(loss) else float(loss)


def _method(run: Run) -> str:
    record = run.record
    section = {
        key: value
        for key, value in record.config.get(_SECTIONS[record.command], {}).items()
        # The layers of a stage come from its probe, which is separate for each seed.
        if key not in DECIDES_NOTHING and not (key == "layers" and record.stage)
    }
    return json.dumps([record.recipe, record.stage, section], sort_keys=True)


def _expected_state(run: Run) -> str:
    """The state that an unfinished training run will produce."""
    config = run.record.config
    if run.record.command == "fft":
        return fine_tuned_state(StartingState.read(run.record.inputs).state, FftOptions.model_validate(config["fft"]))
    return mask_state(MaskTrainOptions.model_validate(config["mask_train"]))


def _add_evaluations(runs: Sequence[Run], measured: Mapping[str, _Measured]) -> None:
    """Adds results of evaluations on the same samples for states that were not measured during training."""
    for run in runs:
        if run.record.command != "eval" or run.record.status != RunStatus.FINISHED:
            continue
        try:
            evaluated = _evaluated(run)
            parents = [name for name in Parents.read(run.record.inputs).parents if not name.endswith("-apply")]
        except (RunError, KeyError, TypeError, ValueError, AttributeError):
            continue  # reported by the comparison, which needs all of them
        if parents and parents[-1] in measured:
            made = measured[parents[-1]]
            for measure, value in evaluated:
                made.scores.setdefault(measure, {}).setdefault(made.kept_step, value)


def _evaluated(run: Run) -> list[tuple[Measure, float]]:
    return [
        (Measure(data.name, data.digest, metric.name, metric.samples), metric.value)
        for data in run.result(EvalResult).datasets
        for metric in data.metrics
        if math.isfinite(metric.value)
    ]


def _unmasked_losses(runs: Sequence[Run]) -> dict[tuple[object, ...], float]:
    """The loss of unmasked models on the half of the validation records that selects the best mask."""
    found: dict[tuple[object, ...], float] = {}
    for run in runs:
        if run.record.command not in ("probe", "mask-train"):
            continue
        try:
            if _is_learned(run):
                loss = _finite(run.result(Outcome).unmasked_loss)
                found |= {} if loss is None else {_validated_on(run): loss}
        except (KeyError, TypeError, ValueError, AttributeError):
            continue  # missing, or damaged, which is reported where the run itself is drawn
    return found


def _is_learned(run: Run) -> bool:
    return bool(run.record.config.get("mask_train", {}).get("method", "learned") == "learned")


def _validated_on(run: Run) -> tuple[object, ...]:
    inputs = RunInputs.read(run.record.inputs)
    return (inputs.model, tuple(inputs.parents), inputs.digests.validation)


def _missing_parents(item: _Measured, measured: Mapping[str, _Measured]) -> list[str]:
    return [name for name in item.parents if name not in measured and not name.endswith(_WITHOUT_TRAINING)]


def _placed(
    item: _Measured, measured: Mapping[str, _Measured], unmasked: Mapping[tuple[object, ...], float]
) -> History:
    first = measured.get(item.parents[0], item) if item.parents else item
    return History(
        run=item.run,
        state=item.state,
        seed=item.seed,
        family=(item.origin, first.data),
        method=item.method,
        first_step=sum(measured[name].kept_step for name in item.parents if name in measured),
        kept_step=item.kept_step,
        losses=item.losses,
        reference_loss=_reference_loss(item, measured, unmasked),
        scores=item.scores,
        standard_errors=item.standard_errors,
        is_trained=item.run.record.command == "fft" or _is_learned(item.run),
    )


def _reference_loss(
    item: _Measured, measured: Mapping[str, _Measured], unmasked: Mapping[tuple[object, ...], float]
) -> float | None:
    """The loss of the best FFT on the validation records of a training run."""
    best = _best_fft(item, measured)
    if item.run.record.command == "fft":
        same_records = best is not None and best.validation == item.validation
        return best.kept_loss if best is not None and same_records else None
    without_mask = item.unmasked_loss
    if without_mask is None:
        without_mask = unmasked.get(_validated_on(item.run))
    if without_mask is None or best is None or item.before == FFT:
        return without_mask
    masked = [measured[name] for name in item.parents if name in measured]
    masked_loss = masked[-1].kept_loss if masked else best.losses.get(0)
    if best.kept_loss is None or masked_loss is None:
        return None
    # A mask is validated on half of the records, so the difference between the two models on all records is used.
    return float(without_mask + best.kept_loss - masked_loss)


def _best_fft(item: _Measured, measured: Mapping[str, _Measured]) -> _Measured | None:
    """The FFT that a training run started from, or else one of the same model, seed and validation records."""
    if item.is_fft:
        return item
    if item.parents and item.parents[0] in measured and measured[item.parents[0]].is_fft:
        return measured[item.parents[0]]
    same = [
        other
        for other in measured.values()
        if other.is_fft and (other.origin, other.seed, other.validation) == (item.origin, item.seed, item.validation)
    ]
    finished = [other for other in same if other.run.record.status == RunStatus.FINISHED]
    return next(reversed(finished or same), None)
