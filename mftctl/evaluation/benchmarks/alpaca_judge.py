"""AlpacaEval's judge, called through its own package: an API model decides which of two answers is better."""

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
"""`Problems.digest` of AlpacaEval's own 805 instructions in their original order."""

_KEYS = ("OPENAI_API_KEY", "OPENAI_API_KEYS", "OPENAI_CLIENT_CONFIG_PATH")


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer in AlpacaEval's format.

    Attributes:
        instruction: The instruction.
        output: The answer.
        generator: Name of the model that wrote the answer.
        dataset: The part of AlpacaEval that the instruction comes from.
    """

    instruction: str
    output: str
    generator: str
    dataset: str = "alpaca_eval"


def what_is_missing() -> list[str]:
    """What the judge needs but this machine lacks; empty if the judge is available."""
    missing = [] if find_spec("alpaca_eval") else ["the package alpaca_eval (pip install 'mftctl[alpaca-eval]')"]
    return missing if any(os.environ.get(name) for name in _KEYS) else [*missing, f"an API key ({_KEYS[0]})"]


def win_shares(answers: Sequence[Answer], references: Sequence[Answer], cache: Path) -> list[float | None]:
    """The judge's preference for each answer over its reference, from 0 to 1; None if it gave no verdict.

    Args:
        answers: The model's answers.
        references: Reference answers to the same instructions, in the same order.
        cache: A file that stores every verdict, so that none is paid for twice.

    Raises:
        EvaluationError: The API rejects the request or cannot be reached; earlier verdicts are kept.

    Source: AlpacaEval 2.0's annotator, `weighted_alpaca_eval_gpt4_turbo`: the probability of the token that represents
    the answer. Their mean is the plain win rate; for the length-controlled one, see `length_controlled`.
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
                "The call to AlpacaEval's judge failed.",
                path=cache,
                expected="a response from the API",
                actual=str(error).partition("\n")[0],
                hint="fix the cause, then run mftctl eval --resume; outputs and verdicts so far are kept",
            ) from error
    by_answer = {(verdict["instruction"], verdict["output_2"]): verdict["preference"] for verdict in found}
    # A preference lies between 1 (the reference) and 2 (the answer).
    preferences = [by_answer.get((answer.instruction, answer.output)) for answer in answers]
    return [None if preference is None or preference != preference else preference - 1 for preference in preferences]


def length_controlled(
    answers: Sequence[Answer], references: Sequence[Answer], shares: Sequence[float | None], digest: str
) -> list[float]:
    """The judge's predicted preference for each answer at equal length with its reference, from 0 to 1.

    The package fits a model of the verdicts to the lengths and the difficulty of each instruction, which it downloads
    from the hub, and predicts the verdicts for equal lengths.

    Args:
        answers: The model's answers.
        references: Reference answers to the same instructions, in the same order.
        shares: The judge's verdicts.
        digest: Digest of all problems, even if only the first ones were run.

    Raises:
        EvaluationError: The instructions are not AlpacaEval's, or the package or its data is not available.

    Source: Dubois et al. (2024), "Length-controlled AlpacaEval"; `alpaca_eval` itself, model and data.
    """
    if digest != ALPACA_EVAL_DIGEST:
        raise EvaluationError(
            "A length-controlled win rate exists only for AlpacaEval's own instructions.",
            key="task_data.alpaca_eval",
            expected="its 805 instructions in their original order",
            hint="omit --task-data, or pass a copy of alpaca_eval_gpt4_baseline.json",
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
                "AlpacaEval's package cannot compute the length-controlled win rate.",
                expected="its file df_gamed.csv from the hub, or from the hub's cache",
                actual=str(error).partition("\n")[0],
            ) from error
    predicted: list[float] = verdicts["glm_preference"].tolist()
    return predicted


def entry(answer: Answer) -> dict[str, str]:
    """The answer as an entry of AlpacaEval's files."""
    return {
        "dataset": answer.dataset,
        "instruction": answer.instruction,
        "output": answer.output,
        "generator": answer.generator,
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the package's progress bars, its logging on the root logger and its deprecation warnings."""
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
    """AlpacaEval's verdicts, requested by the first process and shared with the others."""
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
    """The verdicts, or none if the judge is not available; the answers are written in AlpacaEval's format first."""
    asked = [problems.records[sample.doc_id] for sample in found.samples]
    answers = [
        Answer(record["instruction"], sample.outputs[0], model_name, record.get("dataset", "alpaca_eval"))
        for sample, record in zip(found.samples, asked, strict=True)
    ]
    path = folder / "alpaca_eval.json"
    write_text(path, readable_json([entry(answer) for answer in answers], indent=1) + "\n")
    missing = what_is_missing()
    if not all(record.get("output") for record in asked):
        missing.append("the reference answers (the field output of the data)")
    if missing:
        listener.warn(
            f"AlpacaEval's win rate needs {' and '.join(missing)}. The answers are in {path}; to judge them "
            f"later: mftctl eval --tasks alpaca_eval --predictions {folder / 'alpaca_eval.jsonl'}"
        )
        return {}
    references = [
        Answer(record["instruction"], record["output"], str(record.get("generator", "reference"))) for record in asked
    ]
    shares = win_shares(answers, references, folder / "alpaca_eval_verdicts.json")
    unjudged = shares.count(None)
    if unjudged:
        listener.warn(f"AlpacaEval's judge gave no verdict on {unjudged} of {len(shares)} answers; these are excluded.")
    verdicts: dict[str, list[float | None]] = {"win_rate": list(shares)}
    if for_length:
        try:
            controlled = length_controlled(answers, references, shares, problems.digest)
            verdicts["length_controlled_win_rate"] = list(controlled)
        except EvaluationError as error:
            listener.warn(f"{error.message} (expected: {error.expected}) The verdicts are kept in {folder}.")
    return verdicts
