"""Names of the tracked numbers: the same in every tracker, and accepted by all of them."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from mftctl.experiments.tracking.values import line_values, result_values

ACCEPTED = re.compile(r"[\w.\- /]+")


def test_a_training_line_keeps_its_keys() -> None:
    line = {"step": 3, "loss": 1.5, "learning_rate": 1e-3, "epoch": 0.5, "removed": 4, "restored": 2, "note": "text"}
    assert line_values(line) == {"loss": 1.5, "learning_rate": 1e-3, "epoch": 0.5, "removed": 4.0, "restored": 2.0}


def test_averages_are_named_by_their_horizon() -> None:
    assert line_values({"step": 1, "eval_loss": 2.0, "average_losses": {"0.1": 1.9}, "retained_loss": 3.0}) == {
        "eval_loss": 2.0,
        "average_losses/0.1": 1.9,
        "retained_loss": 3.0,
    }


def test_rewards_are_named_as_in_trl() -> None:
    rewards = {"chosen": 0.2, "rejected": -0.1, "accuracy": 0.75, "margin": 0.3}
    found = line_values({"step": 1, "eval_loss": 0.6, "rewards": rewards, "average_rewards": {"0.1": rewards}})
    assert (found["rewards/accuracy"], found["rewards/margin"], found["average_rewards/0.1/margin"]) == (0.75, 0.3, 0.3)


def test_scores_are_named_by_their_benchmark() -> None:
    metrics = [
        {"name": "exact_match,strict-match", "value": 0.25, "standard_error": 0.01, "samples": 8},
        {"name": "loss", "value": 2, "standard_error": None, "samples": 8},
    ]
    line = {"step": 4, "dataset": "gsm8k", "digest": "0", "metrics": metrics}
    assert line_values(line) == {
        "gsm8k/exact_match.strict-match": 0.25,
        "gsm8k/exact_match.strict-match_stderr": 0.01,
        "gsm8k/loss": 2.0,
    }


def test_a_result_gives_its_figures_and_no_line_twice() -> None:
    result = {
        "state": "MFT",
        "mask": "runs/002-mask-train/mask.bits",
        "best_loss": 1.25,
        "helps": True,
        "learning_rate": None,
        "layer_ratios": {"4": 0.1, "5": 0.2},
        "flips": {"turned": 7, "rounds": [{"step": 1, "removed": 3}]},
        "evaluations": [{"step": 0, "dataset": "gsm8k", "metrics": []}],
    }
    assert result_values(result) == {
        "result/best_loss": 1.25,
        "result/helps": 1.0,
        "result/layer_ratios/4": 0.1,
        "result/layer_ratios/5": 0.2,
        "result/flips/turned": 7.0,
    }


def test_groups_of_a_probe_are_named_by_their_layers() -> None:
    groups = [{"layers": "0-1", "size": 2, "change": -0.5}, {"layers": "2-3", "size": 2, "change": 0.25}]
    found = result_values({"groups": groups, "recommended_layers": "0-1", "unmasked_loss": 2.0})
    assert found["result/groups/0-1/change"] == -0.5
    assert found["result/groups/2-3/change"] == 0.25
    assert found["result/unmasked_loss"] == 2.0


def test_scores_of_an_evaluation_are_named_as_those_on_the_way() -> None:
    metrics = [{"name": "exact_match", "value": 0.5, "standard_error": None, "samples": 4}]
    result = {"state": "FFT", "datasets": [{"name": "test.jsonl", "metrics": metrics, "samples": "samples.jsonl"}]}
    line = {"step": 0, "dataset": "test.jsonl", "metrics": metrics}
    assert result_values(result) == line_values(line) == {"test.jsonl/exact_match": 0.5}


@settings(max_examples=30)
@given(st.text(min_size=1), st.text(min_size=1))
def test_any_name_becomes_one_that_all_trackers_accept(dataset: str, metric: str) -> None:
    metrics = [{"name": metric, "value": 1.0, "standard_error": 0.5, "samples": 1}]
    for name in line_values({"step": 0, "dataset": dataset, "metrics": metrics}):
        assert ACCEPTED.fullmatch(name)
        assert name.count("/") == 1
