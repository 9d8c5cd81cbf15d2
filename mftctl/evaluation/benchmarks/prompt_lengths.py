"""Lengths of benchmark prompts and their answers, computed before generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs

from mftctl.evaluation.benchmarks.local_task import quiet_libraries

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import ConfigurableTask
    from transformers import PreTrainedTokenizerBase

_DEFAULT_NEW_TOKENS = 256
"""lm-eval's default for tasks that set no limit."""


def longest_request(
    tasks: Sequence[ConfigurableTask],
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None,
    chat_template: bool,
    seed: int,
    max_new_tokens: int | None,
) -> int:
    """The maximum number of tokens of a prompt and its answer.

    Args:
        tasks: Tasks, as passed to `run_benchmark`.
        tokenizer: The model's tokenizer.
        limit: Number of problems to run, from the first; None for all.
        chat_template: Whether to apply the tokenizer's chat template to prompts.
        seed: Seed for tasks that draw few-shot examples at random.
        max_new_tokens: Maximum tokens per answer; None for the task's limit.
    """

    def templated(history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            tokenizer.apply_chat_template(
                history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    template: dict[str, Any] = {"chat_template": templated, "tokenizer_name": ""} if chat_template else {}
    found = 0
    for task in tasks:
        with quiet_libraries():
            task.set_fewshot_seed(seed=seed)
            task.build_all_requests(
                limit=limit, apply_chat_template=chat_template, fewshot_as_multiturn=chat_template, **template
            )
        found = max(found, *_lengths(task.instances, tokenizer, max_new_tokens))
    return found


def _lengths(
    requests: Sequence[Instance], tokenizer: PreTrainedTokenizerBase, max_new_tokens: int | None
) -> Iterator[int]:
    for request in requests:
        prompt, rest = request.args[0], request.args[1] if len(request.args) > 1 else ""
        if isinstance(rest, dict):
            known = normalize_gen_kwargs(dict(rest), _DEFAULT_NEW_TOKENS)
            asked = int(known["max_gen_toks"])
            yield _tokens(prompt, tokenizer) + min(asked, max_new_tokens or asked)
        else:
            yield _tokens(prompt + rest, tokenizer)


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    starts = tokenizer.bos_token is not None and has_bos_prefix(text, tokenizer.bos_token)
    return len(tokenizer(text, add_special_tokens=not starts)["input_ids"])
