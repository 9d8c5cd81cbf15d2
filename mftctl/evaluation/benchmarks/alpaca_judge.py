"""AlpacaEval's judge: its own package, asking a language model behind an API which of two answers is better."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mftctl.errors import EvaluationError
from mftctl.evaluation.benchmarks.problems import Problems
from mftctl.evaluation.benchmarks.result import BenchmarkResult
from mftctl.files.atomic import write_text
from mftctl.files.json_files import readable_json
from mftctl.progress import Listener
from mftctl.runtime.process_group import from_first

if TYPE_CHECKING:
    pass

ALPACA_EVAL_DIGEST = "9dd037be93e841b1d825c39268507adc4bbb3f150cb582d855309a67ce551ddc"
"""Of AlpacaEval's own 805 instructions in their own order, as `Problems.digest` has it."""

_KEYS = ("OPENAI_API_KEY", "OPENAI_API_KEYS", "OPENAI_CLIENT_CONFIG_PATH")


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer in AlpacaEval's format.

    Attributes:
        instruction: What was asked.
        output: What was answered.
        generator: Who answered.
        dataset: The part of AlpacaEval that the instruction comes from.
    """

    instruction: str
    output: str
    generator: str
    dataset: str = "alpaca_eval"


def what_is_missing() -> list[str]:
    """What the judge needs and does not find on this machine; empty where it can be asked."""
    missing = [] if find_spec("alpaca_eval") else ["the package alpaca_eval (pip install 'mftctl[alpaca-eval]')"]
    return missing if any(os.environ.get(name) for name in _KEYS) else [*missing, f"an API key ({_KEYS[0]})"]


def win_shares(answers: Sequence[Answer], references: Sequence[Answer], cache: Path) -> list[float | None]:
    """How surely the judge prefers each answer to its reference, from 0 to 1; None where it gave no verdict.

    Args:
        answers: Of the model.
        references: To the same instructions, in the same order.
        cache: A file that keeps every verdict, so that none is paid for twice.

    Raises:
        EvaluationError: The API refuses or cannot be reached; verdicts given before are kept.

    Source: AlpacaEval 2.0's annotator, `weighted_alpaca_eval_gpt4_turbo`: the probability of the token that stands for
    the answer. The win rate of these is the plain one; `length_controlled` has the other.
    """
    with _quiet():
        import openai
        from alpaca_eval.annotators import PairwiseAnnotator

        try:
            annotator = PairwiseAnnotator(caching_path=cache)
            found = annotator.annotate_head2head(
                outputs_1=[entry(answer) for answer in references],
                outputs_2=[entry(answer) for answer in answers],
                is_ordered=True,
            )
        except openai.OpenAIError as error:
            raise EvaluationError(
                "AlpacaEval's judge could not be asked.",
                path=cache,
                expected="an answer of the API",
                actual=str(error).partition("\n")[0],
                hint="mend that, then mftctl eval --resume; the outputs and the verdicts so far are kept",
            ) from error
    by_answer = {(verdict["instruction"], verdict["output_2"]): verdict["preference"] for verdict in found}
    # A preference is 1 for the reference and 2 for the answer, or between.
    preferences = [by_answer.get((answer.instruction, answer.output)) for answer in answers]
    return [None if preference is None or preference != preference else preference - 1 for preference in preferences]


def length_controlled(
    answers: Sequence[Answer], references: Sequence[Answer], shares: Sequence[float | None], digest: str
) -> list[float]:
    """How surely the judge would prefer each answer if it were as long as its reference, from 0 to 1.

    The package fits a model of the verdicts with the lengths and the difficulty of each instruction, which it fetches
    from the hub, and predicts them for equal lengths.

    Args:
        answers: Of the model.
        references: To the same instructions, in the same order.
        shares: The judge's verdicts.
        digest: Of the problems of which these are the first or all.

    Raises:
        EvaluationError: The instructions are not AlpacaEval's, or the package cannot do it here.

    Source: Dubois et al. (2024), "Length-controlled AlpacaEval"; `alpaca_eval` itself, model and data.
    """
    if digest != ALPACA_EVAL_DIGEST:
        raise EvaluationError(
            "Only AlpacaEval's own instructions have a win rate controlled for length.",
            key="task_data.alpaca_eval",
            expected="its 805 instructions in their order",
            hint="leave --task-data out, or give a copy of alpaca_eval_gpt4_baseline.json",
        )
    with _quiet():
        import pandas as pd

        try:
            from alpaca_eval.metrics.glm_winrate import get_length_controlled_winrate

            pairs = zip(answers, references, shares, strict=True)
            verdicts = pd.DataFrame(
                {
                    "preference": float("nan") if share is None else 1 + share,
                    "output_1": reference.output,
                    "output_2": answer.output,
                    "generator_1": "reference",
                    "generator_2": "answer",
                }
                for answer, reference, share in pairs
            )
            get_length_controlled_winrate(verdicts, save_weights_dir=None, is_warn_extreme_changes=False)
        except (ImportError, OSError) as error:
            raise EvaluationError(
                "AlpacaEval's package cannot control its win rate for length here.",
                expected="its file df_gamed.csv from the hub, or from the hub's cache",
                actual=str(error).partition("\n")[0],
            ) from error
    predicted: list[float] = verdicts["glm_preference"].tolist()
    return predicted


def entry(answer: Answer) -> dict[str, str]:
    """The answer as AlpacaEval's files have it."""
    return {
        "dataset": answer.dataset,
        "instruction": answer.instruction,
        "output": answer.output,
        "generator": answer.generator,
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the package's progress bars, its logging on the root logger, and the warnings of its age."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def judged_once(
    found: BenchmarkResult,
    problems: Problems,
    model_name: str,
    folder: Path,
    listener: Listener,
    *,
    for_length: bool,
) -> dict[str, list[float | None]]:
    """AlpacaEval's verdicts in all processes, of which the first asks."""
    verdicts: dict[str, list[float | None]] = json.loads(
        from_first(lambda: json.dumps(_judged(found, problems, model_name, folder, listener, for_length=for_length)))
    )
    return verdicts


def _judged(
    found: BenchmarkResult,
    problems: Problems,
    model_name: str,
    folder: Path,
    listener: Listener,
    *,
    for_length: bool,
) -> dict[str, list[float | None]]:
    """The verdicts where its judge can be asked, else none, after the answers are kept in its format."""
    asked = [problems.records[sample.doc_id] for sample in found.samples]
    answers = [
        Answer(record["instruction"], sample.outputs[0], model_name, record.get("dataset", "alpaca_eval"))
        for sample, record in zip(found.samples, asked, strict=True)
    ]
    path = folder / "alpaca_eval.json"
    write_text(path, readable_json([entry(answer) for answer in answers], indent=1) + "\n")
    missing = what_is_missing()
    if not all(record.get("output") for record in asked):
        missing.append("the reference's answers (the field output of the data)")
    if missing:
        listener.warn(
            f"AlpacaEval's win rate needs {' and '.join(missing)}. The answers are in {path}; to have them judged "
            f"later: mftctl eval --tasks alpaca_eval --predictions {folder / 'alpaca_eval.jsonl'}"
        )
        return {}
    references = [
        Answer(record["instruction"], record["output"], str(record.get("generator", "reference"))) for record in asked
    ]
    shares = win_shares(answers, references, folder / "alpaca_eval_verdicts.json")
    unjudged = shares.count(None)
    if unjudged:
        listener.warn(f"AlpacaEval's judge gave no verdict on {unjudged} of {len(shares)} answers; they are left out.")
    verdicts: dict[str, list[float | None]] = {"win_rate": list(shares)}
    if for_length:
        try:
            controlled = length_controlled(answers, references, shares, problems.digest)
            verdicts["length_controlled_win_rate"] = list(controlled)
        except EvaluationError as error:
            listener.warn(f"{error.message} (expected: {error.expected}) The verdicts are kept in {folder}.")
    return verdicts
