"""Types of the options for precision and attention; imports no torch."""

from __future__ import annotations

from typing import Literal

Precision = Literal["auto", "fp32", "bf16"]
Attention = Literal["auto", "sdpa", "flash_attention_2", "eager"]
