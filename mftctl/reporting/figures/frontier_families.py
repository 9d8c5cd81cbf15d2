"""States of a frontier that differ only in their ratio or in the weight of the data to retain, which form a line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mftctl.experiments.results import MadeState
from mftctl.experiments.run_folder import Run
from mftctl.experiments.run_inputs import Parents
from mftctl.experiments.state_names import STATE_ORDER, place_of
from mftctl.reporting.figures.style import STYLES, LineStyle, numbered_style, style_of
from mftctl.reporting.figures.training_histories import DECIDES_NOTHING
from mftctl.reporting.frontier import Frontier, FrontierPoint

_SECTIONS = {"fft": "fft", "mask-train": "mask_train"}


@dataclass(frozen=True, slots=True)
class Member:
    """A state with the two settings by which it may be on a line.

    Attributes:
        point: The state.
        name: Its name without its variant.
        ratio: Share removed or not updated; None if it does not apply.
        retain_weight: Weight of the data to retain in training.
        others: All other settings that decide the state, as text.
        text: What distinguishes it on its line.
    """

    point: FrontierPoint
    name: str
    ratio: float | None
    retain_weight: float
    others: str
    text: str = ""


@dataclass(frozen=True, slots=True)
class Family:
    """States drawn as one line, or a single state.

    Attributes:
        label: Name in the legend.
        style: Style of line and markers.
        members: The states in the order of the setting that varies.
    """

    label: str
    style: LineStyle
    members: tuple[Member, ...]


def families(frontier: Frontier, by_name: Mapping[str, Run]) -> list[Family]:
    """The states of a frontier as lines and single points.

    Args:
        frontier: The states.
        by_name: The runs of the folder by name.
    """
    groups: dict[tuple[str, str], list[Member]] = {}
    for point in frontier.points:
        member = _member(point, by_name)
        groups.setdefault((member.name, member.others), []).append(member)
    found: list[Family] = []
    places = {place_of(name) for name, _ in groups}
    others = iter([number for number in (*range(len(STATE_ORDER) + 1, STYLES), *range(STYLES)) if number not in places])
    taken: set[int] = set()
    for members in groups.values():
        for label, line in _lines(members):
            place = place_of(line[0].name)
            style = numbered_style(next(others, 0)) if place in taken else style_of(line[0].name)
            taken.add(place)
            found.append(Family(label, style, tuple(line)))
    return found


def _member(point: FrontierPoint, by_name: Mapping[str, Run]) -> Member:
    evaluation = by_name[point.retained.runs[0]]
    name = evaluation.result(MadeState).state
    made_by = [one for one in Parents.read(evaluation.record.inputs).parents if not one.endswith("-apply")]
    record = by_name[made_by[-1]].record if made_by and made_by[-1] in by_name else None
    if record is None or record.command not in _SECTIONS:
        return Member(point, name, None, 0.0, point.state)
    section: dict[str, Any] = dict(record.config.get(_SECTIONS[record.command]) or {})
    ratio, weight = section.pop("ratio", None), section.pop("retain_weight", 0.0)
    for key in DECIDES_NOTHING:
        section.pop(key, None)
    others = json.dumps([section, record.config.get("data"), made_by[:-1]], sort_keys=True)
    number = float(ratio) if isinstance(ratio, int | float) and not isinstance(ratio, bool) else None
    return Member(point, name, number, float(weight or 0.0), others)


def _lines(members: Sequence[Member]) -> list[tuple[str, list[Member]]]:
    """Members with equal other settings as lines by ratio, then by weight, then as single points, with their labels."""
    lines: list[tuple[str, list[Member]]] = []
    rest: list[Member] = []
    for weight in sorted({member.retain_weight for member in members}):
        same = [member for member in members if member.retain_weight == weight]
        by_ratio = {member.ratio: member for member in same if member.ratio is not None}
        if len(by_ratio) < 2 or len(by_ratio) < len(same):
            rest += same
            continue
        line = [_told(by_ratio[ratio], f"{ratio:g}") for ratio in sorted(by_ratio)]
        lines.append((f"{line[0].name} by ratio{_weight_text(weight)}", line))
    for value in dict.fromkeys(member.ratio for member in rest):
        same = [member for member in rest if member.ratio == value]
        by_weight = {member.retain_weight: member for member in same}
        if 1 < len(by_weight) == len(same):
            line = [_told(by_weight[weight], f"{weight:g}") for weight in sorted(by_weight)]
            lines.append((f"{line[0].name} by retain weight", line))
        else:
            lines += [(member.point.state, [member]) for member in same]
    return lines


def _weight_text(weight: float) -> str:
    return f", retain weight {weight:g}" if weight else ""


def _told(member: Member, text: str) -> Member:
    return Member(member.point, member.name, member.ratio, member.retain_weight, member.others, text)
