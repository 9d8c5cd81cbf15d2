"""Comparison of generated answers with reference answers."""

from __future__ import annotations

import re

MARKER = "####"
"""The marker before the final answer in GSM8K."""

_THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))", re.ASCII)
_NUMBER = re.compile(r"([+-]?)(\d*)(?:\.(\d*))?(%?)", re.ASCII)


def final_answer(text: str) -> str:
    """The final answer in canonical form: `#### $1,200.00.` gives `1200`.

    It is the first line after the last `####`, or of the whole text if there is no marker, without `$`, thousands
    separators and final full stops. A number loses its plus sign and redundant zeros; `%` is kept.

    Args:
        text: A reference or generated answer.
    """
    tail = text.rpartition(MARKER)[2].strip()
    line = tail.splitlines()[0] if tail else ""
    line = _THOUSANDS_COMMA.sub("", line.replace("$", "").replace("\N{MINUS SIGN}", "-"))
    return _canonical_number(" ".join(line.split()).rstrip(" ."))


def exact_match(prediction: str, reference: str) -> bool:
    """True if the prediction is right.

    If the reference contains `####`, the final answers are compared, and a prediction without the marker is wrong.
    Otherwise the whole texts are compared, ignoring white space.

    Args:
        prediction: The generated text.
        reference: The reference text.
    """
    if MARKER in reference:
        return MARKER in prediction and final_answer(prediction) == final_answer(reference)
    return prediction.split() == reference.split()


def _canonical_number(text: str) -> str:
    """A decimal number without redundant characters; any other text unchanged.

    Operates on the digits, because a float or a `Decimal` would round a long number.
    """
    match = _NUMBER.fullmatch(text)
    if match is None or not (match[2] or match[3]):
        return text
    whole = match[2].lstrip("0") or "0"
    fraction = (match[3] or "").rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    sign = "-" if match[1] == "-" and number != "0" else ""
    return f"{sign}{number}{match[4]}"
