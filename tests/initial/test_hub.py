"""Models and data of the hub: trained end to end, and what its refusals and failures become."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from helpers import ANSWERS, QUESTIONS, WRONG, save_start, tiny_model, write_jsonl
from local_hub import REFUSALS, LocalHub
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_" + "aB3dE5gH7jK9mN1pQ3sT5vW7yZ0bC2dE4f"  # put together here, so that no scanner of repositories takes it for real
FAULTS: dict[int | str, tuple[str, ...]] = {
    401: ("401", "HF_TOKEN", "valid"),
    403: ("403", "HF_TOKEN", "may read"),
    "gated": ("accept its terms on", "HF_TOKEN"),
    404: ("check the spelling", "private", "HF_TOKEN"),
    429: ("429", "run the same command again"),
    "wait": ("429", "wait 3600 s"),
    500: ("500", "run the same command again"),
    "cut": ("82", "check the network", "run the same command again"),
    "slow": ("bytes in 1 s", "check the network", "run the same command again"),
    "silent": ("timed out", "check the network", "run the same command again"),
}
"""What the one line of each fault says."""


class Bench:
    """A hub, and a process with everything imported that forks the command line."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.folder = folder
        _fill(folder / "hub", tokenizer)
        self.hub = LocalHub(folder / "hub")
        (folder / "runs").mkdir()
        clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        self.environment = {
            **clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
            "HF_ENDPOINT": self.hub.address, "HF_HOME": str(folder / "home"), "HF_TOKEN": TOKEN, "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_VERBOSITY": "error",
        }  # fmt: skip
        command = [sys.executable, str(ROOT / "tests" / "faults" / "fork_server.py")]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self.environment, text=True)

    def close(self) -> None:
        self.server.communicate()
        self.hub.close()

    def run(self, command: str, model: str, data: str, name: str) -> tuple[int, str]:
        """Two steps from a model and data of the hub; the exit code and what was written."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        request = {"words": self.words(command, model, data, name), "folder": str(self.folder / "runs"),
                   "cache": str(self.folder / "cache"), "fault": {}, "kill_after": None, "limit": 100}  # fmt: skip
        print(json.dumps(request), file=self.server.stdin, flush=True)
        answer = json.loads(self.server.stdout.readline())
        assert TOKEN not in answer["output"]
        return answer["code"], answer["output"]

    @staticmethod
    def words(command: str, model: str, data: str, name: str) -> list[str]:
        checkpoint, rows = {"sft": ("pretrain", "dataset"), "dpo": ("sft", "preference")}[command]
        return [command, f"{checkpoint}_checkpoint={model}", *f"{rows}_config.dataset_name={data}".split(),
                f"train_config.output_dir={name}", "train_config.max_steps=2", "train_config.batch_size=2",
                "train_config.mixed_precision=fp32"]  # fmt: skip

    def files(self, *repositories: str) -> dict[str, int]:
        """Size of each file of these repositories."""
        folders = [next(self.folder.glob(f"hub/*/{name}")) for name in repositories]
        return {f"{r}/{p.relative_to(f)}": p.stat().st_size for r, f in zip(repositories, folders, strict=True)
                for p in f.rglob("*") if p.is_file() and p.suffix != ".md"}  # fmt: skip


def _fill(hub: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A model in one file and in shards, adapters on the first, answers and pairs; each once more for every fault."""
    model = tiny_model(tokenizer)
    save_start(model, tokenizer, hub / "models/tiny/model")
    model.save_pretrained(hub / "models/tiny/shards", max_shard_size="60KB")
    tokenizer.save_pretrained(hub / "models/tiny/shards")
    adapter = hub / "models/tiny/adapter"
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(adapter)  # type: ignore[arg-type]
    settings: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "tiny/model"}))
    (hub / "datasets/tiny/answers").mkdir(parents=True)
    rows = [{"prompt": question, "completion": answer} for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]
    write_jsonl(hub / "datasets/tiny/answers/train.jsonl", rows)
    (hub / "datasets/tiny/pairs/data").mkdir(parents=True)
    columns = {"prompt": QUESTIONS, "chosen": ANSWERS, "rejected": WRONG}
    file = hub / "datasets/tiny/pairs/data/train-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.table({name: list(texts) for name, texts in columns.items()}), file)
    for name, file in (("pickled", "pytorch_model.bin"), ("gguf", "model-q4_k_m.gguf")):
        (hub / "models/tiny" / name).mkdir()
        (hub / "models/tiny" / name / file).write_bytes(b"GGUF")
    model.config.save_pretrained(hub / "models/tiny/pickled")
    tokenizer.save_pretrained(hub / "models/tiny/pickled")
    for fault in FAULTS:
        for name in ("models/tiny/model", "datasets/tiny/answers"):
            (hub / f"{name}-{fault}").symlink_to(hub / name)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("bench"), tokenizer)
    yield bench
    bench.close()


@pytest.mark.parametrize(
    ("command", "model", "data", "repositories"),
    [("sft", "tiny/shards", "tiny/answers", ("tiny/shards", "tiny/answers")),
     ("dpo", "tiny/adapter", "tiny/pairs", ("tiny/adapter", "tiny/model", "tiny/pairs"))],
    ids=["sft", "dpo on adapters"],
)  # fmt: skip
def test_a_stage_trains_from_the_hub_and_fetches_each_file_once(command, model, data, repositories, bench: Bench) -> None:
    bench.hub.sent.clear()
    code, output = bench.run(command, model, data, f"first-{command}")
    assert code == 0, output
    assert "step=2" in output
    assert {file: size for file, size in bench.hub.sent.items() if size} == bench.files(*repositories)
    assert bench.hub.tokens == {f"Bearer {TOKEN}"} | (bench.hub.tokens & {None})
    bench.hub.faults.update(dict.fromkeys(repositories, 500))  # what is in the cache needs no hub that works
    again, output = bench.run(command, model, data, f"again-{command}")
    bench.hub.faults.clear()
    assert again == 0, output
    assert bench.hub.sent == bench.files(*repositories)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_the_hub_answers_is_one_line_and_the_command_goes_on(fault: int | str, bench: Bench) -> None:
    model, data, run = f"tiny/model-{fault}", f"tiny/answers-{fault}", f"run-{fault}"
    bench.hub.sent.clear()
    bench.hub.faults.update({model: fault, data: fault})
    for name, field in ((model, "pretrain_checkpoint"), (data, "dataset_name")):
        code, output = bench.run("sft", model, data, run)
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert code == 2, output
        assert "Traceback" not in output
        assert len(errors) == 1, output
        for words in (f"{field}='{name}'", *FAULTS[fault]):
            assert words in errors[0]
        del bench.hub.faults[name]
    if fault in REFUSALS and fault != 500:
        return  # all of them are one case: nothing came
    code, output = bench.run("sft", model, data, run)
    assert code == 0, output
    assert bench.hub.sent == bench.files(model, data)


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [("tiny/pickled", "tiny/answers", ("pretrain_checkpoint='tiny/pickled'", "no model.safetensors", "save_pretrained")),
     ("tiny/gguf", "tiny/answers", ("pretrain_checkpoint='tiny/gguf'", "no config.json")),
     ("tiny/model", "tiny/answers dataset_config.split=test", ("'tiny/answers'", "'test'", "['train']", "check split")),
     ("tiny/model", "tiny/answers dataset_config.dataset_config_name=de", ("'tiny/answers'", "'de'", "['default']"))],
    ids=["pickles", "GGUF", "split", "subset"],
)  # fmt: skip
def test_what_is_wrong_with_a_repository_is_one_line(model: str, data: str, words: tuple[str, ...], bench: Bench) -> None:
    code, output = bench.run("sft", model, data, "wrong")
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 2, output
    assert len(errors) == 1, output
    for word in words:
        assert word in errors[0]


def test_offline_what_is_cached_trains(bench: Bench) -> None:
    words = bench.words("sft", "tiny/model-cut", "tiny/answers-cut", "offline")
    before = len(bench.hub.requests)
    done = subprocess.run([sys.executable, "-m", "modern_llm", *words], env={**bench.environment, "HF_HUB_OFFLINE": "1"},
                          cwd=bench.folder / "runs", capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(bench.hub.requests) == before


def test_the_token_is_in_no_file(bench: Bench) -> None:
    """After all of the above: logs, checkpoints, the hub's cache and that of prepared data."""
    files = [path for path in bench.folder.rglob("*") if path.is_file()]
    assert any(path.name == "metrics.jsonl" for path in files)
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
