"""Further families of vision-language models: losses and answers compared with transformers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mftctl.data.batching import PaddingCollator
from mftctl.data.encoding import encode_all
from mftctl.data.image_inputs import ImageInputs
from mftctl.data.record_issues import RecordIssues
from mftctl.errors import ModelError
from mftctl.evaluation.generation import generate_answers
from mftctl.evaluation.losses import sample_losses
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.record_encoding import load_encoder
from mftctl.masking.checkpoints.load import load_model
from mftctl.masking.targets import decoder_layers, find_targets
from tests.data.test_image_inputs import image, plain_inputs, question
from tests.more_vision_models import MORE_FAMILIES
from tests.vision_models import save_vision_model


@pytest.mark.slow
@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_losses_and_answers(family: str, tmp_path: Path) -> None:
    folder = save_vision_model(family, tmp_path / family, MORE_FAMILIES[family])
    encoder, model = load_encoder(folder, Recipe()), load_model(folder, dtype=torch.float32)
    path, layers = decoder_layers(model)
    assert (path.endswith(("language_model.layers", "text_model.layers")), len(layers)) == (True, 2)
    assert len(find_targets(model)) == 14
    images = [image(tmp_path, seed, 16 + 8 * seed, 32 - 8 * seed) for seed in range(4)]
    examples = [question(images[:1]), question([]), question(images[1:3], "Which?"), question(images[3:], "Longer?")]
    issues = RecordIssues()
    records = encode_all(examples, encoder, 512, issues).records
    issues.settle("error")
    for example, record, loss in zip(examples, records, sample_losses(model, records, pad_token_id=0), strict=True):
        wanted = plain_inputs(encoder, example)
        assert record.input_ids == wanted["input_ids"][0].tolist()
        with torch.no_grad():
            assert loss.nll == pytest.approx(model(**wanted).loss.item() * loss.answer_tokens, abs=1e-3)
    model.train()
    batch = PaddingCollator(0)(records[:2])
    model(**batch, use_cache=False).loss.backward()
    answers = generate_answers(model, encoder, examples, max_new_tokens=4)
    assert answers == [generate_answers(model, encoder, [one], max_new_tokens=4)[0] for one in examples]


class _CrossAttending:
    """A processor whose mask tells which tokens see which image, as that of Llama 3.2 Vision."""

    image_token = "<image>"

    def __call__(self, text: list[str], **_: Any) -> dict[str, torch.Tensor]:
        ids = torch.ones(1, len(text[0]), dtype=torch.int64)
        return {"input_ids": ids, "pixel_values": torch.zeros(1, 3), "cross_attention_mask": ids.unsqueeze(2)}


class _Numbering(_CrossAttending):
    """A processor with kinds of tokens that differ between equal tokens."""

    def __call__(self, text: list[str], **_: Any) -> dict[str, torch.Tensor]:
        ids = torch.ones(1, len(text[0]), dtype=torch.int64)
        return {"input_ids": ids, "mm_token_type_ids": torch.arange(ids.shape[1]).unsqueeze(0)}


@pytest.mark.parametrize(
    ("processor", "key"), [(_CrossAttending, "cross_attention_mask"), (_Numbering, "mm_token_type_ids")]
)
def test_inputs_that_depend_on_text_and_images_are_refused(processor: Any, key: str, tmp_path: Path) -> None:
    inputs = ImageInputs(processor, frozenset({1}))
    with pytest.raises(ModelError, match="depends on text and images together") as caught:
        inputs.of_batch([[image(tmp_path, 0)]], torch.ones(1, 4, dtype=torch.int64), ["train.jsonl:1"])
    assert caught.value.key == key


def test_processor_without_a_placeholder_is_refused() -> None:
    with pytest.raises(ModelError, match="does not mark images"):
        _ = ImageInputs(lambda: object(), frozenset()).placeholder  # type: ignore[arg-type,return-value]
