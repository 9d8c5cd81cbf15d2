"""The `data fetch` workflow: downloads the data of benchmarks, so that later evaluations work without a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

from mftctl.data.hub import is_network_down, offline
from mftctl.errors import EvaluationError, MissingDataError
from mftctl.evaluation.benchmarks.catalog import expand_groups
from mftctl.evaluation.benchmarks.lm_eval_tasks import data_config
from mftctl.evaluation.benchmarks.problems import fetch_problems
from mftctl.evaluation.benchmarks.published_data import PublishedData
from mftctl.evaluation.benchmarks.sentence_data import SENTENCE_DATA, check_sentence_data, fetch_sentence_data
from mftctl.progress import Listener, Progress

_SENTENCES = "https://raw.githubusercontent.com/nltk/nltk_data/gh-pages/packages/tokenizers/punkt_tab.zip"


class State(StrEnum):
    """Where the data of a benchmark was found."""

    SHIPPED = "shipped"
    THERE = "already there"
    FETCHED = "fetched"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class FetchedData:
    """Data of one benchmark.

    Attributes:
        benchmark: The benchmark or lm-eval task.
        source: Where it is published: a package, or a hub dataset with its configuration and split.
        state: Whether it is on this machine now.
        records: Number of problems; None if the data is missing or holds no problems.
        problem: Why it is missing; None if it is not.
        remedy: What to download elsewhere, and how to use it here.
    """

    benchmark: str
    source: str
    state: State
    records: int | None
    problem: str | None
    remedy: str


@dataclass(frozen=True, slots=True)
class _Needed:
    """Data that a benchmark needs.

    Attributes:
        benchmark: The benchmark or lm-eval task.
        source: Where it is published.
        remedy: What to download elsewhere, and how to use it here.
        read: Returns the number of problems, without the network; raises `MissingDataError`.
        download: Downloads it; raises `MissingDataError`. None for shipped data.
    """

    benchmark: str
    source: str
    remedy: str
    read: Callable[[], int | None]
    download: Callable[[], object] | None

    def found(self, state: State) -> FetchedData:
        return FetchedData(self.benchmark, self.source, state, self.read(), None, self.remedy)

    def missing(self, problem: str) -> FetchedData:
        return FetchedData(self.benchmark, self.source, State.MISSING, None, problem, self.remedy)


def fetch_data(names: Sequence[str], listener: Listener) -> tuple[FetchedData, ...]:
    """Downloads the data of benchmarks that is not on this machine; data that cannot be downloaded is `MISSING`.

    Args:
        names: Benchmarks, groups and lm-eval tasks.
        listener: Receives progress updates.

    Raises:
        EvaluationError: There is no such benchmark, or its data has an invalid problem.
        DataError: The data cannot be read.
    """
    tasks = expand_groups(names)
    configs = {task: data_config(task) for task in tasks}
    needed = [data for task, config in configs.items() for data in _needed(task, config)]
    found: list[FetchedData] = []
    has_network = True  # once it is down, nothing more is tried: each attempt takes half a minute
    for done, data in enumerate(needed):
        listener.progress(Progress("fetching", done, len(needed)))
        try:
            found.append(_fetched(data, listener, has_network=has_network))
        except MissingDataError as error:
            found.append(data.missing(str(error.actual) if has_network else "not tried: there is no network"))
            has_network = has_network and not is_network_down(error.__cause__)
    listener.progress(Progress("fetching", len(needed), len(needed)))
    return tuple(found)


def _fetched(data: _Needed, listener: Listener, *, has_network: bool) -> FetchedData:
    if data.download is None:
        return data.found(State.SHIPPED)
    try:
        return data.found(State.THERE)
    except MissingDataError:
        if not has_network:
            raise
    listener.note(f"{data.benchmark}: downloading {data.source}")
    data.download()
    return data.found(State.FETCHED)


def _needed(task: str, config: Mapping[str, Any]) -> Iterator[_Needed]:
    data = PublishedData.of(config)

    def read() -> int:
        with offline():
            return len(fetch_problems(config, task).records)

    download = None if data.is_shipped else partial(fetch_problems, config, task)
    yield _Needed(task, data.source, _remedy(task, data), read, download)
    if task == "ifeval":
        remedy = f"{task}: {_SENTENCES}; then unpack it as {SENTENCE_DATA} in a folder that NLTK_DATA names"
        yield _Needed(task, f"nltk_data, {SENTENCE_DATA}", remedy, check_sentence_data, fetch_sentence_data)


def _remedy(task: str, data: PublishedData) -> str:
    if data.file is not None:
        return f"{task}: {data.file}, revision main; then --task-data {task}=FILE"
    address = f"https://huggingface.co/datasets/{data.dataset}, revision main"
    if len(data.parts) > 1:
        return f"{task}: {address}, split {data.split} of {len(data.parts)} parts; then --task-data {task}=FOLDER"
    part = "" if data.parts[0] is None else f" of {data.parts[0]}"
    return f"{task}: {address}, split {data.split}{part}; then --task-data {task}=FILE"


def require_all(found: Sequence[FetchedData]) -> None:
    """Checks that no data is missing.

    Args:
        found: The result of `fetch_data`.

    Raises:
        EvaluationError: Some is missing; the hint says what to download elsewhere, and how to use it here.
    """
    missing = [data for data in found if data.state is State.MISSING]
    if missing:
        raise EvaluationError(
            f"The data of {', '.join(dict.fromkeys(data.benchmark for data in missing))} cannot be downloaded.",
            actual=missing[0].problem,
            hint="\n".join(
                ["the same command with a network, or download elsewhere:", *(data.remedy for data in missing)]
            ),
        )
