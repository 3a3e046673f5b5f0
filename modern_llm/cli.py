"""The command line: `modern-llm run | pretrain | sft | dpo | plan | bench | compare-losses | inspect | verify | diff | replay |
export | tokenizer | schema`.

Every argument of a stage function is a key of its `--config` YAML file, and every key is an option: `--dpo-config.beta 0.08` or
`dpo_config.beta=0.08`. Options go over the file, and both end in the same validation.
"""

import errno
import json
import os
import re
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError

from modern_llm.config import PipelineConfig, UserError
from modern_llm.config.base import did_you_mean, explain, shown
from modern_llm.config.commands import (
    USAGE,
    BenchArguments,
    CompareArguments,
    DiffArguments,
    DPOArguments,
    ExportArguments,
    InspectArguments,
    PlanArguments,
    PretrainArguments,
    ReplayArguments,
    SchemaArguments,
    SFTArguments,
    TokenizerArguments,
    VerifyArguments,
    as_pipeline,
    command_of_file,
    is_mapping,
    kind_of_file,
    options_of,
)
from modern_llm.config.foreign_names import counterpart
from modern_llm.config.io import json_schema, read_yaml
from modern_llm.config.paths import expanded
from modern_llm.exit_codes import STORAGE_FAILED, WRONG_INPUT, code_of
from modern_llm.secrets import without_secrets

Arguments = TypeVar("Arguments", bound=BaseModel)


def parse(kind: type[Arguments], command: str, words: list[str]) -> Arguments:
    """Options over the YAML file named by `--config`, as one validated object.

    Raises:
        UserError: one line for each problem.
    """
    words, options, config_path = [_as_option(word) for word in words], options_of(kind), None
    if options:
        config_path, words = _take("--config", words)
        if {"-h", "--help"} & set(words):
            print("--config FILE holds any of these options as YAML; an option goes over the file.\n")
    settings = type("Settings", (BaseSettings, kind), {"model_config": _cli_settings(command)})
    try:
        source = CliSettingsSource(settings, cli_parse_args=_spelled_out(words, options))
        given = source()
    except SettingsError as error:
        raise UserError(_complaint(options, str(error))) from None
    content = {} if config_path is None else read_yaml(expanded(config_path))
    if other := command_of_file(content, kind):
        place = "" if other == "run" else "--config "
        raise UserError(f"{config_path}: a file for modern-llm {other} {place}{config_path}, not for {command.split()[0]}")
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


def _take(option: str, words: list[str]) -> tuple[str | None, list[str]]:
    """The value of `--config` or `--dry-run`, and the other words; a switch that stands alone is `true`."""
    value, others, rest = None, [], list(words)
    while rest:
        word, equals, given = rest.pop(0).partition("=")
        if word != option:
            others.append(word + equals + given)
            continue
        if value is not None:
            raise UserError(f"{option}: give it once")
        if equals:
            value = given
        elif option == "--dry-run":
            value = rest.pop(0) if rest and rest[0] in ("true", "false") else "true"
        elif rest:
            value = rest.pop(0)
        else:
            raise UserError(f"{option}: give the path of a YAML file")
    return value, others


def _spelled_out(words: list[str], options: dict[str, FieldInfo]) -> list[str]:
    """Switches that stand alone as `--fit=true`; no mapping (`null`) as the empty one."""
    found = []
    for word, after in zip(words, [*words, "--"][1:], strict=True):
        option, _, value = word.partition("=")
        if word in options and options[word].annotation is bool and after.startswith("-"):
            word += "=true"
        elif option in options and is_mapping(options[option]) and value == "null":
            word = f"{option}={{}}"
        elif word == "null" and found and found[-1] in options and is_mapping(options[found[-1]]):
            word = "{}"
        found.append(word)
    return found


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, mapping by mapping; an empty mapping takes the place of a whole one."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(value, dict) and value and isinstance(below, dict) else value
    return merged


def _complaint(options: dict[str, FieldInfo], message: str) -> str:
    """What the parser says against the words, with what to write."""
    message = message.removeprefix("error parsing CLI: ")
    if found := re.match(r"argument (\S+): expected one argument", message):
        return f"{found[1]}: give a value"
    if found := re.match(r"Parsing error encountered for (\S+): ", message):
        option = "--" + found[1].replace("_", "-")
        field = options.get(option)
        if field is None or not is_mapping(field):
            return f"{option}: {message.removeprefix(found[0])}"
        return f"{option}: give a JSON object, such as {option} '{json.dumps((field.examples or [{}])[0])}', or null for none"
    head = "unrecognized arguments: "
    if not message.startswith(head):
        return message
    word = message.removeprefix(head).split()[0]
    if not word.startswith("--"):
        how = f"a file is given as --config {word}" if word.endswith(".yaml") else "options are --name VALUE or name=VALUE"
        return f"unexpected word '{word}'" + (f": {how}" if options else "")
    name = word.split("=")[0]
    known = [*options, "--config"]
    answer = (counterpart(name, known) or did_you_mean(name, known)) if options else ": there are none"
    return f"unknown option '{name}'{answer}"


def _check(arguments: BaseModel, field: str = "start_checkpoint", ranks: int | None = None) -> PipelineConfig:
    """Refuse settings, and names of nothing, before torch is imported; return the run as a pipeline."""
    config = as_pipeline(arguments, ranks or int(os.environ.get("WORLD_SIZE", "1")))
    _check_names(config.start_checkpoint, field, config)
    return config


def _check_names(checkpoint: str | None, field: str, config: PipelineConfig | None = None) -> None:
    from modern_llm.data.local_files import check_files
    from modern_llm.foreign import find_settings

    if checkpoint is not None:
        find_settings(checkpoint, field)
    for stage in () if config is None else config.stages():
        check_files(getattr(config, stage).data)


def _pretrain(words: list[str]) -> None:
    a = parse(PretrainArguments, "pretrain", words)
    _check(a)
    from modern_llm.training.train_lm import run_training

    print(run_training(a.model, a.train_config, a.dataset_config, a.tokenizer_name))


def _sft(words: list[str]) -> None:
    a = parse(SFTArguments, "sft", words)
    _check(a, "pretrain_checkpoint")
    from modern_llm.training.train_sft import run_sft

    print(run_sft(a.pretrain_checkpoint, a.train_config, a.dataset_config, a.tokenizer_name))


def _dpo(words: list[str]) -> None:
    a = parse(DPOArguments, "dpo", words)
    _check(a, "sft_checkpoint")
    from modern_llm.training.train_dpo import run_dpo

    print(run_dpo(a.sft_checkpoint, a.train_config, a.dpo_config, a.preference_config, a.tokenizer_name))


def _run(words: list[str]) -> None:
    dry_run, words = _take("--dry-run", [_as_option(word) for word in words])
    if dry_run not in (None, "true", "false"):
        raise UserError(f"--dry-run: must be true or false (got {shown(dry_run)})")
    if not words:
        raise UserError("run: give the file first, e.g. modern-llm run configs/quickstart.yaml")
    if _is_name(words[0]):
        words = ["--config", *words]
    elif {"-h", "--help"} & set(words):
        print("--dry-run says what would run, and why, and runs nothing.")
    config = parse(PipelineConfig, "run FILE [--dry-run]", words)
    _check(config)
    from modern_llm.pipeline import plan_pipeline, run_pipeline

    if dry_run == "true":
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
    _check_names(checkpoint, "checkpoint")
    from modern_llm.export import export_checkpoint

    print(export_checkpoint(checkpoint, a.output_dir, a.dtype))


def _file_first(command: str, words: list[str], kind: type[BaseModel], example: str, what: str = "file") -> str:
    """The file (or other thing) that a command's first word names.

    Raises:
        UserError: there is none.
    """
    if words and _is_name(words[0]):
        return expanded(words[0])
    if {"-h", "--help"} & set(words):
        parse(kind, f"{command} {what.upper()}", words)
    raise UserError(f"{command}: give the {what} first, e.g. modern-llm {command} {example}")


def _refuse_missing(*folders: Path | str) -> None:
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: no such folder")


def _is_name(word: str) -> bool:
    """Whether a word names a file, a folder or the like, and is no option."""
    return not word.startswith("-") and "=" not in word


def _inspect(words: list[str]) -> None:
    file = _file_first("inspect", words, InspectArguments, "configs/quickstart.yaml --rows 2")
    config = parse(PipelineConfig, "inspect", ["--config", file])
    a = parse(InspectArguments, "inspect FILE", words[1:])
    _check_names(config.start_checkpoint, "start_checkpoint", config if a.stage is None else None)
    from modern_llm.report.rows import inspect

    inspect(config, a.stage, a.rows, a.as_json)


def _compare_losses(words: list[str]) -> None:
    file = _file_first("compare-losses", words, CompareArguments, "dpo.yaml --losses sigmoid,ipo")
    a = parse(DPOArguments, "compare-losses", ["--config", file])
    b = parse(CompareArguments, "compare-losses FILE", words[1:])
    _check(a, "sft_checkpoint")
    from modern_llm.report.compare import compare_losses

    compare_losses(a.sft_checkpoint, a.train_config, a.dpo_config, a.preference_config, a.tokenizer_name, b.losses, b.seeds)


def _plan(words: list[str]) -> None:
    file = _file_first("plan", words, PlanArguments, "configs/quickstart.yaml --fit")
    arguments = parse(kind_of_file(read_yaml(file)), "plan", ["--config", file])
    a = parse(PlanArguments, "plan FILE", words[1:])
    config = _check(arguments, ranks=a.ranks)
    from modern_llm.report.plan import plan
    from modern_llm.report.plan_text import show

    show(plan(config, measure=not a.no_measure, fit=a.fit, ranks=a.ranks, seconds=a.seconds), a.as_json)


def _bench(words: list[str]) -> None:
    a = parse(BenchArguments, "bench", words)
    from modern_llm.report.bench import bench

    bench(a.seconds, a.as_json)


def _verify(words: list[str]) -> None:
    checkpoint = _file_first("verify", words, VerifyArguments, "experiments/runs/quickstart/dpo/dpo_final", "checkpoint")
    parse(VerifyArguments, "verify CHECKPOINT", words[1:])
    _refuse_missing(checkpoint)
    from modern_llm.lineage import verify_lineage

    verify_lineage(Path(checkpoint))


def _diff(words: list[str]) -> None:
    named = [Path(expanded(word)) for word in words[:2] if _is_name(word)]
    parse(DiffArguments, "diff CHECKPOINT CHECKPOINT", words[len(named) :])
    if len(named) < 2:
        raise UserError("diff: give two checkpoints, e.g. modern-llm diff runs/a/sft_final runs/b/sft_final")
    _refuse_missing(*named)
    from modern_llm.lineage import explain_difference

    print(*explain_difference(*named), sep="\n")


def _replay(words: list[str]) -> None:
    batch = _file_first(
        "replay", words, ReplayArguments, "runs/sft/skipped/step-000123 --checkpoint runs/sft/sft_final", "batch"
    )
    a = parse(ReplayArguments, "replay BATCH", words[1:])
    _refuse_missing(batch)
    from modern_llm.report.replay import replay

    replay(Path(batch), a.checkpoint)


def _schema(words: list[str]) -> None:
    parse(SchemaArguments, "schema", words)
    print(json_schema(PipelineConfig))


COMMANDS = {
    "run": _run, "pretrain": _pretrain, "sft": _sft, "dpo": _dpo, "compare-losses": _compare_losses,
    "inspect": _inspect, "tokenizer": _tokenizer, "schema": _schema, "plan": _plan, "bench": _bench,
    "export": _export, "verify": _verify, "diff": _diff, "replay": _replay,
}  # fmt: skip


def main(command: str | None = None) -> None:
    """Run a command, by default that of the first word; a user's errors are one line each. Codes: `modern_llm.exit_codes`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for library in ("HUB", "DATASETS"):
        os.environ.setdefault(f"HF_{library}_DISABLE_PROGRESS_BARS", "1")  # ours is the one bar
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
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            _fail(f"{shown(str(error.filename))}: no file can have so long a name")
        _fail(f"{error}", STORAGE_FAILED)  # outside of what is saved on purpose, such as a cache of another library
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
