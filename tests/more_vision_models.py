"""Small random vision-language models of further families; see `tests.vision_models`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.vision_models import TEXT, Built, token_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_QWEN_VISION = {
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
}
_QWEN_IMAGES = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "min_pixels": 64,
    "max_pixels": 2048,
}
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_GRID = [[16, 32], [32, 16], [32, 32]]


def _qwen_text(tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    positions = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    return {**TEXT, "head_dim": 8, "vocab_size": len(tokenizer), "rope_parameters": positions}


def _qwen_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    tokens = {f"{name}_token_id": token_of(tokenizer, text) for name, text in names.items()}
    ends = {f"vision_{end}_token_id": token_of(tokenizer, f"<|vision_{end}|>") for end in ("start", "end")}
    return {**tokens, **ends}


def build_qwen2_5_vl(tokenizer: PreTrainedTokenizerFast) -> Built:
    """Qwen2.5-VL, whose vision tower attends within windows."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {**_QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [2]}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=_qwen_text(tokenizer), **_qwen_tokens(tokenizer))
    processor = {"processor_class": "Qwen2_5_VLProcessor"}
    return Qwen2_5_VLForConditionalGeneration(config), _QWEN_IMAGES, processor, _QWEN_IMAGE


def build_qwen3_vl(tokenizer: PreTrainedTokenizerFast) -> Built:
    """Qwen3-VL, whose language model is given features of an image in several layers."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = {**_QWEN_VISION, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
    config = Qwen3VLConfig(vision_config=vision, text_config=_qwen_text(tokenizer), **_qwen_tokens(tokenizer))
    processor = {"processor_class": "Qwen3VLProcessor"}
    return Qwen3VLForConditionalGeneration(config), _QWEN_IMAGES, processor, _QWEN_IMAGE


def build_idefics3(tokenizer: PreTrainedTokenizerFast) -> Built:
    """Idefics3, the model before SmolVLM."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    config = Idefics3Config(
        vision_config=_VISION,
        text_config={"model_type": "llama", **TEXT, "vocab_size": len(tokenizer)},
        image_token_id=token_of(tokenizer, "<image>"),
        scale_factor=2,
    )
    images = {
        "image_processor_type": "Idefics3ImageProcessor",
        "size": {"longest_edge": 32},
        "max_image_size": {"longest_edge": 16},
        "do_image_splitting": True,
    }
    processor = {"processor_class": "Idefics3Processor", "image_seq_len": 4}
    return Idefics3ForConditionalGeneration(config), images, processor, "<image>"


def build_llava_next(tokenizer: PreTrainedTokenizerFast) -> Built:
    """LLaVA-NeXT, whose images are cut into tiles that keep their proportions."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**{**_VISION, "patch_size": 8}),
        text_config=LlamaConfig(vocab_size=len(tokenizer), **TEXT),
        image_token_id=token_of(tokenizer, "<image>"),
        image_grid_pinpoints=_GRID,
        image_seq_length=4,
    )
    images = {
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": 16},
        "crop_size": {"height": 16, "width": 16},
        "image_grid_pinpoints": _GRID,
    }
    processor = {
        "processor_class": "LlavaNextProcessor",
        "patch_size": 8,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
        "image_token": "<image>",
    }
    return LlavaNextForConditionalGeneration(config), images, processor, "<image>\n"


def build_gemma3(tokenizer: PreTrainedTokenizerFast) -> Built:
    """Gemma 3, whose placeholder is another token than those that it becomes."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer._set_model_specific_special_tokens(special_tokens=named)
    config = Gemma3Config(
        vision_config=_VISION,
        text_config={**TEXT, "head_dim": 8, "vocab_size": len(tokenizer)},
        image_token_id=token_of(tokenizer, named["image_token"]),
        boi_token_index=token_of(tokenizer, named["boi_token"]),
        eoi_token_index=token_of(tokenizer, named["eoi_token"]),
        mm_tokens_per_image=4,
    )
    images = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 16, "width": 16}}
    processor = {"processor_class": "Gemma3Processor", "image_seq_length": 4}
    return Gemma3ForConditionalGeneration(config), images, processor, named["boi_token"]


def build_internvl(tokenizer: PreTrainedTokenizerFast) -> Built:
    """InternVL, which cuts an image into patches of one size."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<|video_pad|>",
    }
    tokenizer._set_model_specific_special_tokens(special_tokens=named)
    config = InternVLConfig(
        vision_config={**_VISION, "image_size": [16, 16], "patch_size": [4, 4]},
        text_config={"model_type": "qwen2", **TEXT, "vocab_size": len(tokenizer)},
        image_token_id=token_of(tokenizer, named["context_image_token"]),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    images = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "size": {"height": 16, "width": 16},
        "crop_to_patches": True,
        "max_patches": 4,
        "min_patches": 1,
    }
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": 4}
    return InternVLForConditionalGeneration(config), images, processor, "<IMG_CONTEXT>\n"


MORE_FAMILIES: dict[str, Callable[[PreTrainedTokenizerFast], Built]] = {
    "qwen2_5_vl": build_qwen2_5_vl,
    "qwen3_vl": build_qwen3_vl,
    "idefics3": build_idefics3,
    "llava_next": build_llava_next,
    "gemma3": build_gemma3,
    "internvl": build_internvl,
}
