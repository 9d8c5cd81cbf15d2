"""The `report --surface` workflow: the loss on a grid in the plane through FFT, continued FFT and MFT."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mftctl.data.batching import pad_token_id
from mftctl.data.encoding import Encoded, EncodedRecords, Encoder
from mftctl.data.prepared.examples import data_digest
from mftctl.data.prepared.load import load_examples
from mftctl.data.prepared.records import encode_prepared
from mftctl.data.record_issues import RecordIssues
from mftctl.data.sources import EVALUATION_SEED
from mftctl.data.splits import sample_count, sample_fraction
from mftctl.errors import ConfigError, DataError, Interrupted
from mftctl.evaluation.losses import mean_loss, sample_losses
from mftctl.experiments.deciding_keys import OF_THE_MACHINE
from mftctl.experiments.fingerprints import file_digest, model_fingerprint
from mftctl.experiments.measured_lines import MetricsLine
from mftctl.experiments.model_source import source_of_run
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.record_encoding import encode_part, image_inputs, require_records, tell_issues
from mftctl.experiments.recording import recorded
from mftctl.experiments.results import LowestPoints, MadeModel, SurfaceResult
from mftctl.experiments.run_config import to_document
from mftctl.experiments.run_device import device_for
from mftctl.experiments.run_folder import Run, create_run, list_runs
from mftctl.experiments.run_inputs import Corner, Digests, KnownData, SurfaceInputs
from mftctl.experiments.run_record import RunStatus
from mftctl.masking.checkpoints.check import check_checkpoint, check_lengths, tell_remarks
from mftctl.masking.checkpoints.load import load_model, load_tokenizer
from mftctl.masking.checkpoints.locate import resolve_checkpoint
from mftctl.masking.checkpoints.remote_code import trusting_code
from mftctl.masking.checkpoints.tensors import tensor_index
from mftctl.masking.delta.either import apply_in_memory, open_applicable
from mftctl.masking.dtypes import TORCH_DTYPES
from mftctl.progress import Listener, Progress
from mftctl.runtime.devices import find_device
from mftctl.runtime.peak_memory import peak_memory_bytes, restart_peak_memory
from mftctl.runtime.stop_request import StopRequest, stop_on_signal
from mftctl.training.inputs import split_examples
from mftctl.workflows.loss_surface.corners import Corners, find_corners, state_of
from mftctl.workflows.loss_surface.plane import PlanePoint, WeightPlane, Weights

COMMAND = "surface"
POINTS = 11
RECORDS = 100
_FEWEST_POINTS = 4
_MARGIN = 1 / 3
"""Margin on each side as a share of the extent of the three models; with 11 points, FFT falls on a grid point."""


@dataclass(frozen=True, slots=True)
class _Place:
    """One place to evaluate: a corner with its own weights, or a grid point.

    Attributes:
        step: Its number, from 1; the same in every run of this grid.
        point: Its coordinates.
        corner: 0, 1 or 2; None for a grid point.
        name: Its name in the log: `mark`, or `column` and `row`.
    """

    step: int
    point: PlanePoint
    corner: int | None
    name: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Parts:
    """The records to evaluate on.

    Attributes:
        encoder: Encoder of the FFT model's tokenizer.
        train: A seeded random choice of the records that FFT was trained on.
        test: The first N test records, as with `eval --limit`.
    """

    encoder: Encoder
    train: EncodedRecords
    test: EncodedRecords


def measure_surface(
    root: Path, listener: Listener, *, points: int = POINTS, records: int = RECORDS, device: str = "auto"
) -> Run:
    """The finished run of a loss surface: an existing one, one that is resumed, or a new one.

    Its `metrics.jsonl` has a line for each of the three models (`mark`) and each point of the grid (`column`, `row`):
    `x` and `y`, the distances from FFT along the two axes of `WeightPlane`, and the losses per answer token with fp32
    weights, `train_loss` and `test_loss`, null where the loss is not finite.

    Memory holds the model in fp32 (4 bytes per weight) and the three models as stored; tensors that two of them share
    are held once.

    Args:
        root: The runs folder.
        listener: Receives progress updates.
        points: Grid points per side.
        records: Number of records to evaluate on, from the training data and from the test data each.
        device: Device to compute on, as named in a recipe.

    Raises:
        ConfigError: A number is out of range.
        RunError: A run that spans the plane is missing; the error names the command that creates it.
        Interrupted: The user stopped it; all points measured so far are kept.
        DataError: The training data has changed, or no record can be used.
        ModelError: A model cannot be loaded, or the three models do not span a plane.
        DeviceMemoryError: The GPU runs out of memory.

    Source: MFT, figures 6 and 10.
    """
    _check("--surface-points", points, _FEWEST_POINTS)
    _check("--surface-records", records, 1)
    corners = find_corners(root, listener)
    with trusting_code(corners.recipe.trust_remote_code):
        return _surface(root, corners, listener, points, records, device)


def _surface(root: Path, corners: Corners, listener: Listener, points: int, records: int, device: str) -> Run:
    """Runs `measure_surface` once the corners are known."""
    checkpoint = resolve_checkpoint(corners.fft.result(MadeModel).model)
    tokenizer = load_tokenizer(checkpoint)
    for model in dict.fromkeys(source_of_run(run).model for run in corners.runs()):
        check = check_checkpoint(resolve_checkpoint(model), tokenizer)
        tell_remarks(check, listener)
    images = image_inputs(checkpoint, tokenizer)
    encoder = Encoder(tokenizer, learn=corners.recipe.learn, now=corners.fft.started, images=images)
    parts = _Parts(
        encoder,
        _training_records(corners, encoder, records, listener),
        _test_records(corners.recipe, encoder, records, listener),
    )
    measured = (*parts.train.records, *parts.test.records)
    check_lengths(check, [len(record.input_ids) for record in measured], checkpoint)
    find_device(device)
    run = _open_run(root, corners, parts, points, records, listener)
    if run.record.status != RunStatus.FINISHED:
        with recorded(run):
            with device_for(run, listener, less_memory=["--surface-records below " + str(records)], device=device):
                run.finish(_measure(run, corners, parts, points, listener))
    return run


def _check(option: str, value: int, fewest: int) -> None:
    if value < fewest:
        raise ConfigError("The loss surface is too small.", key=option, expected=f"at least {fewest}", actual=value)


def _training_records(corners: Corners, encoder: Encoder, count: int, listener: Listener) -> EncodedRecords:
    """A seeded random choice of the records that FFT was trained on.

    Raises:
        DataError: The data has changed since then.
    """
    recipe, known = corners.recipe, corners.fft.inputs(KnownData)
    read = split_examples(recipe, listener)
    train = read.train
    if recipe.fft.data_fraction < 1:
        train = sample_fraction(train, recipe.fft.data_fraction, recipe.seed)
    length, issues = recipe.fft.max_length_tokens, RecordIssues()
    if data_digest(train) != known.digests.train:  # the digest excludes records that were left out
        train = encode_prepared(train, encoder, length, issues, listener).examples
    if data_digest(train) != known.digests.train:
        raise DataError(
            f"The training data has changed since {corners.fft.name} was trained.",
            path=", ".join(source.path for source in recipe.data),
            expected=f"{known.train_records} records with SHA-256 {known.digests.train}",
            actual=f"{len(train)} records with SHA-256 {data_digest(train)}",
            hint="restore the data, or train all three models again on the new data",
        )
    chosen = encode_part(sample_count(train, count, recipe.seed), encoder, length, issues, listener)
    require_records("Training data", chosen.records, issues, length)
    return chosen


def _test_records(recipe: Recipe, encoder: Encoder, count: int, listener: Listener) -> EncodedRecords:
    length, issues = recipe.eval.max_length_tokens, RecordIssues()
    examples = load_examples(recipe.test_data, seed=EVALUATION_SEED, issues=issues)[:count]
    used = encode_part(examples, encoder, length, issues, listener)
    issues.settle(recipe.bad_records, recipe.bad_records_max, part="Test data")
    tell_issues("Test data", issues, length, listener)
    require_records("Test data", used.records, issues, length)
    return used


def _open_run(root: Path, corners: Corners, parts: _Parts, points: int, records: int, listener: Listener) -> Run:
    """The latest run with exactly these inputs, finished or resumed; otherwise a new one."""
    config = _without_machine(to_document(corners.recipe))
    asked = SurfaceInputs(
        points=points,
        records=records,
        train_records=len(parts.train.records),
        test_records=len(parts.test.records),
        corners=[_identity(run) for run in corners.runs()],
        digests=Digests(train=data_digest(parts.train.examples), test=data_digest(parts.test.examples)),
    )
    inputs = {**source_of_run(corners.fft).as_inputs(), **asked.document()}
    same = [
        run
        for run in list_runs(root)[0]
        if run.record.command == COMMAND
        and (_without_machine(run.record.config), run.record.inputs) == (config, inputs)
    ]
    for run in same:
        if run.record.status == RunStatus.FINISHED:
            listener.note(f"Already measured: {run.folder}")
            return run
    if same:
        same[-1].go_on()
        listener.note(f"Resuming: {same[-1].folder}")
        return same[-1]
    run = create_run(root, COMMAND, config, inputs=inputs)
    listener.note(f"Run: {run.folder}")
    return run


def _without_machine(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the device that FFT was trained on, which is irrelevant here."""
    return {key: value for key, value in config.items() if key not in OF_THE_MACHINE}


def _identity(run: Run) -> Corner:
    """Identifies a corner, so that a change can be detected."""
    source = source_of_run(run)
    return Corner(
        state=state_of(run),
        run=run.name,
        model=source.model,
        mask=source.mask,
        fingerprint=model_fingerprint(source.model),
        mask_digest=None if source.mask is None else file_digest(source.mask),
    )


def _measure(run: Run, corners: Corners, parts: _Parts, points: int, listener: Listener) -> SurfaceResult:
    """Evaluates all places and returns the result."""
    restart_peak_memory()
    checkpoint = resolve_checkpoint(corners.fft.result(MadeModel).model)
    pad = pad_token_id(parts.encoder.tokenizer)
    encoded = {"train_loss": parts.train.records, "test_loss": parts.test.records}
    model = load_model(checkpoint, dtype=torch.float32)
    plane = WeightPlane(model, _weights(corners))
    names = [state_of(corner) for corner in corners.runs()]
    listener.note("; ".join(map(_place_text, names, plane.corners)) + ": distances in weight space")
    places = list(_places(plane, names, points))
    log = run.training
    log.rewind(len(places))  # a killed process may have left a partial line
    done = {line.step for line in log.metrics()}
    with stop_on_signal(listener) as stop:
        for place in places:
            if place.step in done:
                continue
            _set(plane, place)
            listen = _Listening(stop, listener, run.folder, len(done), len(places))
            log.log({"step": place.step, **place.name, **asdict(place.point), **_losses(model, encoded, pad, listen)})
            done.add(place.step)
    return _result(log.metrics(), encoded)


@dataclass(frozen=True, slots=True)
class _Listening:
    """Reports progress in records, and aborts the current point when the user asks to stop."""

    stop: StopRequest
    listener: Listener
    folder: Path
    places_done: int
    places: int

    def hear(self, records_done: int, records: int) -> None:
        """Receives the number of records completed at one place.

        Raises:
            Interrupted: The user asked to stop.
        """
        if self.stop.requested:
            raise Interrupted(
                f"Stopped after {self.places_done} of {self.places} points.",
                path=self.folder,
                hint="run the same command again to resume",
            )
        done = self.places_done * records + records_done
        self.listener.progress(Progress("measuring the surface", done, self.places * records))


def _weights(corners: Corners) -> tuple[Weights, Weights, Weights]:
    """The parameters of the three models as stored; equal tensors are held once."""
    fft = _stored(corners.fft)
    continued, mft = (
        {name: fft[name] if _equal(tensor, fft.get(name)) else tensor for name, tensor in _stored(run).items()}
        for run in (corners.continued, corners.mft)
    )
    return fft, continued, mft


def _stored(run: Run) -> dict[str, torch.Tensor]:
    """The parameters of a run's model, tied ones once, in the dtype of its checkpoint if uniform, otherwise in fp32."""
    source = source_of_run(run)
    checkpoint = resolve_checkpoint(source.model)
    dtypes = {stored.dtype for stored in tensor_index(checkpoint).values()}
    only = TORCH_DTYPES.get(dtypes.pop()) if len(dtypes) == 1 else None
    model = load_model(checkpoint, dtype=only or torch.float32)
    with open_applicable(source.mask) as applied:
        if applied is not None:
            apply_in_memory(model, applied, checkpoint)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _equal(tensor: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and tensor.dtype == other.dtype and torch.equal(tensor, other)


def _places(plane: WeightPlane, names: Sequence[str], points: int) -> Iterator[_Place]:
    """The three models, then the grid from coarse to fine: every eighth row and column, every fourth, and so on."""
    for number, (name, corner) in enumerate(zip(names, plane.corners, strict=True)):
        yield _Place(number + 1, corner, number, {"mark": name})
    xs = _axis([corner.x for corner in plane.corners], points)
    ys = _axis([corner.y for corner in plane.corners], points)
    cells = [(column, row) for row in range(points) for column in range(points)]
    cells.sort(key=lambda cell: -min(map(_level, cell)))
    for step, (column, row) in enumerate(cells, start=len(names) + 1):
        yield _Place(step, PlanePoint(xs[column], ys[row]), None, {"column": column, "row": row})


def _level(index: int) -> int:
    """The largest power of two that divides an index, at most 8."""
    return next(power for power in (8, 4, 2, 1) if index % power == 0)


def _axis(values: Sequence[float], points: int) -> list[float]:
    low, high = min(values), max(values)
    margin = _MARGIN * (high - low)
    width = high - low + 2 * margin
    return [low - margin + width * index / (points - 1) for index in range(points)]


def _set(plane: WeightPlane, place: _Place) -> None:
    if place.corner is None:
        plane.set_point(place.point)
    else:
        plane.set_corner(place.corner)


def _losses(
    model: PreTrainedModel, encoded: Mapping[str, Sequence[Encoded]], pad: int, listen: _Listening
) -> dict[str, float | None]:
    records = sum(map(len, encoded.values()))
    losses: dict[str, float | None] = {}
    before = 0
    for name, part in encoded.items():
        hear = partial(_hear_part, listen, before, records)
        loss = mean_loss(sample_losses(model, part, pad_token_id=pad, on_progress=hear))
        losses[name] = loss if math.isfinite(loss) else None
        before += len(part)
    return losses


def _hear_part(listen: _Listening, before: int, records: int, done: int, _: int) -> None:
    listen.hear(before + done, records)


def _place_text(name: str, point: PlanePoint) -> str:
    return f"{name} ({point.x:.4g}, {point.y:.4g})"


def _result(lines: Sequence[MetricsLine], encoded: Mapping[str, Sequence[Encoded]]) -> SurfaceResult:
    grid = [line for line in lines if line.mark is None]
    trained = [(line.train_loss, line) for line in grid if line.train_loss is not None]
    tested = [(line.test_loss, line) for line in grid if line.test_loss is not None]
    return SurfaceResult(
        marks=[line for line in lines if line.mark is not None],
        lowest=LowestPoints(train_loss=_lowest(trained), test_loss=_lowest(tested)),
        train_answer_tokens=sum(record.answer_tokens for record in encoded["train_loss"]),
        test_answer_tokens=sum(record.answer_tokens for record in encoded["test_loss"]),
        peak_memory_bytes=peak_memory_bytes(),
    )


def _lowest(points: Sequence[tuple[float, MetricsLine]]) -> MetricsLine | None:
    return min(points, key=itemgetter(0), default=(0.0, None))[1]
