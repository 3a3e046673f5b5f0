"""The command line: `modern-llm run | pretrain | sft | dpo | plan | bench | compare-losses | inspect | verify | diff | replay |
export | tokenizer | schema`.

Every argument of a stage function is a key of its `--config` YAML file, and every key is an option: `--dpo-config.beta 0.08` or
`dpo_config.beta=0.08`. Options go over the file, and both end in the same validation.
"""

import errno
import os
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError

from modern_llm.config import PipelineConfig, UserError
from modern_llm.config.base import did_you_mean, explain, shown
from modern_llm.config.commands import (
    BenchArguments,
    CompareArguments,
    DiffArguments,
    DPOArguments,
    ExportArguments,
    InspectArguments,
    PlanArguments,
    PretrainArguments,
    ReplayArguments,
    SFTArguments,
    TokenizerArguments,
    VerifyArguments,
    as_pipeline,
    kind_of_file,
)
from modern_llm.config.io import json_schema, read_yaml
from modern_llm.exit_codes import STORAGE_FAILED, WRONG_INPUT, code_of
from modern_llm.secrets import without_secrets

USAGE = """usage: modern-llm COMMAND [--config FILE] [--option VALUE | option=VALUE ...]

  run FILE   the whole pipeline of a YAML file: pretrain, SFT, DPO, and a table of what each learned; what is there already is
             reused (--dry-run: only say what would run, and why)
  pretrain   train a model from random weights on documents
  sft        fine-tune a checkpoint on demonstrations
  dpo        train a checkpoint on preference pairs
  plan FILE  what a run will need: parameters, tokens, FLOPs, memory, disk, time; nothing is trained
  bench      what this machine can do: matrix products and copies
  compare-losses FILE   train one start with several preference losses, and put them in one table
  inspect FILE   what the data of a pipeline file becomes: counts, and rows as colours
  verify CHECKPOINT   hash a checkpoint, its ancestors and their data again, and print the chain
  diff CHECKPOINT CHECKPOINT   why two checkpoints differ
  replay BATCH   run a batch that was skipped through a checkpoint: which rows are not finite
  export CHECKPOINT   one plain model folder from a checkpoint: adapters merged, weights in bf16
  tokenizer  train a tokenizer on documents
  schema     print the JSON Schema of a pipeline file, for editors

  modern-llm COMMAND --help lists every option with its meaning."""


Arguments = TypeVar("Arguments", bound=BaseModel)


def parse(kind: type[Arguments], command: str, words: list[str]) -> Arguments:
    """Options over the YAML file named by `--config`, as one validated object.

    Raises:
        UserError: one line for each problem.
    """
    words = [_as_option(word) for word in words]
    config_path, words = _take_config(words)
    if {"-h", "--help"} & set(words):
        print("--config FILE holds any of these options as YAML; an option goes over the file.\n")
    settings = type("Settings", (BaseSettings, kind), {"model_config": _cli_settings(command)})
    try:
        source = CliSettingsSource(settings, cli_parse_args=words)
        given = source()
    except SettingsError as error:
        raise UserError(_unknown_option(kind, str(error))) from None
    content = {} if config_path is None else read_yaml(config_path)
    try:
        return kind.model_validate(_merge(content, given))
    except ValidationError as error:
        raise UserError(explain(error, source=config_path or "")) from None


def _cli_settings(command: str) -> SettingsConfigDict:
    return SettingsConfigDict(
        cli_prog_name=f"modern-llm {command}",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_exit_on_error=False,
        cli_parse_none_str="null",
        use_attribute_docstrings=True,
        extra="forbid",
    )


def _as_option(word: str) -> str:
    """`dpo_config.beta=0.08` and `--dpo_config.beta` as the option `--dpo-config.beta`; anything else as it is."""
    name, equals, value = word.partition("=")
    if name.startswith("--") or (equals and name.replace(".", "").replace("_", "").replace("-", "").isalnum()):
        return "--" + name.removeprefix("--").replace("_", "-") + equals + value
    return word


def _take_config(words: list[str]) -> tuple[str | None, list[str]]:
    """The value of `--config`, and the other words."""
    for n, word in enumerate(words):
        if word.startswith("--config="):
            return word.removeprefix("--config="), words[:n] + words[n + 1 :]
        if word == "--config":
            if n + 1 == len(words):
                raise UserError("--config: give the path of a YAML file")
            return words[n + 1], words[:n] + words[n + 2 :]
    return None, words


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, mapping by mapping."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged


def _unknown_option(kind: type[BaseModel], message: str) -> str:
    """argparse's complaint with the nearest option that exists."""
    message = message.removeprefix("error parsing CLI: ")
    head = "unrecognized arguments: "
    if not message.startswith(head):
        return message
    word = message.removeprefix(head).split()[0]
    if not word.startswith("--"):
        return f"unexpected word '{word}': options are --name VALUE or name=VALUE"
    return f"unknown option '{word.split('=')[0]}'{did_you_mean(word.split('=')[0], _options(kind))}"


def _options(kind: type[BaseModel], prefix: str = "--") -> list[str]:
    """Every option of a config class, nested ones with a dot."""
    names = ["--config"] if prefix == "--" else []
    for name, field in kind.model_fields.items():
        option = prefix + (field.alias or name).replace("_", "-")
        members: list[Any] = [field.annotation, *get_args(field.annotation)]
        inner = [member for member in members if isinstance(member, type) and issubclass(member, BaseModel)]
        names += [option] if not inner else [o for model in inner for o in _options(model, option + ".")]
    return names


def _pretrain(words: list[str]) -> None:
    arguments = parse(PretrainArguments, "pretrain", words)
    from modern_llm.training.train_lm import run_training

    a = arguments
    print(run_training(a.model, a.train_config, a.dataset_config, a.tokenizer_name))


def _sft(words: list[str]) -> None:
    a = parse(SFTArguments, "sft", words)
    from modern_llm.training.train_sft import run_sft

    print(run_sft(a.pretrain_checkpoint, a.train_config, a.dataset_config, a.tokenizer_name))


def _dpo(words: list[str]) -> None:
    a = parse(DPOArguments, "dpo", words)
    from modern_llm.training.train_dpo import run_dpo

    print(run_dpo(a.sft_checkpoint, a.train_config, a.dpo_config, a.preference_config, a.tokenizer_name))


def _run(words: list[str]) -> None:
    if words and not words[0].startswith("-") and "=" not in words[0]:
        words = ["--config", *words]
    only_plan = "--dry-run" in words
    config = parse(PipelineConfig, "run", [word for word in words if word != "--dry-run"])
    from modern_llm.pipeline import plan_pipeline, run_pipeline

    if only_plan:
        print(*plan_pipeline(config), sep="\n")
    else:
        run_pipeline(config)


def _tokenizer(words: list[str]) -> None:
    a = parse(TokenizerArguments, "tokenizer", words)
    from modern_llm.data.lm_datasets import training_texts
    from modern_llm.data.tokenizer import save_tokenizer, train_tokenizer

    print(save_tokenizer(train_tokenizer(training_texts(a.dataset_config), a.vocab_size), a.output_dir))


def _export(words: list[str]) -> None:
    checkpoint = _file_first("export", words, ExportArguments, "runs/sft/sft_final --output-dir model", "checkpoint")
    a = parse(ExportArguments, "export CHECKPOINT", words[1:])
    from modern_llm.export import export_checkpoint

    print(export_checkpoint(checkpoint, a.output_dir, a.dtype))


def _file_first(command: str, words: list[str], kind: type[BaseModel], example: str, what: str = "file") -> str:
    """The file (or other thing) that a command's first word names.

    Raises:
        UserError: there is none.
    """
    if words and not words[0].startswith("-") and "=" not in words[0]:
        return words[0]
    if {"-h", "--help"} & set(words):
        parse(kind, f"{command} {what.upper()}", words)
    raise UserError(f"{command}: give the {what} first, e.g. modern-llm {command} {example}")


def _inspect(words: list[str]) -> None:
    file = _file_first("inspect", words, InspectArguments, "configs/quickstart.yaml --rows 2")
    config = parse(PipelineConfig, "inspect", ["--config", file])
    a = parse(InspectArguments, "inspect FILE", words[1:])
    from modern_llm.report.rows import inspect

    inspect(config, a.stage, a.rows, a.as_json)


def _compare_losses(words: list[str]) -> None:
    file = _file_first("compare-losses", words, CompareArguments, "dpo.yaml --losses sigmoid,ipo")
    a = parse(DPOArguments, "compare-losses", ["--config", file])
    b = parse(CompareArguments, "compare-losses FILE", words[1:])
    from modern_llm.report.compare import compare_losses

    compare_losses(a.sft_checkpoint, a.train_config, a.dpo_config, a.preference_config, a.tokenizer_name, b.losses, b.seeds)


def _plan(words: list[str]) -> None:
    file = _file_first("plan", words, PlanArguments, "configs/quickstart.yaml --fit true")
    config = parse(kind_of_file(read_yaml(file)), "plan", ["--config", file])
    a = parse(PlanArguments, "plan FILE", words[1:])
    from modern_llm.report.plan import plan
    from modern_llm.report.plan_text import show

    show(plan(as_pipeline(config), measure=not a.no_measure, fit=a.fit, ranks=a.ranks), a.as_json)


def _bench(words: list[str]) -> None:
    a = parse(BenchArguments, "bench", words)
    from modern_llm.report.bench import bench

    bench(a.seconds, a.as_json)


def _verify(words: list[str]) -> None:
    checkpoint = _file_first("verify", words, VerifyArguments, "experiments/runs/quickstart/dpo/dpo_final", "checkpoint")
    parse(VerifyArguments, "verify CHECKPOINT", words[1:])
    from modern_llm.lineage import verify_lineage

    verify_lineage(Path(checkpoint))


def _diff(words: list[str]) -> None:
    first = _file_first("diff", words, DiffArguments, "runs/a/sft_final runs/b/sft_final", "checkpoint")
    second = _file_first("diff", words[1:], DiffArguments, "runs/a/sft_final runs/b/sft_final", "second checkpoint")
    parse(DiffArguments, "diff CHECKPOINT CHECKPOINT", words[2:])
    from modern_llm.lineage import explain_difference

    print(*explain_difference(Path(first), Path(second)), sep="\n")


def _replay(words: list[str]) -> None:
    batch = _file_first(
        "replay", words, ReplayArguments, "runs/sft/skipped/step-000123 --checkpoint runs/sft/sft_final", "batch"
    )
    a = parse(ReplayArguments, "replay BATCH", words[1:])
    from modern_llm.report.replay import replay

    replay(Path(batch), a.checkpoint)


def _schema(words: list[str]) -> None:
    print(json_schema(PipelineConfig))


COMMANDS = {
    "run": _run, "pretrain": _pretrain, "sft": _sft, "dpo": _dpo, "compare-losses": _compare_losses,
    "inspect": _inspect, "tokenizer": _tokenizer, "schema": _schema, "plan": _plan, "bench": _bench,
    "export": _export, "verify": _verify, "diff": _diff, "replay": _replay,
}  # fmt: skip


def main(command: str | None = None) -> None:
    """Run a command; errors that the user can put right are one line each. Exit codes: `modern_llm.exit_codes`.

    Args:
        command: set by `python -m modern_llm.training.train_dpo` and its siblings; else the first word.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # ours is the one bar
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries end in one line of ours
    sys.excepthook = _print_bug
    words = sys.argv[1:]
    if command is None:
        if not words or words[0] in ("-h", "--help"):
            print(USAGE)
            return
        command, *words = words
    if command not in COMMANDS:
        _fail(f"unknown command '{command}'{did_you_mean(command, COMMANDS)}")
    try:
        COMMANDS[command](words)
    except ValidationError as error:
        _fail(explain(error))
    except UserError as error:
        _fail(str(error), code_of(error))
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # outside of what is saved on purpose, such as a cache of another library
        if error.errno == errno.ENAMETOOLONG:
            _fail(f"{shown(str(error.filename))}: no file can have so long a name")
        _fail(str(error), STORAGE_FAILED)
    except KeyboardInterrupt:  # while nothing was being trained
        _fail("interrupted; the same command goes on from the newest checkpoint", code=130)


def _fail(message: str, code: int = WRONG_INPUT) -> NoReturn:
    for line in without_secrets(message).splitlines():
        print(f"error: {line}", file=sys.stderr)
    raise SystemExit(code)


def _print_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The traceback of an error that no user can put right, without secrets: messages of libraries may hold whole URLs."""
    print(without_secrets("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


if __name__ == "__main__":
    main()
