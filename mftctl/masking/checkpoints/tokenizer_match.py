"""Checks that checkpoints have the same tokenizer and chat templates, by their files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Final

from mftctl.errors import ModelError
from mftctl.files.json_files import read_json_object
from mftctl.files.regular import read_regular

_FAST: Final = "tokenizer.json"
_SLOW: Final = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
"""Files of a tokenizer without `tokenizer.json`; beside one, they are ignored."""

_OF_THE_LAST_CALL: Final = ("truncation", "padding")
"""Keys of `tokenizer.json` that hold settings of the last call, not of the tokenizer."""

_SETTINGS: Final = "tokenizer_config.json"
_TEMPLATE: Final = "chat_template.jinja"
_MORE_TEMPLATES: Final = "additional_chat_templates"


def require_same_tokenizer(first: Path, other: Path) -> None:
    """Checks that two checkpoints have the same tokenizer and the same chat templates.

    Args:
        first: A checkpoint.
        other: The checkpoint compared with it.

    Raises:
        ModelError: A file differs or cannot be read.
    """
    names = [_FAST] if all((folder / _FAST).is_file() for folder in (first, other)) else [_FAST, *_SLOW]
    for name in names:
        if _content(first / name) != _content(other / name):
            raise _different("The checkpoints have different tokenizers.", name, first, other)
    mine, theirs = _templates(first), _templates(other)
    for template in sorted({*mine, *theirs}):
        if mine.get(template, ("", None))[1] != theirs.get(template, ("", None))[1]:
            name = (theirs.get(template) or mine[template])[0]
            raise _different("The checkpoints have different chat templates.", name, first, other)


def _content(path: Path) -> object:
    """What a tokenizer's file says; None if it does not exist."""
    if not path.is_file():
        return None
    if path.name != _FAST:
        return _read(path)
    document = _document(path)
    return {key: value for key, value in document.items() if key not in _OF_THE_LAST_CALL}


def _templates(folder: Path) -> dict[str, tuple[str, str]]:
    """The chat templates of a checkpoint by name, each with the file that holds it."""
    found: dict[str, tuple[str, str]] = {}
    settings = folder / _SETTINGS
    stored = _document(settings).get("chat_template") if settings.is_file() else None
    listed = stored if isinstance(stored, list) else [{"name": "default", "template": stored}] if stored else []
    for entry in listed:
        if isinstance(entry, dict):
            found[str(entry.get("name"))] = (_SETTINGS, str(entry.get("template")))
    if (folder / _TEMPLATE).is_file():  # takes precedence, as in transformers
        found["default"] = (_TEMPLATE, _text(folder / _TEMPLATE))
    for path in sorted((folder / _MORE_TEMPLATES).glob("*.jinja")):
        found[path.stem] = (f"{_MORE_TEMPLATES}/{path.name}", _text(path))
    return found


def _different(message: str, name: str, first: Path, other: Path) -> ModelError:
    return ModelError(
        message,
        path=other / name,
        key=name,
        expected=f"{_summary(first / name)}, as in {first}",
        actual=_summary(other / name),
        hint="give checkpoints that share one tokenizer and its chat templates",
    )


def _summary(path: Path) -> str:
    return f"SHA-256 {hashlib.sha256(_read(path)).hexdigest()[:12]}" if path.is_file() else "no such file"


def _read(path: Path) -> bytes:
    try:
        return read_regular(path)
    except OSError as error:
        raise ModelError("A file of the tokenizer cannot be read.", path=path, actual=error) from error


def _text(path: Path) -> str:
    return _read(path).decode("utf-8", "replace")


def _document(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except (OSError, ValueError) as error:
        raise ModelError("A file of the tokenizer cannot be read.", path=path, actual=error) from error
