"""Every mftctl command of the README runs, on small inputs and with few steps; its recipe and its Python run too."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from mftctl import __version__
from mftctl.experiments.recipe_files import load_recipe
from mftctl.experiments.run_folder import list_runs
from mftctl.reporting.reproduction import reproduction
from tests.cli.running import CommandLine
from tests.conftest import build_llama, build_tokenizer
from tests.workflow_fixtures import write_additions

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FEW_STEPS = ("--set", "fft.max_steps=2", "--set", "mask_train.max_steps=2")
FEW_RECORDS = ("--set", "val_data=quickstart/validation=8", "--set", "eval.limit=4")
SHORTER = {
    "fft": ("--max-steps", 2),
    "probe": ("--set", "mask_train.max_steps=2"),
    "mask-train": ("--max-steps", 2),
    "eval": ("--limit", 2),
    "run": (*FEW_STEPS, *FEW_RECORDS),
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(block: str) -> list[list[str]]:
    return [re.sub(r"\s+#.*", "", line).split() for line in re.findall(r"mftctl ([a-z].*)", block)]


CONSOLE = [block for block in blocks("console") if "mftctl " in block]


def test_every_block_is_known() -> None:
    assert len(CONSOLE) == 7, "a new block of commands needs a test here"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


def run_all(here: CommandLine, block: str, *first: str) -> None:
    """Runs a block's commands; `first` are options for the first one, whose settings the others go on with."""
    for number, command in enumerate(commands(block)):
        outcome = here(*command, *SHORTER.get(command[0], ()), *(first if number == 0 else ()))
        assert outcome.code == 0, f"{command}: {outcome.stderr}"


def write_benchmarks(folder: Path) -> None:
    """Two problems each of MATH and HumanEval, and outputs for the latter."""
    maths = [{"problem": f"{n}+1?", "solution": rf"\\boxed{{{n + 1}}}"} for n in range(2)]
    functions = [
        {
            "task_id": f"T/{n}",
            "prompt": f"def add_{n}(x):\n",
            "entry_point": f"add_{n}",
            "test": f"def check(f):\n    assert f(1) == {1 + n}\n",
            "canonical_solution": f"    return x + {n}\n",
        }
        for n in range(2)
    ]
    outputs = [{"task_id": record["task_id"], "output": record["canonical_solution"]} for record in functions]
    for name, records in (("math-test", maths), ("humaneval", functions), ("outputs", outputs)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))


def test_the_run_command(here: CommandLine) -> None:
    run_all(here, CONSOLE[0])
    report = (here.folder / "report" / "report.md").read_text()
    assert all(state in report for state in ("pre-trained", "FFT", "continued FFT", "random mask", "MFT"))


def test_the_bare_commands_in_an_empty_folder(here: CommandLine) -> None:
    run_all(here, CONSOLE[1], *FEW_RECORDS)
    assert (here.folder / "mask.bits").is_file()


def test_the_commands_on_ones_own_model(here: CommandLine) -> None:
    build_llama(max_position_embeddings=8192).save_pretrained(here.folder / "my-model")
    build_tokenizer().save_pretrained(here.folder / "my-model")
    for name in ("train", "test", "gsm8k-test"):
        write_additions(here.folder / f"{name}.jsonl", 60, seed=len(name))
    run_all(here, CONSOLE[2])
    assert (here.folder / "better" / "model.safetensors").is_file()
    write_benchmarks(here.folder)
    run_all(here, CONSOLE[3])
    run_all(here, CONSOLE[5])
    assert (here.folder / "dropped" / "model.safetensors").is_file()
    assert (here.folder / "imported.bits").is_file()


def test_the_commands_of_the_report(here: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mftctl.cli.watch_view.time.sleep", interrupt)  # --watch goes on until Ctrl-C
    assert here("fft", "--max-steps", 2, *FEW_RECORDS).code == 0
    assert here("fft", "-m", "runs/001-fft/model", "--max-steps", 2).code == 0
    assert here("mask-train", "-m", "runs/001-fft/model", "--max-steps", 2).code == 0
    assert here("eval", "runs/001-fft/model", "--limit", 4).code == 0
    run_all(here, CONSOLE[4])
    figures = {path.name for path in (here.folder / "report" / "figures").iterdir()}
    assert any(name.startswith("loss-surface") for name in figures)
    [surface] = [run for run in list_runs(Path("runs"))[0] if run.record.command == "surface"]
    measured = (surface.folder / "metrics.jsonl").read_text()
    shutil.rmtree(surface.folder)
    program, *arguments = shlex.split(reproduction(surface))
    assert program == "mftctl"
    assert here(*arguments).code == 0
    assert (surface.folder / "metrics.jsonl").read_text() == measured


def test_the_commands_that_only_look(here: CommandLine) -> None:
    run_all(here, CONSOLE[6])
    assert not (here.folder / "runs").exists()


def test_the_recipe_is_one(tmp_path: Path) -> None:
    (block,) = blocks("yaml")
    (tmp_path / "recipe.yaml").write_text(block)
    recipe = load_recipe(str(tmp_path / "recipe.yaml"))
    assert set(recipe.stages) == {"fft", "mft", "results"}
    assert recipe.fft.learning_rate == 2e-5


def test_the_python_runs(here: CommandLine, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    shutil.copytree(workspace / "tiny", here.folder / "tiny")
    # The README masks layer 4, which the tiny model has as its fourth: the same name is asked of a mask of layer 3.
    masked = here("mask-train", "-m", "tiny", "-d", workspace / "train.jsonl", "--method", "random", "--layers", "all")
    assert masked.code == 0, masked.stderr
    (block,) = blocks("python")
    model = AutoModelForCausalLM.from_pretrained(here.folder / "tiny")
    monkeypatch.chdir(here.folder)
    names = {"model": model}
    exec(block.replace("layers.4.", "layers.3."), names)
    assert (model.get_parameter("model.layers.3.mlp.up_proj.weight")[~names["keep"]] == 0).all()
    assert (here.folder / "copy.bits").is_file()


def test_ci_runs_the_test_command() -> None:
    (line,) = re.findall(r"<!-- test command -->\n```console\n(.*?)\n```", README)
    assert line.endswith("scripts/check")
    assert "<!-- test command -->" in (ROOT / ".ci" / "run").read_text()
    check = (ROOT / "scripts" / "check").read_text().split()
    assert {"ruff", "mypy", "pytest"} <= set(check)


def test_changelog_begins_with_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## \[(.+?)\]", changelog, re.MULTILINE)[0] == __version__
    assert f"version: {__version__}" in (ROOT / "CITATION.cff").read_text()
