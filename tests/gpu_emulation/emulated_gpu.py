"""GPUs for tests on machines without one: CPU tensors that report `cuda:0` and refuse to mix with CPU tensors.

The GPU of a tensor is a property of its storage. A function mode reports it where Python asks for it (`.device`,
`.to`, `.numpy`); a dispatch mode propagates it to results and refuses operations that mix devices, as CUDA does. All
results are those of the CPU. Threads are not covered, and neither are reads of a device within the autograd
engine.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import safetensors
import torch
import torch._dynamo  # torch imports it at the first operation, which must not happen inside the modes
from torch import overrides
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from mftctl.workflows.planning import command_memory
from mftctl.workflows.planning.memory import estimate_memory

CPU = torch.device("cpu")
TOTAL_BYTES = 80 << 30

_TAKE_BOTH = ("aten.copy_.default", "aten._to_copy.default", "aten.set_.source_Storage", "aten.set_.source_Tensor")
_INDEXING = ("aten.index.Tensor", "aten.index_put_.default", "aten.index_put.default", "aten._index_put_impl_.default")


class DeviceMismatchError(RuntimeError):
    """Raised like CUDA's error for operations on tensors of two devices."""


class _Current:
    """The current GPU, and all GPUs that have held a tensor."""

    index = 0
    used: ClassVar[set[int]] = set()


def used_gpus() -> set[int]:
    """Indices of the emulated GPUs that have held a tensor."""
    return set(_Current.used)


def gpu_of(tensor: torch.Tensor) -> int | None:
    """Index of a tensor's emulated GPU; None on the CPU."""
    with torch._C.DisableTorchFunction():
        return None if tensor.is_meta else getattr(tensors_in(tensor)[-1].untyped_storage(), "gpu", None)


def is_on_gpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor is on an emulated GPU."""
    return gpu_of(tensor) is not None


def tensors_in(values: Any) -> list[torch.Tensor]:
    """The tensors with storage in nested arguments or results of an operation: of a sparse one, its two parts."""
    if isinstance(values, torch.Tensor):
        with torch._C.DisableTorchFunction():
            if values.layout != torch.sparse_coo:
                return [values]
            with _disable_current_modes():
                return [values._indices(), values._values()]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, tuple | list):
        return []
    return [tensor for value in values for tensor in tensors_in(value)]


def _put(values: Any, gpu: int | None) -> Any:
    """The same value with all its tensors moved to that GPU or the CPU."""
    if gpu is not None:
        _Current.used.add(gpu)
    with torch._C.DisableTorchFunction():
        for tensor in tensors_in(values):
            if not tensor.is_meta:
                tensor.untyped_storage().gpu = gpu  # type: ignore[attr-defined]
    return values


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Mode(TorchDispatchMode):
    """A dispatch mode without the wrapper for compiled models, which takes as long as the rest of an operation."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class _Kernels(Mode):
    """Runs every operation, refuses mixed devices, and places new results on the device of their inputs.

    Attributes:
        fused: GPU of the results while operations belong to one fused kernel, whatever their inputs.
    """

    fused: int | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            inputs = [item for item in (*tensors_in(args), *tensors_in(kwargs)) if not item.is_meta]
            gpus = [getattr(item.untyped_storage(), "gpu", None) for item in inputs]
        gpu = next((gpu for gpu in gpus if gpu is not None), None) if self.fused is None else self.fused
        if gpu is not None and self.fused is None and any(other != gpu for other in gpus):
            name = str(func)
            if name not in _TAKE_BOTH:
                _refuse_mixture(name, args, inputs)
        result = func(*args, **kwargs)
        if gpu is not None:
            known = {_storage(tensor) for tensor in inputs}
            _put([item for item in tensors_in(result) if not item.is_meta and _storage(item) not in known], gpu)
        return result


def _refuse_mixture(name: str, args: Any, inputs: list[torch.Tensor]) -> None:
    """Raises unless CUDA would accept these tensors: all on one GPU, except for CPU scalars and indices."""
    indices = [item for item in args[1] if item is not None] if name in _INDEXING and is_on_gpu(args[0]) else []
    foreign = [item for item in inputs if not is_on_gpu(item) and not any(item is index for index in indices)]
    several = len({gpu_of(item) for item in inputs if is_on_gpu(item)}) > 1
    on_gpu = any(item.dim() for item in inputs if is_on_gpu(item))
    if several or any(item.dim() for item in foreign) or (foreign and not on_gpu):
        shapes = [f"{'cpu' if gpu_of(item) is None else gpu_of(item)} {tuple(item.shape)}" for item in inputs]
        raise DeviceMismatchError(f"Expected all tensors to be on the same device: {name} of {', '.join(shapes)}")


class _Devices(TorchFunctionMode):
    """Reports the device of a tensor, and moves tensors."""

    def __init__(self, kernels: _Kernels) -> None:
        super().__init__()
        self._kernels = kernels

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if args and isinstance(args[0], torch.Tensor):
            if name == "__get__":
                return self._attribute(func, args)
            if handler := getattr(self, f"_{name.strip('_')}", None):
                return handler(func, args, kwargs)
        if "autocast" in name and isinstance(args[0], str):
            args = (args[0].replace("cuda", "cpu"), *args[1:])
        wanted = kwargs.get("device")
        if wanted is not None:
            kwargs["device"] = wanted = _device(wanted)
            if wanted.type == "cuda":
                kwargs["device"] = CPU
        result = func(*args, **kwargs)
        return result if wanted is None or wanted.type == "meta" else _put(result, _index(wanted))

    def _attribute(self, func: Any, args: Any) -> Any:
        owner, gpu = getattr(func.__self__, "__name__", ""), gpu_of(args[0])
        known = {} if gpu is None else {"device": torch.device("cuda", gpu), "is_cuda": True, "is_cpu": False}
        return known.get(owner, func(*args)) if owner in known else func(*args)

    def _get_device(self, func: Any, args: Any, kwargs: Any) -> int:
        gpu = gpu_of(args[0])
        return -1 if gpu is None else gpu

    def _numpy(self, func: Any, args: Any, kwargs: Any) -> Any:
        if is_on_gpu(args[0]):
            raise TypeError("can't convert cuda device type tensor to numpy.")
        return func(*args, **kwargs)

    _array = _numpy

    def _backward(self, func: Any, args: Any, kwargs: Any) -> None:
        with self:  # the mode is off while it handles a call, but backward passes run custom functions
            torch.autograd.backward(args[0], kwargs.pop("gradient", None), *args[1:], **kwargs)

    def _scaled_dot_product_attention(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        tensors = [*tensors_in(args), *tensors_in(kwargs)]
        if not is_on_gpu(args[0]):
            return func(*args, **kwargs)  # type: ignore[no-any-return]
        _refuse_mixture("scaled_dot_product_attention", args, tensors)
        self._kernels.fused = gpu_of(args[0])
        try:
            return func(*args, **kwargs)  # type: ignore[no-any-return]
        finally:
            self._kernels.fused = None

    def _histc(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        counted = args[0].float()  # torch has no histogram of integers on a CPU
        return func(counted, *args[1:], **kwargs).to(args[0].dtype)  # type: ignore[no-any-return]

    def _pin_memory(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        return args[0]  # type: ignore[no-any-return]

    def _cpu(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        return _move(args[0], CPU)

    def _cuda(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        return _move(args[0], torch.device("cuda"))

    def _to(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        tensor, *rest = args
        copy = kwargs.pop("copy", False)
        if rest and isinstance(rest[0], torch.Tensor):
            gpu = gpu_of(rest[0])
            device, dtype = CPU if gpu is None else torch.device("cuda", gpu), rest[0].dtype
        else:
            rest = [
                _device(item) if isinstance(item, int | str) and not isinstance(item, bool) else item for item in rest
            ]
            device = next((item for item in (*rest, kwargs.get("device")) if isinstance(item, torch.device)), None)
            dtype = next((item for item in (*rest, kwargs.get("dtype")) if isinstance(item, torch.dtype)), None)
        device = None if device is None else _device(device)
        if device is not None and device.type == "meta":
            return func(*args, **kwargs)  # type: ignore[no-any-return]
        cast = func(tensor, dtype or tensor.dtype, copy=copy)
        return cast if device is None else _move(cast, device, fresh=_storage(cast) != _storage(tensor))


def _move(tensor: torch.Tensor, device: torch.device, *, fresh: bool = False) -> torch.Tensor:
    """The tensor on a device, copied only if it is on a different one."""
    gpu = _index(device)
    if gpu_of(tensor) == gpu:
        return tensor
    return _put(tensor if fresh else tensor.clone(), gpu)  # type: ignore[no-any-return]


def _index(device: torch.device) -> int | None:
    """Index of a GPU, by default the current one; None for the CPU."""
    if device.type != "cuda":
        return None
    return _Current.index if device.index is None else device.index


def _device(value: Any) -> torch.device:
    with torch._C.DisableTorchFunction():
        return torch.device("cuda", value) if isinstance(value, int) else torch.device(value)


@contextlib.contextmanager
def emulated_gpu(*, count: int = 1, bf16: bool = False) -> Iterator[None]:
    """Gives torch a GPU inside the block.

    Args:
        count: Number of visible GPUs; the first is the current one.
        bf16: Whether the GPUs support bf16.
    """
    kernels = _Kernels()
    state = torch.zeros(16, dtype=torch.uint8)
    _Current.index = 0
    _Current.used.clear()

    def make_current(device: Any) -> None:
        _Current.index = _index(_device(device)) or 0

    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: count,
        "current_device": lambda: _Current.index,
        "set_device": make_current,
        "is_bf16_supported": lambda including_emulation=True: bf16 or including_emulation,
        "is_current_stream_capturing": lambda: False,
        "get_device_name": lambda *_: "Emulated GPU",
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: SimpleNamespace(
            name="Emulated GPU", major=9, minor=0, total_memory=TOTAL_BYTES
        ),
        "max_memory_allocated": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
        "mem_get_info": lambda *_: (TOTAL_BYTES, TOTAL_BYTES),
        "memory_reserved": lambda *_: 0,
        "get_rng_state": lambda *_: state,
        "get_rng_state_all": lambda: [state],
        **dict.fromkeys(
            (
                "empty_cache",
                "manual_seed",
                "manual_seed_all",
                "reset_peak_memory_stats",
                "set_rng_state",
                "set_rng_state_all",
                "synchronize",
            ),
            lambda *_, **__: None,
        ),
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch(f"torch.cuda.{name}", answer))
            if "rng_state" in name:
                stack.enter_context(mock.patch(f"torch.cuda.random.{name}", answer))
        for name, answer in _accelerator(answers).items():
            stack.enter_context(mock.patch(f"torch.accelerator.{name}", answer))
        for patch in (*_cpu_in_place_of_cuda(), _no_device_check_in_recomputation(), _estimates_outside_the_modes()):
            stack.enter_context(patch)
        # Without threads, transformers reads weights inside the modes below.
        stack.enter_context(mock.patch.dict("os.environ", HF_DEACTIVATE_ASYNC_LOAD="1"))
        stack.enter_context(kernels)
        stack.enter_context(_Devices(kernels))
        yield


def _accelerator(of_cuda: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The answers of `torch.accelerator`."""
    same = (
        "is_available",
        "device_count",
        "max_memory_allocated",
        "memory_allocated",
        "reset_peak_memory_stats",
        "empty_cache",
        "synchronize",
    )
    return {
        **{name: of_cuda[name] for name in same},
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "current_device_index": of_cuda["current_device"],
        "set_device_index": of_cuda["set_device"],
        "current_stream": lambda *_: SimpleNamespace(is_capturing=lambda: False),
        "get_memory_info": lambda *_: (TOTAL_BYTES, TOTAL_BYTES),
    }


def _cpu_in_place_of_cuda() -> Iterator[Any]:
    """Patches autocast, generators and safetensors files, which handle devices without a tensor."""
    begin, opened = torch.autocast.__init__, safetensors.safe_open
    enabled, lower = torch.is_autocast_enabled, torch.get_autocast_dtype

    def begin_on_cpu(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        begin(self, device_type.replace("cuda", "cpu"), *args, **kwargs)

    yield mock.patch.object(torch.autocast, "__init__", begin_on_cpu)
    yield mock.patch.object(torch, "is_autocast_enabled", lambda device="cpu": enabled(device.replace("cuda", "cpu")))
    yield mock.patch.object(torch, "get_autocast_dtype", lambda device: lower(device.replace("cuda", "cpu")))

    class OnCpu(torch.Generator):
        """A random number generator that accepts any device."""

        def __new__(cls, device: Any = "cpu") -> OnCpu:
            return super().__new__(cls, "cpu")

    yield mock.patch.object(torch, "Generator", OnCpu)

    class OnGpu:
        """An open file that loads its tensors to the GPU."""

        def __init__(self, filename: Any, framework: str = "pt", device: Any = "cpu", **kwargs: Any) -> None:
            self._file, self._gpu = opened(filename, framework, **kwargs), _index(_device(device))

        def __enter__(self) -> Any:
            self._open = self._file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._open, name)

        def get_tensor(self, name: str) -> torch.Tensor:
            return _put(self._open.get_tensor(name), self._gpu)  # type: ignore[no-any-return]

    yield mock.patch("safetensors.torch.safe_open", OnGpu)


def _no_device_check_in_recomputation() -> Any:
    """Gradient checkpointing compares devices in the autograd engine, where the function mode is inactive."""
    fewer = {"default": lambda tensor: {"shape": tensor.shape, "dtype": tensor.dtype}}
    return mock.patch.dict(checkpoint._allowed_determinism_checks_to_fns, fewer)


def _estimates_outside_the_modes() -> Any:
    """Memory estimates only count with fake tensors, none of which is on a GPU: the modes would only slow them down."""

    @functools.wraps(estimate_memory)
    def estimate(*args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            while torch._C._len_torch_function_stack():
                stack.enter_context(overrides._pop_mode_temporarily())
            stack.enter_context(_disable_current_modes())
            return estimate_memory(*args, **kwargs)

    return mock.patch.object(command_memory, "estimate_memory", estimate)
