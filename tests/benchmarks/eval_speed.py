"""Compares the speed of `mftctl eval` with plain lm-eval on the same task, model, problems and process.

python -m tests.benchmarks.eval_speed MODEL gsm8k gsm8k/test.jsonl --limit 16 --batch-size 8
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import lm_eval.evaluator
import torch
from lm_eval.models.huggingface import HFLM

from mftctl.evaluation.benchmarks.lm_eval_tasks import task_config
from mftctl.evaluation.benchmarks.local_task import build_task, quiet_libraries
from mftctl.evaluation.benchmarks.problems import read_problems
from mftctl.evaluation.benchmarks.run import run_benchmark
from mftctl.evaluation.inference import evaluation_mode
from mftctl.evaluation.lm.hf import ModelAnswers
from mftctl.evaluation.lm.output_cache import OutputCache
from mftctl.masking.checkpoints.load import load_model, load_tokenizer
from tests.benchmarks.timings import ratios, seconds_in_turn, spread


def compare(
    model_folder: Path,
    task_name: str,
    file: Path,
    *,
    limit: int,
    batch_size: int,
    max_new_tokens: int,
    repetitions: int,
) -> dict[str, str]:
    """Seconds and ratios, each as minimum, median and maximum; fails if the scores differ."""
    model, tokenizer = load_model(model_folder, dtype=torch.float32), load_tokenizer(model_folder)
    config = task_config(task_name)
    config["generation_kwargs"] = {**config["generation_kwargs"], "max_gen_toks": max_new_tokens}
    problems = read_problems(file, task_name)
    task = build_task(config, problems, is_local=True)
    scores: dict[str, dict[str, float]] = {}

    def ours(name: str, size: int | None) -> Callable[[], None]:
        def work() -> None:
            answers = ModelAnswers(
                model,
                tokenizer,
                batch_size=size,
                max_new_tokens=None,
                seed=0,
                cache=OutputCache(),
                on_progress=None,
            )
            found = run_benchmark(answers, task, problems, limit=limit, chat_template=False, seed=0)
            scores[name] = {score.name: score.value for score in found.scores}

        return work

    def theirs() -> None:
        plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = lm_eval.evaluator.evaluate(plain, {"tasks": {task_name: task}}, limit=limit, bootstrap_iters=0)
        results = found["results"][task_name]
        scores["lm-eval"] = {name: results[name] for name in scores[same]}

    same = f"mftctl, batches of {batch_size}"
    with quiet_libraries(), evaluation_mode(model):
        ways = {same: ours(same, batch_size), "mftctl, auto": ours("mftctl, auto", None), "lm-eval": theirs}
        seconds = seconds_in_turn(ways, repetitions)
    if scores[same] != scores["lm-eval"]:
        raise SystemExit(f"The scores differ: {scores}")
    return {
        **{f"{name}, seconds": spread(values) for name, values in seconds.items()},
        **{f"{name} / lm-eval": spread(ratios(seconds[name], seconds["lm-eval"])) for name in list(ways)[:2]},
    }


def main() -> None:
    """Prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("task")
    parser.add_argument("file", type=Path)
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    found = compare(
        options.model,
        options.task,
        options.file,
        limit=options.limit,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        repetitions=options.repetitions,
    )
    for name, text in found.items():
        print(f"{name}: {text}")


if __name__ == "__main__":
    main()
