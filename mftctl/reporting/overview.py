"""All states of a model on all data, side by side: the effect of a method outside the domain it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mftctl.evaluation.benchmarks.catalog import BENCHMARKS
from mftctl.reporting.paired_change import Change
from mftctl.reporting.state_tables import MetricTable


@dataclass(frozen=True, slots=True)
class Column:
    """One metric on which all states are compared.

    Attributes:
        domain: Subject area, such as `math`; None for a data file and for other lm-eval tasks.
        dataset: The benchmark, or the data file.
        metric: The metric's name.
    """

    domain: str | None
    dataset: str
    metric: str


@dataclass(frozen=True, slots=True)
class Cell:
    """The result of one state in one column.

    Attributes:
        value: The metric, averaged over seeds.
        change: Change against the baseline; None for the baseline itself or if the samples differ.
        spread: Standard deviation over seeds; None with a single seed.
        runs: Names of the evaluation runs.
        against: Names of the baseline's rows.
    """

    value: float
    change: Change | None
    spread: float | None = None
    runs: tuple[str, ...] = ()
    against: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Overview:
    """Methods by benchmarks.

    Attributes:
        origin: The pre-trained model.
        columns: The columns, ordered by domain.
        rows: One row per state with one cell per column; None if not measured.
        has_several_baselines: Whether the states are compared with several fine-tuned models.
    """

    origin: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]
    has_several_baselines: bool = False


def overviews(tables: Sequence[MetricTable]) -> list[Overview]:
    """One overview per model with more than one metric.

    A benchmark has a single column, for its first metric; a data file has a column per metric.

    Args:
        tables: The comparison tables.

    Source: MFT, tables 5 and 6.
    """
    found = []
    for origin in dict.fromkeys(table.origin for table in tables):
        figures: dict[object, list[MetricTable]] = {}
        for table in tables:
            if table.origin == origin:
                key = table.dataset if table.is_benchmark else (table.dataset, table.metric)
                figures.setdefault(key, []).append(table)
        if len(figures) > 1:
            found.append(_overview(origin, [_headline(candidates) for candidates in figures.values()]))
    return found


def _headline(candidates: Sequence[MetricTable]) -> MetricTable:
    """The table of the first metric that was measured on the most samples."""
    metric = candidates[0].metric
    return max((table for table in candidates if table.metric == metric), key=lambda table: table.rows[0].samples)


def _overview(origin: str, tables: list[MetricTable]) -> Overview:
    order = list(dict.fromkeys(benchmark.domain for benchmark in BENCHMARKS.values()))
    domains = [BENCHMARKS[table.dataset].domain if table.dataset in BENCHMARKS else None for table in tables]
    placed = sorted(zip(domains, tables, strict=True), key=lambda pair: -1 if pair[0] is None else order.index(pair[0]))
    cells = [
        {row.state: Cell(row.value, row.change, row.spread, row.runs, row.against) for row in table.rows}
        for _, table in placed
    ]
    longest = max((table for _, table in placed), key=lambda table: len(table.rows))
    states = dict.fromkeys([row.state for row in longest.rows] + [state for column in cells for state in column])
    return Overview(
        origin,
        tuple(Column(domain, table.dataset, table.metric) for domain, table in placed),
        tuple((state, tuple(column.get(state) for column in cells)) for state in states),
        any(table.has_several_baselines for table in tables),
    )
