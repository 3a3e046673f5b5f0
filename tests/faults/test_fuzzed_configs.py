"""Broken config files: read, or refused in lines that name the file; no traceback, no hang, no file written."""

import json
import random
from pathlib import Path

import pytest
import yaml
from fuzz import CASES, damaged, mutated, try_cases

from modern_llm.cli import parse
from modern_llm.config import PipelineConfig, UserError, dump_yaml, load_config
from modern_llm.config.commands import kind_of_file
from modern_llm.config.io import read_yaml

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
ARGUMENTS = (
    {"sft_checkpoint": "m", "train_config": {"max_steps": 3, "output_dir": "out"}, "dpo_config": {"beta": 0.1}},
    {"pretrain_checkpoint": "m", "dataset_config": {"dataset_name": {"a.jsonl": 1, "b.jsonl": {"weight": 0.5}}}},
    {"model_config": {"d_model": 64}, "train_config": {"dataset_name": "a.txt", "learning_rates": {"head": 1e-3}}},
)  # fmt: skip
BASES = [(path.read_bytes(), yaml.safe_load(path.read_bytes())) for path in CONFIGS]
BASES += [(yaml.dump(content).encode(), content) for content in ARGUMENTS]
PIECES = (
    b"\t", b"\0", b"\xff", b"\xed\xa0\x80", b"\r", b"\n", b"\xe2\x80\xa8", b"\xe2\x80\xae", b"x" * 5000,
    b"&a ", b"*a", b"<<: *a\n", b"!!python/object/apply:os.system ['true'] ", b"!!int ", b"!!timestamp x", b"---\n", b"...\n",
    b"%YAML 9.9\n", b"? ", b"- ", b": ", b"{", b"[" * 300, b"{a: " * 200, b"'", b'"', b"|\n", b"=", b"# ", b'"\\ud800"',
    b'"\\0"', b"2020-13-45", b"2001-12-14t21:59:43.10-99:99", b"9" * 5000, b"0x" + b"f" * 5000, b"1" + b":59" * 90, b"1e999",
    b".nan", b"-.inf",
)  # fmt: skip
"""What is put into the bytes."""


def text_of(content: object, random: random.Random) -> bytes:
    if random.random() < 0.5:
        return json.dumps(content, default=str).encode("utf-8", "surrogatepass")  # JSON is YAML
    return yaml.dump(content, allow_unicode=True, sort_keys=False).encode("utf-8", "surrogatepass")


def broken(case: int) -> bytes:
    """The config file of a number."""
    chance = random.Random(case)
    whole, content = chance.choice(BASES)
    if case % 10 < 4:
        return damaged(whole, chance, PIECES)
    try:
        return text_of(mutated(content, chance), chance)
    except (RecursionError, TypeError):  # too deep for what writes it, or a key of a kind that JSON has not
        return b"a: " + b"[" * 2000


def test_broken_config_files_are_read_or_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run.yaml"
    number = 0

    def write(case: int) -> str:
        nonlocal number
        number = case
        file.write_bytes(broken(case))
        return str(file)

    def read() -> None:
        kind = kind_of_file(read_yaml(file))
        # an option goes over the file: merging and validation of the command line, which is slow
        config = load_config(kind, file) if number % 10 else parse(kind, "plan", ["--config", str(file)])
        if isinstance(config, PipelineConfig):
            assert load_config(PipelineConfig, again(config)) == config

    def again(config: PipelineConfig) -> Path:
        path = tmp_path / "again.yaml"
        path.write_text(dump_yaml(config), encoding="utf-8")
        return path

    counts = try_cases(CASES, write, read, tmp_path)
    print(f"\nfuzzed configs: {counts}")
    assert (counts.tracebacks, counts.hangs, counts.strays) == ([], [], [])
    assert counts.accepted + counts.refused == CASES


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a: &a [x]\n" + b"".join(b"%c: &%c [%s]\n" % (n, n, b"*%c, " % (n - 1) * 9) for n in range(98, 108)),
         "more than 100000 values, those that aliases repeat included"),
        (b"a: &a [*a]\n", "stands for what it is a part of"),
        (b"a: " + b"[" * 100_000, "nested more than 100 levels deep"),
        (b"a: " + b"{a: " * 100_000, "nested more than 100 levels deep"),
        (b"- " * 100_000, "nested more than 100 levels deep"),
        (b"? " * 100_000, "nested more than 100 levels deep"),
        (b"a: " + b"x" * 2**20, "more than 1 MiB"),
        (b"seed: !!int x\n", "tags are not read"),
        (b"seed: 2020-13-45\n", "month must be in 1..12"),
        (b"seed: 0x" + b"f" * 9000, "a number of 9002 digits"),
        (b"seed: 1" + b":59" * 200 + b".5\n", "a number of 603 digits"),
        (b'run_name: "a\\0b"\n', "a character that no text has"),
        (b'"\\ud800": 1\n', "a character that no text has"),
    ],
)  # fmt: skip
def test_a_file_made_to_do_harm_is_refused_by_name(content: bytes, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError) as refused:
        load_config(PipelineConfig, file)
    assert str(refused.value).startswith(f"{file}: not YAML: ")
    assert reason in str(refused.value)
    assert len(str(refused.value)) < 3000
