"""Vision-language models: which configurations describe one, the class that loads it, and its processor of images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from mftctl.errors import ModelError
from mftctl.files.json_files import read_json_object
from mftctl.masking.checkpoints.model_failures import model_failures
from mftctl.masking.checkpoints.remote_code import trusts_code

_TEMPLATE = "chat_template.jinja"
_LEGACY_TEMPLATE = "chat_template.json"
_VIDEO = "video_processor"


def is_vision_language(config: PreTrainedConfig) -> bool:
    """True if a configuration describes a decoder that transformers loads with `AutoModelForImageTextToText`.

    Models whose vision tower has no configuration of its own are loaded as language models.
    """
    has_tower = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and hasattr(config, "vision_config")
    return has_tower and not getattr(config, "is_encoder_decoder", False)


def auto_class(config: PreTrainedConfig) -> Any:
    """The class of transformers that builds and loads the model of a configuration."""
    return AutoModelForImageTextToText if is_vision_language(config) else AutoModelForCausalLM


def image_token_ids(folder: Path) -> frozenset[int] | None:
    """The ids that stand for parts of an image in the tokens of a vision-language model; None for other models.

    Args:
        folder: A checkpoint; without a configuration that can be read, it is taken for that of another model.
    """
    try:
        document = read_json_object(folder / "config.json")
    except (OSError, ValueError):
        return None  # reported where the model is loaded
    if "vision_config" not in document:
        return None
    with model_failures("The model cannot be loaded.", path=folder):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trusts_code())
    if not is_vision_language(config):
        return None
    found = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    return frozenset(token for token in found if isinstance(token, int))


def processor_template(folder: Path) -> str | None:
    """The chat template that older processors keep in a file of their own; None without one, or beside a newer file."""
    if (folder / _TEMPLATE).is_file():
        return None
    try:
        template = read_json_object(folder / _LEGACY_TEMPLATE).get("chat_template")
    except (OSError, ValueError):
        return None
    return template if isinstance(template, str) else None


def load_processor(folder: Path, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    """The processor of a vision-language model, without the part for videos, which would need torchvision.

    Images are processed with Pillow, so that the result does not depend on whether torchvision is installed.

    Args:
        folder: A checkpoint with the files of its processor.
        tokenizer: The model's tokenizer, which the processor is given.

    Raises:
        ModelError: The processor cannot be loaded, or a package that it needs is missing.
    """
    with model_failures(
        "The model's image processor cannot be loaded.",
        path=folder,
        hint=_hint(),
    ):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trusts_code())
        kind: Any = PROCESSOR_MAPPING[type(config)] if type(config) in PROCESSOR_MAPPING else None
        if not isinstance(kind, type):
            raise ModelError(
                "transformers has no processor for this model.", path=folder, key="model_type", actual=config.model_type
            )
        return _without_videos(kind, folder, tokenizer)


def _own(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy for the processor, which may change it, with a token to pad the placeholders of a batch with."""
    own = copy.deepcopy(tokenizer)
    if own.pad_token_id is None:
        own.pad_token = own.eos_token
    return own


def _hint() -> str:
    if find_spec("num2words") is None:
        return 'pip install "mftctl[vision]", or copy preprocessor_config.json and processor_config.json to the folder'
    return "copy preprocessor_config.json and processor_config.json from the original model into this folder"


def _without_videos(kind: Any, folder: Path, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    """The processor of a class from its parts."""
    from transformers import AutoImageProcessor

    names: list[str] = kind.get_attributes()
    known: dict[str, Callable[[], Any]] = {
        # The classes of transformers are not typed.
        "image_processor": lambda: cast("Any", AutoImageProcessor).from_pretrained(
            folder, local_files_only=True, backend="pil"
        ),
        "tokenizer": lambda: _own(tokenizer),
        _VIDEO: lambda: None,
    }
    unknown = sorted({*names} - {*known})
    if unknown:
        raise ModelError(
            "The model's processor has parts that mftctl cannot load.",
            path=folder,
            expected="image_processor, tokenizer and video_processor",
            actual=", ".join(unknown),
        )

    def attributes(_: type[ProcessorMixin]) -> list[str]:
        return [name for name in names if name != _VIDEO]

    reduced: Any = type(kind.__name__, (kind,), {"get_attributes": classmethod(attributes)})
    document, options = kind.get_processor_dict(folder, local_files_only=True)
    found: ProcessorMixin = reduced.from_args_and_dict([known[name]() for name in names], document, **options)
    return found
