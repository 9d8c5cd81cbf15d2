"""Writes a mask file with its metadata, and a summary for the run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from mftctl.errors import OutputError
from mftctl.experiments.mask_results import KeptMask, SoftMask
from mftctl.experiments.model_source import ModelSource
from mftctl.experiments.presets import MaxMultiplier
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.run_folder import Run
from mftctl.files.atomic import atomic_file
from mftctl.masking.delta.records import DeltaMetadata, NamedModel
from mftctl.masking.delta.soft_file import write_soft_mask
from mftctl.masking.mask import Mask, mask_permit, save_mask
from mftctl.masking.mask_file.document import MaskMetadata
from mftctl.masking.soft_mask import IDENTITY_CODES
from mftctl.masking.targets import MaskTarget, format_layers
from mftctl.runtime.processes import is_first
from mftctl.training.mask_search import MaskSearch

KeyType = TypeVar("KeyType", int, str)


def keep_mask(mask: Mask, run: Run, *, may_replace: bool) -> KeptMask:
    """Writes a mask to the run folder and the output path; returns both paths and a summary of what it removes.

    Args:
        mask: The mask.
        run: Open run, with or without an output path.
        may_replace: Whether to replace a mask file at the output path.
    """
    path = run.folder / "mask.bits"
    output, refused = run.record.output, None
    if is_first():
        save_mask(mask, path)
        if output is not None:
            try:
                save_mask(mask, Path(output), permit=mask_permit(replace=may_replace))
            except OutputError as error:
                output, refused = None, str(error)
    return KeptMask(
        mask=str(path.resolve()),
        output=output,
        output_refused=refused,
        tensors=len(mask),
        weights=mask.weights,
        removed=mask.removed,
        ratio=mask.ratio,
        soft=None,
    )


def keep_soft_mask(
    codes: Mapping[str, torch.Tensor],
    search: MaskSearch,
    recipe: Recipe,
    source: ModelSource,
    run: Run,
    *,
    may_replace: bool,
) -> KeptMask:
    """Writes a soft mask to the run folder and the output path; returns both paths and a summary of it.

    Args:
        codes: uint8 codes by target name.
        search: The search that found it, with the whole model.
        recipe: The recipe of the run.
        source: The fine-tuned model.
        run: Open run, with or without an output path.
        may_replace: Whether to replace a mask file at the output path.
    """
    path, limit = run.folder / "mask.bits", recipe.mask_train.max_multiplier
    output, refused = run.record.output, None
    if is_first():
        metadata = DeltaMetadata(
            values="scale",
            base=NamedModel(source.model, recipe.revision),
            tuned=(),
            method=recipe.mask_train.method,
            seed=recipe.seed,
            run_id=run.name,
        )
        write_soft_mask(codes, limit, search.targets, search.model, search.inputs.checkpoint, path, metadata)
        if output is not None:
            try:
                with atomic_file(Path(output), mask_permit(replace=may_replace)) as temporary:
                    shutil.copyfile(path, temporary)
            except OutputError as error:
                output, refused = None, str(error)
    counts = torch.stack([torch.bincount(own.flatten(), minlength=256) for own in codes.values()]).sum(0)
    weights, removed = int(counts.sum()), int(counts[0])
    return KeptMask(
        mask=str(path.resolve()),
        output=output,
        output_refused=refused,
        tensors=len(codes),
        weights=weights,
        removed=removed,
        ratio=removed / weights,
        # Only the first process writes the file, and only its result is recorded.
        soft=_soft_summary(counts, limit, path.stat().st_size if is_first() else 0),
    )


def _soft_summary(counts: torch.Tensor, limit: MaxMultiplier, file_bytes: int) -> SoftMask:
    """The summary of a soft mask from the number of weights with each code, int64 `(256,)`."""
    identity, weights = IDENTITY_CODES[limit], int(counts.sum())
    codes = torch.arange(len(counts))
    return SoftMask(
        max_multiplier=limit,
        changed=weights - int(counts[identity]),
        mean=int((counts * codes).sum()) / identity / weights,
        mean_change=int((counts * (codes - identity).abs()).sum()) / identity / weights,
        file_bytes=file_bytes,
    )


def layer_ratios(mask: Mapping[str, torch.Tensor], targets: Sequence[MaskTarget]) -> dict[str, float]:
    """The share removed in each masked decoder layer, by index, and in the projector; unknown before, by threshold."""
    found = _shares(mask, targets, lambda target: target.layer)
    return {format_layers([layer]): found[layer] for layer in sorted(found)}


def projection_ratios(mask: Mapping[str, torch.Tensor], targets: Sequence[MaskTarget]) -> dict[str, float]:
    """The share removed in each kind of projection, such as `q_proj`, in model order."""
    return _shares(mask, targets, lambda target: target.projection)


def _shares(
    mask: Mapping[str, torch.Tensor], targets: Sequence[MaskTarget], key: Callable[[MaskTarget], KeyType]
) -> dict[KeyType, float]:
    """The share removed among the targets with the same key."""
    removed: dict[KeyType, int] = {}
    weights: dict[KeyType, int] = {}
    for target in targets:
        own, place = mask[target.name], key(target)
        removed[place] = removed.get(place, 0) + int((own == 0).sum())
        weights[place] = weights.get(place, 0) + own.numel()
    return {place: removed[place] / weights[place] for place in weights}


def mask_metadata(
    recipe: Recipe, source: ModelSource, run: Run, layers: list[int], base: str | None = None
) -> MaskMetadata:
    """The metadata of a mask: its models, its method and the run that made it.

    Args:
        recipe: The recipe of the run.
        source: The fine-tuned model.
        run: The run.
        layers: The masked layers.
        base: The model before fine-tuning, for a delta mask.
    """
    options = recipe.mask_train
    ratio = options.ratio if options.blocks is None else options.blocks.ratio
    is_delta = base is not None
    return MaskMetadata(
        kind="delta" if is_delta else "weight",
        base_model=base or source.model,
        base_revision=None if is_delta else recipe.revision,
        method=options.method,
        ratio=ratio if isinstance(ratio, float) else None,
        threshold=options.threshold,
        layers=format_layers(layers),
        seed=recipe.seed,
        run_id=run.name,
        tuned_model=source.model if is_delta else None,
        tuned_revision=recipe.revision if is_delta else None,
    )
