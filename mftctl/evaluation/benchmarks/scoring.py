"""Scores of single answers, for benchmarks that need other metrics than lm-eval's.

Each function takes a problem and the filtered outputs, as lm-eval's `process_results` does.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from mftctl.evaluation.exact_match import MARKER, final_answer

_INVALID = "[invalid]"
"""lm-eval's marker for an output without an answer."""

_MARKED = re.compile(rf"{MARKER}[^\S\n]*([+\-\N{{MINUS SIGN}}]?\$?[+\-\N{{MINUS SIGN}}]?\d[\d,]*(?:\.\d+)?%?)")

MOST_ANSWER_CHARACTERS = 500
"""Limit of a formula: none in MATH is half as long, and the time to compare formulas grows quadratically."""

MOST_LINE_CHARACTERS = 10_000
"""Limit of a line in an IFEval answer; the longest answers have about as many characters in total."""

_SUM = re.compile(r"(?:[^\sA-Za-z\\=] ?)+")
"""An expression without words, commands or equals signs."""

_LANGUAGE_CODES = {"english": "en", "arabic": "ar"}
"""Languages whose articles are removed before answers are compared, as in lm-eval."""


def maths_scores(problem: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, float]:
    """Scores a maths answer: `strict` in the requested form, `flexible` in any equivalent form.

    Strict follows Minerva: the text after "Final Answer: The final answer is", or the last box, equals the reference
    after normalisation. Flexible also accepts what math-verify finds equal. An answer of more than
    `MOST_ANSWER_CHARACTERS` is wrong.

    Args:
        problem: With its `solution`.
        outputs: The single answer.

    Source: MFT, section 3.1 (MATH). lm-eval's `minerva_math` and its functions, which ignore boxes; reading them is
    our addition.
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
    """True if an answer, or a sum in its derivation, is too long to be compared.

    Args:
        output: The output for a problem whose answer is a formula.
    """
    from lm_eval.tasks.minerva_math import utils as minerva

    answers = (minerva.get_unnormalized_answer(output), boxed(output))
    sums = (match.group() for match in _SUM.finditer(output))
    return any(text is not None and len(text) > MOST_ANSWER_CHARACTERS for text in (*answers, *sums))


def is_short(text: str | None) -> TypeGuard[str]:
    """True if there is an answer that is short enough to be compared.

    Args:
        text: The answer taken from an output, if any.
    """
    return text is not None and len(text) <= MOST_ANSWER_CHARACTERS


def boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{}` or `\fbox{}`; None if there is none or it cannot be parsed.

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
    """The answer after `####` in each output, as in GSM8K's own solutions, in the reference's spelling if right.

    The match is strict, as in lm-eval's `gsm8k`; its `gsm8k_cot` expects "The answer is" instead.

    Args:
        outputs: Outputs of each problem; the first one counts.
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
    """Word-level F1 and exact match, the best over the reference answers.

    Args:
        problem: With `answers` and `language`.
        outputs: The single answer.

    Source: GMT, section 4.1 (TyDiQA, F1); lm-eval's `tydiqa`, normalisation by language.
    """
    from lm_eval.tasks.tydiqa import utils as tydiqa

    language = _LANGUAGE_CODES.get(problem["language"], problem["language"])
    scores: dict[str, float] = tydiqa.process_results_lang({"answers": problem["answers"]}, outputs, language)
    return {name: float(score) for name, score in scores.items()}


def instruction_scores(problem: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
    """Scores for the instructions followed, strict and loose: one number per prompt, one list per instruction.

    Args:
        problem: With `key`, `prompt`, `instruction_id_list` and `kwargs`.
        outputs: The single answer.

    Source: MFT, section 3.1 (IFEval); lm-eval's checker. If an instruction lacks an argument or has an unusable one
    (two of the 541 problems count a letter that is not one), the checker draws one at random; here with a fixed seed.
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
    """True if a line is too long for lm-eval's instruction checkers, whose time grows quadratically.

    Args:
        output: An IFEval output; with such a line, it counts as following no instruction.
    """
    return any(len(line) > MOST_LINE_CHARACTERS for line in output.split("\n"))


def length_scores(problem: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, float]:
    """The length of an answer in characters, the only AlpacaEval metric available without its judge.

    Args:
        problem: Ignored.
        outputs: The single answer.
    """
    return {"characters": float(len(outputs[0]))}
