"""Recommends the next command."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from mftctl.experiments.run_folder import Run
from mftctl.experiments.run_record import RunStatus
from mftctl.experiments.state_names import State, StateKind
from mftctl.reporting.paired_change import LOWER_IS_BETTER
from mftctl.reporting.state_tables import MetricTable, Row
from mftctl.reporting.strongest_control import AgainstControl


@dataclass(frozen=True, slots=True)
class Advice:
    """A recommended command and the reason for it.

    Attributes:
        command: The command to type next.
        reason: One sentence.
    """

    command: str
    reason: str


def is_learned_mask(row: Row) -> bool:
    """True if a row of a table is about a learned mask, or a mask of unknown origin."""
    return row.made is not None and row.made.is_masked_by_learning


def next_step(tables: Sequence[MetricTable], runs: Sequence[Run]) -> Advice:
    """Returns the most useful next step: measure what is missing, settle what is open, then use a good mask.

    Args:
        tables: The comparison tables; those of data to retain do not count.
        runs: The runs of the runs folder, oldest first.
    """
    tables = [table for table in tables if not table.is_retained]
    made = {run.record.command for run in runs if run.record.status == RunStatus.FINISHED}
    states = {row.made for table in tables for row in table.rows}
    masks = [(table, row) for table in tables for row in table.rows if is_learned_mask(row)]
    if "fft" not in made and "mask-train" not in made:
        return Advice("mftctl fft", "There is no fine-tuned model to learn a mask for yet.")
    if "mask-train" not in made:
        return Advice("mftctl mask-train", "No mask has been learned yet.")
    if not masks:
        return Advice("mftctl eval", "The learned mask has not been measured yet.")
    if State(StateKind.FFT) not in states:
        return Advice("mftctl eval MODEL", "The fine-tuned model that the mask belongs to has not been measured.")
    return _after_a_mask(masks, tables, runs)


def _after_a_mask(
    masks: Sequence[tuple[MetricTable, Row]], tables: Sequence[MetricTable], runs: Sequence[Run]
) -> Advice:
    verdicts = {_verdict(row) for _, row in masks}
    seeds = max(len(row.seeds) for _, row in masks)
    stronger = _better_without_a_mask(masks)
    if stronger is not None:
        return stronger
    if "worse" in verdicts and "better" not in verdicts:
        return Advice("mftctl probe", "The mask made the model worse. Masking only some of the layers may still help.")
    if "better" not in verdicts:
        return Advice("mftctl eval", "The change is within noise. More test records (no --limit) narrow the interval.")
    if _has_no_control(masks, tables):
        return Advice(
            "mftctl fft --schedule constant --average ema",
            "The mask beats the model it was learned on, but no control (more plain training on the same data) was "
            "measured. mftctl run measures controls automatically.",
        )
    if seeds < 3:
        recipe = next((run.record.recipe for run in reversed(runs) if run.record.recipe), None)
        if recipe is not None:
            return Advice(
                f'mftctl run {shlex.quote(recipe)} --set "seeds=[0,1,2]"',
                f"The mask helps with {'one seed' if seeds == 1 else 'two seeds'}. Three give stronger evidence.",
            )
    if not any(table.is_benchmark for table in tables):
        return Advice(
            "mftctl eval --tasks gsm8k", "The mask helps on its own data. A benchmark shows its effect on other data."
        )
    return Advice("mftctl apply", "The mask helps. apply writes a standard checkpoint that any server loads.")


def _verdict(row: Row) -> str | None:
    """The verdict on a mask against its strongest control, or against the baseline if no control is stronger."""
    if row.against_control is not None:
        return row.against_control.change.verdict
    return None if row.change is None else row.change.verdict


def _better_without_a_mask(masks: Sequence[tuple[MetricTable, Row]]) -> Advice | None:
    """Advice to use a control, if no mask is better than it anywhere; None if one is, or if there is no control."""
    found = [(table, row, row.against_control) for table, row in masks if row.against_control is not None]
    if any(control.change.verdict == "better" for _, _, control in found):
        return None
    weaker = [(table, row, control) for table, row, control in found if _is_the_weaker(row, control)]
    if not weaker:
        return None
    table = weaker[0][0]
    sign = 1 if table.metric in LOWER_IS_BETTER else -1
    _, row, control = min((item for item in weaker if item[0] is table), key=lambda item: sign * item[1].value)
    relation = "better" if control.change.verdict == "worse" else "no worse"
    return Advice(
        "mftctl report --each-seed",
        f"A model without a mask, {control.control}, is {relation} than {row.state} on {table.dataset} "
        f"({table.metric} {control.change.value:+.4f} with the mask). Use that model.",
    )


def _has_no_control(masks: Sequence[tuple[MetricTable, Row]], tables: Sequence[MetricTable]) -> bool:
    """True if masks were compared with nothing but the model that they were learned on."""
    compared = [row.against_control for _, row in masks if row.against_control is not None]
    controls = [row for table in tables for row in table.rows if row.made is not None and row.made.is_plain_training]
    alone = all(control.is_baseline for control in compared) and all(row.is_baseline for row in controls)
    return bool(compared) and alone


def _is_the_weaker(row: Row, control: AgainstControl) -> bool:
    """True if a control is better than a mask, or as good as one that is better than the baseline."""
    is_better_than_baseline = row.change is not None and row.change.verdict == "better"
    return not control.is_baseline and (control.change.verdict == "worse" or is_better_than_baseline)
