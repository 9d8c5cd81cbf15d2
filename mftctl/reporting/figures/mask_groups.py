"""The masks that a report shows: the newest of each state and seed, together where they are of one architecture."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mftctl.errors import MaskFileError, RunError
from mftctl.experiments.results import MadeMask, MadeState
from mftctl.experiments.run_contents import first_fault
from mftctl.experiments.run_folder import Run
from mftctl.experiments.state_names import STATE_ORDER

if TYPE_CHECKING:
    from mftctl.masking.mask_file.document import Kind, TensorRecord

MAX_GROUPS: Final = 8
"""More heat maps or lines in one figure cannot be told apart."""

_NUMBER: Final = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class ShownMask:
    """A sound mask file of a finished `mask-train` run.

    Attributes:
        run: The run.
        path: The mask file.
        state: What the mask makes of the model, in the words of the papers.
        seed: The run's.
        origin: The pre-trained model.
        kind: `weight` (removed weights become 0) or `delta` (they go back to the values before fine-tuning).
        records: What the file states of each tensor, names in ascending order.
    """

    run: Run
    path: Path
    state: str
    seed: int
    origin: str
    kind: Kind
    records: Mapping[str, TensorRecord]

    @property
    def made_as(self) -> tuple[str, ...]:
        """The same for masks that differ in nothing but the seed."""
        record = self.run.record
        if record.stage is not None:
            return self.origin, self.state, record.recipe or "", record.stage
        options = [record.config.get(key) for key in ("data", "mask_train")]
        return self.origin, self.state, record.recipe or "", "", json.dumps(options, sort_keys=True)

    @property
    def removed_share(self) -> float:
        """Removed over all masked weights, 0 to 1."""
        records = self.records.values()
        return sum(record.removed for record in records) / sum(record.weights for record in records)


@dataclass(frozen=True, slots=True)
class MaskGroup:
    """Masks that differ in nothing but the seed.

    Attributes:
        label: The state, with as much of recipe, stage or run as tells it from others of the same state.
        masks: The newest of each seed, by seed.
    """

    label: str
    masks: tuple[ShownMask, ...]

    @property
    def state(self) -> str:
        """What the masks make of a model, in the words of the papers."""
        return self.masks[0].state

    @property
    def runs(self) -> tuple[str, ...]:
        """The names of their runs."""
        return tuple(mask.run.name for mask in self.masks)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Their seeds."""
        return tuple(mask.seed for mask in self.masks)


@dataclass(frozen=True, slots=True)
class MaskFamily:
    """Masks of one kind, of models whose tensors have the same shapes, so that they can be compared.

    Attributes:
        kind: Of the masks.
        origin: The pre-trained model of the first of them.
        groups: In the order of the papers' tables.
        older: How many masks are not shown since a newer one was made in the same way with the same seed.
        more: How many other groups there are, with fewer seeds or older than those shown.
    """

    kind: Kind
    origin: str
    groups: tuple[MaskGroup, ...]
    older: int
    more: int


def mask_families(runs: Sequence[Run], problems: list[str]) -> list[MaskFamily]:
    """The masks of finished `mask-train` runs, each file read once and checked, one in memory at a time.

    Args:
        runs: Oldest first.
        problems: Gets a line for each mask that cannot be used.
    """
    found: list[tuple[dict[str, tuple[int, ...]], list[ShownMask]]] = []
    for run in runs:
        if run.record.command != "mask-train" or run.record.status != "finished":
            continue
        try:
            mask = _read_mask(run)
        except (MaskFileError, RunError) as error:
            problems.append(f"{error.path or run.folder}: {error.message}")
            continue
        shapes = {_NUMBER.sub("*", name): record.shape for name, record in mask.records.items()}
        for family, masks in found:
            shared = family.keys() & shapes.keys()
            if masks[0].kind == mask.kind and shared and all(family[name] == shapes[name] for name in shared):
                family.update(shapes)
                masks.append(mask)
                break
        else:
            found.append((shapes, [mask]))
    return [_family(masks) for _, masks in found]


def _read_mask(run: Run) -> ShownMask:
    """The mask of a finished run, its bits checked and not kept.

    Raises:
        RunError: The record lacks something.
        MaskFileError: The file is gone or damaged, or a package to read it is missing.
    """
    from mftctl.masking.mask import open_mask

    record = run.record
    try:
        # The run's own file first: a copied runs folder still names the one it was copied from.
        path = run.folder / "mask.bits"
        path = path if path.is_file() else Path(run.result(MadeMask).mask)
        state, seed = run.result(MadeState).state, int(record.config.get("seed", 0))
        origin = record.inputs["origin"]
    except (OSError, RunError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(
            "The record of this mask's run is not complete.", path=run.folder / "run.json", actual=first_fault(error)
        ) from error
    with open_mask(path) as mask:
        for name in mask.names():
            mask.packed(name)  # which checks them against the record
        return ShownMask(run, path, state, seed, str(origin), mask.metadata.kind, dict(mask.records))


def _family(masks: Sequence[ShownMask]) -> MaskFamily:
    newest = {(mask.made_as, mask.seed): mask for mask in masks}
    groups: dict[tuple[str, ...], list[ShownMask]] = {}
    for mask in newest.values():
        groups.setdefault(mask.made_as, []).append(mask)
    places = {id(mask): place for place, mask in enumerate(masks)}

    def importance(group: Sequence[ShownMask]) -> tuple[int, int]:
        return len(group), max(places[id(mask)] for mask in group)

    shown = sorted(groups.values(), key=importance, reverse=True)[:MAX_GROUPS]
    shown.sort(key=lambda group: (_place(group[0].state), places[id(group[0])]))
    labels = _labels([group[-1] for group in shown])
    return MaskFamily(
        kind=masks[0].kind,
        origin=masks[0].origin,
        groups=tuple(
            MaskGroup(label, tuple(sorted(group, key=lambda mask: mask.seed)))
            for label, group in zip(labels, shown, strict=True)
        ),
        older=len(masks) - len(newest),
        more=len(groups) - len(shown),
    )


def _place(state: str) -> int:
    return STATE_ORDER.index(state) if state in STATE_ORDER else len(STATE_ORDER)


def _labels(masks: Sequence[ShownMask]) -> list[str]:
    """A name for each group, by one of its masks: as short as tells it from the others."""
    forms = []
    for mask in masks:
        record = mask.run.record
        stage = record.stage or mask.run.name
        forms.append((mask.state, f"{mask.state} ({stage})", f"{mask.state} ({record.recipe}: {stage})"))
    counts = [[form[length] for form in forms] for length in range(3)]
    return [
        next(
            (text for length, text in enumerate(form) if counts[length].count(text) == 1),
            f"{mask.state} ({mask.run.name})",
        )
        for form, mask in zip(forms, masks, strict=True)
    ]
