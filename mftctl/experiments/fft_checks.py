"""Checks that the options of `fft` go together."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Final, Protocol

_SELECTING: Final = ("gmt", "random")
_WITH_A_RATIO: Final = (*_SELECTING, "supertuning")


class _Settings(Protocol):
    """The options of `FftOptions` that depend on each other."""

    @property
    def method(self) -> str: ...
    @property
    def objective(self) -> str: ...
    @property
    def ratio(self) -> float | None: ...
    @property
    def support(self) -> str | None: ...
    @property
    def exclude(self) -> Sized: ...
    @property
    def unselected(self) -> str: ...
    @property
    def lora_dropout(self) -> float: ...
    @property
    def lora_experts(self) -> bool: ...
    @property
    def quantize(self) -> str | None: ...
    @property
    def low_memory(self) -> bool: ...
    @property
    def optimizer(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def trains_adapter(self) -> bool: ...
    @property
    def trains_positions(self) -> bool: ...
    @property
    def has_8bit_moments(self) -> bool: ...


def fft_problem(options: _Settings) -> str | None:
    """Returns the first reason why the options cannot be used together; None if they can.

    Args:
        options: The `fft` section as given; derived values need not be filled in.
    """
    return next(_problems(options), None)


def _problems(options: _Settings) -> Iterator[str]:
    yield from _objective(options)
    yield from _selection(options)
    yield from _adapter(options)
    yield from _memory(options)


def _objective(options: _Settings) -> Iterator[str]:
    if options.objective == "dpo" and options.trains_positions:
        yield f"fft.objective: dpo trains with full, lora, gmt, hft or random; the method is {options.method}"
    if options.objective == "dpo" and options.lora_dropout > 0:
        yield "fft.lora_dropout does not apply to the objective dpo, which trains without dropout"


def _selection(options: _Settings) -> Iterator[str]:
    if options.ratio is not None and options.method not in _WITH_A_RATIO:
        yield f"fft.ratio applies only to the methods gmt, random and supertuning; the method is {options.method}"
    if options.exclude and options.method not in _SELECTING:
        yield f"fft.exclude applies only to the methods gmt and random; the method is {options.method}"


def _adapter(options: _Settings) -> Iterator[str]:
    if options.support is not None:
        if not options.trains_positions:
            yield f"fft.support applies only to the methods shira and supertuning; the method is {options.method}"
        if options.ratio is not None:
            yield "give either fft.ratio or fft.support, whose mask decides how many weights are trained"
    if options.lora_experts:
        if options.method != "lora":
            yield f"fft.lora_experts applies only to the method lora; the method is {options.method}"
        if options.lora_dropout:
            yield (
                "fft.lora_experts: PEFT adds the adapter of experts to their weights, so nothing can be dropped before "
                f"it; fft.lora_dropout must be 0, not {options.lora_dropout:g}"
            )
        if options.quantize is not None:
            yield "fft.lora_experts and fft.quantize: bitsandbytes quantises linear layers only, not fused experts"


def _memory(options: _Settings) -> Iterator[str]:
    if options.quantize is not None and options.method != "lora":
        yield f"fft.quantize applies only to the method lora; the method is {options.method}"
    if options.low_memory and options.trains_adapter:
        instead = " (use fft.quantize: nf4)" if options.method == "lora" else ""
        yield f"fft.low_memory applies only to trained weights; {options.method} freezes them{instead}"
    if options.low_memory and options.optimizer != "adamw":
        yield f"fft.low_memory needs the optimizer adamw; the optimizer is {options.optimizer}"
    if options.low_memory and options.precision == "fp32":
        yield "fft.low_memory needs bf16; the precision is fp32"
    if options.has_8bit_moments and options.method in _SELECTING and options.unselected == "unchanged":
        yield (
            f"fft.optimizer: {options.optimizer} keeps one scale per 256 moments, so weights that are not selected "
            "cannot stay unchanged (use fft.unselected: momentum, or fft.low_memory with adamw)"
        )
