"""What a stage's result is made from, and its key: the same key is the same result, and nothing else is reused.

A name or a place never counts, only content: data and checkpoints may move, and runs may be renamed.
"""

import ast
import functools
import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from modern_llm.config import DPOConfig, TrainingConfig
from modern_llm.config.base import StrictModel
from modern_llm.config.data import DatasetConfig, LanguageModelingDatasetConfig
from modern_llm.config.io import plain
from modern_llm.config.resolve import filled_settings
from modern_llm.config.training import Stage, no_effect
from modern_llm.data.known_templates import template_text
from modern_llm.data.sources import Kind, open_source
from modern_llm.data.tokenizer import load_tokenizer, template_fingerprint
from modern_llm.initial.checkpoint import identity
from modern_llm.secrets import record_without_secrets

KINDS: dict[Stage, Kind] = {"pretrain": "text", "sft": "instructions", "dpo": "preferences"}
MODULES: dict[Stage, str] = {"pretrain": "training.train_lm", "sft": "training.train_sft", "dpo": "training.train_dpo"}
BY_CONTENT = ("dataset_name", "eval_dataset", "tokenizer_name", "reference_checkpoint")
"""Fields that name something whose content is compared."""
PACKAGE = Path(__file__).parents[1]


def stage_inputs(
    stage: Stage,
    train: TrainingConfig,
    sections: dict[str, StrictModel],
    start: Path | str | None = None,
    tokenizer_name: str | None = None,
) -> dict[str, Any]:
    """Everything that decides a stage's result, as JSON; made without loading a model or tokenizing a row.

    Args:
        stage: which stage.
        train: not resolved.
        sections: the stage's other configs by name: `data`, and `model` or `dpo`.
        start: the starting checkpoint.
        tokenizer_name: the tokenizer of pretraining. None: it is trained, or the start's.

    Raises:
        UserError: something that is named is not there.
    """
    settings = plain(train.model_copy(update=filled_settings(train, stage)))
    configs = {"train": {name: value for name, value in settings.items() if name not in (*no_effect(settings), *BY_CONTENT)}}
    configs |= {name: deciding(section) for name, section in sections.items()}
    data, dpo = sections["data"], sections.get("dpo")
    assert isinstance(data, DatasetConfig)
    reference = dpo.reference_checkpoint if isinstance(dpo, DPOConfig) else None
    inputs = {
        "stage": stage,
        "config": configs,
        "data": content_of(data, KINDS[stage]),
        "start": None if start is None else identity(start, "start_checkpoint"),
        "reference": None if reference is None else identity(reference, "reference_checkpoint"),
        "tokenizer": None if tokenizer_name is None else template_fingerprint(load_tokenizer(tokenizer_name)),
        "code": {"modern_llm": code_version(MODULES[stage]), **libraries()},
    }
    return record_without_secrets(inputs)  # as the manifest will have them, so that both have one key


def key_of(inputs: dict[str, Any], any_code: bool = False) -> str:
    """sha256 over a stage's inputs.

    Args:
        inputs: of `stage_inputs`.
        any_code: whether the code's version is left out.
    """
    parts = {name: value for name, value in inputs.items() if not (any_code and name == "code")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def deciding(section: StrictModel) -> dict[str, Any]:
    """The fields of a config but those that only name something."""
    found = {name: value for name, value in plain(section).items() if name not in BY_CONTENT}
    if found.get("chat_template"):
        found["chat_template"] = template_text(found["chat_template"])
    return found


def content_of(data: DatasetConfig, kind: Kind) -> list[dict[str, Any]]:
    """Each source's rows by their hash, and what of the mixture is not in the config's other fields."""
    found = []
    streaming = isinstance(data, LanguageModelingDatasetConfig) and data.streaming
    for prefix, sources in (("", data.sources()), ("eval_", data.eval_sources() or {})):
        for name, source in sources.items():
            # a stream is too large to be hashed; its name has to do
            rows = name if streaming else open_source(name, source, kind).fingerprint()
            found.append({prefix + ("stream" if streaming else "rows"): rows, **plain(source)})
    return found


def libraries() -> dict[str, str]:
    """Versions of the libraries that decide a run's numbers."""
    return {name: version(name) for name in ("torch", "transformers", "tokenizers", "peft", "bitsandbytes")}


@functools.cache
def code_version(module: str) -> str:
    """sha256 of a module's code and of all of this package that it imports, comments and docstrings left out."""
    digest = hashlib.sha256()
    for name in sorted(_reached(module)):
        digest.update(f"{name}:{_code_of(_file_of(name) or PACKAGE)}".encode())  # found, or it were not reached
    return digest.hexdigest()


def _file_of(module: str) -> Path | None:
    """The file of `training.loop`, a name without the package's."""
    path = PACKAGE.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@functools.cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _code_of(file: Path) -> str:
    """A file's syntax tree as text, without the strings that stand alone."""

    class Bare(ast.NodeTransformer):
        def visit_Expr(self, node: ast.Expr) -> ast.Expr | ast.Pass:
            is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
            return ast.Pass() if is_text else node

    return ast.dump(Bare().visit(_tree(file)))  # what it takes out imports nothing


def _reached(module: str) -> set[str]:
    """The module and all that it imports of this package, at any depth; commands are not followed."""
    reached, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        file = _file_of(name)
        if name in reached or file is None or name == "cli":
            continue
        reached.add(name)
        waiting += [found for node in ast.walk(_tree(file)) for found in _imported(node)]
    return reached


def _imported(node: ast.AST) -> list[str]:
    """The modules that an import takes from the package; what a package's `__init__` passes on, from where it is."""
    if isinstance(node, ast.Import):
        return [name.name.partition(".")[2] for name in node.names if name.name.startswith("modern_llm.")]
    if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "modern_llm":
        return []
    inside = (node.module or "").partition(".")[2]
    found = []
    for name in node.names:
        direct = f"{inside}.{name.name}".lstrip(".")
        found.append(direct if _file_of(direct) else _passed_on(inside, name.name))
    return found


def _passed_on(package: str, name: str) -> str:
    """Where a package's `__init__` has a name from; itself, if it makes the name."""
    file = _file_of(package)
    if file is None or file.name != "__init__.py":
        return package
    for node in _tree(file).body:
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            return _imported(ast.ImportFrom(node.module, [ast.alias(name)], 0))[0]
    return package
