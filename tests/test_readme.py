"""Runs the commands of the README and the guides on small inputs with few steps, and their recipes and Python code."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from mftctl import __version__
from mftctl.data.formats import to_example
from mftctl.experiments.recipe_files import load_recipe
from mftctl.experiments.run_folder import list_runs
from mftctl.reporting.reproduction import reproduction
from tests.cli.running import CommandLine
from tests.conftest import build_llama, build_tokenizer
from tests.masking.built_checkpoints import write_tuned
from tests.preference_records import write_preferences
from tests.vision_models import made_image, save_vision_model, write_image_records
from tests.workflow_fixtures import write_additions

ROOT = Path(__file__).parent.parent
FEW_STEPS = ("--set", "fft.max_steps=2", "--set", "mask_train.max_steps=2")
FEW_RECORDS = ("--set", "data=quickstart=64", "--set", "val_data=quickstart/validation=8", "--set", "eval.limit=4")
SHORTER = {
    "fft": ("--max-steps", 2),
    "probe": ("--set", "mask_train.max_steps=2"),
    "mask-train": ("--max-steps", 2),
    "eval": ("--limit", 2),
    "run": (*FEW_STEPS, *FEW_RECORDS),
}
RUN = {
    "README.md": ("Install and try it", "On your own model"),
    "docs/quickstart.md": ("Step by step", "As one experiment"),
    "docs/guides/own-model.md": (
        "1. Fine-tune",
        "2. Choose",
        "3. Learn",
        "4. Apply",
        "5. Measure",
        "Look at answers",
        "On your own model",
    ),
    "docs/guides/averaging.md": ("Average checkpoints", "Interpolate"),
    "docs/guides/benchmarks.md": ("Benchmarks", "During training"),
    "docs/guides/delta.md": ("A fine-tune as", "Smaller", "Merge", "PEFT"),
    "docs/guides/methods.md": ("Fine-tuning", "Adapters", "Masks", "Forgetting", "Inspect"),
    "docs/guides/preferences.md": ("Preferences",),
    "docs/guides/recipes.md": ("Check before you train",),
    "docs/guides/report.md": ("Report",),
    "docs/guides/vision-language.md": ("Vision-language models",),
}
"""Where the blocks are whose commands run here, by the beginning of their headings."""
PARSED = {
    "docs/guides/averaging.md": ("Average checkpoints", "Interpolate"),
    "docs/guides/data.md": ("Data and chat templates", "Look at the data", "Prepared once"),
    "docs/guides/memory.md": ("Memory",),
    "docs/guides/methods.md": ("Choosing layers", "Schedules", "The best step"),
    "docs/guides/multi-gpu.md": ("Several GPUs",),
    "docs/guides/recipes.md": ("Recipes", "Controls"),
    "docs/guides/serving.md": ("Serving", "vLLM", "llama.cpp"),
    "docs/guides/tracking.md": ("Experiment trackers",),
    "docs/reference/differences.md": ("Differences",),
}
"""Blocks whose commands `test_docs.py` parses alone: they want a GPU, a hub or a server, or run elsewhere already."""


def blocks(page: str, language: str) -> list[tuple[str, str]]:
    """The code blocks of a page in one language, each with the heading above it."""
    text = (ROOT / page).read_text(encoding="utf-8")
    heading, blocks = "", []
    for title, written_in, block in re.findall(r"^#+ ([^\n]+)$|^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if title:
            heading = title
        elif written_in == language:
            blocks.append((heading, block))
    return blocks


def block(page: str, heading: str, language: str = "console") -> str:
    """The only code block under a heading with this prefix; for shell blocks, the only one with mftctl commands."""
    (found,) = [
        text
        for title, text in blocks(page, language)
        if title.startswith(heading) and (language != "console" or "mftctl " in text)
    ]
    return found


def commands(block: str) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in re.findall(r"mftctl ([a-z].*)", block)]


def test_every_block_is_known() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    for page in (path.relative_to(ROOT).as_posix() for path in pages):
        known = (*RUN.get(page, ()), *PARSED.get(page, ()))
        titles = [title for title, text in blocks(page, "console") if commands(text)]
        assert [title for title in titles if not title.startswith(known)] == [], f"{page}: run it here"
        assert [start for start in known if not any(title.startswith(start) for title in titles)] == [], page


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


def run_all(here: CommandLine, block: str, *first: str) -> None:
    """Runs the commands of a block; `first` holds options for the first command, whose settings later ones inherit."""
    for number, command in enumerate(commands(block)):
        outcome = here(*command, *SHORTER.get(command[0], ()), *(first if number == 0 else ()))
        assert outcome.code == 0, f"{command}: {outcome.stderr}"


def write_benchmarks(folder: Path) -> None:
    """Writes two problems each of MATH and HumanEval, and outputs for HumanEval."""
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


@pytest.mark.slow
def test_the_run_command(here: CommandLine) -> None:
    assert commands(block("README.md", "Install")) == commands(block("docs/quickstart.md", "As one experiment"))
    run_all(here, block("README.md", "Install"))
    report = (here.folder / "report" / "report.md").read_text()
    assert all(state in report for state in ("pre-trained", "FFT", "continued FFT", "random mask", "MFT"))


@pytest.mark.slow
def test_the_bare_commands_in_an_empty_folder(here: CommandLine) -> None:
    run_all(here, block("docs/quickstart.md", "Step by step"), *FEW_RECORDS)
    assert (here.folder / "mask.bits").is_file()


@pytest.fixture
def own(here: CommandLine) -> CommandLine:
    """A folder with a user-supplied model and data."""
    build_llama(max_position_embeddings=8192).save_pretrained(here.folder / "my-model")
    build_tokenizer().save_pretrained(here.folder / "my-model")
    for name in ("train", "test", "gsm8k-test", "general"):
        write_additions(here.folder / f"{name}.jsonl", 60, seed=len(name))
    return here


@pytest.mark.slow
def test_the_six_commands_on_ones_own_model(own: CommandLine) -> None:
    run_all(own, block("README.md", "On your own model"))
    assert (own.folder / "better" / "model.safetensors").is_file()
    assert (own.folder / "report" / "index.html").is_file()


@pytest.mark.slow
def test_the_guides_on_ones_own_model(own: CommandLine) -> None:
    for heading in RUN["docs/guides/own-model.md"]:
        run_all(own, block("docs/guides/own-model.md", heading))
    assert (own.folder / "better" / "model.safetensors").is_file()
    write_benchmarks(own.folder)
    for heading in RUN["docs/guides/benchmarks.md"]:
        run_all(own, block("docs/guides/benchmarks.md", heading))
    for heading in RUN["docs/guides/methods.md"]:
        run_all(own, block("docs/guides/methods.md", heading))
    assert (own.folder / "dropped" / "model.safetensors").is_file()
    assert (own.folder / "imported.bits").is_file()


@pytest.mark.slow
def test_vision_language_models(here: CommandLine) -> None:
    save_vision_model("qwen2_vl", here.folder / "my-vlm")
    for name in ("train.jsonl", "test.jsonl"):
        write_image_records(here.folder, [1, 0, 2, 1] * 6, name)
    made_image(0).save(here.folder / "photo.png")
    run_all(here, block("docs/guides/vision-language.md", "Vision-language models"))
    assert (here.folder / "better" / "preprocessor_config.json").is_file()
    assert (here.folder / "all.bits").is_file()
    records = [
        to_example(json.loads(line), "the guide")
        for line in block("docs/guides/vision-language.md", "Data", "json").splitlines()
    ]
    assert [len(record.images) for record in records] == [1, 2, 1, 0]
    assert [record.messages[0].image_places for record in records] == [(0,), (8, 13), (0,), ()]


@pytest.mark.slow
def test_preferences(own: CommandLine) -> None:
    shutil.move(own.folder / "my-model", own.folder / "tuned")
    write_preferences(own.folder / "pairs.jsonl", 60)
    run_all(own, block("docs/guides/preferences.md", "Preferences"))
    assert all((own.folder / name / "model.safetensors").is_file() for name in ("preferred", "gmt", "lora"))
    assert (own.folder / "preferred.bits").is_file()
    for record in block("docs/guides/preferences.md", "Data", "json").splitlines():
        assert to_example(json.loads(record), "the guide").rejected


@pytest.mark.slow
def test_averages_and_interpolation(own: CommandLine) -> None:
    assert own("fft", "-m", "my-model", "-d", "train.jsonl", "-o", "first", "--max-steps", 2).code == 0
    for seed, name in enumerate(("second", "third")):
        write_tuned(own.folder / "first", own.folder / name, seed=seed)
    for heading in RUN["docs/guides/averaging.md"]:
        run_all(own, block("docs/guides/averaging.md", heading))
    assert all((own.folder / name / "model.safetensors").is_file() for name in ("averaged", "weighted", "between"))
    (own.folder / "recipe.yaml").write_text(block("docs/guides/averaging.md", "Interpolate", "yaml"))
    assert load_recipe(str(own.folder / "recipe.yaml")).stages["between"].command == "interpolate"


@pytest.mark.slow
def test_small_files(own: CommandLine) -> None:
    write_tuned(own.folder / "my-model", own.folder / "tuned")
    assert own("mask-train", "-m", "tuned", "--base", "my-model", "--method", "drop", "-o", "delta.bits").code == 0
    for seed, name in ((1, "first"), (2, "second")):
        write_tuned(own.folder / "my-model", own.folder / name, seed=seed)
        assert own("delta", "my-model", name, "-o", f"{name}.delta").code == 0
    for heading in RUN["docs/guides/delta.md"]:
        run_all(own, block("docs/guides/delta.md", heading))
    again, tuned = ((own.folder / name / "model.safetensors").read_bytes() for name in ("again", "tuned"))
    assert again[-1000:] == tuned[-1000:]
    assert (own.folder / "merged" / "model.safetensors").is_file()
    (own.folder / "recipe.yaml").write_text(block("docs/guides/delta.md", "Smaller", "yaml"))
    assert load_recipe(str(own.folder / "recipe.yaml")).stages["small"].command == "delta"


@pytest.mark.slow
def test_the_commands_of_the_report(here: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mftctl.cli.watch_view.time.sleep", interrupt)  # --watch runs until Ctrl-C
    assert here("fft", "--max-steps", 2, *FEW_RECORDS).code == 0
    assert here("fft", "-m", "runs/001-fft/model", "--max-steps", 2).code == 0
    assert here("mask-train", "-m", "runs/001-fft/model", "--max-steps", 2).code == 0
    assert here("eval", "runs/001-fft/model", "--limit", 4).code == 0
    run_all(here, block("docs/guides/report.md", "Report"))
    figures = {path.name for path in (here.folder / "report" / "figures").iterdir()}
    assert any(name.startswith("loss-surface") for name in figures)
    [surface] = [run for run in list_runs(Path("runs"))[0] if run.record.command == "surface"]
    measured = (surface.folder / "metrics.jsonl").read_text()
    shutil.rmtree(surface.folder)
    program, *arguments = shlex.split(reproduction(surface))
    assert program == "mftctl"
    assert here(*arguments).code == 0
    assert (surface.folder / "metrics.jsonl").read_text() == measured


@pytest.mark.slow
def test_the_commands_that_only_look(here: CommandLine) -> None:
    run_all(here, block("docs/guides/recipes.md", "Check before you train"))
    assert not (here.folder / "runs").exists()


def test_the_recipe_is_one(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(block("docs/guides/recipes.md", "Recipes", "yaml"))
    recipe = load_recipe(str(tmp_path / "recipe.yaml"))
    assert set(recipe.stages) == {"fft", "mft", "results"}
    assert recipe.fft.learning_rate == 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/reference/python.md"])
def test_the_python_runs(here: CommandLine, workspace: Path, monkeypatch: pytest.MonkeyPatch, page: str) -> None:
    from transformers import AutoModelForCausalLM

    for name in ("tiny", "tuned"):
        shutil.copytree(workspace / "tiny", here.folder / name, dirs_exist_ok=True)
    # The pages mask layer 4; the tiny model's fourth layer is layer 3, so a mask of layer 3 gets the same name.
    masked = here("mask-train", "-m", "tiny", "-d", workspace / "train.jsonl", "--method", "random", "--layers", "all")
    assert masked.code == 0, masked.stderr
    model = AutoModelForCausalLM.from_pretrained(here.folder / "tiny")
    monkeypatch.chdir(here.folder)
    names = {"model": model, "print": lambda *values: None}
    for _, python in blocks(page, "python"):
        exec(python.replace("layers.4.", "layers.3."), names)
    assert (names["model"].get_parameter("model.layers.3.mlp.up_proj.weight")[~names["keep"]] == 0).all()
    assert (here.folder / "copy.bits").is_file()


def test_ci_runs_the_test_command() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"<!-- test command -->\n```console\n(.*?)\n```", readme)
    assert line == "scripts/test"
    assert "<!-- test command -->" in (ROOT / ".ci" / "run").read_text()
    assert (ROOT / "scripts" / "test").read_text().rstrip().endswith("scripts/check")
    check = (ROOT / "scripts" / "check").read_text().split()
    assert {"ruff", "mypy", "mkdocs", "pytest"} <= set(check)


def test_the_workflow_runs_what_ci_runs() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    supported = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert job["strategy"]["matrix"]["python-version"] == supported
    assert job["steps"][-1] == {"run": ".ci/run"}


def test_issue_forms_ask_for_the_environment() -> None:
    forms = [path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert len(forms) == 3
    for form in forms:
        fields = {field.get("id"): field for field in yaml.safe_load(form.read_text(encoding="utf-8"))["body"]}
        assert "mftctl env" in fields["env"]["attributes"]["description"]
        assert fields["env"]["validations"]["required"] is True


def test_changelog_begins_with_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## \[(.+?)\]", changelog, re.MULTILINE)[0] == __version__
    assert f"version: {__version__}" in (ROOT / "CITATION.cff").read_text()
