from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mftctl.errors import ModelError
from mftctl.masking.checkpoints.tokenizer_match import require_same_tokenizer


@pytest.fixture
def pair(tiny_checkpoint: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints with the same tokenizer, of which only the tokenizer's files matter."""
    files = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    for name in ("first", "other"):
        (tmp_path / name).mkdir()
        for file in files:
            shutil.copyfile(tiny_checkpoint / file, tmp_path / name / file)
    return tmp_path / "first", tmp_path / "other"


def refused(pair: tuple[Path, Path], message: str) -> ModelError:
    with pytest.raises(ModelError, match=message) as caught:
        require_same_tokenizer(*pair)
    with pytest.raises(ModelError, match=message):
        require_same_tokenizer(*reversed(pair))
    return caught.value


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_same_files_pass(pair: tuple[Path, Path]) -> None:
    require_same_tokenizer(*pair)


def test_settings_of_the_last_call_and_the_form_of_the_file_do_not_matter(pair: tuple[Path, Path]) -> None:
    change_json(pair[1] / "tokenizer.json", padding={"strategy": "BatchLongest"}, truncation={"max_length": 9})
    change_json(pair[1] / "tokenizer_config.json", model_max_length=7)
    require_same_tokenizer(*pair)


def test_files_of_slow_tokenizers_beside_a_fast_one_do_not_matter(pair: tuple[Path, Path]) -> None:
    (pair[1] / "vocab.json").write_text("{}")
    require_same_tokenizer(*pair)


def test_another_vocabulary_is_refused_with_its_file(pair: tuple[Path, Path]) -> None:
    document = json.loads((pair[1] / "tokenizer.json").read_text())
    document["model"]["vocab"]["more"] = 999
    (pair[1] / "tokenizer.json").write_text(json.dumps(document))
    error = refused(pair, "different tokenizers")
    assert (error.key, error.path) == ("tokenizer.json", str(pair[1] / "tokenizer.json"))
    assert str(error.expected).endswith(f", as in {pair[0]}")


def test_a_slow_vocabulary_that_differs_is_refused(tmp_path: Path) -> None:
    for name in ("first", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "merges.txt").write_text("a b")
        (tmp_path / name / "vocab.json").write_text(json.dumps({name: 0}))
    assert refused((tmp_path / "first", tmp_path / "other"), "different tokenizers").key == "vocab.json"


def test_a_missing_tokenizer_is_refused(pair: tuple[Path, Path]) -> None:
    (pair[1] / "tokenizer.json").unlink()
    assert refused(pair, "different tokenizers").actual == "no such file"


def test_another_chat_template_is_refused_with_its_file(pair: tuple[Path, Path]) -> None:
    (pair[1] / "chat_template.jinja").write_text("{{ messages }}")
    assert refused(pair, "different chat templates").key == "chat_template.jinja"


def test_a_chat_template_of_one_of_them_is_refused(pair: tuple[Path, Path]) -> None:
    (pair[1] / "chat_template.jinja").unlink()
    assert refused(pair, "different chat templates").key == "chat_template.jinja"


def test_another_named_template_is_refused_with_its_file(pair: tuple[Path, Path]) -> None:
    (pair[1] / "additional_chat_templates").mkdir()
    (pair[1] / "additional_chat_templates" / "tools.jinja").write_text("x")
    assert refused(pair, "different chat templates").key == "additional_chat_templates/tools.jinja"


@pytest.mark.parametrize("form", ["text", "list"])
def test_a_template_in_the_configuration_is_the_same_as_one_in_a_file(form: str, pair: tuple[Path, Path]) -> None:
    text = (pair[1] / "chat_template.jinja").read_text()
    stored = text if form == "text" else [{"name": "default", "template": text}]
    (pair[1] / "chat_template.jinja").unlink()
    change_json(pair[1] / "tokenizer_config.json", chat_template=stored)
    require_same_tokenizer(*pair)
    change_json(pair[1] / "tokenizer_config.json", chat_template="other")
    assert refused(pair, "different chat templates").key in ("tokenizer_config.json", "chat_template.jinja")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_is_not_json_is_refused(name: str, pair: tuple[Path, Path]) -> None:
    (pair[1] / name).write_text("{")
    assert refused(pair, "cannot be read").path == str(pair[1] / name)
