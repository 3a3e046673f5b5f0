"""Stories for both sides, the held-out ones, a tokenizer, and the weights that each seed starts from.

Our side reads the stories as documents and cuts its own blocks. The peer gets the usual ones: all stories end to end, each with
its end token, in blocks of `max_length`. Both see the same tokens of the same stories.

A held-out story is scored by itself, from its second token up to its end token or to `max_length`.
"""

import json
import sys
from pathlib import Path

from common.models import dimensions, get_tokenizer, village_texts
from plan import Plan

from modern_llm.config import ModelConfig
from modern_llm.data.tokenizer import TextEncoder
from modern_llm.models.build import build_model

SEPARATOR = "<|endoftext|>"


def stories_of(plan: Plan) -> list[str]:
    """Every story once, in the order of the file."""
    if plan.text is None:
        return list(dict.fromkeys(village_texts()))
    parts = Path(plan.text).read_text(encoding="utf-8").split(SEPARATOR)
    return list(dict.fromkeys(part.strip() for part in parts if part.strip()))


def main() -> None:
    plan = Plan(**json.loads(sys.argv[1]))
    folder, stories = Path(plan.folder), stories_of(plan)
    every = len(stories) // plan.held_out
    held_out = stories[::every][: plan.held_out]
    kept = set(held_out)
    train = [story for story in stories if story not in kept]
    tokenizer = get_tokenizer(None, train, plan.words)
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder, end = TextEncoder(tokenizer), tokenizer.eos_token_id
    stream: list[int] = []
    for story in train:
        ids = tokenizer(story, add_special_tokens=False)["input_ids"]
        if encoder.text(story) != ids:
            raise SystemExit(f"our side gives this story other tokens: {story[:80]!r}")
        stream += [*ids, end]
    blocks = [stream[i : i + plan.max_length] for i in range(0, len(stream) - plan.max_length + 1, plan.max_length)]
    validation = [[*tokenizer(story, add_special_tokens=False)["input_ids"], end][: plan.max_length] for story in held_out]
    (folder / "ours.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in train), encoding="utf-8")
    (folder / "peer.json").write_text(json.dumps(blocks), encoding="utf-8")
    (folder / "validation.json").write_text(json.dumps(validation), encoding="utf-8")
    (folder / "shape.json").write_text(json.dumps(plan.model), encoding="utf-8")
    model = None
    for seed in plan.seeds:
        model = build_model(ModelConfig(**plan.model), tokenizer, seed)
        model.save_pretrained(folder / f"model-{seed}")
    assert model is not None, "there is a seed"
    scored = sum(len(ids) - 1 for ids in validation)
    counts = {"stories": len(train), "tokens": len(stream), "held_out_stories": len(validation), "held_out_tokens": scored}
    print(json.dumps({"model": dimensions(model), "words": len(tokenizer), **counts}))


if __name__ == "__main__":
    main()
