"""The numbers of a metrics line or of a result, under the names that every tracker shows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

_NOT_IN_A_NAME = re.compile(r"[^\w.\- ]")
"""Characters that MLflow, the strictest tracker, does not accept."""

_NOT_NUMBERS: Final = ("step", "dataset", "digest", "metrics")
_LOGGED_BEFORE: Final = ("evaluations", "rounds", "losses")
"""Lists in results whose entries were logged during training."""


def line_values(line: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a line of `metrics.jsonl` by name, such as `eval_loss` or `gsm8k/exact_match`.

    Args:
        line: The line; the scores of a benchmark are named after it.
    """
    if line.get("dataset") is not None:
        return _scores(line)
    return dict(_numbers({key: value for key, value in line.items() if key not in _NOT_NUMBERS}))


def result_values(result: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a result by name, such as `result/best_loss` or `result/layer_ratios/4`.

    The scores of an evaluation have the same names as those of evaluations during training.

    Args:
        result: The result as stored in `run.json`.
    """
    figures = {key: value for key, value in result.items() if key != "datasets"}
    found = {f"result/{name}": value for name, value in _numbers(figures)}
    for dataset in result.get("datasets", ()):
        found |= _scores({**dataset, "dataset": dataset["name"]})
    return found


def _scores(line: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for metric in line["metrics"]:
        name = f"{_clean(line['dataset'])}/{_clean(metric['name'])}"
        found[name] = float(metric["value"])
        if metric["standard_error"] is not None:
            found[f"{name}_stderr"] = float(metric["standard_error"])
    return found


def _numbers(value: object, name: str = "") -> Iterator[tuple[str, float]]:
    """Yields the numbers in nested values by path; entries of lists are named by their layers, others left out."""
    if isinstance(value, int | float):
        yield name, float(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key not in _LOGGED_BEFORE:
                yield from _numbers(item, f"{name}/{_clean(str(key))}".lstrip("/"))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            if isinstance(item, Mapping) and "layers" in item:
                yield from _numbers(item, f"{name}/{_clean(item.get('projection') or item['layers'])}")


def _clean(part: str) -> str:
    return _NOT_IN_A_NAME.sub("_", part.replace(",", "."))
