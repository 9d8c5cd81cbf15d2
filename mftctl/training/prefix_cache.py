"""Cache for the output of the decoder layers below the first masked one, which is constant for each batch."""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import torch
from torch import nn

from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.experiments.results import PrefixReuse
from mftctl.masking.targets import decoder_layers
from mftctl.runtime.memory import available_bytes
from mftctl.runtime.processes import local_world_size, world_size
from mftctl.training.schedule import accumulation, records_per_step, total_steps


@dataclass(frozen=True, slots=True)
class _Stored:
    layer: int
    shape: torch.Size
    dtype: torch.dtype
    size_bytes: int
    offset_bytes: int | None
    """Offset in the file; None if in memory."""


class HiddenStates:
    """Hidden states that enter a decoder layer, for as many batches as fit within the limits.

    The file is unnamed, so it disappears with the process, however that ends.

    Args:
        folder: Folder for the file.
        memory_bytes: Maximum bytes in memory.
        file_bytes: Maximum bytes in the file.

    Attributes:
        reused: Number of cache hits.
    """

    def __init__(self, folder: Path, memory_bytes: int, file_bytes: int) -> None:
        self._folder = folder
        self._room_bytes = memory_bytes
        self._file_room_bytes = file_bytes
        self._file: IO[bytes] | None = None
        self._file_size_bytes = 0
        self._stored: dict[bytes, _Stored] = {}
        self._tensors: dict[bytes, torch.Tensor] = {}
        self.reused = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stored.clear()
        self._tensors.clear()
        if self._file is not None:
            self._file.close()

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def size_bytes(self) -> int:
        """Bytes cached, in memory and in the file."""
        return sum(stored.size_bytes for stored in self._stored.values())

    def get(self, batch: bytes, deepest: int) -> tuple[int, torch.Tensor] | None:
        """A batch's cached hidden states on the CPU and the layer they enter; None if there are none of use.

        Args:
            batch: The key given to `put`.
            deepest: Hidden states that enter a layer above this one are of no use.
        """
        stored = self._stored.get(batch)
        if stored is None or stored.layer > deepest:
            return None
        self.reused += 1
        return stored.layer, self._tensors[batch] if stored.offset_bytes is None else self._read(stored)

    def put(self, batch: bytes, layer: int, hidden_states: torch.Tensor) -> bool:
        """Caches a batch's hidden states, replacing earlier ones; returns False if the limits are reached.

        Args:
            batch: The key of the batch.
            layer: Index of the decoder layer that they enter.
            hidden_states: `(records, tokens, hidden)` on any device; must not be changed afterwards.

        Raises:
            OSError: The file cannot be written.
        """
        hidden_states = hidden_states.detach().cpu()
        size_bytes, before = hidden_states.nbytes, self._stored.get(batch)
        if before is not None and before.size_bytes != size_bytes:
            return False
        offset_bytes = None if before is None else before.offset_bytes
        if before is None and size_bytes > self._room_bytes:
            if size_bytes > self._file_room_bytes:
                return False
            offset_bytes = self._file_size_bytes
        if offset_bytes is None:
            self._tensors[batch] = hidden_states
        else:
            self._write(hidden_states, offset_bytes)
        if before is None and offset_bytes is None:
            self._room_bytes -= size_bytes
        elif before is None:
            self._file_room_bytes -= size_bytes
            self._file_size_bytes += size_bytes
        self._stored[batch] = _Stored(layer, hidden_states.shape, hidden_states.dtype, size_bytes, offset_bytes)
        return True

    def _read(self, stored: _Stored) -> torch.Tensor:
        mapped = np.memmap(
            self._opened(), dtype=np.uint8, mode="r", offset=stored.offset_bytes or 0, shape=(stored.size_bytes,)
        )
        return torch.from_numpy(np.array(mapped)).view(stored.dtype).view(stored.shape)

    def _write(self, hidden_states: torch.Tensor, offset_bytes: int) -> None:
        # Not through the memory map, where a full disk raises a fatal signal; here it raises an error.
        file = self._opened()
        file.seek(offset_bytes)
        file.write(hidden_states.contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()

    def _opened(self) -> IO[bytes]:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)
        return self._file


_INPUTS = ("input_ids", "attention_mask")
_FOLLOWED = {*_INPUTS, "use_cache", "logits_to_keep"}
"""Arguments with which a call's hidden states depend only on the inputs."""


@contextmanager
def reusing_prefix(
    model: nn.Module,
    first_masked: int,
    states: HiddenStates,
    on_refusal: Callable[[str], None],
    *,
    in_training: bool,
) -> Iterator[None]:
    """Context in which a batch seen before enters the model at its deepest cached frozen layer.

    The first batch is computed both ways, in training and in evaluation; if the logits are not bit-identical, as with
    dropout, hidden states are not reused in that mode.

    Args:
        model: A causal language model whose weights below the first masked layer do not change.
        first_masked: Index of the first masked decoder layer.
        states: Cache kept between calls as long as the frozen weights stay the same.
        on_refusal: Called with the reason if nothing is reused.
        in_training: Whether training batches repeat; evaluation batches always do.
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
    """State shared by a model's hooks and its frozen layers' stand-ins during a forward pass.

    The layer modules stay in place, since models read more from them than their output.
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
        """Looks up the batch in the cache."""
        if self._checking:
            return
        self._forget()
        if not self._reuses[model.training] or not _follows_from_inputs(args, kwargs):
            return
        self._batch = _name(model.training, kwargs)
        # The first batch runs through all layers, so that its output is right whatever the check finds.
        found = self._states.get(self._batch, len(self._layers)) if self._checked[model.training] else None
        if found is not None:
            self._start, hidden_states = found
            self._entering = hidden_states.to(kwargs["input_ids"].device)

    def after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Caches the input of the first masked layer, and checks it the first time."""
        if self._checking:
            return
        batch, leaving = self._batch, self._leaving
        if batch is not None and output is not None:
            if self._checked[model.training] or self._check(model, kwargs, leaving, output):
                self._keep(model, batch, leaving)
            else:
                self._stop(model, "the model's logits differ when computed from stored ones, as with dropout")
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
        """True if a fully computed batch gives the same logits when it enters at the first masked layer."""
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
        self._refuse(f"Hidden states are not reused in {place}: {why}. Results are the same, but it takes longer.")

    def _forget(self) -> None:
        self._batch, self._start, self._entering, self._leaving = None, 0, None, None


def _follows_from_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return not args and "input_ids" in kwargs and kwargs.keys() <= _FOLLOWED and kwargs.get("use_cache") is False


def _name(training: bool, kwargs: dict[str, Any]) -> bytes:
    """A digest that identifies the batch."""
    digest = hashlib.blake2b(bytes([training]), digest_size=16)
    for name in _INPUTS:
        if kwargs.get(name) is not None:
            tensor = kwargs[name].cpu().contiguous()
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.numpy().data)
    return digest.digest()


_SHARE = 4
"""A quarter of a machine's free memory, for all its processes; training needs the rest."""


def hidden_states(options: MaskTrainOptions, folder: Path) -> HiddenStates:
    """An empty cache within the limits that the options and the machine set for this process.

    Args:
        options: Options with the limit per machine.
        folder: The run's folder, which holds the cache file.
    """
    processes = local_world_size()
    memory_bytes = available_bytes() // _SHARE // processes
    if options.prefix_cache_gb is None:
        disk_bytes = shutil.disk_usage(folder).free // _SHARE // processes
        return HiddenStates(folder, memory_bytes, disk_bytes)
    limit_bytes = int(options.prefix_cache_gb * 1e9) // processes
    memory_bytes = min(memory_bytes, limit_bytes)
    return HiddenStates(folder, memory_bytes, limit_bytes - memory_bytes)


def batches_come_again(records: int, options: MaskTrainOptions) -> bool:
    """True if training sees the same micro-batch more than once."""
    steps = total_steps(records, options, world_size())
    if options.batch_tokens is not None:
        # Steps differ between epochs, and so do micro-batches, grouped by length, unless one step has all records.
        return steps > 1 and records <= records_per_step(options, world_size())
    batches = math.ceil(records / options.batch_size)
    return steps * accumulation(options, world_size()) * world_size() > batches


def token_batches_change(records: int, options: MaskTrainOptions) -> bool:
    """True if only a token budget prevents micro-batches from repeating, and reusing hidden states would pay off."""
    if options.batch_tokens is None or options.prefix_cache_gb == 0 or options.method != "learned":
        return False
    processes = world_size()
    return total_steps(records, options, processes) * records_per_step(options, processes) >= 2 * records


def prefix_reuse(states: HiddenStates) -> PrefixReuse:
    """Size and use of the cache, for a run's result."""
    return PrefixReuse(batches=len(states), size_bytes=states.size_bytes, reused=states.reused)
