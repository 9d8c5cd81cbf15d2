"""Settings that do not suit the engine, found before anything is read."""

from __future__ import annotations

from typing import Any

import pytest

from mftctl.errors import ConfigError
from mftctl.evaluation.engine_checks import check_engine
from mftctl.experiments.recipe_files import parse_recipe
from mftctl.progress import Silence
from mftctl.workflows.run_checks import check_jobs

URL = "http://127.0.0.1:8000/v1"


def problem(options: dict[str, Any], **changes: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check_engine(parse_recipe({"eval": options, **changes}))
    return caught.value


def test_a_server_on_its_own_is_fine() -> None:
    check_engine(parse_recipe({"eval": {"engine": "openai", "base_url": URL}}))


def test_a_server_needs_a_url() -> None:
    assert "--base-url" in str(problem({"engine": "openai"}).hint)


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_a_url_that_would_not_be_asked(engine: str) -> None:
    error = problem({"engine": engine, "base_url": URL})
    assert error.actual == f"{URL} with --engine {engine}"
    assert "--engine openai" in str(error.hint)


def test_a_client_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mftctl.evaluation.engine_checks.find_spec", lambda name: None)
    assert problem({"engine": "openai", "base_url": URL}).hint == "pip install 'mftctl[openai]'"


@pytest.mark.parametrize("changes", [{"device": "cpu"}, {"attention": "eager"}])
def test_a_device_or_kernel_that_the_server_would_not_hear_of(changes: dict[str, str]) -> None:
    assert "itself" in problem({"engine": "openai", "base_url": URL}, **changes).message


def test_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mftctl.evaluation.engine_checks.world_size", lambda: 2)
    assert problem({"engine": "openai", "base_url": URL}).hint == "--concurrent-requests"


def test_an_experiment_cannot_be_served_while_it_is_made(workspace: Any) -> None:
    from mftctl.experiments.jobs import spell_out
    from tests.workflow_fixtures import make_recipe

    stages = {"fft": {"command": "fft"}, "results": {"command": "eval", "of": ["fft"]}}
    recipe = make_recipe(workspace, stages=stages, eval={"engine": "openai", "base_url": URL})
    with pytest.raises(ConfigError, match="cannot be completed") as caught:
        check_jobs(spell_out(recipe), Silence())
    assert "a server cannot serve a model that the experiment has yet to make" in caught.value.problems[0]
