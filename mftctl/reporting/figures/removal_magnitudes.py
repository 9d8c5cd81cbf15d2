"""The share of weights that masks remove, by rank of magnitude."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mftctl.data.quickstart.built_in import NAME as QUICKSTART
from mftctl.data.quickstart.built_in import model_path
from mftctl.errors import MaskFileError, MaskMismatchError, ModelError
from mftctl.experiments.run_inputs import RunInputs
from mftctl.reporting.figures.mask_groups import MaskGroup, ShownMask

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mftctl.masking.checkpoints.tensors import StoredTensor
    from mftctl.masking.mask import Mask

BINS: Final = 20
MAX_SAMPLE: Final = 2**17
"""Maximum sample per tensor: 6,554 weights per bin, for a standard error of 0.4 percentage points at 10 %."""

_PLACE_BITS: Final = 17  # bits of a position in the sample


@dataclass(frozen=True, slots=True)
class MagnitudeShares:
    """The share of weights removed by the masks of one group, in 20 bins by rank of magnitude.

    Attributes:
        label: Label of the group.
        state: State of the masked models, as named in the papers.
        runs: Names of the masks' runs.
        seeds: Seeds of the masks.
        shares: Share per bin, 0 to 1, smallest weights of each tensor first, averaged over the masks.
        lowest: Lowest share of any mask in each bin.
        highest: Highest share of any mask in each bin.
        flat: Overall share removed, averaged over the masks: the expected share of a random mask in every bin.
        is_sampled: Whether any tensor was so large that only a sample of its weights was used.
    """

    label: str
    state: str
    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    shares: tuple[float, ...]
    lowest: tuple[float, ...]
    highest: tuple[float, ...]
    flat: float
    is_sampled: bool


def magnitude_shares(groups: Sequence[MaskGroup]) -> tuple[list[MagnitudeShares], list[str]]:
    """The share removed by magnitude, for each group with a mask whose model is still on disk.

    The weights are those of the model that the mask is applied to: the fine-tuned model, even if the mask resets them
    to earlier values. Each tensor is read once for all masks and must match the digest in their records.

    Args:
        groups: The masks.

    Returns:
        The shares, and one line per mask whose model is missing or does not match.
    """
    by_model: dict[Path, list[ShownMask]] = {}
    problems = []
    for mask in (mask for group in groups for mask in group.masks):
        folder = _model_folder(mask)
        if folder is None:
            model = RunInputs.read(mask.run.record.inputs).model
            problems.append(f"{mask.run.name}: left out of the magnitude figure; its model is not on disk: {model}")
        else:
            by_model.setdefault(folder, []).append(mask)
    found: dict[Path, NDArray[np.float64]] = {}
    for folder, masks in by_model.items():
        measured, unmeasured = _of_model(folder, masks)
        found |= measured
        problems += unmeasured
    return [shares for group in groups if (shares := _of_group(group, found)) is not None], problems


def _of_group(group: MaskGroup, found: Mapping[Path, NDArray[np.float64]]) -> MagnitudeShares | None:
    """The shares of a group, given those by mask file; None if none of its masks has any."""
    import numpy as np

    known = [mask for mask in group.masks if mask.path in found]
    if not known:
        return None
    values = np.stack([found[mask.path] for mask in known])
    return MagnitudeShares(
        label=group.label,
        state=group.state,
        runs=tuple(mask.run.name for mask in known),
        seeds=tuple(mask.seed for mask in known),
        shares=tuple(values.mean(axis=0).tolist()),
        lowest=tuple(values.min(axis=0).tolist()),
        highest=tuple(values.max(axis=0).tolist()),
        flat=float(np.mean([mask.removed_share for mask in known])),
        is_sampled=any(r.weights > MAX_SAMPLE for mask in known for r in mask.records.values()),
    )


def _model_folder(mask: ShownMask) -> Path | None:
    """The folder of the model that the mask is applied to; None if it is not on this disk."""
    model = str(RunInputs.read(mask.run.record.inputs).model)
    path = Path(model)
    # The same runs folder first: records in a copied runs folder still point to the original.
    for folder in (mask.run.folder.parent / path.parent.name / path.name, path):
        with suppress(OSError):  # name too long
            if folder.is_dir():
                return folder
    if model == QUICKSTART:
        return model_path()
    return _downloaded(model, mask.run.record.config.get("revision"))


def _downloaded(model: str, revision: str | None) -> Path | None:
    """A Hub model in the local cache; a report downloads nothing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (HFValidationError, OSError):
        return None


def _of_model(folder: Path, masks: Sequence[ShownMask]) -> tuple[dict[Path, NDArray[np.float64]], list[str]]:
    """The share removed in each bin, by mask file, for the masks of this model, and one line per mask left out."""
    import numpy as np

    from mftctl.masking.mask import open_mask

    problems: list[str] = []
    with ExitStack() as stack:
        kept: dict[Path, tuple[Mask, dict[str, StoredTensor]]] = {}
        removed = {mask.path: np.zeros(BINS) for mask in masks}

        def leave_out(mask: ShownMask, error: MaskFileError | ModelError | OSError) -> None:
            reason = str(error) if isinstance(error, OSError) else error.message.rstrip(".")
            problems.append(f"{mask.run.name}: left out of the magnitude figure: {reason} ({folder})")
            kept.pop(mask.path, None)

        for shown in masks:
            try:
                opened = stack.enter_context(open_mask(shown.path))
                kept[shown.path] = opened, _stored(opened, folder)
            except (MaskFileError, ModelError) as error:
                leave_out(shown, error)
        for name in sorted({name for mask, _ in kept.values() for name in mask.records}):
            having = [shown for shown in masks if shown.path in kept and name in shown.records]
            if not having:
                continue
            try:
                tensor = _Tensor.read(kept[having[0].path][1][name])
            except (ModelError, OSError) as error:
                for shown in having:
                    leave_out(shown, error)
                continue
            for shown in having:
                try:
                    removed[shown.path] += tensor.removed(kept[shown.path][0], name)
                except MaskFileError as error:
                    leave_out(shown, error)
    weights = {mask.path: sum(record.weights for record in mask.records.values()) for mask in masks}
    return {path: removed[path] * BINS / weights[path] for path in kept}, problems


def _stored(mask: Mask, folder: Path) -> dict[str, StoredTensor]:
    """The tensors that the mask is applied to.

    Raises:
        MaskMismatchError: The model does not have these tensors.
        ModelError: The model cannot be read.
    """
    from mftctl.masking.checkpoints.mask_match import masked_tensors

    return masked_tensors(mask, folder, "base" if mask.metadata.kind == "weight" else "tuned checkpoint")


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor's digest and the flat positions of its sampled weights, in ascending order of magnitude."""

    digest: str
    weights: int
    positions: NDArray[np.int64]

    @classmethod
    def read(cls, stored: StoredTensor) -> _Tensor:
        """Reads a tensor; raises ModelError or OSError if the file cannot be read."""
        import numpy as np

        from mftctl.masking.checkpoints.tensors import tensor_digest
        from mftctl.masking.dtypes import item_bytes, unsigned_view

        digest = tensor_digest(stored)
        unsigned = unsigned_view(stored.dtype)
        weights = stored.length_bytes // item_bytes(stored.dtype)
        bits = np.memmap(stored.path, dtype=unsigned, mode="r", offset=stored.offset_bytes, shape=(weights,))
        positions = _sample(weights)
        # Without the sign bit, numbers of any of these types are ordered like their bits read as integers.
        magnitudes = (bits[positions] & unsigned.type(2 ** (8 * unsigned.itemsize - 1) - 1)).astype(np.uint64)
        if unsigned.itemsize == 8:
            magnitudes >>= _PLACE_BITS  # drops the lowest of 52 fraction bits to make space
        # One integer key of magnitude and position: sorting integers is 8 times as fast as a stable argsort.
        keys = np.sort(magnitudes << _PLACE_BITS | np.arange(len(positions), dtype=np.uint64))
        return cls(digest, weights, positions[keys & np.uint64(2**_PLACE_BITS - 1)])

    def removed(self, mask: Mask, name: str) -> NDArray[np.float64]:
        """Number of weights that the mask removes in each bin, `(BINS,)`, scaled up from the sample.

        A weight on the border of two bins counts partly in each, so that all bins have the same size.

        Raises:
            MaskMismatchError: The mask was made for a tensor with different bytes.
            MaskFormatError: The file changed since it was opened.
        """
        import numpy as np

        record = mask.records[name]
        if self.digest != (record.sha256 if mask.metadata.kind == "weight" else record.tuned_sha256):
            raise MaskMismatchError("The weights are not the ones the mask was made for", key=name)
        packed = mask.packed(name)
        is_removed = (packed[self.positions >> 3] >> (self.positions & 7).astype(np.uint8)) & 1 == 0
        looked_at = len(self.positions)
        below = np.concatenate([[0], np.cumsum(is_removed)])
        borders, part = np.divmod(np.arange(BINS + 1) * looked_at, BINS)
        at_borders = below[borders] + np.append(is_removed, False)[borders] * part / BINS
        counts: NDArray[np.float64] = np.diff(at_borders) * (self.weights / looked_at)
        return counts


@lru_cache(maxsize=8)  # a model has only a few distinct tensor sizes
def _sample(weights: int) -> NDArray[np.int64]:
    """Flat positions to sample, ascending: all, or one drawn from each of `MAX_SAMPLE` segments, always the same."""
    import numpy as np

    if weights <= MAX_SAMPLE:
        return np.arange(weights)
    borders = np.arange(MAX_SAMPLE + 1) * weights // MAX_SAMPLE
    # Drawn at random, since equal strides could always hit the same columns of a matrix.
    return np.random.default_rng(0).integers(borders[:-1], borders[1:])
