"""Generation of answers in batches, greedy unless logits processors draw samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList, TextStreamer

from mftctl.data.batching import pad_token_id
from mftctl.data.decoding import decode_behind
from mftctl.data.prepared.records import answer_lengths
from mftctl.errors import EvaluationError
from mftctl.evaluation.answer_room import AnswerRoom, answer_room
from mftctl.evaluation.answer_stops import AnswerStops, answer_stops
from mftctl.evaluation.inference import OnProgress, evaluation_mode
from mftctl.evaluation.lm.stop_strings import StopStrings, cut_at
from mftctl.runtime.process_group import own_part, parts, put_together
from mftctl.runtime.torch_failures import gpu_failures

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mftctl.data.encoding import Encoded, Encoder
    from mftctl.data.examples import Example
    from mftctl.data.image_inputs import ImageInputs


def context_tokens(model: PreTrainedModel) -> int | None:
    """The model's context length in tokens; None if its configuration sets no limit."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return None if limit is None else int(limit)


def default_max_new_tokens(
    encoded: Sequence[Encoded], *, longest_prompt_tokens: int = 0, limit_tokens: int | None = None
) -> int:
    """Default maximum tokens per answer: 1.5 times the longest reference plus 16, or what the longest prompt leaves.

    Args:
        encoded: The reference answers.
        longest_prompt_tokens: Length of the longest prompt.
        limit_tokens: The model's context length.

    Returns:
        At least 1, even if the prompt fills the context; `generate_answers` then reports the example.
    """
    longest_answer = max(answer_lengths(encoded), default=0)
    wanted = longest_answer * 3 // 2 + 16
    return wanted if limit_tokens is None else max(1, min(wanted, limit_tokens - longest_prompt_tokens))


def generate_answers(
    model: PreTrainedModel,
    encoder: Encoder,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    room: AnswerRoom | None = None,
    on_progress: OnProgress | None = None,
) -> list[str]:
    """Generates a greedy answer to each prompt, without special tokens, in the given order.

    In multi-process runs, the processes share the prompts.

    An answer ends at the chat template's end of turn and at the end tokens of the tokenizer and the model's generation
    settings. Nothing else is taken from these settings: a checkpoint's own penalties and sampling would make its score
    depend on more than its weights.

    Args:
        model: A causal language model.
        encoder: Encoder for its tokenizer.
        examples: Each with a prompt; their answers are ignored.
        max_new_tokens: Maximum tokens per answer.
        room: Batch sizes; by default, as large as free memory allows. They do not affect the answers.
        on_progress: Called after each batch.

    Raises:
        EvaluationError: A prompt and its answer do not fit the model's context.
    """
    tokenizer = encoder.tokenizer
    prompts = [encoder.prompt(example) for example in examples]
    check_context(context_tokens(model), examples, prompts, max_new_tokens)
    stops = answer_stops(model, tokenizer)
    answers: dict[int, str] = {}
    pad_id = pad_token_id(tokenizer)
    settings = generation_settings(model, stops, pad_id, max_new_tokens)
    with evaluation_mode(model), settings, gpu_failures("generating answers"):
        own = own_part(range(len(prompts)))
        batches = (room or answer_room(model)).answered(
            [len(prompts[index]) for index in own],
            max_new_tokens,
            lambda places: continue_prompts(
                model,
                tokenizer,
                [prompts[own[place]] for place in places],
                pad_id=pad_id,
                stop_texts=stops.texts,
                asked=PromptImages.of(encoder, [examples[own[place]] for place in places]),
            ),
        )
        for places, written in batches:
            for place, token_ids in zip(places, written, strict=True):
                answers[own[place]] = _text(tokenizer, prompts[own[place]], token_ids, stops)
            if on_progress is not None:
                on_progress(min(len(answers) * parts(), len(examples)), len(examples))
    answers = put_together(answers)
    return [answers[index] for index in range(len(examples))]


def check_context(
    limit: int | None, examples: Sequence[Example], prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    """Checks that every prompt and its answer fit the context.

    Args:
        limit: Context length in tokens; None for no limit.
        examples: The examples, for the error.
        prompts: Token ids of each prompt.
        max_new_tokens: Maximum tokens per answer.

    Raises:
        EvaluationError: One does not fit.
    """
    for example, prompt in zip(examples, prompts, strict=True):
        if limit is not None and len(prompt) + max_new_tokens > limit:
            raise EvaluationError(
                "A prompt and its answer exceed the model's context.",
                path=example.where,
                expected=f"at most {limit} tokens",
                actual=f"prompt tokens: {len(prompt)}, new tokens: up to {max_new_tokens}",
                hint="allow fewer new tokens, or remove this record",
            )


@contextmanager
def generation_settings(
    model: PreTrainedModel, stops: AnswerStops, pad_id: int | None, max_new_tokens: int
) -> Iterator[None]:
    """Replaces the model's generation settings; options passed to `generate` would be merged with them.

    Args:
        model: Its own settings are restored afterwards.
        stops: The tokens that end an answer.
        pad_id: The padding after an answer that ends before the rest of its batch.
        max_new_tokens: The limit at which an unfinished answer is cut.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stops.token_ids) or None,
        pad_token_id=pad_id,
    )
    try:
        yield
    finally:
        model.generation_config = own


@dataclass(frozen=True, slots=True)
class PromptImages:
    """The images of a batch of prompts.

    Attributes:
        images: Turns them into model inputs.
        examples: The examples that the prompts belong to.
    """

    images: ImageInputs
    examples: Sequence[Example]

    @classmethod
    def of(cls, encoder: Encoder, examples: Sequence[Example]) -> PromptImages | None:
        """The images of some examples; None if there are none."""
        if encoder.images is None or not any(example.images for example in examples):
            return None
        return cls(encoder.images, examples)

    def inputs(self, input_ids: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
        """The model inputs for the padded prompts, int64 `(prompts, tokens)`, on a device."""
        images = [example.images for example in self.examples]
        made = self.images.of_batch(images, input_ids, [example.where for example in self.examples])
        return {name: tensor.to(device) for name, tensor in made.items()}


def continue_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    pad_id: int,
    stop_texts: Sequence[str],
    logits_processors: Sequence[LogitsProcessor] = (),
    streamer: TextStreamer | None = None,
    asked: PromptImages | None = None,
) -> list[list[int]]:
    """The new token ids of each prompt, including padding after the end.

    Args:
        model: Under `generation_settings`.
        tokenizer: Its tokenizer.
        prompts: Token ids, without padding.
        pad_id: The padding before shorter prompts.
        stop_texts: Texts that end an answer.
        logits_processors: Processors that draw the tokens of samples.
        streamer: Receives the tokens of a single prompt as they are generated.
        asked: The images of the prompts; None if there are none.
    """
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        attention_mask[row, width - len(prompt) :] = 1
    output = model.generate(  # type: ignore[operator]  # comes from a mixin of the concrete class
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        **({} if asked is None else asked.inputs(input_ids, model.device)),
        stopping_criteria=StoppingCriteriaList([StopStrings(tokenizer, stop_texts, width)] if stop_texts else []),
        logits_processor=LogitsProcessorList(logits_processors),
        streamer=streamer,
    )
    new_ids: list[list[int]] = output[:, width:].tolist()
    return new_ids


def _text(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], token_ids: Sequence[int], stops: AnswerStops
) -> str:
    """The text of the answer up to its end."""
    text = decode_behind(tokenizer, prompt, stops.before(token_ids), skip_special_tokens=True)
    return cut_at(text, stops.texts)
