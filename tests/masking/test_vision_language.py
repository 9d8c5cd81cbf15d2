"""Masks on vision-language models of three families: on the language model and the projector, never on a tower."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from mftctl.errors import MaskingError
from mftctl.masking.baselines import random_mask
from mftctl.masking.checkpoints.apply import apply_to_checkpoint
from mftctl.masking.checkpoints.apply_in_memory import apply_mask, target_names
from mftctl.masking.checkpoints.build_mask import build_mask
from mftctl.masking.checkpoints.carried_parts import parts_left_out
from mftctl.masking.checkpoints.check import check_checkpoint
from mftctl.masking.checkpoints.load import load_model, load_tokenizer
from mftctl.masking.checkpoints.meta_models import build_skeleton, count_layers, read_config
from mftctl.masking.checkpoints.tensors import tensor_index
from mftctl.masking.checkpoints.vision_language import image_token_ids
from mftctl.masking.mask_file.document import MaskMetadata
from mftctl.masking.targets import (
    PROJECTOR_LAYER,
    Target,
    decoder_layers,
    find_targets,
    format_layers,
    masked_layer_indices,
)
from mftctl.masking.towers import beside_language_model
from mftctl.training.flops import flops_per_token
from tests.checkpoint_kinds import copied, with_weights
from tests.vision_models import families

LANGUAGE = {
    "llava": "model.language_model.layers",
    "qwen2_vl": "model.language_model.layers",
    "smolvlm": "model.text_model.layers",
}
PROJECTORS = {
    "llava": ["model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"],
    "qwen2_vl": ["model.visual.merger.mlp.0", "model.visual.merger.mlp.2"],
    "smolvlm": ["model.connector.modality_projection.proj"],
}


def load(folder: Path) -> PreTrainedModel:
    return load_model(folder, dtype=torch.float32)


@families
def test_checkpoint_loads_with_its_vision_tower(family: str, vision_checkpoints: dict[str, Path]) -> None:
    model = load(vision_checkpoints[family])
    assert type(model) is type(AutoModelForImageTextToText.from_pretrained(vision_checkpoints[family]))
    assert check_checkpoint(vision_checkpoints[family], load_tokenizer(vision_checkpoints[family])).remarks == ()


@families
def test_decoder_layers_are_those_of_the_language_model(family: str, vision_checkpoints: dict[str, Path]) -> None:
    path, layers = decoder_layers(load(vision_checkpoints[family]))  # every vision tower has more layers
    assert (path, len(layers)) == (LANGUAGE[family], 2)
    assert count_layers(read_config(str(vision_checkpoints[family]))) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("family", "path"), [("git", "git.encoder.layer"), ("idefics", "model.layers")])
def test_tower_in_a_configuration_of_one_level(family: str, path: str) -> None:
    """Here the configuration itself is that of the language model, and only the tower has one of its own."""
    config = AutoConfig.for_model(family)
    config.num_hidden_layers, config.vision_config.num_hidden_layers = 2, 3
    found, layers = decoder_layers(build_skeleton(config, torch.float32))
    assert (found, len(layers)) == (path, 2)


@families
def test_targets_are_of_the_language_model_and_of_the_projector(
    family: str, vision_checkpoints: dict[str, Path]
) -> None:
    model = load(vision_checkpoints[family])
    both, projector = find_targets(model), find_targets(model, target="projector")
    assert len(both) == 14
    assert all(target.name.startswith(LANGUAGE[family]) for target in both)
    assert [target.name for target in projector] == PROJECTORS[family]
    assert {(target.layer, target.part) for target in projector} == {(PROJECTOR_LAYER, "projector")}
    assert [target.name for target in find_targets(model, [1], "all")] == [
        *PROJECTORS[family],
        *(target.name for target in find_targets(model, [1])),
    ]


@families
def test_parameters_beside_the_language_model(family: str, vision_checkpoints: dict[str, Path]) -> None:
    model = load(vision_checkpoints[family])
    beside = {id(parameter) for parameter in beside_language_model(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in beside}
    kept = (LANGUAGE[family].removesuffix("layers"), "lm_head")
    assert names == {name for name, _ in model.named_parameters() if not name.startswith(kept)}
    assert flops_per_token(model, find_targets(model)) < flops_per_token(model, find_targets(model, target="all"))


@families
@pytest.mark.parametrize("target", ["both", "projector", "all"])
def test_applied_checkpoint_equals_the_model_masked_in_memory(
    family: str, target: Target, vision_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = vision_checkpoints[family]
    model = load(folder)
    targets = find_targets(model, target=target)
    stored = target_names(targets, model, tensor_index(folder))
    assert set(stored.values()) <= set(tensor_index(folder))
    keep = {one.name: random_mask(one, 0.3, seed=3) for one in targets}
    layers = format_layers(masked_layer_indices("all", 2, target))
    metadata = MaskMetadata(
        base_model=str(folder),
        base_revision=None,
        method="random",
        ratio=0.3,
        threshold=None,
        layers=layers,
        seed=3,
        run_id=None,
    )
    mask = build_mask(keep, targets, model, folder, metadata)
    apply_to_checkpoint(folder, mask, tmp_path / "out", mask_path=None, base_model=str(folder))
    applied = load(tmp_path / "out")
    apply_mask(model, mask)
    masked = dict(model.named_parameters())
    for name, parameter in applied.named_parameters():
        assert torch.equal(parameter, masked[name]), name
    changed = {name for name, parameter in load(folder).named_parameters() if not torch.equal(parameter, masked[name])}
    assert changed == {one.weight_name for one in targets}


@pytest.mark.parametrize(
    ("family", "renamed"),
    [
        ("llava", {"vision_tower.": "vision_tower.vision_model."}),  # as published for transformers 4
        ("llava", {"language_model.model.": "model.language_model.", "language_model.lm_head": "lm_head"}),
        ("qwen2_vl", {"visual.": "model.visual.", "model.": "model.language_model."}),
    ],
)
def test_names_of_published_checkpoints(
    family: str, renamed: dict[str, str], vision_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    def rename(name: str) -> str:
        return next((new + name.removeprefix(old) for old, new in renamed.items() if name.startswith(old)), name)

    folder = with_weights(
        vision_checkpoints[family], tmp_path / "m", lambda weights: {rename(name): w for name, w in weights.items()}
    )
    model, other = load(folder), load(vision_checkpoints[family])
    for name, parameter in other.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)
    targets = find_targets(model, target="all")
    assert parts_left_out(folder, model) == {}
    stored = target_names(targets, other, tensor_index(vision_checkpoints[family]))
    assert target_names(targets, model, tensor_index(folder)) == {name: rename(one) for name, one in stored.items()}


def test_template_of_an_older_processor(vision_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(vision_checkpoints["llava"], tmp_path / "m")
    (folder / "chat_template.json").write_text('{"chat_template": "older"}')
    template = load_tokenizer(vision_checkpoints["llava"]).chat_template
    assert load_tokenizer(folder).chat_template == template
    (folder / "chat_template.jinja").unlink()
    assert load_tokenizer(folder).chat_template == "older"
    (folder / "chat_template.json").write_text("[]")
    assert load_tokenizer(folder).chat_template is None


def test_layers_of_the_projector() -> None:
    assert masked_layer_indices("all", 4, "projector") == [PROJECTOR_LAYER]
    assert masked_layer_indices("1-2", 4, "all") == [PROJECTOR_LAYER, 1, 2]
    assert format_layers([PROJECTOR_LAYER]) == "projector"
    assert format_layers([PROJECTOR_LAYER, 1, 2]) == "projector,1-2"
    with pytest.raises(MaskingError, match="belongs to no decoder layer"):
        masked_layer_indices("1-2", 4, "projector")


def test_text_model_has_no_projector(tiny_checkpoint: Path) -> None:
    with pytest.raises(MaskingError, match="has no projector"):
        find_targets(load(tiny_checkpoint), target="projector")
    assert image_token_ids(tiny_checkpoint) is None
