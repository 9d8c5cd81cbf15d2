"""What a chat template takes for the present, which is fixed, so that a run can be repeated."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Final

_FUNCTION: Final = "strftime_now"
_DIRECTIVES: Final = "aAbBcdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ"


def at(template: str, now: datetime) -> str:
    """The template with `strftime_now` telling one moment, and not the present; others as they are.

    Args:
        template: A chat template of transformers, which takes data but no functions from outside.
        now: The moment.
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
