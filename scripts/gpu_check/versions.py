"""Reports the hardware and software versions of the check."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from scripts.gpu_check.findings import Measurement
from scripts.gpu_check.measuring import GB
from scripts.gpu_check.scale import Scale

_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "datasets",
    "lm_eval",
    "numpy",
    "bitsandbytes",
)


def versions(scale: Scale) -> Iterator[Measurement]:
    """The GPU, Python and library versions."""
    properties = torch.cuda.get_device_properties(0)
    yield Measurement("GPU", properties.name)
    yield Measurement("memory", properties.total_memory / GB, "GB")
    yield Measurement("compute capability", f"{properties.major}.{properties.minor}")
    yield Measurement("CUDA", str(torch.version.cuda))
    yield Measurement("Python", platform.python_version())
    for name in _PACKAGES:
        try:
            yield Measurement(name, version(name))
        except PackageNotFoundError:
            yield Measurement(name, "not installed")
    yield Measurement("bf16", str(torch.cuda.is_bf16_supported(including_emulation=False)))
