"""docs/reference/memory-table.md matches the planning code; one model is checked as a sample."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "memory_table.py"
ROWS = ("eval", "probe", "fft --method lora")
"""Of the smallest model; the script makes the others the same way."""


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("memory_table", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_table_is_up_to_date() -> None:
    script = _script()
    written = script.PATH.read_text(encoding="utf-8")
    assert written.startswith(script.HEAD)
    config = script.models()["1B"]
    for label in ROWS:
        assert script._line(["1B", f"`{label}`", *script.row(config, label, {})]) in written.splitlines()


def test_every_model_and_command_is_in_the_table() -> None:
    script = _script()
    written = script.PATH.read_text(encoding="utf-8")
    for name in script.models():
        for label in script.COMMANDS:
            assert f"| {name} | `{label}` |" in written
