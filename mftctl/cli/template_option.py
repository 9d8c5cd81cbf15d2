"""The `--chat-template` option of `eval`, whose value is optional."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mftctl.data.quickstart.built_in import NAME as QUICKSTART

OPTION = "--chat-template"
OWN = ""
"""The value that selects the tokenizer's own template."""

_TEMPLATE_ENDS = (".jinja", ".jinja2", ".j2")


def with_value(words: Sequence[str]) -> list[str]:
    """Returns the words of a command line, with `--chat-template=` where the option has no value.

    The next word is its value unless it is an option or a model: a folder, `quickstart`, or a hub id of the form
    owner/name.

    Args:
        words: The words after the command name.
    """
    found: list[str] = []
    for index, word in enumerate(words):
        if word == "--":
            return [*found, *words[index:]]
        following = words[index + 1] if index + 1 < len(words) else "-"
        is_bare = word == OPTION and (following.startswith("-") or _is_model(following))
        found.append(f"{OPTION}={OWN}" if is_bare else word)
    return found


def _is_model(word: str) -> bool:
    path = Path(word).expanduser()
    is_hub_id = "/" in word and not path.is_file() and not word.endswith(_TEMPLATE_ENDS)
    return word == QUICKSTART or path.is_dir() or is_hub_id
