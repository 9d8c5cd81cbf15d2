"""What is judged, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["passed", "failed", "timed out", "out of memory", "too much output", "crashed"]


@dataclass(frozen=True, slots=True)
class Program:
    """One piece of model-written code and its test.

    Attributes:
        code: The model's code, which defines functions.
        test: Source of the test, which fails by raising. Names that it neither defines nor finds among Python's
            builtins are the code's.
        entry_point: The function under test; needed only where it is called like a builtin, which is the test's own
            otherwise (MBPP 126 asks for `sum`).
    """

    code: str
    test: str
    entry_point: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a program passes its test.

    Attributes:
        passed: Whether the test ran to its end, with all that it asked of the program right.
        outcome: What happened.
        detail: Type and text of what went wrong, at most a few hundred printable characters; empty if it passed.
        seconds: Wall time from the start of its processes to the verdict.
    """

    passed: bool
    outcome: Outcome
    detail: str
    seconds: float
