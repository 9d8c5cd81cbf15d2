"""The masks that a report shows: the latest of each state and seed, grouped by architecture."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mftctl.errors import MaskFileError, RunError
from mftctl.experiments.mask_results import Softness
from mftctl.experiments.results import MadeMask, MadeState
from mftctl.experiments.run_contents import first_fault
from mftctl.experiments.run_folder import Run
from mftctl.experiments.run_inputs import Origin
from mftctl.experiments.run_record import RunStatus
from mftctl.experiments.state_names import place_of

if TYPE_CHECKING:
    from mftctl.masking.mask_file.document import Kind, TensorRecord

MAX_GROUPS: Final = 8
"""Maximum number of heat maps or lines in one figure."""

_NUMBER: Final = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class ShownMask:
    """A valid mask file of a finished `mask-train` run.

    Attributes:
        run: The run.
        path: The mask file.
        state: State of the masked model, as named in the papers.
        seed: The run's seed.
        origin: The pre-trained model.
        kind: `weight` (removed weights become 0) or `delta` (they return to their values before fine-tuning).
        records: The file's record of each tensor, sorted by name.
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
        """Equal for masks that differ only in their seed."""
        record = self.run.record
        if record.stage is not None:
            return self.origin, self.state, record.recipe or "", record.stage
        options = [record.config.get(key) for key in ("data", "mask_train")]
        return self.origin, self.state, record.recipe or "", "", json.dumps(options, sort_keys=True)

    @property
    def removed_share(self) -> float:
        """Removed weights divided by masked weights, 0 to 1."""
        records = self.records.values()
        return sum(record.removed for record in records) / sum(record.weights for record in records)


@dataclass(frozen=True, slots=True)
class MaskGroup:
    """Masks that differ only in their seed.

    Attributes:
        label: The state, with recipe, stage or run if needed to distinguish it from others of the same state.
        masks: The latest mask of each seed, by seed.
    """

    label: str
    masks: tuple[ShownMask, ...]

    @property
    def state(self) -> str:
        """State of the masked models, as named in the papers."""
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
    """Comparable masks: of one kind, for models with the same tensor shapes.

    Attributes:
        kind: Kind of the masks.
        origin: Pre-trained model of the first mask.
        groups: Mask groups in the order of the papers' tables.
        older: Number of masks replaced by a newer one with the same settings and seed.
        more: Number of groups left out because they have fewer seeds or are older.
    """

    kind: Kind
    origin: str
    groups: tuple[MaskGroup, ...]
    older: int
    more: int


def mask_families(runs: Sequence[Run]) -> tuple[list[MaskFamily], list[str]]:
    """The hard masks of finished `mask-train` runs; each file is read and checked once, one at a time.

    Args:
        runs: The runs, oldest first.

    Returns:
        The families, and one line per mask that cannot be used.
    """
    found: list[tuple[dict[str, tuple[int, ...]], list[ShownMask]]] = []
    problems = []
    for run in runs:
        if run.record.command != "mask-train" or run.record.status != RunStatus.FINISHED:
            continue
        try:
            if run.result(Softness).soft is not None:
                continue
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
    return [_family(masks) for _, masks in found], problems


def _read_mask(run: Run) -> ShownMask:
    """The mask of a finished run; its bits are checked but not kept.

    Raises:
        RunError: The record is incomplete.
        MaskFileError: The file is missing or damaged, or a package to read it is missing.
    """
    from mftctl.masking.mask import open_mask

    record = run.record
    try:
        # The run's own file first: the record in a copied runs folder still points to the original.
        path = run.folder / "mask.bits"
        path = path if path.is_file() else Path(run.result(MadeMask).mask)
        state, seed = run.result(MadeState).state, int(record.config.get("seed", 0))
        origin = Origin.read(record.inputs).origin
    except (OSError, RunError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(
            "The run record of this mask is incomplete.", path=run.folder / "run.json", actual=first_fault(error)
        ) from error
    with open_mask(path) as mask:
        for name in mask.names():
            mask.packed(name)  # checks the bits against the record
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
    shown.sort(key=lambda group: (place_of(group[0].state), places[id(group[0])]))
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


def _labels(masks: Sequence[ShownMask]) -> list[str]:
    """The shortest distinct label for each group, given one mask per group."""
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
