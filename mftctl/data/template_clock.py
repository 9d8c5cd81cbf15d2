"""Fixes the current time in chat templates, so that runs are reproducible."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Final

_FUNCTION: Final = "strftime_now"
_DIRECTIVES: Final = "aAbBcdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ"


def at(template: str, now: datetime) -> str:
    """The template with `strftime_now` returning a fixed time; templates without it are unchanged.

    Args:
        template: A transformers chat template, which accepts data from outside but no functions.
        now: The fixed time.
    """
    if _FUNCTION not in template:
        return template
    values = {}
    for directive in _DIRECTIVES:
        for flag in ("%", "%-"):
            values[flag + directive] = now.strftime(flag + directive)
    return (
        f"{{%- macro {_FUNCTION}(form) -%}}{{%- set written = namespace(text=form) -%}}"
        f"{{%- for directive, value in {json.dumps(values)}.items() -%}}"
        "{%- set written.text = written.text.replace(directive, value) -%}{%- endfor -%}"
        f"{{{{- written.text -}}}}{{%- endmacro -%}}{template}"
    )
