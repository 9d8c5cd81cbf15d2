"""Scoring and averaging as in OLMES, the evaluation harness of the MFT paper.

Source: allenai/olmes as vendored by the reference implementation (Ming-K9/MFT, `olmes/`), and the commands in its
`bash/evaluation`: task defaults, no chat template. None of its code is copied here.

Deviations:
    Prompts are never truncated, and the context length is the model's. OLMES uses 2,048 tokens by default, as in those
    commands: prompts of GSM8K and MATH above 1,536 and 1,024 tokens lose their beginning, and an AlpacaEval answer ends
    when it fills the rest.
    An AlpacaEval answer may use what the longest prompt leaves of the context, so it does not depend on its batch.
    Programs run in the sandbox under limits derived from the reference solution; OLMES allows 3 seconds, and 20 for
    HumanEval+.
    Maths answers are compared and instructions checked by the installed lm-eval; OLMES uses version 0.4.3.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mftctl.errors import EvaluationError
from mftctl.evaluation.benchmarks.scoring import boxed, instruction_scores, is_short
from mftctl.evaluation.exact_match import MARKER
from mftctl.evaluation.statistics import standard_error_of_ratio

if TYPE_CHECKING:
    from mftctl.evaluation.benchmarks.result import BenchmarkResult, BenchmarkSample
    from mftctl.experiments.recipe import Prompts

_COMMA = re.compile(r"(\d),(\d)")
"""A comma between digits; each digit matches once, so 1,2,3 keeps its second comma."""

_NUMBER = re.compile(r"[+-]?\d*\.\d+|\d+")
"""An integer loses its sign, both in the answer and in the reference."""

_INVALID = "[invalidanswer]"
"""lm-eval's marker for an output without Minerva's sentence."""


def begins_texts(prompts: Prompts) -> bool | None:
    """True if prompts start with a begin-of-sequence token; None for the tokenizer's default.

    Args:
        prompts: The value of `--prompts`.

    Source: `oe_eval/default_configs.py` (`add_bos_token`) and `oe_eval/models/eleuther_vllm_causallms.py`.
    """
    return False if prompts == "olmes" else None


def last_numbers(outputs: Sequence[Sequence[str]], problems: Sequence[Mapping[str, Any]]) -> list[str]:
    """The last number of each output, in the reference's spelling if right; the output itself if it has no number.

    Args:
        outputs: Outputs of each problem; the first one counts.
        problems: GSM8K problems, with their `answer`.

    Source: `oe_eval/tasks/oe_eval_tasks/gsm8k.py`. Digits are compared, not values: 18.00 is not 18.
    """
    found = []
    for written, problem in zip(outputs, problems, strict=True):
        gold = str(problem["answer"]).rpartition(MARKER)[2].strip()
        given = _last_number(written[0])
        found.append(gold if given == _last_number(gold) else given)
    return found


def _last_number(text: str) -> str:
    joined = _COMMA.sub(r"\1\2", text)
    return next(reversed(_NUMBER.findall(joined)), joined)


def olmes_maths_scores(problem: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, float]:
    """Scores a maths answer: `flexible` in the likeliest places, `strict` only in Minerva's sentence.

    Flexible comes first, so it is the benchmark's main metric. It takes the answers in that sentence and in the last
    box; without either, the text between the last two dollar signs; without these, the whole output. An answer is right
    if it equals the reference by Minerva's comparison or by that of MATH's authors, and wrong if it is too long to
    compare.

    Args:
        problem: With its `solution`.
        outputs: The single answer.

    Source: `oe_eval/tasks/oe_eval_tasks/minerva_math.py`; the comparisons are lm-eval's functions, as in OLMES.
    """
    from lm_eval.tasks.hendrycks_math import utils as hendrycks
    from lm_eval.tasks.minerva_math import utils as minerva

    gold = minerva.normalize_final_answer(boxed(problem["solution"]) or "")
    named = minerva.get_unnormalized_answer(outputs[0])
    strict = is_short(named) and bool(minerva.is_equiv(minerva.normalize_final_answer(named), gold))
    flexible = strict or any(
        minerva.is_equiv(answer, gold) or hendrycks.is_equiv(answer, gold)
        for answer in map(minerva.normalize_final_answer, filter(is_short, _likely_answers(outputs[0], named)))
    )
    return {"flexible": float(flexible), "strict": float(strict)}


def _likely_answers(output: str, named: str) -> list[str]:
    in_box = boxed(output) if "\\boxed" in output else None  # an \fbox in an answer does not count
    given = [answer for answer in (None if named == _INVALID else named, in_box) if answer is not None]
    return given or [output.split("$")[-2] if output.count("$") > 1 else output]


def olmes_instruction_scores(problem: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
    """Scores for the instructions followed, by lm-eval's checker; the loose instruction-level metric comes first.

    Args:
        problem: An IFEval problem.
        outputs: The single answer.

    Source: `oe_eval/tasks/oe_eval_tasks/ifeval.py` (`primary_metric`).
    """
    scores = instruction_scores(problem, outputs)
    return {name: scores[name] for name in sorted(scores, key=lambda name: name != "inst_level_loose_acc")}


def require_subjects(records: Sequence[Mapping[str, Any]], source: str) -> None:
    """Checks that every problem states its subject.

    Args:
        records: MATH problems.
        source: Their origin, for the error.

    Raises:
        EvaluationError: A problem has no subject; the error names its number.
    """
    for number, record in enumerate(records):
        if not isinstance(record.get("type"), str):
            raise EvaluationError(
                "The mean over MATH's subjects needs the subject of every problem.",
                path=f"{source}#{number}",
                key="type",
                expected="a subject, such as Algebra",
                actual=record.get("type"),
                hint="use --prompts lm-eval, which takes the mean over all problems",
            )


def mean_of_subjects(result: BenchmarkResult, subjects: Sequence[str]) -> BenchmarkResult:
    """The result with all subjects weighted equally, whatever their number of problems.

    The score and the weight of each problem are scaled accordingly.

    Args:
        result: Result of a run, with one score per metric and problem.
        subjects: Subject of each sample.

    Source: Ming-K9/MFT, `scripts/get_math_score.py`.
    """
    sizes = Counter(subjects)
    parts = [len(subjects) / (len(sizes) * sizes[subject]) for subject in subjects]
    samples = tuple(_scaled(sample, part) for sample, part in zip(result.samples, parts, strict=True))
    scores = []
    for score in result.scores:
        sums = [sample.scores[score.name] for sample in samples]
        error = standard_error_of_ratio(sums, parts) if len(sums) > 1 else None
        scores.append(replace(score, value=sum(sums) / sum(parts), standard_error=error))
    return replace(result, scores=tuple(scores), samples=samples)


def _scaled(sample: BenchmarkSample, part: float) -> BenchmarkSample:
    scores = {name: score * part for name, score in sample.scores.items()}
    return replace(sample, scores=scores, weights=dict.fromkeys(scores, part))
