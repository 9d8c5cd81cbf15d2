"""Compares a function's results with those of the reference solution; prepended to tests in the sandbox.

mftctl is not available there, so this module imports only the standard library.
"""

from __future__ import annotations

import copy
import math

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

inf, nan = math.inf, math.nan
"""Names used in the inputs of a test."""

_MOST_BYTES = 30 * 2**20
"""Approximate limit of the sandbox for one result."""

_LEAST_TOLERANCE = 1e-6
_RELATIVE_TOLERANCE = 1e-7


def check_outputs(
    function: Callable[..., Any],
    reference: str,
    name: str,
    inputs: Sequence[Sequence[Any]],
    tolerance: float,
    rule: str,
) -> None:
    """Checks that the function returns the same as the reference solution on every input.

    Deviation: an input whose expected result is too large for the sandbox is skipped (one of MBPP+'s 40,000, the
    largest of problem 255, with 128 million items).

    Args:
        function: The function under test.
        reference: Source of the reference solution.
        name: Name of the function in it.
        inputs: Arguments of each call.
        tolerance: Absolute tolerance for floats; 0 for the benchmarks' default.
        rule: Comparison rule in place of equality, from `mftctl.evaluation.benchmarks.evalplus`; empty for none.

    Raises:
        AssertionError: A result differs.
    """
    defined: dict[str, Any] = {"__name__": "reference"}
    exec(compile(reference, "<reference>", "exec", dont_inherit=True), defined)
    for arguments in inputs:
        expected = defined[name](*copy.deepcopy(arguments))
        if not can_cross(expected):
            continue
        found = function(*copy.deepcopy(arguments))
        fits = _fits(found, expected, arguments, tolerance, rule, defined)
        assert fits, f"found {found!r:.100}, expected {expected!r:.100}"


def _fits(
    found: Any, expected: Any, arguments: Sequence[Any], tolerance: float, rule: str, defined: dict[str, Any]
) -> bool:
    if rule == "root":
        return bool(abs(defined["poly"](*arguments, found)) <= tolerance)
    if rule == "any order":
        return set(found) == set(expected)
    if rule == "is there":
        there = expected is not None
        return there == (found if isinstance(found, bool) else found is not None)
    if rule == "any truth":
        return isinstance(found, bool)
    if same(found, expected, tolerance):
        return True
    if rule == "upright height":
        return bool(found == upright_pyramid_surface(*arguments))
    if rule == "padded digits":
        return bool(found == padded_digit_distance(*arguments))
    return rule == "or zero" and type(found) is int and found == 0


def can_cross(value: Any) -> bool:
    """True if a result is small enough to be sent by the process that runs the answer.

    Args:
        value: The expected result.
    """
    size, waiting = 0, [value]
    while waiting and size <= _MOST_BYTES:
        item = waiting.pop()
        size += 8
        if isinstance(item, (str, bytes)):
            size += len(item)
        elif isinstance(item, int):
            size += item.bit_length() // 8
        elif isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            waiting += item
    return size <= _MOST_BYTES


def same(found: Any, expected: Any, tolerance: float) -> bool:
    """True if a result is right: equal, or close if floats are expected.

    Args:
        found: Result of the function.
        expected: Result of the reference solution.
        tolerance: Absolute tolerance for floats; 0 allows 1e-6 for a float or a list of floats, and none otherwise.
    """
    if found == expected:
        return True
    allowed = tolerance or (_LEAST_TOLERANCE if _are_floats(expected) else 0.0)
    return bool(allowed) and _near(found, expected, allowed)


def _are_floats(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(item, float) for item in value)
    return isinstance(value, float)


def _near(found: Any, expected: Any, tolerance: float) -> bool:
    if isinstance(expected, (list, tuple)):
        same_length = type(found) is type(expected) and len(found) == len(expected)
        return same_length and all(_near(a, b, tolerance) for a, b in zip(found, expected, strict=True))
    if type(found) is not type(expected) or not isinstance(expected, (int, float, complex)):
        return bool(found == expected)
    if found == expected or (found != found and expected != expected):
        return True
    if abs(expected) == inf:
        return False
    return bool(abs(found - expected) <= tolerance + _RELATIVE_TOLERANCE * abs(expected))


def upright_pyramid_surface(edge: float, height: float) -> int:
    """The surface of a square pyramid, where the height is that of the apex above the base, not of the sides.

    Args:
        edge: Edge of the base.
        height: Height of the apex.
    """
    return round(edge**2 + 2 * edge * math.hypot(edge / 2, height))


def padded_digit_distance(first: int, second: int) -> int:
    """The sum of the differences between digits at the same position; missing digits are 0.

    Args:
        first: One number.
        second: The other.
    """
    width = max(len(str(first)), len(str(second)))
    pairs = zip(str(first).zfill(width), str(second).zfill(width), strict=True)
    return sum(abs(int(a) - int(b)) for a, b in pairs)
