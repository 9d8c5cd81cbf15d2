"""`--device` on the command line: reported before any output is created, and not inherited by later commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mftctl.cli.output import Output
from mftctl.cli.session import Session
from mftctl.errors import ConfigError
from mftctl.experiments.model_source import ModelSource
from tests.cli.running import CommandLine
from tests.gpu_emulation.emulated_gpu import emulated_gpu
from tests.workflow_fixtures import make_recipe, open_run


@pytest.mark.parametrize("command", ["fft", "probe", "mask-train", "eval"])
def test_a_device_that_is_not_there_leaves_no_run(mftctl: CommandLine, workspace: Path, command: str) -> None:
    data = str(workspace / "test.jsonl")
    model = [str(workspace / "tiny")] if command == "eval" else ["-m", str(workspace / "tiny")]
    with emulated_gpu(count=2):
        outcome = mftctl(command, *model, "-d", data, "--device", "cuda:7")
    assert outcome.code == 2
    assert "expected: auto, cpu, cuda, cuda:0, cuda:1" in " ".join(outcome.stderr.split())
    assert not (mftctl.folder / "runs").exists()


def test_env_names_the_gpus(mftctl: CommandLine) -> None:
    with emulated_gpu(count=2):
        assert json.loads(mftctl("env", "--json").stdout)["gpus"] == "Emulated GPU, Emulated GPU"
    assert json.loads(mftctl("env", "--json").stdout)["gpus"] == "none"


def test_eval_does_not_inherit_the_device_of_the_training(tmp_path: Path) -> None:
    source = ModelSource("quickstart", config={"device": "cuda:3", "attention": "flash_attention_2", "seed": 5})
    with Output() as console:
        settled = Session("eval", console, tmp_path).settle(source)
        asked = Session("eval", console, tmp_path, options={"device": "cpu", "attention": "eager"}).settle(source)
    assert (settled.device, settled.attention, settled.seed) == ("auto", "auto", 5)
    assert (asked.device, asked.attention) == ("cpu", "eager")


def test_a_run_is_resumed_on_another_device(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, device="cuda:1", attention="eager")
    run, _ = open_run(tmp_path, "fft", recipe)
    run.update(status="interrupted")
    with Output() as console:
        with pytest.raises(ConfigError, match="not available"):
            Session("fft", console, tmp_path).open_training(resume=True)
        _, resumed, _ = Session("fft", console, tmp_path, options={"device": "cpu"}).open_training(resume=True)
        with pytest.raises(ConfigError, match="except for the device"):
            Session("fft", console, tmp_path, options={"seed": 3}).open_training(resume=True)
        machine = {"device": "cpu", "attention": "sdpa", "check_memory": False}
        _, elsewhere, _ = Session("fft", console, tmp_path, options=machine).open_training(resume=True)
    assert (resumed.device, resumed.attention) == ("cpu", "eager")
    assert (elsewhere.attention, elsewhere.check_memory) == ("sdpa", False)
