"""Masks in a training loop of one's own: scores on a loaded model, and the mask that they select."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from mftctl.errors import ConfigError, MaskingError
from mftctl.masking import layers as masked
from mftctl.masking.checkpoints.build_mask import build_mask
from mftctl.masking.checkpoints.locate import resolve_checkpoint
from mftctl.masking.layers import DEFAULT_START_STD, ScoreStart, initial_scores, masked_layers
from mftctl.masking.mask import Mask
from mftctl.masking.mask_file.document import MaskMetadata
from mftctl.masking.pattern import Pattern
from mftctl.masking.rule import MaskRule
from mftctl.masking.selection import Ranking
from mftctl.masking.targets import (
    MaskTarget,
    Target,
    decoder_layers,
    find_targets,
    format_layers,
    masked_layer_indices,
)


@dataclass(frozen=True, slots=True)
class _Attached:
    targets: list[MaskTarget]
    ratio: float | None
    threshold: float | None
    layers: list[int]
    seed: int


_attached: weakref.WeakKeyDictionary[nn.Module, _Attached] = weakref.WeakKeyDictionary()


def attach_masks(
    model: PreTrainedModel,
    *,
    layers: str = "all",
    target: Target = "both",
    ratio: float | None = None,
    threshold: float | None = None,
    pattern: str | None = None,
    ranking: Ranking = "signed",
    start: ScoreStart = "weights",
    start_std: float = DEFAULT_START_STD,
    seed: int = 0,
) -> list[nn.Parameter]:
    """Freezes a model, gives its projections scores, and returns these, its only trainable parameters.

    The model then computes with the mask that the scores select, and any Trainer can train them. The gradient of a
    score is proportional to its weight, so use an Adam with an epsilon of 1e-20. With the default start, use four times
    the learning rate of fine-tuning, and no weight decay.

    Args:
        model: Loaded from a checkpoint; modified in place.
        layers: Decoder layers, such as `4-7`, `0,3,8-11` or `all`.
        target: Projections to mask.
        ratio: Share to remove from each tensor.
        threshold: Remove weights with scores below this value instead; 0 if none of the three is given.
        pattern: Keep the best N of every M consecutive inputs instead, such as `2:4`.
        ranking: Whether a ratio or pattern ranks by the score (`signed`) or by |score| (`absolute`, as in the paper).
        start: Initial scores: `weights` is |weight|; `normal` is that of the paper.
        start_std: Standard deviation of the normal start.
        seed: Decides random starts.

    Raises:
        ConfigError: More than one of ratio, threshold and pattern is given, or the pattern is not valid.
        MaskingError: The model has masks already, or no projections to mask in these layers.

    Source: MFT, section 2, equations 2 to 5; the default start and threshold are ours.
    """
    given = {"ratio": ratio, "threshold": threshold, "pattern": pattern}
    if list(given.values()).count(None) < 2:
        shown = ", ".join(f"{key}={value}" for key, value in given.items() if value is not None)
        raise ConfigError("Give either a ratio, a threshold or a pattern.", key="attach_masks", actual=shown)
    if any(True for _ in masked_layers(model)):
        raise MaskingError("The model has masks already.", expected="a model without masks", hint="detach_masks first")
    chosen = masked_layer_indices(layers, len(decoder_layers(model)[1]), target)
    targets = find_targets(model, chosen, target)
    blocks = None if pattern is None else _pattern(pattern)
    if ratio is None and blocks is None and threshold is None:
        threshold = 0.0
    rules = {one.name: MaskRule(ratio, threshold, ranking, blocks, one.inputs_dim) for one in targets}
    scores = {one.name: initial_scores(one, start, std=start_std, seed=seed) for one in targets}
    masked.attach_masks(model, targets, scores, rules)
    _attached[model] = _Attached(targets, blocks.ratio if blocks else ratio, threshold, chosen, seed)
    return [module.scores for _, module in masked_layers(model)]


def collect_mask(model: PreTrainedModel, checkpoint: str | Path | None = None) -> Mask:
    """Returns the mask that the scores of a model select now; the model keeps its scores.

    Args:
        model: From `attach_masks`.
        checkpoint: Folder or hub id that the model was loaded from; by default the one it remembers.

    Raises:
        MaskingError: The model has no masks of `attach_masks`.
        MaskMismatchError: A masked parameter is not in the checkpoint.
        ModelError: The checkpoint cannot be found.
    """
    attached = _attached.get(model)
    if attached is None:
        raise MaskingError("The model has no masks.", expected="a model that attach_masks was called on")
    name = str(checkpoint or model.config._name_or_path)
    metadata = MaskMetadata(
        base_model=name,
        base_revision=None,
        method="learned",
        ratio=attached.ratio,
        threshold=attached.threshold,
        layers=format_layers(attached.layers),
        seed=attached.seed,
        run_id=None,
    )
    keep = {name: module.mask().cpu() for name, module in masked_layers(model)}
    return build_mask(keep, attached.targets, model, resolve_checkpoint(name), metadata)


def _pattern(text: str) -> Pattern:
    try:
        return Pattern.parse(text)
    except ValueError as error:
        raise ConfigError("The pattern is not valid.", key="pattern", expected=str(error), actual=text) from error
