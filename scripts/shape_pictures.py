"""Builds pictures of shapes with questions about them, and a small vision-language model without training.

    python scripts/shape_pictures.py OUTPUT

Writes `pretraining.jsonl` (names of shapes), `train.jsonl`, `validation.jsonl`, `test.jsonl` (descriptions), their
pictures and `untrained/`, a LLaVA of 0.8 M parameters, for the experiment of `recipes/vision/shapes.yaml`. The same on
every machine.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from build_quickstart import ROLES, build_tokenizer
from PIL import Image, ImageDraw
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

IMAGE = "<image>"
SIZE_PIXELS = 32
PATCH_PIXELS = 8
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 119, 180),
    "yellow": (230, 200, 30),
    "purple": (148, 70, 189),
}
SHAPES = ("circle", "square", "triangle", "bar")
PLACES = ("top left", "top right", "bottom left", "bottom right")
COUNTS = {"pretraining": 8000, "train": 500, "validation": 400, "test": 500}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """One shape of a picture."""

    colour: str
    kind: str
    place: int

    @property
    def text(self) -> str:
        """Its colour and kind."""
        return f"{self.colour} {self.kind}"


def random_picture(rng: random.Random) -> list[Shape]:
    """Two to four shapes in different places, in reading order."""
    places = sorted(rng.sample(range(len(PLACES)), rng.randint(2, 4)))
    return [Shape(rng.choice(list(COLOURS)), rng.choice(SHAPES), place) for place in places]


def drawn(shapes: list[Shape], rng: random.Random) -> Image.Image:
    """The picture, with a random brightness of the ground and random sizes and offsets of the shapes."""
    ground = rng.randint(200, 255)
    picture = Image.new("RGB", (SIZE_PIXELS, SIZE_PIXELS), (ground, ground, ground))
    canvas = ImageDraw.Draw(picture)
    for shape in shapes:
        size = rng.randint(8, 12)
        left = 16 * (shape.place % 2) + rng.randint(1, 15 - size)
        top = 16 * (shape.place // 2) + rng.randint(1, 15 - size)
        box = (left, top, left + size, top + size)
        colour = COLOURS[shape.colour]
        if shape.kind == "circle":
            canvas.ellipse(box, fill=colour)
        elif shape.kind == "square":
            canvas.rectangle(box, fill=colour)
        elif shape.kind == "triangle":
            canvas.polygon([(left, top + size), (left + size, top + size), (left + size / 2, top)], fill=colour)
        else:
            canvas.rectangle((left, top + size / 3, left + size, top + 2 * size / 3), fill=colour)
    return picture


def names(shapes: list[Shape]) -> tuple[str, str]:
    """The question for all shapes, and their names in reading order."""
    return "Name the shapes.", ", ".join(f"a {shape.text}" for shape in shapes)


def description(shapes: list[Shape]) -> tuple[str, str]:
    """The question for a description, and the shapes with their places, from the last to the first."""
    return "Describe the picture.", ", ".join(f"a {shape.text} {PLACES[shape.place]}" for shape in reversed(shapes))


def write_records(output: Path, name: str, count: int, ask: Callable[[list[Shape]], tuple[str, str]]) -> list[str]:
    """Writes a file of records and its pictures; returns all texts."""
    rng = random.Random(name)
    folder = output / "images" / name
    folder.mkdir(parents=True, exist_ok=True)
    lines, texts = [], []
    for number in range(count):
        shapes = random_picture(rng)
        path = folder / f"{number:04d}.png"
        drawn(shapes, rng).save(path)
        prompt, completion = ask(shapes)
        record = {"prompt": prompt, "completion": completion, "images": [str(path.relative_to(output))]}
        lines.append(json.dumps(record) + "\n")
        texts += [prompt, completion]
    (output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
    return texts


def write_model(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Writes the LLaVA with random weights, its tokenizer and its processor."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE_PIXELS,
        patch_size=PATCH_PIXELS,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.05,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(SIZE_PIXELS // PATCH_PIXELS) ** 2,
        vision_feature_layer=-1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": SIZE_PIXELS},
        "crop_size": {"height": SIZE_PIXELS, "width": SIZE_PIXELS},
        "processor_class": "LlavaProcessor",
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": PATCH_PIXELS,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
        "image_token": IMAGE,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(images, indent=2) + "\n")
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary")


def main() -> None:
    """Builds everything in the output folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output", type=Path)
    output: Path = parser.parse_args().output
    texts = []
    for name, count in COUNTS.items():
        texts += write_records(output, name, count, names if name == "pretraining" else description)
    tokenizer = build_tokenizer(texts)
    tokenizer.add_special_tokens({"additional_special_tokens": [*ROLES, IMAGE]})
    tokenizer.chat_template = CHAT_TEMPLATE
    write_model(output / "untrained", tokenizer)


if __name__ == "__main__":
    main()
