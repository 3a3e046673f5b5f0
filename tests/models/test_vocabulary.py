"""Rows of the vocabulary: which ones no training has reached, what they begin from, and that each of them learns."""

import copy
from typing import Any

import pytest
import torch
from families import GROUPED, VOCAB, WINDOW, families, random_model
from helpers import random_segment
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from modern_llm.layout import pack
from modern_llm.models.policy import Policy
from modern_llm.models.vocabulary import fill_untrained_rows, free_padding_rows, template_tokens, untrained_tokens

START, END, OTHER = 7, 250, 299
TOKENS = {"<|im_start|>": START, "<|im_end|>": END}


def tables(model: PreTrainedModel) -> list[Tensor]:
    return [model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data]  # type: ignore[union-attr]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    config = families()["llama"]
    config.tie_word_embeddings = request.param
    return random_model(config)


def test_rows_of_their_own_are_trained(model: PreTrainedModel) -> None:
    before = [table.clone() for table in tables(model)]
    assert untrained_tokens(model, TOKENS, VOCAB) == []
    fill_untrained_rows(model, TOKENS.values())
    assert all(torch.equal(old, new) for old, new in zip(before, tables(model), strict=True))


@pytest.mark.parametrize("table", [0, 1], ids=["input", "output"])
@pytest.mark.parametrize("value", ["zeros", "a copy of the other", "a copy of padding"])
def test_zeros_and_copies_in_either_table_are_untrained_and_begin_as_the_mean_of_the_others(
    value: str, table: int, model: PreTrainedModel
) -> None:
    rows = tables(model)[table]
    rows[END] = 0 if value == "zeros" else rows[START if "other" in value else OTHER]
    untrained = ["<|im_start|>", "<|im_end|>"] if "other" in value else ["<|im_end|>"]
    assert untrained_tokens(model, TOKENS, VOCAB) == untrained
    others = torch.ones(VOCAB, dtype=torch.bool)
    others[[END, *([START] if "other" in value else []), *([OTHER] if "padding" in value else [])]] = False
    before = [each.clone() for each in tables(model)]
    fill_untrained_rows(model, TOKENS.values())
    for i in (TOKENS[text] for text in untrained):
        torch.testing.assert_close(rows[i], before[table][others].mean(0), rtol=1e-5, atol=1e-7)
    kept = [i for i in range(VOCAB) if i not in {TOKENS[text] for text in untrained}]
    assert torch.equal(rows[kept], before[table][kept])
    if not model.config.tie_word_embeddings:
        assert torch.equal(tables(model)[1 - table], before[1 - table])


def test_tokens_beyond_a_table_or_a_tokenizer_are_untrained_whatever_their_rows_hold(model: PreTrainedModel) -> None:
    assert untrained_tokens(model, {**TOKENS, "<|new|>": VOCAB}, VOCAB + 1) == ["<|new|>"]
    assert untrained_tokens(model, TOKENS, END) == ["<|im_end|>"]
    fill_untrained_rows(model, [VOCAB])


def test_a_table_of_zeros_has_no_mean(model: PreTrainedModel) -> None:
    for table in tables(model):
        table.zero_()
    fill_untrained_rows(model, TOKENS.values())
    assert all(not table.any() for table in tables(model))


def test_the_tokens_of_a_template_are_those_that_it_writes_and_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    given = copy.deepcopy(tokenizer)
    given.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|spare|>", "<|begin|>"]})  # type: ignore
    given.add_special_tokens({"bos_token": "<|begin|>"})
    ids = given.get_vocab()
    assert template_tokens(given) == {text: ids[text] for text in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")}
    given.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    assert template_tokens(given) == {text: ids[text] for text in ("<|begin|>", "<|endoftext|>")}
    given.chat_template = None
    assert template_tokens(given) == {"<|endoftext|>": ids["<|endoftext|>"]}


# The row of a padding token

PER_LAYER: dict[str, Any] = {
    "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8, "activation_sparsity_pattern": [0.0] * 2, "intermediate_size": 64, "laurel_rank": 8,
    "sliding_window": WINDOW, "num_kv_shared_layers": 0,
}  # fmt: skip
PADDED: dict[str, dict[str, Any]] = {
    "llama": {},
    "opt": {},
    "gpt_neox": {},
    "gemma2": {"head_dim": 8},
    "gemma3n_text": PER_LAYER,
}


@pytest.mark.parametrize("family", PADDED)
def test_the_row_of_the_padding_token_has_the_gradient_of_any_other(family: str) -> None:
    """In every table of tokens; transformers masks it where the config names a padding token. What the model says stays."""
    if family == "opt":
        config = families()["opt"]
    else:
        config = AutoConfig.for_model(family, **{**GROUPED, **PADDED[family]})
    config.pad_token_id = END
    model = random_model(config)
    named = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Embedding) and m.num_embeddings == VOCAB}
    with torch.no_grad():
        for table in named.values():
            table.weight[END] = table.weight[START]  # random models have zeros there
        for name, parameter in model.named_parameters():
            if name.endswith("correct_output_scale"):  # and here, in Gemma 3n, which lets no gradient pass
                parameter.fill_(1.0)
    plain = copy.deepcopy(model)
    segments = [random_segment(i, 12) for i in range(3)]
    for segment in segments:
        segment.ids[4] = END
    policy = Policy(model)
    policy(pack(segments)).logprobs.sum().backward()
    assert len(named) == (2 if family == "gemma3n_text" else 1)
    for module in plain.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None
    logprobs = []
    for segment in segments:
        ids = torch.from_numpy(segment.ids).long()
        logprobs.append(plain(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None]))
    torch.cat(logprobs).sum().backward()
    for name, table in named.items():
        gradient, expected = table.weight.grad, plain.get_parameter(f"{name}.weight").grad
        assert gradient is not None
        assert expected is not None
        assert bool(gradient[END].any())
        torch.testing.assert_close(gradient[END], expected[END], rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_the_row_learns_in_an_input_table_that_is_no_output_table() -> None:
    config = families()["llama"]
    config.pad_token_id, config.tie_word_embeddings = END, False
    model = random_model(config)
    assert model.get_input_embeddings().padding_idx == END  # type: ignore[union-attr]
    segment = random_segment(0, 12)
    segment.ids[4] = END
    Policy(model)(pack([segment])).logprobs.sum().backward()
    assert bool(model.get_input_embeddings().weight.grad[END].any())  # type: ignore[union-attr, index]


def test_an_embedding_that_counts_positions_from_the_padding_row_keeps_it() -> None:
    from transformers import ProphetNetConfig, ProphetNetForCausalLM

    shape: dict[str, Any] = {
        "hidden_size": 32,
        "num_decoder_layers": 1,
        "decoder_ffn_dim": 32,
        "num_decoder_attention_heads": 2,
    }
    model = ProphetNetForCausalLM(ProphetNetConfig(vocab_size=VOCAB, pad_token_id=1, **shape))
    free_padding_rows(model)
    assert model.get_input_embeddings().padding_idx is None  # type: ignore[union-attr]
    assert {m.padding_idx for m in model.modules() if type(m).__name__ == "ProphetNetPositionalEmbeddings"} == {1}
    model(input_ids=torch.arange(5)[None])
