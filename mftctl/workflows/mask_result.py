"""Writes the mask that a search found, hard or soft, and its result for the run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from mftctl.errors import OutputError
from mftctl.experiments.mask_results import Confirmation, KeptMask, MeasuredMask, SoftMask
from mftctl.experiments.model_source import ModelSource
from mftctl.experiments.presets import MaxMultiplier
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.results import PrefixReuse
from mftctl.experiments.run_folder import Run
from mftctl.experiments.state_names import mask_state
from mftctl.files.atomic import atomic_file
from mftctl.masking.checkpoints.build_mask import build_mask
from mftctl.masking.checkpoints.pairing import TensorPair
from mftctl.masking.delta.records import DeltaMetadata, NamedModel
from mftctl.masking.delta.soft_file import write_soft_mask
from mftctl.masking.mask import Mask, mask_permit, save_mask
from mftctl.masking.mask_file.document import MaskMetadata
from mftctl.masking.soft_mask import IDENTITY_CODES
from mftctl.masking.targets import MaskTarget, format_layers
from mftctl.runtime.peak_memory import peak_memory_bytes
from mftctl.runtime.processes import is_first
from mftctl.training.interim_evaluation import measurements
from mftctl.training.mask_search import FoundMask, MaskSearch

KeyType = TypeVar("KeyType", int, str)


@dataclass(frozen=True, slots=True)
class SearchedMask:
    """A mask that was measured on the model.

    Attributes:
        search: The search, with the whole model.
        found: Its result.
        layers: The masked layers.
        base: For a delta mask, the model before fine-tuning.
        pairs: For a delta mask, the tensors of both models by target name.
        flops: FLOPs per training token.
        confirmation: Effect on records not used to choose the mask.
        reuse: Use of the cache of hidden states.
    """

    search: MaskSearch
    found: FoundMask
    layers: list[int]
    base: str | None
    pairs: Mapping[str, TensorPair] | None
    flops: float
    confirmation: Confirmation | None
    reuse: PrefixReuse


def written_mask(
    searched: SearchedMask, recipe: Recipe, source: ModelSource, run: Run, *, may_replace: bool
) -> MeasuredMask:
    """Writes a mask, hard or soft, and returns the result.

    Args:
        searched: What the search found.
        recipe: The recipe of the run.
        source: The fine-tuned model.
        run: Open run, with or without an output path.
        may_replace: Whether to replace a mask file at the output path.
    """
    search, found, options = searched.search, searched.found, recipe.mask_train
    kept = (
        keep_soft_mask(found.mask, search, recipe, source, run, may_replace=may_replace)
        if options.writes_multipliers
        else keep_mask(mask_of(searched, recipe, source, run), run, may_replace=may_replace)
    )
    return MeasuredMask(
        **kept.document(),
        state=mask_state(options),
        model=source.model,
        base=searched.base,
        layers=format_layers(searched.layers),
        layer_ratios=layer_ratios(found.mask, search.targets),
        tensor_ratios={one.weight_name: search.ratios[one.name] for one in search.targets} if search.ratios else None,
        projection_ratios=projection_ratios(found.mask, search.targets) if search.ratios else None,
        unmasked_loss=found.unmasked_loss,
        start_loss=found.start_loss,
        best_loss=found.best_loss,
        best_step=found.best_step,
        kept_average=found.kept_average,
        unmasked_score=found.unmasked_score,
        best_score=found.best_score,
        steps=found.steps,
        tokens=found.tokens,
        learning_rate=found.learning_rate,
        helps=found.helps,
        flips=found.flips,
        kept=options.keep if options.method == "learned" else None,
        start_std=search.start.std if (options.method, options.start) == ("learned", "normal") else None,
        flops_per_token=searched.flops,
        confirmation=searched.confirmation,
        prefix_reuse=searched.reuse,
        evaluations=measurements(run.training),
        peak_memory_bytes=peak_memory_bytes(),
        retained=found.retained,
        rewards=found.rewards,
    )


def mask_of(searched: SearchedMask, recipe: Recipe, source: ModelSource, run: Run) -> Mask:
    """The hard mask that a search found, with its metadata.

    Args:
        searched: What the search found.
        recipe: The recipe of the run.
        source: The fine-tuned model.
        run: The run.
    """
    search, metadata = searched.search, mask_metadata(recipe, source, run, searched.layers, searched.base)
    checkpoint = search.inputs.checkpoint
    return build_mask(searched.found.mask, search.targets, search.model, checkpoint, metadata, searched.pairs)


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
