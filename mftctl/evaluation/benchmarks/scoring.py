"""Scores of single answers, for the benchmarks that lm-eval's own metrics do not fit.

Each takes a problem and what was taken from the model's output, as lm-eval's `process_results` does.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from mftctl.evaluation.exact_match import MARKER, final_answer

_INVALID = "[invalid]"
"""lm-eval's word for an output without an answer."""

_MARKED = re.compile(rf"{MARKER}[^\S\n]*([+\-\N{{MINUS SIGN}}]?\$?[+\-\N{{MINUS SIGN}}]?\d[\d,]*(?:\.\d+)?%?)")

MOST_ANSWER_CHARACTERS = 500
"""Of a formula: none of MATH's has half as many, and the time that comparing takes grows with their square."""

MOST_LINE_CHARACTERS = 10_000
"""Of an answer to IFEval, whose longest texts have about as many in all."""

_SUM = re.compile(r"(?:[^\sA-Za-z\\=] ?)+")
"""What has no word, command or equals sign in it."""

_LANGUAGE_CODES = {"english": "en", "arabic": "ar"}
"""Where articles are left out before answers are compared, as in lm-eval."""


def maths_scores(problem: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, float]:
    """Whether the answer is right: `strict` in the form asked for, `flexible` in any that says what is meant.

    Strict is Minerva's: the text after "Final Answer: The final answer is", or the last box, equal after
    normalisation. Flexible is also right where math-verify calls both equal. An answer of more than
    `MOST_ANSWER_CHARACTERS` is wrong.

    Args:
        problem: With its `solution`.
        outputs: The one answer.

    Source: MFT, section 3.1 (MATH). lm-eval's `minerva_math`, functions and all; the box is ours, as it reads none.
    """
    from lm_eval.tasks.minerva_math import utils as minerva

    output = outputs[0]
    gold = boxed(problem["solution"])
    named = minerva.get_unnormalized_answer(output)
    given = [minerva.normalize_final_answer(text) for text in (named, boxed(output)) if is_short(text)]
    strict = any(minerva.is_equiv(answer, minerva.normalize_final_answer(gold or "")) for answer in given)
    flexible = strict or (not is_too_long(output) and _verified(problem["solution"], output))
    return {"strict": float(strict), "flexible": float(flexible)}


def is_too_long(output: str) -> bool:
    """Whether an answer, or a sum on the way to it, is longer than anything that is compared.

    Args:
        output: Of a problem whose answer is a formula.
    """
    from lm_eval.tasks.minerva_math import utils as minerva

    answers = (minerva.get_unnormalized_answer(output), boxed(output))
    sums = (match.group() for match in _SUM.finditer(output))
    return any(text is not None and len(text) > MOST_ANSWER_CHARACTERS for text in (*answers, *sums))


def is_short(text: str | None) -> TypeGuard[str]:
    """Whether there is an answer, and it is short enough to be compared.

    Args:
        text: From an output.
    """
    return text is not None and len(text) <= MOST_ANSWER_CHARACTERS


def boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{}` or `\fbox{}`; None without one, or with one that cannot be read.

    Args:
        text: A solution.
    """
    from lm_eval.tasks.minerva_math import utils as minerva

    found = (minerva.last_boxed_only_string(text) or "").replace("\\fbox", "\\boxed")
    return str(minerva.remove_boxed(found)) if found.startswith(("\\boxed{", "\\boxed ")) else None


def _verified(gold: str, output: str) -> bool:
    from math_verify import parse, verify

    return bool(verify(gold=parse(gold), target=parse(output)))


def marked_answers(outputs: Sequence[Sequence[str]], problems: Sequence[Mapping[str, Any]]) -> list[str]:
    """The answer after `####` of each output, as GSM8K's own solutions end, in the reference's spelling if it is right.

    It is strict, as lm-eval's `gsm8k` is, which its `gsm8k_cot` is not: that wants "The answer is".

    Args:
        outputs: Of each problem, of which the first counts.
        problems: With their `answer`.
    """
    return [
        _marked_answer(written[0], str(problem["answer"])) for written, problem in zip(outputs, problems, strict=True)
    ]


def _marked_answer(output: str, gold: str) -> str:
    found = _MARKED.search(output)
    if found is None:
        return _INVALID
    given, right = final_answer(found.group(1)), final_answer(gold)
    return gold.rpartition(MARKER)[2].strip() if given == right else given


def passage_scores(problem: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, float]:
    """F1 over words and exact match, the best over the right answers.

    Args:
        problem: With `answers` and `language`.
        outputs: The one answer.

    Source: GMT, section 4.1 (TyDiQA, F1); lm-eval's `tydiqa`, normalisation by language.
    """
    from lm_eval.tasks.tydiqa import utils as tydiqa

    language = _LANGUAGE_CODES.get(problem["language"], problem["language"])
    scores: dict[str, float] = tydiqa.process_results_lang({"answers": problem["answers"]}, outputs, language)
    return {name: float(score) for name, score in scores.items()}


def instruction_scores(problem: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
    """Whether each instruction was kept, strict and loose: of the prompt a number, of its instructions a list.

    Args:
        problem: With `key`, `prompt`, `instruction_id_list` and `kwargs`.
        outputs: The one answer.

    Source: MFT, section 3.1 (IFEval); lm-eval's checker. Where an instruction lacks a detail or has one it cannot use
    (two of the 541 problems count a letter that is none), it draws one at random; here always the same.
    """
    from lm_eval.tasks.ifeval import utils as ifeval

    state = random.getstate()
    random.seed(0)
    try:
        short = ["" if has_long_line(output) else output for output in outputs]
        scores: dict[str, Any] = ifeval.process_results(problem, short)
    finally:
        random.setstate(state)
    return scores


def has_long_line(output: str) -> bool:
    """Whether a line is longer than lm-eval's checkers of instructions can look through: time grows with its square.

    Args:
        output: Of a problem of IFEval, which then keeps no instruction.
    """
    return any(len(line) > MOST_LINE_CHARACTERS for line in output.split("\n"))


def length_scores(problem: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, float]:
    """The length of an answer in characters: what can be said of AlpacaEval without its judge.

    Args:
        problem: Not looked at.
        outputs: The one answer.
    """
    return {"characters": float(len(outputs[0]))}
