"""Code shipped with a model is run only if the user trusts it, and there are no prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mftctl.errors import ModelError
from mftctl.masking.checkpoints.load import load_model, load_tokenizer
from mftctl.masking.checkpoints.meta_models import read_config
from mftctl.masking.checkpoints.remote_code import require_trusted_code, trusting_code, trusts_code
from mftctl.progress import Silence
from mftctl.workflows.fft import fine_tune
from mftctl.workflows.multi_process.dispatch import work_here
from tests.checkpoint_kinds import copied, with_config, with_own_code
from tests.workflow_fixtures import make_recipe, open_run


@pytest.fixture
def own(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return with_own_code(copied(tiny_checkpoint, tmp_path / "own"))


def test_trust_ends_with_its_block() -> None:
    assert not trusts_code()
    with trusting_code(True):
        assert trusts_code()
        with trusting_code(False):
            assert not trusts_code()
    assert not trusts_code()


def test_untrusted_code_is_not_loaded(own: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for load in (load_tokenizer, lambda folder: load_model(folder, dtype=torch.float32), read_config):
        with pytest.raises(ModelError, match="comes with its own code"):
            load(own if load is not read_config else str(own))
    assert capfd.readouterr() == ("", "")


def test_model_that_transformers_knows_needs_none_of_its_code(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = with_config(
        copied(tiny_checkpoint, tmp_path / "m"), auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    )
    require_trusted_code(folder)
    assert type(load_model(folder, dtype=torch.float32)).__name__ == "LlamaForCausalLM"


def test_tokenizer_with_code(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = copied(tiny_checkpoint, tmp_path / "m")
    code = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    with_config(folder, "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=code)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(folder)
    assert caught.value.actual == "tokenization_own.py"


@pytest.mark.slow
def test_trusted_model_is_fine_tuned_with_its_code(own: Path, workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, model=str(own), fft__max_steps=1, trust_remote_code=True)
    run, source = open_run(tmp_path / "runs", "fft", recipe)
    work_here(recipe, source, run, Silence(), resume=False, may_replace=False)
    assert {"configuration_own.py", "modeling_own.py"} <= {path.name for path in (run.folder / "model").iterdir()}
    with trusting_code(True):
        assert type(load_model(run.folder / "model", dtype=torch.float32)).__name__ == "OwnForCausalLM"


def test_untrusted_model_is_not_fine_tuned(own: Path, workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, model=str(own), fft__max_steps=1)
    run, source = open_run(tmp_path / "runs", "fft", recipe)
    with pytest.raises(ModelError, match="comes with its own code"):
        fine_tune(recipe, source, run, Silence())
