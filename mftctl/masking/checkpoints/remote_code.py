"""Code that comes with a model: run only with explicit consent, never by asking on the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from mftctl.errors import ModelError
from mftctl.files.regular import read_regular

_TRUSTED: ContextVar[bool] = ContextVar("trusted", default=False)


@contextmanager
def trusting_code(trusted: bool) -> Iterator[None]:
    """Context in which code of models is run or rejected, according to the recipe's `trust_remote_code`.

    Args:
        trusted: Whether the user allows it to run.
    """
    token = _TRUSTED.set(trusted)
    try:
        yield
    finally:
        _TRUSTED.reset(token)


def trusts_code() -> bool:
    """Checks whether the user allows code of models to run."""
    return _TRUSTED.get()


def require_trusted_code(folder: Path) -> None:
    """Checks that a model and its tokenizer load without their own code, or that code is trusted.

    Args:
        folder: The model folder; missing or damaged files are reported elsewhere.

    Raises:
        ModelError: The model needs its own code, which is not trusted.
    """
    if trusts_code():
        return
    config, tokenizer = (_read(folder / name) for name in ("config.json", "tokenizer_config.json"))
    code = {} if _is_known(config) else _classes(config)
    own_tokenizer = _classes(tokenizer)
    if own_tokenizer and not _is_known_tokenizer(tokenizer):
        code |= own_tokenizer
    if not code:
        return
    files = sorted({f"{name.rpartition('--')[2].split('.')[0]}.py" for name in _names(code)})
    raise ModelError(
        "The model comes with its own code, which loading it would run.",
        path=folder,
        key="auto_map",
        expected="a model supported by transformers",
        actual=", ".join(files),
        hint="review these files; if you trust them, --trust-remote-code",
    )


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, Mapping) else {}


def _classes(config: Mapping[str, Any]) -> dict[str, Any]:
    code = config.get("auto_map")
    if isinstance(code, list | tuple):  # format of old tokenizers
        return {"AutoTokenizer": code}
    return dict(code) if isinstance(code, Mapping) else {}


def _names(code: Mapping[str, Any]) -> Iterator[str]:
    for value in code.values():
        yield from (str(name) for name in (value if isinstance(value, list | tuple) else [value]) if name)


def _is_known(config: Mapping[str, Any]) -> bool:
    """Checks whether transformers supports the model without code from its folder."""
    from transformers import CONFIG_MAPPING

    name = config.get("model_type")
    return isinstance(name, str) and name in CONFIG_MAPPING


def _is_known_tokenizer(config: Mapping[str, Any]) -> bool:
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    name = config.get("tokenizer_class")
    return isinstance(name, str) and tokenizer_class_from_name(name) is not None
