"""Reports the hardware and software versions of the check."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from scripts.gpu_check.findings import Figure
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


def versions(scale: Scale) -> Iterator[Figure]:
    """The GPU, Python and library versions."""
    properties = torch.cuda.get_device_properties(0)
    yield Figure("GPU", properties.name)
    yield Figure("memory", properties.total_memory / GB, "GB")
    yield Figure("compute capability", f"{properties.major}.{properties.minor}")
    yield Figure("CUDA", str(torch.version.cuda))
    yield Figure("Python", platform.python_version())
    for name in _PACKAGES:
        try:
            yield Figure(name, version(name))
        except PackageNotFoundError:
            yield Figure(name, "not installed")
    yield Figure("bf16", str(torch.cuda.is_bf16_supported(including_emulation=False)))
