"""`torch.compile` of the decoder layers: the same numbers, decided aloud, and never silently something else."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_loop, random_examples, snapshot, tiny_model
from torch import Tensor
from torch._inductor.cpp_builder import cpp_compiler_search
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from transformers import PreTrainedTokenizerFast

from modern_llm.config import UserError
from modern_llm.models.compilation import compile_layers
from modern_llm.models.policy import Policy

LONG_RUN, SHORT_RUN = 1e6, 10.0


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What a compiled policy sets for the whole process is put back."""
    with (
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=False),
        torch.fx.experimental._config.patch(use_duck_shape=True),  # type: ignore[attr-defined]
    ):
        yield
    torch._dynamo.reset()


def is_compiled(policy: Policy) -> bool:
    return any(module._compiled_call_impl is not None for module in policy.modules())


def test_auto_says_why_a_short_run_is_not_compiled(tokenizer: PreTrainedTokenizerFast) -> None:
    policy = Policy(tiny_model(tokenizer))
    assert compile_layers(policy, "auto", SHORT_RUN) == "compile: off (auto: about 10 s of training, and it pays from 900 s on)"
    assert not is_compiled(policy)
    assert not policy.compiled


def test_auto_compiles_a_long_run_and_off_never(tokenizer: PreTrainedTokenizerFast) -> None:
    policy = Policy(tiny_model(tokenizer))
    assert compile_layers(policy, "off", LONG_RUN) == "compile: off"
    assert not is_compiled(policy)
    assert compile_layers(policy, "auto", LONG_RUN).startswith("compile: on (auto: about 16667 minutes of training)")
    assert is_compiled(policy)
    assert policy.compiled


@pytest.mark.parametrize(
    ("architecture", "attention", "reason"),
    [("qwen3_moe", "auto", "experts"), ("qwen3", "sdpa", "attention='auto'")],
)
def test_what_cannot_be_compiled_is_named(
    architecture: Any, attention: Any, reason: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    policy = Policy(tiny_model(tokenizer, architecture=architecture), attention)
    assert reason in compile_layers(policy, "auto", LONG_RUN)
    assert not is_compiled(policy)
    with pytest.raises(UserError, match="compile='on' cannot be"):
        compile_layers(policy, "on", SHORT_RUN)


def test_without_a_compiler_auto_says_so_and_on_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    policy = Policy(tiny_model(tokenizer))
    cpp_compiler_search.cache_clear()  # torch remembers the compiler that it found
    try:
        with torch._inductor.config.patch({"cpp.cxx": (None, str(tmp_path / "none"))}):  # where it puts what CXX says
            assert compile_layers(policy, "auto", LONG_RUN) == (
                "compile: off (auto: no C++ compiler was found (install g++, or name one by the environment variable CXX))"
            )
            with pytest.raises(UserError, match=r"compile='on' cannot be: no C\+\+ compiler"):
                compile_layers(policy, "on", LONG_RUN)
    finally:
        cpp_compiler_search.cache_clear()
    assert not is_compiled(policy)


def test_compiled_layers_train_as_the_others_do(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Weights after three steps over rows of changing layout, in fp32; built by the compiler for real."""

    def trained(wanted: Any) -> dict[str, Tensor]:
        loop = make_loop(
            tiny_model(tokenizer, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1),
            random_examples([9, 4, 30, 2, 17, 8, 8, 2, 25, 3, 12, 6]), folder=tmp_path / wanted,
            batch_size=4, micro_batch_size=2, max_steps=3, learning_rate=1e-2,
        )  # fmt: skip
        note = compile_layers(loop.policy, wanted, LONG_RUN)
        assert ("on" in note) == (wanted == "on")
        loop.run()
        return snapshot(loop.policy.model)  # type: ignore[arg-type]

    compiled, plain = trained("on"), trained("off")
    assert compiled.keys() == plain.keys(), "names in a checkpoint stay those of the model"
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-4, atol=1e-5)


# What torch keeps of compiled programs: pickles and machine code, in a folder whose name everybody knows


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch keeps them in this test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    return Path(default_cache_dir())


def test_compiled_programs_are_in_a_folder_that_only_the_user_can_enter(
    programs: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert compile_layers(Policy(tiny_model(tokenizer)), "on", SHORT_RUN).startswith("compile: on")
    assert programs.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", ["everybody may write to it", "a link"])
def test_programs_that_others_could_have_put_there_are_not_run(
    kind: str, programs: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    if kind == "a link":
        programs.symlink_to(tmp_path)
    else:
        programs.mkdir()
        programs.chmod(0o777)
    policy = Policy(tiny_model(tokenizer))
    said = compile_layers(policy, "auto", LONG_RUN)
    assert said.startswith(f"compile: off (auto: others can write to {programs}, and torch runs the programs it finds there")
    with pytest.raises(UserError, match="set TMPDIR"):
        compile_layers(policy, "on", LONG_RUN)
    assert not is_compiled(policy)
