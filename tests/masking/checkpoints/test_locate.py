from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mftctl.data.quickstart import built_in
from mftctl.errors import ModelError
from mftctl.masking.checkpoints import locate
from mftctl.masking.checkpoints.locate import resolve_checkpoint


def test_local_folder_is_itself(tiny_checkpoint: Path) -> None:
    assert resolve_checkpoint(str(tiny_checkpoint)) == tiny_checkpoint


def test_quickstart_is_the_built_in_model(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(built_in, "model_path", lambda: tiny_checkpoint)
    assert resolve_checkpoint("quickstart") == tiny_checkpoint


def test_hub_model_is_downloaded_without_pickles(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(repo_id: str, **options: object) -> str:
        calls.append((repo_id, options))
        return str(tiny_checkpoint)

    monkeypatch.setattr(locate, "snapshot_download", download)
    assert resolve_checkpoint("org/model", "v1") == tiny_checkpoint
    [(repo_id, options)] = calls
    assert (repo_id, options["revision"]) == ("org/model", "v1")
    assert "*.safetensors" in options["allow_patterns"]
    assert not any(".bin" in pattern for pattern in options["allow_patterns"])


@pytest.mark.parametrize("model", ["mftctl-test/no-such-model", "./no/such/folder", "a b"])
def test_unknown_name_is_refused(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="no such model") as caught:
        resolve_checkpoint(model)
    assert caught.value.key == model
    assert caught.value.hint


def test_unknown_revision_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="no such model") as caught:
        resolve_checkpoint("mftctl-test/no-such-model", "v2")
    assert caught.value.key == "mftctl-test/no-such-model@v2"


def test_file_instead_of_a_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.touch()
    with pytest.raises(ModelError, match="this is a file"):
        resolve_checkpoint(str(path))


def test_folder_without_a_configuration_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "base")
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_checkpoint(str(folder))


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no safetensors weights"):
        resolve_checkpoint(str(tmp_path))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth"])
def test_pickle_checkpoint_is_refused_with_the_way_to_convert(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).touch()
    with pytest.raises(ModelError, match="is a pickle") as caught:
        resolve_checkpoint(str(tmp_path))
    assert caught.value.path == str(tmp_path / name)
    assert f'AutoModelForCausalLM.from_pretrained("{tmp_path}").save_pretrained("NEW")' in str(caught.value.hint)
