"""Checks that the options of soft masks go together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol


class _Settings(Protocol):
    """The options of `MaskTrainOptions` that soft masks depend on."""

    @property
    def mask(self) -> str: ...
    @property
    def max_multiplier(self) -> int: ...
    @property
    def harden(self) -> bool: ...
    @property
    def method(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def preset(self) -> str: ...

    def given(self) -> dict[str, Any]:
        """Returns the options that were set."""


_OF_HARD_MASKS = ("ratio", "budget", "threshold", "pattern")


def soft_mask_problem(options: _Settings) -> str | None:
    """Returns the first reason why the options cannot be used together; None if they can.

    Args:
        options: The `mask_train` section as given; derived values need not be filled in.
    """
    return next(_problems(options), None)


def _problems(options: _Settings) -> Iterator[str]:
    return _of_hard(options) if options.mask == "hard" else _of_soft(options)


def _of_hard(options: _Settings) -> Iterator[str]:
    if options.max_multiplier != 1 or options.harden:
        key = "harden" if options.harden else "max_multiplier"
        yield f"mask_train.{key} applies only to soft masks (mask_train.mask: soft)"
    if options.given().get("start") == "identity":
        yield "mask_train.start: identity applies only to soft masks (mask_train.mask: soft)"


def _of_soft(options: _Settings) -> Iterator[str]:
    given = options.given()
    if options.method != "learned":
        yield f"mask_train.mask: soft masks are learned; the method is {options.method}"
    if options.kind == "delta":
        yield (
            "mask_train.mask: soft multiplies weights; it applies only to kind weight (mftctl interpolate finds a "
            "share of the way from the model before fine-tuning)"
        )
    if options.preset != "default":
        yield f"mask_train.mask: soft does not apply to the preset {options.preset}, whose masks are hard"
    for key in _OF_HARD_MASKS:
        if given.get(key) is not None:
            yield f"mask_train.{key} decides which weights a hard mask removes; it does not apply to mask: soft"
    if given.get("ranking", "signed") != "signed":
        yield "mask_train.ranking decides which weights a hard mask removes; it does not apply to mask: soft"
    if given.get("start", "identity") != "identity":
        yield f"mask_train.start: soft masks start as the identity, not as {given['start']}"
    if options.harden and options.max_multiplier != 1:
        yield "mask_train.harden ends at 0 and 1; it does not apply to max_multiplier 2"
