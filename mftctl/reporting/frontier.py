"""What each state learned against what it kept: the loss on its own domain and the loss on data to retain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mftctl.reporting.state_tables import MetricTable, Row


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """A state measured on both domains with the same seeds.

    Attributes:
        state: Name of the state.
        in_domain: Its loss on its own domain.
        retained: Its loss on the data to retain.
        is_dominated: Whether another state has one loss lower and the other no higher, on average over seeds.
    """

    state: str
    in_domain: Row
    retained: Row
    is_dominated: bool


@dataclass(frozen=True, slots=True)
class Frontier:
    """All states of one model on two domains.

    Attributes:
        origin: The pre-trained model.
        dataset: The data of the model's own domain.
        baseline: The state that changes are measured against.
        points: The states, by their loss on their own domain.
    """

    origin: str
    dataset: str
    baseline: str
    points: tuple[FrontierPoint, ...]

    @property
    def not_dominated(self) -> tuple[FrontierPoint, ...]:
        """The states that no other state dominates, by their loss on their own domain."""
        return tuple(point for point in self.points if not point.is_dominated)


def frontiers(tables: Sequence[MetricTable]) -> tuple[list[Frontier], list[str]]:
    """One frontier for each file of a model's own domain and each data to retain, both with losses.

    Args:
        tables: The comparison tables.

    Returns:
        The frontiers, and one line per state that was measured with different seeds.
    """
    losses = [table for table in tables if table.metric == "loss" and not table.is_benchmark]
    found, problems = [], []
    for table in losses:
        for retained in losses:
            if table.is_retained or not retained.is_retained or table.origin != retained.origin:
                continue
            pairs, unequal = _pairs(table, retained)
            problems += unequal
            if len(pairs) > 1:
                found.append(Frontier(table.origin, table.dataset, retained.baseline, _points(pairs)))
    return found, list(dict.fromkeys(problems))


def _pairs(table: MetricTable, retained: MetricTable) -> tuple[list[tuple[Row, Row]], list[str]]:
    """The rows of the states in both tables, and one line per state with different seeds."""
    by_state = {row.state: row for row in retained.rows}
    pairs, problems = [], []
    for row in table.rows:
        other = by_state.get(row.state)
        if other is None:
            continue
        if set(other.seeds) == set(row.seeds):
            pairs.append((row, other))
        else:
            seeds = [", ".join(map(str, sorted(one.seeds))) for one in (row, other)]
            problems.append(
                f"{row.state}: left out of the frontier: measured on {table.dataset} with seeds {seeds[0]}, on data to "
                f"retain with {seeds[1]}"
            )
    return pairs, problems


def _points(pairs: Sequence[tuple[Row, Row]]) -> tuple[FrontierPoint, ...]:
    losses = [(one.value, other.value) for one, other in pairs]

    def is_dominated(mine: tuple[float, float]) -> bool:
        return any(its != mine and its[0] <= mine[0] and its[1] <= mine[1] for its in losses)

    points = [
        FrontierPoint(one.state, one, other, is_dominated(mine))
        for (one, other), mine in zip(pairs, losses, strict=True)
    ]
    return tuple(sorted(points, key=lambda point: point.in_domain.value))
