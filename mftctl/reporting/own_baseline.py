"""Which fine-tuned model each state is compared with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from mftctl.errors import EvaluationError
from mftctl.experiments.deciding_keys import in_names_of_today
from mftctl.experiments.run_inputs import RunInputs
from mftctl.experiments.state_names import FFT, PRE_TRAINED
from mftctl.reporting.evaluation_runs import Maker, Measurement, belong_together

Pair = tuple[Measurement, Measurement]
"""The evaluation of a baseline, and that of a state."""

_DATA = ("data", "val_data", "val_fraction", "revision", "learn", "bad_records", "files")
_TEMPLATE = ("chat_template", "template_args", "merge_system")
_OF_SPEED = ("benchmark_every", "benchmark_limit", "gradient_checkpointing")
_OF_STEP = ("batch_size", "grad_accum_steps")
"""Counted as one setting."""


def baseline_of(measurements: Sequence[Measurement]) -> str:
    """The state that the others are compared with: FFT, or without it the pre-trained model."""
    return FFT if any(may_be_baseline(item) and item.state == FFT for item in measurements) else PRE_TRAINED


def may_be_baseline(item: Measurement) -> bool:
    """True unless it is a control that `run` added, which for a mask of a given model is its first fine-tuning."""
    return not item.run.record.chose_its_model


def baseline_pairs(group: Sequence[Measurement], others: Iterable[Measurement], baseline: str) -> list[Pair]:
    """The evaluations of a state, each after those of its own baseline.

    A state made from a fine-tuned model is compared with that model. For any other, such as GMT, one row of several
    fine-tuned models is chosen: the one that differs from it in the fewest settings; among equals, that of the same
    recipe, then that of the same seeds.

    Args:
        group: Evaluations of the state, one per seed.
        others: All evaluations on the same data.
        baseline: The state to compare with.

    Raises:
        EvaluationError: Several rows fit equally well.
    """
    candidates = [item for item in others if item.state == baseline and may_be_baseline(item)]
    pairs = [(base, item) for item in group for base in candidates if belong_together(base, item)]
    rows: dict[Maker, list[Pair]] = {}
    for base, item in pairs:
        rows.setdefault(base.maker, []).append((base, item))
    if len(rows) < 2 or all(_is_made_from(base, item) for base, item in pairs):
        return pairs
    distances = {row: _distance(of_row) for row, of_row in rows.items()}
    are_known = None not in distances.values()
    ranks = {row: (distances[row] if are_known else 0, *_differences(of_row, group)) for row, of_row in rows.items()}
    nearest = [row for row, rank in ranks.items() if rank == min(ranks.values())]
    if len(nearest) > 1:
        names = ", ".join(": ".join(filter(None, row)) for row in nearest)
        raise EvaluationError(f"not compared, since several fine-tuned models fit equally well: {names}")
    return rows[nearest[0]]


def _is_made_from(base: Measurement, item: Measurement) -> bool:
    parents = item.lineage.parents
    return base.lineage.parents == parents[:1] if parents else item.state != PRE_TRAINED


def _differences(of_row: Sequence[Pair], group: Sequence[Measurement]) -> tuple[bool, bool]:
    """Whether a row is of another recipe than the state, and whether it lacks one of the state's seeds."""
    recipes = [{item.run.record.recipe for item in side} for side in ([base for base, _ in of_row], group)]
    return recipes[0].isdisjoint(recipes[1]), not {item.seed for item in group} <= {base.seed for base, _ in of_row}


def _distance(of_row: Sequence[Pair]) -> int | None:
    """The number of settings in which a state differs from a row; None if they are not recorded."""
    for base, item in of_row:
        theirs, mine = _settings(base), _settings(item)
        if base.seed == item.seed and theirs and mine:
            return sum(theirs.get(key) != mine.get(key) for key in theirs.keys() | mine.keys())
    return None


def _settings(item: Measurement) -> dict[str, str]:
    """What determined the first fine-tuning of a state, as JSON by name; empty without one or without its run."""
    tuned = [run for run in item.made_by[:1] if run.record.command == "fft"]
    if not tuned:
        return {}
    decides = in_names_of_today(tuned[0].record.decides)
    section = decides.get("fft")
    if not isinstance(section, dict):
        return {}
    found = {key: decides[key] for key in (*_DATA, *_TEMPLATE) if key in decides}
    found |= {f"fft.{key}": value for key, value in section.items() if key not in (*_OF_SPEED, *_OF_STEP)}
    found["step"] = [section.get(key) for key in _OF_STEP]
    found["digest"] = RunInputs.read(tuned[0].record.inputs).of_part("train")[0]
    return {key: json.dumps(value, sort_keys=True) for key, value in found.items()}
