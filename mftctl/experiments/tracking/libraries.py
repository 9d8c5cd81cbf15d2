"""Thin layers over the public interfaces of the trackers.

transformers' own integrations only see what its Trainer logs, under names that differ between trackers: no scores of
benchmarks, no groups of a probe, no evaluations and no results; and a resumed run would start a new tracked run.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mftctl.experiments.run_record import RunStatus
from mftctl.experiments.tracking.feed import Tracker
from mftctl.experiments.tracking.state import TrackerState

WAIT_SECONDS: Final = 60.0
"""Time for a server to answer at the start, and to take the last numbers at the end."""

MODULES: Final = {
    "wandb": "wandb",
    "tensorboard": "torch.utils.tensorboard",
    "trackio": "trackio",
    "mlflow": "mlflow",
}
"""The module to import for each tracker."""

_NOT_IN_A_PROJECT = re.compile(r"[/\\#?%:]")
_LONGEST_PROJECT = 128
_LONGEST_PARAMETER = 6000
_PARAMETERS_A_CALL = 100
_TRACKIO_WARNING = "* Trackio warning: "


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """What a tracker shows of a run besides its numbers.

    Attributes:
        project: Name of the project or experiment.
        name: Name of the run.
        config: Its configuration, as plain data.
        folder: The run folder.
    """

    project: str
    name: str
    config: Mapping[str, Any]
    folder: Path


def open_tracker(name: str, run: TrackedRun, state: TrackerState) -> Tracker:
    """Opens a run in a tracker, the same one as before if the run is resumed.

    Args:
        name: The name of the tracker.
        run: The run.
        state: What is remembered of it; receives its identifier.
    """
    return _TRACKERS[name](run, state)


class TensorBoard:
    """Event files in `tensorboard/` of the run folder; one folder for each of several trainings."""

    def __init__(self, run: TrackedRun, state: TrackerState) -> None:
        self._folder = run.folder / "tensorboard"
        self._writers: dict[str, Any] = {}
        self._step = 0
        self.place = f"tensorboard --logdir {run.folder.parent}"
        if state.identifier is None:
            state.identify(self._folder.name)
            document = json.dumps(run.config, indent=2, ensure_ascii=False)
            self._writer("").add_text("config", "\n".join(f"    {line}" for line in document.splitlines()))
            self._writer("").flush()

    def log(self, step: int, values: Mapping[str, float], training: str) -> None:
        """Writes the numbers, so that even a killed run has them."""
        writer = self._writer(training)
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()
        self._step = max(self._step, step)

    def close(self, status: RunStatus, figures: Mapping[str, float]) -> None:
        """Writes the result and closes the files."""
        if figures:
            self.log(self._step, figures, "")
        for writer in self._writers.values():
            writer.close()

    def _writer(self, training: str) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        if training not in self._writers:
            self._writers[training] = SummaryWriter(str(self._folder / training))
        return self._writers[training]


class Wandb:
    """A run of Weights & Biases; `WANDB_MODE=offline` and its other variables apply."""

    def __init__(self, run: TrackedRun, state: TrackerState) -> None:
        import wandb

        settings = wandb.Settings(
            silent=True,  # also keeps it from asking for a key
            console="off",
            init_timeout=WAIT_SECONDS,
            finish_timeout=WAIT_SECONDS,
        )
        wandb.setup(settings)
        identifier = state.identifier or state.identify(uuid.uuid4().hex[:16])
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=identifier,
            resume="allow",
            config=dict(run.config),
            settings=settings,
        )
        self._run.define_metric("*", step_metric="step")
        self.place = self._run.url or f"offline in {Path(self._run.dir).parent}"

    def log(self, step: int, values: Mapping[str, float], training: str) -> None:
        """Sends the numbers with their step, as wandb's own must not decrease."""
        self._run.log({"step": step, **_of_training(values, training)})

    def close(self, status: RunStatus, figures: Mapping[str, float]) -> None:
        """Sends the result as the summary and finishes the run."""
        self._run.summary.update(dict(figures))
        self._run.finish(exit_code=int(status is not RunStatus.FINISHED))


class Trackio:
    """A run in trackio's local store; `TRACKIO_SPACE_ID` and its other variables apply."""

    def __init__(self, run: TrackedRun, state: TrackerState) -> None:
        import trackio
        import trackio.run
        import trackio.utils

        self._failure: str | None = None
        # It reports on stdout, which is for results, and there also the failures that it cannot warn of.
        warnings.filterwarnings("error", category=UserWarning, module=r"trackio\b")
        for module in (trackio, trackio.run, trackio.utils):
            vars(module)["print"] = self._hear
        # Runs are resumed by name, and those of all folders are in one store.
        name = state.identifier or state.identify(f"{run.name} {uuid.uuid4().hex[:6]}")
        self._run = trackio.init(run.project, name=name, config=dict(run.config), resume="allow", embed=False)
        self._step = 0
        self.place = f"trackio show --project {shlex.quote(run.project)}"

    def log(self, step: int, values: Mapping[str, float], training: str) -> None:
        """Queues the numbers in trackio.

        Raises:
            OSError: trackio could not store earlier ones; it raises no errors itself.
        """
        self._require_success()
        self._run.log(_of_training(values, training), step=step)
        self._step = max(self._step, step)

    def close(self, status: RunStatus, figures: Mapping[str, float]) -> None:
        """Queues the result and waits until trackio has stored everything."""
        if figures:
            self.log(self._step, figures, "")
        self._run.finish()
        self._require_success()

    def _hear(self, *texts: object, **options: object) -> None:
        """Takes the place of `print`."""
        text = " ".join(map(str, texts))
        if text.startswith(_TRACKIO_WARNING):
            self._failure = self._failure or text.removeprefix(_TRACKIO_WARNING)

    def _require_success(self) -> None:
        if self._failure is not None:
            raise OSError(self._failure)


class MLflow:
    """A run in the store named by `MLFLOW_TRACKING_URI`, or in MLflow's default store."""

    def __init__(self, run: TrackedRun, state: TrackerState) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        for noisy in ("mlflow", "alembic"):  # which report every table that they create
            logging.getLogger(noisy).setLevel(logging.WARNING)
        self._client = MlflowClient()
        self._step = 0
        if state.identifier is not None:
            self._id = state.identifier
            self._client.update_run(self._id, status="RUNNING")
        else:
            experiment = self._client.get_experiment_by_name(run.project)
            place = experiment.experiment_id if experiment else self._client.create_experiment(run.project)
            self._id = self._client.create_run(place, run_name=run.name).info.run_id
            state.identify(self._id)
            parameters = [Param(name, text[:_LONGEST_PARAMETER]) for name, text in _parameters(run.config)]
            for start in range(0, len(parameters), _PARAMETERS_A_CALL):
                self._client.log_batch(self._id, params=parameters[start : start + _PARAMETERS_A_CALL])
        self.place = f"{self._client.tracking_uri}, run {self._id}"

    def log(self, step: int, values: Mapping[str, float], training: str) -> None:
        """Sends the numbers."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        named = _of_training(values, training).items()
        self._client.log_batch(self._id, metrics=[Metric(name, value, now_ms, step) for name, value in named])
        self._step = max(self._step, step)

    def close(self, status: RunStatus, figures: Mapping[str, float]) -> None:
        """Sends the result and ends the run."""
        if figures:
            self.log(self._step, figures, "")
        ends = {RunStatus.FINISHED: "FINISHED", RunStatus.INTERRUPTED: "KILLED"}
        self._client.set_terminated(self._id, ends.get(status, "FAILED"))


def _of_training(values: Mapping[str, float], training: str) -> dict[str, float]:
    return {f"{training}/{name}" if training else name: value for name, value in values.items()}


def _parameters(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields the settings by dotted key, as text."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _parameters(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def project_name(name: str) -> str:
    """Returns a name without the characters that trackers refuse in a project."""
    return _NOT_IN_A_PROJECT.sub("-", name)[:_LONGEST_PROJECT]


_TRACKERS: Final[Mapping[str, Callable[[TrackedRun, TrackerState], Tracker]]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
    "mlflow": MLflow,
}
