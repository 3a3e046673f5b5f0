"""One model folder for each side and the same rows for both.

The peer tokenizes prompt and answer as one plain text and puts the end token behind it. Our side renders chats, so its folder
has a chat template that adds nothing to the words but what the peer's texts have: `\\n\\nAssistant:` before an answer and the
end token behind it. Rows whose tokens differ all the same (words that merge across the seam) or that do not fit whole are left
out on both sides and counted.

Our side draws rows in an order that is a function of the seed; its file is laid so that it draws them in the peer's order.
"""

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from common.models import get_tokenizer, make_folders
from job import MAX_LENGTH, Plan
from transformers import PreTrainedTokenizerFast

from modern_llm.data.chat import ChatEncoder
from modern_llm.data.messages import Pair
from modern_llm.data.preference_datasets import encode_whole
from modern_llm.data.prepared import epoch_order
from modern_llm.data.village import village_rows

Row = dict[str, str]
"""`prompt`, `chosen` and `rejected` as text."""
Ids = tuple[list[int], list[int], list[int]]
"""Of the prompt and of each answer with its end token."""

ANSWERS = "\n\nAssistant:"
"""What stands between a prompt's last words and an answer."""


def hh_pairs(path: Path) -> Iterator[Row]:
    """Pairs of HH-RLHF whose two sides share the prompt, in the order of the file."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            cut = row["chosen"].rfind(ANSWERS) + len(ANSWERS)
            if row["rejected"][:cut] == row["chosen"][:cut]:
                yield {"prompt": row["chosen"][:cut], "chosen": row["chosen"][cut:], "rejected": row["rejected"][cut:]}


def village_pairs() -> Iterator[Row]:
    """Pairs of the built-in world in the form of HH-RLHF."""
    for row in village_rows("preferences", "train"):
        words = {name: row[name][-1]["content"] for name in ("prompt", "chosen", "rejected")}
        yield {
            "prompt": f"\n\nHuman: {words['prompt']}{ANSWERS}",
            "chosen": f" {words['chosen']}",
            "rejected": f" {words['rejected']}",
        }


def random_pairs(tokenizer: PreTrainedTokenizerFast, prompt: int, answer: int) -> Iterator[Row]:
    """Pairs of random words of one token each; lengths in tokens, with what the template adds."""
    found = [str(tokenizer.decode([i])) for i in range(len(tokenizer))]
    words = [w for w in found if w[:1] == " " and w[1:].isascii() and w[1:].isalpha() and len(tokenizer(w)["input_ids"]) == 1]
    drawn = Random(f"{prompt}/{answer}")
    opening = len(tokenizer(ANSWERS)["input_ids"])
    while True:
        chosen, rejected = ("".join(drawn.choices(words, k=answer - 1)) for _ in range(2))
        yield {"prompt": "".join(drawn.choices(words, k=prompt - opening)) + ANSWERS, "chosen": chosen, "rejected": rejected}


def peer_ids(tokenizer: PreTrainedTokenizerFast, row: Row) -> Ids:
    """How TRL tokenizes a row: the answer is what follows the tokens that all three texts begin with."""
    texts = [row["prompt"], *(row["prompt"] + row[side] + str(tokenizer.eos_token) for side in ("chosen", "rejected"))]
    prompt, *sides = (tokenizer(text)["input_ids"] for text in texts)
    kept = min(next((i for i, (a, b) in enumerate(zip(prompt, s, strict=False)) if a != b), len(prompt)) for s in sides)
    return prompt[:kept], sides[0][kept:], sides[1][kept:]


def our_ids(encoder: ChatEncoder, row: Row) -> Ids:
    prompt = [{"role": "user", "content": row["prompt"].removesuffix(ANSWERS)}]
    chosen, rejected = ({"role": "assistant", "content": row[side]} for side in ("chosen", "rejected"))
    return encode_whole(Pair(prompt, chosen, rejected), encoder)


def our_row(row: Row) -> dict[str, Any]:
    """As messages, so that nothing in the text is taken for turns."""
    sides = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
    return {"prompt": [{"role": "user", "content": row["prompt"].removesuffix(ANSWERS)}], **sides}


def usable(rows: Iterator[Row], count: int, tokenizer: PreTrainedTokenizerFast, left_out: dict[str, int]) -> list[Row]:
    """The first `count` rows that fit whole and have the same tokens on both sides."""
    encoder, found = ChatEncoder(tokenizer), []
    for row in rows:
        if len(found) == count:
            break
        prompt, chosen, rejected = ids = peer_ids(tokenizer, row)
        if not row["chosen"].strip() or not row["rejected"].strip() or chosen == rejected:
            reason = "nothing_to_compare"
        elif len(prompt) + max(len(chosen), len(rejected)) > MAX_LENGTH:
            reason = "too_long"
        elif ids != our_ids(encoder, row):
            reason = "other_tokens"
        else:
            found.append(row)
            continue
        left_out[reason] = left_out.get(reason, 0) + 1
    if len(found) < count:
        raise SystemExit(f"only {len(found)} rows are usable of the {count} that are needed: fewer --steps")
    return found


def write_sets(folder: Path, sets: dict[str, list[Row]]) -> None:
    """Each set as the peer reads it, and as ours does, laid so that ours draws it in the same order."""
    (folder / "rows").mkdir()
    for name, rows in sets.items():
        laid: list[Row] = [{}] * len(rows)
        for row, place in zip(rows, epoch_order(len(rows), 0, 0).tolist(), strict=True):
            laid[place] = row
        for suffix, lines in {"peer": rows, "ours": map(our_row, laid)}.items():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / "rows" / f"{name}.{suffix}.jsonl").write_text(text, encoding="utf-8")


def main() -> None:
    plan = Plan(**json.loads(sys.argv[1]))
    tokenizer = get_tokenizer(plan.tokenizer)
    model = make_folders(Path(plan.folder), plan.shape, tokenizer, ANSWERS)
    left_out: dict[str, int] = {}
    candidates = village_pairs() if plan.pairs is None else hh_pairs(Path(plan.pairs))
    found = usable(candidates, max(plan.sets.values()), tokenizer, left_out)
    sets = {name: found[:count] for name, count in plan.sets.items()}
    for name, (prompt, answer) in plan.lengths.items():
        sets[name] = usable(random_pairs(tokenizer, prompt, answer), plan.sets["timed"], tokenizer, {})
    write_sets(Path(plan.folder), sets)
    print(json.dumps({"model": model, "left_out": left_out}))


if __name__ == "__main__":
    main()
