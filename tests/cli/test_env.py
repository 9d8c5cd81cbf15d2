"""`mftctl env`."""

from __future__ import annotations

import importlib.metadata
import json

import pytest

from tests.cli.running import CommandLine


@pytest.mark.parametrize("installed", [True, False])
def test_deepspeed_is_listed(mftctl: CommandLine, monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name != "deepspeed":
            return real(name)
        if installed:
            return "0.19.8"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    told = "0.19.8" if installed else "not installed, needed for ZeRO: pip install 'mftctl[deepspeed]'"
    assert json.loads(mftctl("env", "--json").stdout)["deepspeed"] == told
