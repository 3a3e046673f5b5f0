"""The documentation is true: its code runs and prints what it says, its links lead somewhere, its tables are complete.

Fences of a page run in order, in one folder and one namespace. The second word of a fence says what it is:

    python                  run
    bash                    every line that begins with `modern-llm` or `python -m modern_llm` is run
    python|bash no-run      not run; the line above says why ("Not run by the tests: …")
    bash fails              exit code 2, and the `text` fence that follows is the error
    text output             what the `python` fence before it prints
    json documents|instruction|preference    a row that the stage reads
    yaml SomeConfig         a file of that config class; under the name in its first line it is there for later commands
"""

import importlib
import importlib.util
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from helpers import save_start, tiny_model, tiny_tokenizer, write_jsonl

from modern_llm import cli, config
from modern_llm.config import PipelineConfig, StrictModel, load_config
from modern_llm.config.pipeline import PretrainStageConfig, SFTStageConfig
from modern_llm.data.instruction_adapters import read_chat
from modern_llm.data.lm_datasets import LanguageModelingDatasetConfig, prepare_documents
from modern_llm.data.messages import Chat
from modern_llm.data.preference_adapters import PairRow, read_pair
from modern_llm.data.tokenizer import TextEncoder, train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
YAML_KINDS = {
    kind.__name__: kind
    for kind in (PipelineConfig, PretrainStageConfig, SFTStageConfig, cli.PretrainArguments, cli.DPOArguments)
}
REASON = "Not run by the tests: "
COMMANDS = ("modern-llm", "python -m modern_llm")


@dataclass(frozen=True)
class Fence:
    """A fenced block of a page."""

    page: Path
    line: int
    """Number of the opening line."""
    language: str
    word: str
    text: str
    above: str
    """The paragraph above it."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}, line {self.line}"


def fences(page: Path) -> list[Fence]:
    found, lines, start = [], page.read_text(encoding="utf-8").splitlines(), None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
            continue
        language, _, word = lines[start].removeprefix("```").partition(" ")
        paragraphs = "\n".join(lines[:start]).rstrip().split("\n\n")
        found.append(Fence(page, start + 1, language, word, "\n".join(lines[start + 1 : number]), paragraphs[-1]))
        start = None
    assert start is None, f"{page}: a fence is not closed"
    return found


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


class Reader:
    """Somebody who types a page's code from top to bottom."""

    def __init__(self) -> None:
        self.namespace: dict[str, Any] = {"__name__": "__main__"}
        self.printed = ""

    def read(self, fence: Fence) -> None:
        if fence.word == "no-run":
            assert fence.above.splitlines()[-1].startswith(REASON), f"{fence}: say above why it is not run: '{REASON}…'"
        elif fence.language == "python":
            self.run_python(fence)
        elif fence.language == "bash" and fence.word == "fails":
            self.printed = self.fail(fence)
        elif fence.language == "bash":
            for line in fence.text.replace("\\\n", " ").splitlines():
                if line.startswith(COMMANDS):
                    run_line(line, str(fence))
        elif fence.language == "json":
            read_row(fence)
        elif fence.language == "yaml" and fence.word:
            path = Path(fence.text.split("\n", 1)[0].removeprefix("# ") if fence.text.startswith("# ") else "fence.yaml")
            path.write_text(fence.text)
            load_config(YAML_KINDS[fence.word], path)
        elif fence.language == "text" and (fence.word == "output" or self.printed.startswith("error: ")):
            assert fence.text.rstrip() == self.printed.rstrip(), str(fence)
            self.printed = ""

    def run_python(self, fence: Fence) -> None:
        # blank lines in front, so that a traceback names the line of the page
        code = compile("\n" * fence.line + fence.text, str(fence.page), "exec")
        out = io.StringIO()
        with redirect_stdout(out):
            exec(code, self.namespace)
        self.printed = out.getvalue()

    def fail(self, fence: Fence) -> str:
        """The error of a command that the user got wrong."""
        code, errors = run_words(shlex.split(fence.text))
        assert code == 2, str(fence)
        return errors


def run_line(line: str, where: str) -> None:
    """Run a line of a shell, of which pages use `>` alone."""
    words = shlex.split(line, comments=True)
    words, file = (words[:-2], words[-1]) if ">" in words else (words, None)
    out = io.StringIO()
    with redirect_stdout(out):
        code, errors = run_words(words)
    assert code == 0, f"{where}: {line}\n{out.getvalue()}\n{errors}"
    if file is not None:
        Path(file).write_text(out.getvalue())


def run_words(words: list[str]) -> tuple[int, str]:
    """Exit code and errors of a command. In this process: starting a new one takes seconds."""
    errors, before = io.StringIO(), sys.argv
    sys.argv = words
    try:
        with redirect_stderr(errors):
            if words[0] == "python":
                _, _, module, *rest = words
                sys.argv = [module, *rest]
                runpy.run_module(module, run_name="__main__")
            else:
                cli.main()
    except SystemExit as stopped:
        return int(stopped.code or 0), errors.getvalue()
    finally:
        sys.argv = before
    return 0, errors.getvalue()


@pytest.mark.parametrize("command", [["modern-llm"], ["python", "-m", "modern_llm"]], ids=" ".join)
def test_the_commands_of_the_pages_start(command: list[str]) -> None:
    """The installed ones; what they do with their words is run in this process."""
    program = str(Path(sys.executable).with_name(command[0]))
    done = subprocess.run([program, *command[1:], "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: modern-llm COMMAND")


def read_row(fence: Fence) -> None:
    Path("row.jsonl").write_text(fence.text)
    if fence.word == "documents":
        encoder = TextEncoder(train_tokenizer(["a"], 300))
        assert prepare_documents(LanguageModelingDatasetConfig(dataset_name="row.jsonl"), encoder, 8, seed=0).train
    elif fence.word == "instruction":
        kind = config.InstructionDatasetConfig(dataset_name="row.jsonl")
        assert isinstance(read_chat(json.loads(fence.text), kind), Chat), str(fence)
    elif fence.word == "preference":
        kind = config.PreferenceDatasetConfig(dataset_name="row.jsonl")
        assert isinstance(read_pair(json.loads(fence.text), kind), PairRow), str(fence)
    else:
        raise AssertionError(f"{fence}: say which stage reads the row")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_code_of_a_page_runs_and_prints_what_the_page_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    reader = Reader()
    for fence in fences(page):
        reader.read(fence)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "real-model.md"], ids=name_of)
def test_the_three_lines_for_a_model_of_ones_own_work(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    save_start(tiny_model(tokenizer), tokenizer, Path("my-model"))
    write_jsonl(Path("my-rows.jsonl"), [{"prompt": f"Say {n}.", "response": f"It is {n}."} for n in range(40)])
    (lines,) = (fence.text for fence in fences(page) if 'run_sft("my-model"' in fence.text)
    assert len([line for line in lines.splitlines() if line]) == 3
    exec(compile(lines, str(page), "exec"), {})
    assert Path("experiments/runs/sft/sft_final").is_dir()


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_every_config_file_is_valid_and_described(path):
    load_config(PipelineConfig, path)
    assert path.name in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    missing = [target for target in targets if target and "://" not in target and not (page.parent / target).exists()]
    assert not missing


def test_the_tests_that_the_security_page_names_exist():
    named = re.findall(r"`(tests/[a-z_/]+\.py)::(test_\w+)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8"))
    assert len(named) > 10
    assert [test for file, test in named if f"\ndef {test}(" not in (ROOT / file).read_text(encoding="utf-8")] == []


SITE_ONLY = re.compile(r"^ *(:::|!!!|\?\?\?|===|--8<--|\{%)|\]\{")
"""Syntax of mkdocs and its extensions, which other readers of Markdown show as it stands."""


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_reads_whole_without_the_site(page):
    text = page.read_text(encoding="utf-8")
    plain = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    assert [line for line in plain.splitlines() if SITE_ONLY.search(line)] == []
    # what is made from the code stands in the page itself, and is up to date
    assert documentation_hooks().with_tables(text) == text, "run: python docs/hooks.py"


def test_the_site_documents_every_entry_of_the_api_page():
    source = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    entries = re.findall(r"^- \[`(\S+)`\]", source, re.MULTILINE)
    assert len(entries) > 50
    page = documentation_hooks().on_page_markdown(source)
    assert re.findall(r"^::: (\S+)$", page, re.MULTILINE) == entries


def test_the_site_shows_the_config_files_of_the_recipes():
    page = documentation_hooks().on_page_markdown((ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"))
    missing = [path.name for path in CONFIGS if path.read_text(encoding="utf-8") not in page]
    assert missing == []


def test_the_papers_settings_are_the_papers():
    """arXiv 2305.18290, appendix B."""
    for name, beta in (("hh", 0.1), ("tldr", 0.5)):
        stage = load_config(PipelineConfig, ROOT / "configs" / f"dpo-paper-{name}.yaml").dpo
        assert stage is not None
        train = stage.train
        assert (stage.dpo.beta, stage.dpo.loss_type, train.optimizer, train.learning_rate) == (beta, "sigmoid", "rmsprop", 1e-6)
        assert (train.batch_size, train.warmup_steps, train.lr_schedule) == (64, 150, "constant")


def test_every_page_is_in_the_navigation():
    class Loader(yaml.SafeLoader):
        """mkdocs' own tags are of no interest here."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    navigation = str(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=Loader)["nav"])
    assert [page.name for page in PAGES[1:] if page.name not in navigation] == []


def test_the_file_tree_of_the_readme_is_that_of_the_package():
    tree = next(fence.text for fence in fences(ROOT / "README.md") if fence.text.startswith("modern_llm/\n"))
    listed = [("modern_llm/" if line.startswith("  ") else "") + line.split()[0] for line in tree.splitlines()]
    assert [path for path in listed if not (ROOT / path).exists()] == []
    files = (path.relative_to(ROOT) for path in (ROOT / "modern_llm").rglob("*.py"))
    expected = {str(path) for path in files if path.name != "__init__.py" or len(path.parts) == 2}
    assert expected - set(listed) == set()


def documentation_hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("documentation_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config_classes(kind: type[StrictModel] = StrictModel) -> list[type[StrictModel]]:
    """Every config class that no other one refines."""
    # "Settings" are what the command line makes of a config while it parses
    below = [inner for sub in kind.__subclasses__() if sub.__name__ != "Settings" for inner in config_classes(sub)]
    return below or [kind]


def test_every_field_of_every_config_is_on_the_configuration_page():
    source = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    page = documentation_hooks().on_page_markdown(source)
    sections = {section.split("\n", 1)[0]: section for section in page.split("\n## ")}
    classes = [kind for kind in config_classes() if kind.__module__.startswith("modern_llm.")]
    assert {"TrainingConfig", "ModelConfig", "DPOConfig", "PipelineConfig"} <= {kind.__name__ for kind in classes}
    missing = [
        f"{kind.__name__}.{name}"
        for kind in classes
        for name, field in kind.model_fields.items()
        if f"\n| `{field.alias or name}` |" not in sections.get(kind.__name__, "")
    ]
    assert missing == []


def test_every_field_of_every_config_says_what_it_means():
    silent = [
        f"{kind.__name__}.{name}"
        for kind in documentation_hooks().config_classes()
        for name, field in kind.model_fields.items()
        if not field.description
    ]
    assert silent == []
