"""Small random vision-language models of three families with their processors, and made images to ask them about."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

IMAGE_TOKENS = (
    "<image>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<fake_token_around_image>",
    "<global-img>",
    "<row_1_col_1>",
    "<row_1_col_2>",
    "<row_2_col_1>",
    "<row_2_col_2>",
    "<end_of_utterance>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
)
"""The special tokens of all families."""

Built = tuple["PreTrainedModel", dict[str, Any], dict[str, Any], str]
"""A model, the settings of its image processor and of its processor, and what its chat template writes for an image."""

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def chat_template(image: str) -> str:
    """A chat template that writes `image` for an image part and takes content as text or as parts."""
    return (
        "{% for message in messages %}<|{{ message['role'] }}|>"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )


def vision_tokenizer() -> PreTrainedTokenizerFast:
    """The character-level tokenizer with the special tokens of all families."""
    from tests.conftest import build_tokenizer

    tokenizer = build_tokenizer(chat_template=None)
    added = ["<|system|>", "<|user|>", "<|assistant|>", *IMAGE_TOKENS]
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    return tokenizer


def token_of(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    """The id of a token."""
    return int(tokenizer.convert_tokens_to_ids(text))


def build_llava(tokenizer: PreTrainedTokenizerFast) -> Built:
    """LLaVA with a vision tower that has more layers than the language model."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(vocab_size=len(tokenizer), **TEXT)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=token_of(tokenizer, "<image>"),
        image_seq_length=4,
        pad_token_id=0,
        eos_token_id=1,
    )
    images = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 16},
        "crop_size": {"height": 16, "width": 16},
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": 8,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
        "image_token": "<image>",
    }
    return LlavaForConditionalGeneration(config), images, processor, "<image>\n"


def build_qwen2_vl(tokenizer: PreTrainedTokenizerFast) -> Built:
    """Qwen2-VL, whose images have as many tokens as their size asks for and whose positions have three parts."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig(
        vision_config={"depth": 3, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
        text_config={
            **TEXT,
            "vocab_size": len(tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
        image_token_id=token_of(tokenizer, "<|image_pad|>"),
        video_token_id=token_of(tokenizer, "<|video_pad|>"),
        vision_start_token_id=token_of(tokenizer, "<|vision_start|>"),
        vision_end_token_id=token_of(tokenizer, "<|vision_end|>"),
        pad_token_id=0,
        eos_token_id=1,
    )
    images = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 4,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "min_pixels": 64,
        "max_pixels": 2048,
    }
    processor = {"processor_class": "Qwen2VLProcessor"}
    return Qwen2VLForConditionalGeneration(config), images, processor, "<|vision_start|><|image_pad|><|vision_end|>"


def build_smolvlm(tokenizer: PreTrainedTokenizerFast) -> Built:
    """SmolVLM, which splits large images into tiles."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    config = SmolVLMConfig(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        text_config={"model_type": "llama", **TEXT, "vocab_size": len(tokenizer)},
        image_token_id=token_of(tokenizer, "<image>"),
        scale_factor=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    images = {
        "image_processor_type": "SmolVLMImageProcessor",
        "size": {"longest_edge": 32},
        "max_image_size": {"longest_edge": 16},
        "do_image_splitting": True,
    }
    processor = {"processor_class": "SmolVLMProcessor", "image_seq_len": 4}
    return SmolVLMForConditionalGeneration(config), images, processor, "<image>"


FAMILIES: dict[str, Callable[[PreTrainedTokenizerFast], Built]] = {
    "llava": build_llava,
    "qwen2_vl": build_qwen2_vl,
    "smolvlm": build_smolvlm,
}


families = pytest.mark.parametrize("family", FAMILIES)
_needs_package = pytest.mark.skipif(find_spec("num2words") is None, reason="num2words is not installed")
families_with_images = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=_needs_package if name == "smolvlm" else ()) for name in FAMILIES]
)
"""For tests that load the processor; that of SmolVLM imports num2words, which the extra `vision` installs."""


def save_vision_model(
    family: str, folder: Path, build: Callable[[PreTrainedTokenizerFast], Built] | None = None
) -> Path:
    """A checkpoint folder as its publisher would write it: model, tokenizer, chat template, processor."""
    import torch

    tokenizer = vision_tokenizer()
    torch.manual_seed(0)
    model, images, processor, image = (build or FAMILIES[family])(tokenizer)
    model.save_pretrained(folder)
    tokenizer.chat_template = chat_template(image)
    tokenizer.save_pretrained(folder)
    images = {**images, "processor_class": processor["processor_class"]}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def made_image(seed: int, width: int = 24, height: int = 16) -> Image:
    """An RGB image of random colours."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_image_records(folder: Path, counts: Sequence[int] = (1, 0, 2, 1), name: str = "train.jsonl") -> Path:
    """Questions with different numbers of images, written as PNG files beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number, count in enumerate(counts):
        paths = []
        for index in range(count):
            path = f"images/{number}-{index}.png"
            (folder / "images").mkdir(exist_ok=True)
            made_image(10 * number + index, width=16 + 8 * (number % 3), height=16 + 8 * index).save(folder / path)
            paths.append(path)
        fields: dict[str, Any] = {"prompt": f"What is {number}?", "completion": f"Picture {number}."}
        records.append({**fields, **({"images": paths} if paths else {})})
    file = folder / name
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file
