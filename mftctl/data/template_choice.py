"""Selects the chat template for training and evaluation."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerBase

from mftctl.data.template_limits import TEMPLATE_FAILURES, render_template
from mftctl.errors import ConfigError
from mftctl.files.regular import read_regular

BUILT_IN = ("chatml", "tulu", "llama3", "zephyr", "alpaca")

TemplateValue = bool | int | float | str

_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)

_ASSIGNMENT = re.compile(r"\{%- set (?P<name>[A-Za-z_]\w*) = (?:true|false|[-\d.eE+]+|\"(?:[^\"\\]|\\.)*\") -%\}")
"""The output of `_assignment`."""

# Part of the template itself, so that it is saved with the model.
_MERGED_SYSTEM = (
    "{%- if messages | length > 1 and messages[0]['role'] == 'system' -%}"
    "{%- set messages = [{'role': messages[1]['role'], "
    "'content': messages[0]['content'] + '\\n\\n' + messages[1]['content']}] + messages[2:] -%}"
    "{%- endif -%}"
)


@dataclass(frozen=True, slots=True)
class TemplateChoice:
    """The user's chat-template options.

    Attributes:
        source: A Jinja file, one of the tokenizer's named templates or one of `BUILT_IN`; None for the tokenizer's own.
        variables: Variables to set in the template, such as `enable_thinking`.
        merge_system: Whether to merge the system prompt into the first question.
    """

    source: str | None = None
    variables: Mapping[str, TemplateValue] = field(default_factory=dict)
    merge_system: bool = False


def choose_template(tokenizer: PreTrainedTokenizerBase, choice: TemplateChoice) -> None:
    """Sets the tokenizer's chat template, which is saved with it.

    Args:
        tokenizer: The model's tokenizer.
        choice: The user's options.

    Raises:
        ConfigError: The template does not exist or is invalid, or the tokenizer has several and none is selected.
    """
    template = _source(tokenizer, choice.source)
    if template is None:
        if choice.variables or choice.merge_system:
            raise ConfigError(
                "The model has no chat template to modify.",
                key="--merge-system" if choice.merge_system else "--template-arg",
                expected="a chat template",
                hint=f"--chat-template FILE, or one of {', '.join(BUILT_IN)}",
            )
        return
    if choice.source is None:
        template = _without_earlier(template, choice)
    set_variables = "".join(_assignment(name, value) for name, value in choice.variables.items())
    template = set_variables + (_MERGED_SYSTEM if choice.merge_system else "") + template
    _check(template, choice.source)
    tokenizer.chat_template = template


def _without_earlier(template: str, choice: TemplateChoice) -> str:
    """The template without the parts of an earlier choice that the new choice replaces."""
    kept = ""
    while (earlier := _ASSIGNMENT.match(template)) is not None:
        if earlier["name"] not in choice.variables:
            kept += earlier[0]
        template = template[earlier.end() :]
    if choice.merge_system:
        template = template.removeprefix(_MERGED_SYSTEM)
    return kept + template


def _source(tokenizer: PreTrainedTokenizerBase, source: str | None) -> str | None:
    """The text of the template; None if there is none."""
    own = tokenizer.chat_template
    named: dict[str, str] = own if isinstance(own, dict) else {}
    if source is None:
        if named and "default" not in named:
            raise ConfigError(
                "The tokenizer has several chat templates but no default.",
                key="--chat-template",
                expected=", ".join(sorted(named)),
                actual="none selected",
                hint=f"--chat-template {sorted(named)[0]}",
            )
        return named["default"] if named else own
    if source in named:
        return named[source]
    if source in BUILT_IN:
        return (resources.files("mftctl.data") / "chat_templates" / f"{source}.jinja").read_text(encoding="utf-8")
    try:
        return read_regular(Path(source)).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "The chat template does not exist or cannot be read.",
            key="--chat-template",
            expected=f"a Jinja file, or one of {', '.join([*sorted(named), *BUILT_IN])}",
            actual=f"{source} ({error})",
        ) from error


def _assignment(name: str, value: TemplateValue) -> str:
    if not _VARIABLE.fullmatch(name):
        raise ConfigError(
            "A chat-template variable has an invalid name.", key="--template-arg", expected="NAME=VALUE", actual=name
        )
    literal = json.dumps(value)  # also a Jinja literal
    return f"{{%- set {name} = {literal} -%}}"


def _check(template: str, source: str | None) -> None:
    try:
        render_template([{"role": "user", "content": "A"}], template)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            "The chat template is not valid Jinja.",
            key="--chat-template",
            path=source,
            expected="a Jinja template",
            actual=f"line {error.lineno}: {error.message}",
        ) from error
    except TEMPLATE_FAILURES:  # for example because of the roles; reported later, with a record
        return
