from __future__ import annotations

import logging

import pytest
from transformers.utils import logging as transformers_logging

from mftctl.evaluation.harness import quiet_libraries, task_config


def test_a_task_is_lm_evals_own() -> None:
    config = task_config("gsm8k", "gsm8k_cot")
    assert config["dataset_path"] == "openai/gsm8k"
    assert config["num_fewshot"] == len(config["fewshot_config"]["samples"]) == 8
    assert [entry["name"] for entry in config["filter_list"]] == ["strict-match", "flexible-extract"]


def test_changing_a_configuration_leaves_the_next_one_alone() -> None:
    task_config("gsm8k", "gsm8k_cot")["metric_list"].clear()
    assert task_config("gsm8k", "gsm8k_cot")["metric_list"]


def test_levels_are_put_back_after_an_error() -> None:
    harness = logging.getLogger("lm_eval")
    before = (harness.level, transformers_logging.get_verbosity())
    inside = []

    def fail() -> None:
        inside.append((harness.level, transformers_logging.get_verbosity()))
        raise KeyError

    with pytest.raises(KeyError), quiet_libraries():
        fail()
    assert inside == [(logging.ERROR, logging.ERROR)]
    assert (harness.level, transformers_logging.get_verbosity()) == before
