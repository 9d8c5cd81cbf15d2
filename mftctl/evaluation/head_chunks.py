"""Losses at selected positions without holding all their logits: the output head runs on one chunk at a time.

With a vocabulary of 128,256, the logits of 4,096 positions take 2.1 GB in fp32, and a backward pass several times that.
Some models transform their logits, for example with a soft cap or a scale, in their own code after the head. Therefore
each chunk runs the model's own forward pass, with a decoder that returns its earlier output and a head that is fed the
chunk.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mftctl.data.examples import IGNORED_LABEL
from mftctl.runtime.process_group import any_process, largest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_LOGITS = 2**27
"""Maximum logits per chunk: 512 MiB in fp32. Smaller chunks cost more: each adds up a gradient of the whole head."""

_SHOWN = 16
"""Positions whose logits are part of the output if there are several chunks."""

_gives_same: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
"""For each model checked so far, whether a chunk gives the same logits as the model itself."""

OnRefusal = Callable[[str], None]


def positions_at_once(model: nn.Module) -> int:
    """Number of positions per chunk.

    Args:
        model: A causal language model.
    """
    head = output_head(model)
    size = getattr(head, "out_features", None) or getattr(getattr(model, "config", None), "vocab_size", None)
    return max(CHUNK_LOGITS // size, 1) if isinstance(size, int) else CHUNK_LOGITS


def chunk_count(model: nn.Module, positions: int) -> int:
    """Number of chunks for the given positions, at least one.

    If the processes shard the weights of the head, each pass through it gathers them, so all processes use the same
    number of chunks.

    Args:
        model: A causal language model.
        positions: Number of positions in this process.
    """
    count = max(-(-positions // positions_at_once(model)), 1)
    return largest(count) if _shares_head(model) else count


def _shares_head(model: nn.Module) -> bool:
    """True if DeepSpeed ZeRO-3 shards the head over the processes; FSDP gathers it once for all passes."""
    head = output_head(model)
    return head is not None and any(hasattr(parameter, "ds_id") for parameter in head.parameters())


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that maps hidden states to logits; None if the model has no separate one."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return head if isinstance(head, nn.Module) else None


def answer_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions that predict an answer token, and these tokens.

    Args:
        labels: `(records, length)`, -100 except at answer tokens.

    Returns:
        Positions in the flattened batch, int64 `(answer tokens,)`, each one before its token; and the tokens.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL).flatten()
    positions = (targets != IGNORED_LABEL).nonzero().squeeze(1)
    return positions, targets[positions]


@contextmanager
def logits_only_at(
    model: nn.Module,
    positions: torch.Tensor,
    tokens: torch.Tensor | None = None,
    on_refusal: OnRefusal | None = None,
) -> Iterator[None]:
    """Restricts the output head to selected positions while the context is open: prompts and padding need no logits.

    With a large vocabulary and small layers, the head takes much of the time of a training step, and its logits much of
    the memory. Transformations of the logits, such as a soft cap, are preserved.

    Args:
        model: A causal language model. Without a separate head module, it computes all logits.
        positions: Int64, in the flattened batch.
        tokens: The tokens predicted there. If given and their logits exceed one chunk, the output contains the logits
            of the first positions only, and its `loss` the negative log-likelihood of each other token.
        on_refusal: Called with the reason if a model computes all logits at once; by default, issues a warning.
    """
    head = output_head(model)
    if head is None:
        yield
        return
    inner, chunks = None, 1
    if tokens is not None:
        chunks = chunk_count(model, len(positions))
    if chunks > 1:
        inner = _chunkable(model, head, on_refusal or _warn)
    if inner is None or tokens is None:
        with _feeding(head, lambda hidden: hidden.flatten(0, 1)[positions]):
            yield
        return
    chunked = _ChunkedForward(inner, head, positions, tokens, chunks, on_refusal or _warn)
    with _replaced_forward(inner, chunked):
        yield


class _ChunkedForward:
    """Runs the forward pass of a model, then its head on each chunk of the remaining positions."""

    def __init__(
        self,
        model: PreTrainedModel,
        head: nn.Module,
        positions: torch.Tensor,
        tokens: torch.Tensor,
        chunks: int,
        on_refusal: OnRefusal,
    ) -> None:
        self._model = model
        self._forward = model.forward
        self._head = head
        self._positions = positions
        self._tokens = tokens
        self._chunks = chunks
        self._refuse = on_refusal

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        shown = min(_SHOWN, -(-len(self._positions) // self._chunks))
        hidden: list[torch.Tensor] = []
        decoded: list[Any] = []

        def choose(states: torch.Tensor) -> torch.Tensor:
            hidden.append(states.flatten(0, 1)[self._positions])
            return hidden[0][:shown]

        decoder = self._model.base_model
        handle = decoder.register_forward_hook(lambda module, inputs, output: decoded.append(output))
        try:
            with _feeding(self._head, choose):
                output = self._forward(*args, **kwargs)
        finally:
            handle.remove()
        run = None
        if len(hidden) == len(decoded) == 1 and hasattr(decoded[0], "last_hidden_state"):
            run = self._head_run(args, kwargs, decoded[0])
        if run is None or not self._gives_same(run, hidden[0][:shown], output):
            self._give_up()
            with _feeding(self._head, lambda states: states.flatten(0, 1)[self._positions]):
                return self._forward(*args, **kwargs)
        output["loss"] = self._losses(run, hidden[0][shown:], self._tokens[shown:])
        return output

    def _losses(
        self, run: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """The negative log-likelihood of each token; the logits of a chunk are recomputed for the backward pass."""

        def losses(states: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(run(states).float(), expected, reduction="none")

        parts = zip(hidden.tensor_split(self._chunks), tokens.tensor_split(self._chunks), strict=True)
        return torch.cat([checkpoint(losses, *part, use_reentrant=False) for part in parts])

    def _head_run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], decoded: Any
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function that maps hidden states to logits, now and in a backward pass."""
        model, head, forward = self._model, self._head, self._forward
        make, others = type(decoded), {name: value for name, value in decoded.items() if name != "last_hidden_state"}

        def run(states: torch.Tensor) -> torch.Tensor:
            def decode(*_: Any, **__: Any) -> Any:
                return make(last_hidden_state=states.unsqueeze(0), **others)

            with _replaced_forward(model.base_model, decode), _feeding(head, lambda _: states):
                logits: torch.Tensor = forward(*args, **kwargs).logits
            return logits[0]

        return run

    @torch.no_grad()
    def _gives_same(self, run: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, output: Any) -> bool:
        """True if a chunk gives the same logits as the model itself; checked once per model."""
        known = _gives_same.get(self._model)
        if known is None:
            if isinstance(hidden, FakeTensor):
                return True
            known = torch.equal(run(hidden), output.logits[0])
            if _shares_head(self._model):
                known = not any_process(not known)
            _gives_same[self._model] = known
        return known

    def _give_up(self) -> None:
        _gives_same[self._model] = False
        self._refuse(_refusal(self._model))


def _chunkable(model: nn.Module, head: nn.Module, on_refusal: OnRefusal) -> PreTrainedModel | None:
    """The part of a model that owns the head and a separate decoder; None if there is none."""
    from transformers import PreTrainedModel

    found = (
        module for module in model.modules() if isinstance(module, PreTrainedModel) and output_head(module) is head
    )
    inner = next(found, None)
    if inner is not None and inner.base_model is not inner:
        return inner if _gives_same.get(inner, True) else None
    if model not in _gives_same:
        _gives_same[model] = False
        on_refusal(_refusal(model))
    return None


def _refusal(model: nn.Module) -> str:
    return (
        f"{type(model).__name__} computes the logits of all answer tokens at once, because computing them in chunks "
        "would change them. The results are the same, but more memory is needed."
    )


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)


@contextmanager
def _feeding(head: nn.Module, choose: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Replaces the head's input by other hidden states, `(positions, hidden)`, while the context is open."""

    def replace(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (choose(inputs[0]).unsqueeze(0), *inputs[1:])

    handle = head.register_forward_pre_hook(replace)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replaces a module's computation while the context is open; hooks on the module still run."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
