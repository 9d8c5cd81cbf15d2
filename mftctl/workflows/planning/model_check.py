"""Checks a model without loading its weights: configuration, tokenizer, projections."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from mftctl.data.image_inputs import ImageInputs
from mftctl.data.template_choice import choose_template
from mftctl.errors import ConfigError
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.record_encoding import image_inputs, template_choice
from mftctl.masking.checkpoints.check import CheckpointCheck, check_checkpoint, learned_positions
from mftctl.masking.checkpoints.load import model_tokenizer
from mftctl.masking.checkpoints.locate import is_adapter, local_folder, resolve_checkpoint
from mftctl.masking.checkpoints.meta_models import build_skeleton, read_config
from mftctl.masking.targets import MaskTarget, decoder_layers, find_targets
from mftctl.masking.towers import projector_modules
from mftctl.workflows.planning.problem_list import ProblemList, describe

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
_WEIGHT_FILES = ("*.safetensors*", "*.bin*", "*.pt", "*.pth")


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """The properties of a model that are shown.

    Attributes:
        name: Name in the recipe.
        model_type: Model family.
        parameters: Number of parameters.
        layers: Number of decoder layers.
        projections: Number of attention and MLP projections.
        tokenizer: Class of the tokenizer; None if there is none to load.
        chat_template: Whether the tokenizer has a chat template; None without a tokenizer.
    """

    name: str
    model_type: str
    parameters: int
    layers: int
    projections: int
    tokenizer: str | None
    chat_template: bool | None


@dataclass(frozen=True, slots=True)
class CheckedModel:
    """A model described by its configuration.

    Attributes:
        name: Name in the recipe.
        config: Model configuration.
        tokenizer: The tokenizer; None if there is none to load.
        parameters: Number of parameters.
        layer_count: Number of decoder layers.
        projections: All attention and MLP projections, without data.
        check: Result of the checkpoint check.
        images: The image side of a vision-language model; None for other models, and for one that is not on this
            machine.
    """

    name: str
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    parameters: int
    layer_count: int
    projections: list[MaskTarget]
    check: CheckpointCheck
    images: ImageInputs | None = None

    def summary(self) -> ModelSummary:
        """Returns the properties to show."""
        tokenizer = self.tokenizer
        return ModelSummary(
            name=self.name,
            model_type=self.config.model_type,
            parameters=self.parameters,
            layers=self.layer_count,
            projections=len(self.projections),
            tokenizer=None if tokenizer is None else type(tokenizer).__name__,
            chat_template=None if tokenizer is None else bool(tokenizer.chat_template),
        )


def check_model(recipe: Recipe, problems: ProblemList) -> CheckedModel | None:
    """Returns the recipe's model, or None if not even its shapes can be determined.

    Args:
        recipe: The recipe with the model and its revision.
        problems: Receives problems with its files, tokenizer and family.
    """
    if recipe.model is None:
        problems.problem("model: the recipe names no model (try: --set model=DIR)")
        return None
    checked = None
    with problems.collecting("model"):
        name = _base_of(recipe.model)
        config = read_config(name, recipe.revision)
        _check_family(recipe, config, problems)
        tokenizer = _find_tokenizer(name, recipe.revision, problems)
        check = _check_weights(name, tokenizer, problems)
        tokenizer = _with_template(tokenizer, recipe, problems)
        model = build_skeleton(config, torch.float32)
        if check is None:
            _check_vocabulary(config, tokenizer, problems)
            check = CheckpointCheck((), learned_positions(model))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        layer_count = len(decoder_layers(model)[1])
        images = None if tokenizer is None else image_inputs(local_folder(name), tokenizer)
        targets = find_targets(model, target="all" if projector_modules(model) else "both")
        checked = CheckedModel(recipe.model, config, tokenizer, parameters, layer_count, targets, check, images)
    return checked


def _base_of(model: str) -> str:
    """The model itself, or the base model of an adapter, which has the same shapes."""
    folder = Path(model).expanduser()
    if not is_adapter(folder):
        return model
    from mftctl.masking.checkpoints.locate import adapter_base

    return adapter_base(folder)


def _check_family(recipe: Recipe, config: PreTrainedConfig, problems: ProblemList) -> None:
    if recipe.model_type is not None and recipe.model_type != config.model_type:
        problems.problem(
            f"model_type: the recipe is for a different model family (expected: {recipe.model_type}; "
            f"got: {config.model_type})"
        )


def _check_weights(
    model: str, tokenizer: PreTrainedTokenizerBase | None, problems: ProblemList
) -> CheckpointCheck | None:
    """Checks a checkpoint; returns None if it has no weights or they are faulty."""
    folder = local_folder(model)
    check = None
    if folder is None:
        problems.skip("model: weights, which the first command downloads")
    elif not any(next(folder.glob(pattern), None) for pattern in _WEIGHT_FILES):
        problems.skip(f"model: weights, since {folder} has none; all values are derived from config.json")
    else:
        check = CheckpointCheck()
        with problems.collecting("model"):
            check = check_checkpoint(resolve_checkpoint(model), tokenizer)
            for remark in check.remarks:
                problems.warn(f"model: {remark}")
    return check


def _find_tokenizer(model: str, revision: str | None, problems: ProblemList) -> PreTrainedTokenizerBase | None:
    folder = local_folder(model)
    if folder is None or any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return model_tokenizer(model, revision)
    problems.skip(
        f"model: chat template, labels and token counts, since {folder} has no tokenizer; every batch is assumed to "
        "have max_length_tokens"
    )
    return None


def _with_template(
    tokenizer: PreTrainedTokenizerBase | None, recipe: Recipe, problems: ProblemList
) -> PreTrainedTokenizerBase | None:
    """The tokenizer with the recipe's chat template; None if the template cannot be used."""
    if tokenizer is None:
        return None
    try:
        choose_template(tokenizer, template_choice(recipe))
    except ConfigError as error:
        problems.problem(f"chat_template: {describe(error)}")
        return None
    return tokenizer


def _check_vocabulary(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None, problems: ProblemList
) -> None:
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if tokenizer is not None and vocabulary is not None and len(tokenizer) > vocabulary:
        problems.problem(
            f"model: the tokenizer has more tokens than the model (expected: at most {vocabulary:,}; "
            f"got: {len(tokenizer):,})"
        )
