"""The decoder layers below the first masked one, which always give the same: computed once for each batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mftctl.masking.hidden_states import HiddenStates
from mftctl.masking.targets import decoder_layers

_INPUTS = ("input_ids", "attention_mask")
_FOLLOWED = {*_INPUTS, "use_cache", "logits_to_keep"}
"""What a call may name for its hidden states to follow from the inputs alone."""


@contextmanager
def reusing_prefix(
    model: nn.Module,
    first_masked: int,
    states: HiddenStates,
    on_refusal: Callable[[str], None],
    *,
    in_training: bool,
) -> Iterator[None]:
    """Inside it, a batch that was seen before enters the model at the deepest frozen layer known of it.

    The first batch is computed both ways, in training and in evaluation: where the logits differ by a bit, as with
    dropout, hidden states are not reused there.

    Args:
        model: A causal language model whose weights below the first masked layer do not change.
        first_masked: Index of the decoder layer above those.
        states: Kept from one call to the next, as long as the frozen weights are the same ones.
        on_refusal: Is told why nothing is reused.
        in_training: Whether training batches come again; those of an evaluation always do.
    """
    if first_masked == 0:
        yield
        return
    prefix = _Prefix(decoder_layers(model)[1][:first_masked], states, on_refusal, in_training)
    prefix.put_stand_ins()
    hooks = [
        model.register_forward_pre_hook(prefix.before, with_kwargs=True),
        model.register_forward_hook(prefix.after, with_kwargs=True, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        prefix.remove_stand_ins()


class _Prefix:
    """What the hooks of a model and the stand-ins of its frozen layers know of the batch that passes.

    The layers stay the modules they are, since models ask them for more than their output.
    """

    def __init__(
        self, layers: nn.ModuleList, states: HiddenStates, on_refusal: Callable[[str], None], in_training: bool
    ) -> None:
        self._layers = layers
        self._states = states
        self._refuse = on_refusal
        self._reuses = {True: in_training, False: True}
        self._checked = {True: False, False: False}
        self._forwards: list[Any] = []
        self._checking = False
        self._batch: bytes | None = None
        self._start = 0
        self._entering: torch.Tensor | None = None
        self._leaving: Any = None

    def put_stand_ins(self) -> None:
        for number, layer in enumerate(self._layers):
            self._forwards.append(layer.__dict__.get("forward"))
            layer.forward = self._stand_in(number, layer.forward)

    def remove_stand_ins(self) -> None:
        for layer, forward in zip(self._layers, self._forwards, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Looks the batch up."""
        if self._checking:
            return
        self._forget()
        if not self._reuses[model.training] or not _follows_from_inputs(args, kwargs):
            return
        self._batch = _name(model.training, kwargs)
        # The first batch goes all the way, so that it has its right output whatever the check says.
        found = self._states.get(self._batch, len(self._layers)) if self._checked[model.training] else None
        if found is not None:
            self._start, hidden_states = found
            self._entering = hidden_states.to(kwargs["input_ids"].device)

    def after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Keeps what entered the first masked layer, and checks it the first time."""
        if self._checking:
            return
        batch, leaving = self._batch, self._leaving
        if batch is not None and output is not None:
            if self._checked[model.training] or self._check(model, kwargs, leaving, output):
                self._keep(model, batch, leaving)
            else:
                self._stop(model, "from stored ones the model gives other logits, as it does with dropout")
        self._forget()

    def _stand_in(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if number < self._start - 1:
                return args[0] if args else kwargs["hidden_states"]
            if number == self._start - 1:
                output = self._entering
            else:
                output = forward(*args, **kwargs)
            if number == len(self._layers) - 1:
                self._leaving = output
            return output

        return stand_in

    @torch.no_grad()
    def _check(self, model: nn.Module, kwargs: dict[str, Any], leaving: Any, output: Any) -> bool:
        """Whether a batch that went all the way has the same logits when it enters at the first masked layer."""
        if not isinstance(leaving, torch.Tensor):
            return False
        self._start, self._entering = len(self._layers), leaving
        self._checking = True
        try:
            with torch.random.fork_rng([leaving.device] if leaving.device.type in ("cuda", "xpu") else []):
                again = model(**kwargs)
        finally:
            self._checking = False
            self._start = 0
        self._checked[model.training] = True
        return torch.equal(output.logits, again.logits)

    def _keep(self, model: nn.Module, batch: bytes, leaving: torch.Tensor) -> None:
        if self._start == len(self._layers):
            return
        try:
            self._states.put(batch, len(self._layers), leaving)
        except OSError as error:
            self._stop(model, f"their file cannot be written ({error})")

    def _stop(self, model: nn.Module, why: str) -> None:
        self._reuses[model.training] = False
        place = "training" if model.training else "validation"
        self._refuse(f"Hidden states are not reused in {place}: {why}. The results are the same, the time is not.")

    def _forget(self) -> None:
        self._batch, self._start, self._entering, self._leaving = None, 0, None, None


def _follows_from_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return not args and "input_ids" in kwargs and kwargs.keys() <= _FOLLOWED and kwargs.get("use_cache") is False


def _name(training: bool, kwargs: dict[str, Any]) -> bytes:
    """A digest of the batch, the same whenever it comes."""
    digest = hashlib.blake2b(bytes([training]), digest_size=16)
    for name in _INPUTS:
        if kwargs.get(name) is not None:
            tensor = kwargs[name].cpu().contiguous()
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.numpy().data)
    return digest.digest()
