"""Checks that the engine of a recipe can be used for what it measures."""

from __future__ import annotations

from importlib.util import find_spec

from mftctl.errors import ConfigError
from mftctl.experiments.recipe import Recipe
from mftctl.runtime.processes import world_size


def check_engine(recipe: Recipe) -> None:
    """Checks that the engine is installed and that the other settings suit it.

    Args:
        recipe: With the `eval` section.

    Raises:
        ConfigError: It is not, or they do not.
    """
    match recipe.eval.engine:
        case "openai":
            _check_server(recipe)
        case "vllm":
            _check_no_server(recipe)
            _check_vllm(recipe)
        case _:
            _check_no_server(recipe)


def _check_no_server(recipe: Recipe) -> None:
    """Checks that no server is named that would not be asked."""
    if recipe.eval.base_url is not None:
        raise ConfigError(
            "A server's URL has an effect only with --engine openai.",
            key="eval.base_url",
            expected="--engine openai",
            actual=f"{recipe.eval.base_url} with --engine {recipe.eval.engine}",
            hint="add --engine openai, or omit --base-url (in a recipe: --set eval.base_url=null)",
        )


def _check_server(recipe: Recipe) -> None:
    if recipe.eval.base_url is None:
        raise ConfigError(
            "--engine openai needs the URL of a server.",
            key="eval.base_url",
            expected="a URL such as http://localhost:8000/v1",
            hint="--base-url http://localhost:8000/v1",
        )
    if find_spec("openai") is None:
        raise ConfigError(
            "The client for OpenAI's API is not installed.",
            key="eval.engine",
            actual="openai",
            hint="pip install 'mftctl[openai]'",
        )
    if world_size() > 1:
        raise ConfigError(
            "A server is asked by one process, with several requests at a time.",
            key="--processes",
            expected="1 with --engine openai",
            actual=world_size(),
            hint="--concurrent-requests",
        )
    if recipe.device != "auto" or recipe.attention != "auto":
        raise ConfigError(
            "A server chooses its device and attention kernel itself.",
            key="eval.engine",
            expected="device auto and attention auto",
            actual=f"{recipe.device}, {recipe.attention}",
            hint="omit --device and --attention",
        )


def _check_vllm(recipe: Recipe) -> None:
    if world_size() > 1:
        raise ConfigError(
            "vLLM starts its own processes.",
            key="--processes",
            expected="1 with --engine vllm",
            actual=world_size(),
        )
    if find_spec("vllm") is None:
        raise ConfigError(
            "vLLM is not installed.",
            key="eval.engine",
            actual="vllm",
            hint="pip install 'mftctl[vllm]', or use --engine hf",
        )
    if recipe.device in ("cpu", "mps", "xpu") or recipe.attention != "auto":
        raise ConfigError(
            "vLLM chooses its device and attention kernel itself.",
            key="eval.engine",
            expected="device auto, cuda or cuda:N, and attention auto",
            actual=f"{recipe.device}, {recipe.attention}",
            hint="omit --device and --attention, or use --engine hf",
        )
    sources = (*recipe.test_data, *recipe.retain_data)
    if sources:
        raise ConfigError(
            "vLLM runs benchmarks only; the loss on a data file is computed with transformers.",
            key="eval.engine",
            actual=f"vllm with the data {sources[0].path}",
            hint="run two commands: one with --data or --retain, one with --tasks and --engine vllm",
        )
