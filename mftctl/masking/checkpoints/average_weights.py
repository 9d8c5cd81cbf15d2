"""The weights of an average."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from mftctl.errors import ConfigError

_LARGEST: Final = 1e100
_ROUNDING: Final = 1e-12
"""A sum of weights below this share of their magnitudes is 0 but for rounding, as in 0.1 + 0.2 - 0.3."""


def settled_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """The weight of each checkpoint, with sum 1.

    Args:
        weights: Any numbers, in proportion; negative ones extrapolate. None for equal weights.
        count: Number of checkpoints.

    Raises:
        ConfigError: There are fewer than two checkpoints, or the weights do not match them, are not finite or sum to 0.
    """
    if count < 2:
        raise ConfigError(
            "An average needs at least two checkpoints.",
            key="CHECKPOINT",
            expected="two or more checkpoints",
            actual=count,
            hint="mftctl average FIRST SECOND -o OUT",
        )
    if weights is None:
        return (1 / count,) * count
    if len(weights) != count:
        raise _wrong_weights("There must be one weight per checkpoint.", f"{count} numbers", weights)
    if not all(abs(weight) <= _LARGEST for weight in weights):  # false for NaN too
        raise _wrong_weights("A weight of the average cannot be used.", f"numbers up to {_LARGEST:g}", weights)
    largest = max(map(abs, weights))
    shares = [weight / largest for weight in weights] if largest else [0.0] * count
    total = math.fsum(shares)
    if abs(total) <= _ROUNDING * math.fsum(map(abs, shares)):
        raise _wrong_weights(
            "The weights are divided by their sum, which must not be 0.", "a sum other than 0", weights
        )
    return tuple(share / total for share in shares)


def _wrong_weights(message: str, expected: str, weights: Sequence[float]) -> ConfigError:
    actual = ",".join(f"{weight:g}" for weight in weights)
    return ConfigError(message, key="--weights", expected=expected, actual=actual, hint="--weights 0.7,0.3")
