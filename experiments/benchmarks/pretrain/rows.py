"""Rows of exactly `max_length` tokens for both sides, and the weights that both start from.

Our side cuts documents up and scores every token of a document but its first. So each document here is one that gives exactly
`max_length` tokens together with its end token: then a document is a block, nothing is cut, and the same tokens are scored on
both sides. Pieces of text that give other tokens alone than they did in the whole (words cut in two) are passed over.

The peer's rows are tokenized by themselves and laid in the order in which our side draws them.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from common import ours
from common.job import Job
from common.models import chat_template, dimensions, get_tokenizer, village_texts
from sizes import SIZES, Plan, Size
from transformers import PreTrainedTokenizerFast

from modern_llm.config import LanguageModelingDatasetConfig, ModelConfig
from modern_llm.data.lm_datasets import prepare_documents
from modern_llm.data.tokenizer import TextEncoder, load_tokenizer
from modern_llm.models.build import build_model

ENOUGH = 10
"""Characters of the text to a token that is needed: more than any tokenizer takes."""


def pieces(text: str, tokenizer: PreTrainedTokenizerFast, length: int) -> Iterator[str]:
    """Stretches of the text that are exactly `length` tokens by themselves, from its beginning to its end and over again."""
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    while True:
        found, start = 0, 0
        while start + length <= len(whole):
            ids = whole[start : start + length]
            piece = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
            if piece.strip() and tokenizer(piece, add_special_tokens=False)["input_ids"] == ids:
                found, start = found + 1, start + length
                yield piece
            else:
                start += 1
        if not found:
            raise SystemExit(f"no piece of {length} tokens in a text of {len(whole)}")


def write_documents(folder: Path, texts: list[str]) -> Path:
    path = folder / "ours.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def main() -> None:
    plan = Plan(**json.loads(sys.argv[1]))
    folder, size = Path(plan.folder), SIZES[plan.size]
    text = "\n\n".join(village_texts()) if plan.text is None else Path(plan.text).read_text(encoding="utf-8")
    name = plan.tokenizer if size.words is None else None
    tokenizer = get_tokenizer(name, None if plan.text is None else text.split("\n\n"), size.words)
    if tokenizer.chat_template is None:  # else ours would add ChatML's control tokens to it
        tokenizer.chat_template = chat_template("\n\nAnswer:", str(tokenizer.eos_token))
    tokenizer.save_pretrained(folder / "tokenizer")
    rows = plan.micro_batch * plan.steps
    found = pieces(text[: ENOUGH * rows * size.max_length], tokenizer, size.max_length - 1)
    texts = [next(found) for _ in range(rows)]
    model = make_model(folder, size, tokenizer)
    documents = write_documents(folder, texts)
    config = LanguageModelingDatasetConfig(dataset_name=str(documents), max_length=size.max_length)
    data = prepare_documents(config, TextEncoder(load_tokenizer(folder / "tokenizer")), size.max_length, ours.SEED)
    drawn = ours.in_order(data, Job(plan.folder, micro_batch=plan.micro_batch, steps=plan.steps))
    end = tokenizer.eos_token_id
    theirs = {tuple(ids): ids for ids in ([*tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in texts)}
    order = [tuple(row) for row in ours.shown(drawn)["ids"]]
    missing = [number for number, row in enumerate(order) if row not in theirs]
    if missing:
        raise SystemExit(f"rows {missing[:10]} of our side are none of the peer's")
    lines = [json.dumps({"input_ids": theirs[row], "labels": theirs[row]}) + "\n" for row in order]
    (folder / "peer.jsonl").write_text("".join(lines), encoding="utf-8")
    print(json.dumps({"model": model, "rows": len(order), "rows_that_differ": len(set(order))}))


def make_model(folder: Path, size: Size, tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """The weights that `run_training` starts from, as the peer's folder; the model's dimensions."""
    config = ModelConfig(**size.model)
    (folder / "shape.json").write_text(json.dumps(size.model), encoding="utf-8")
    model = build_model(config, tokenizer, ours.SEED)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return dimensions(model)


if __name__ == "__main__":
    main()
