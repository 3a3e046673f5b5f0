"""One model folder for each side and the same demonstrations for both.

The peer tokenizes prompt and answer as one plain text in the Alpaca layout and puts the end token behind it. Our side renders
chats, so its folder has a chat template that adds nothing to the words but what the peer's texts have: `\\n\\n### Response:\\n`
before an answer and the end token behind it. Rows whose tokens differ all the same (words that merge across the seam) or that
do not fit whole are left out on both sides and counted.

The peer's file is laid in the order in which our side draws its rows.
"""

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from common import ours
from common.job import Job
from common.models import get_tokenizer, make_folders
from plan import MAX_LENGTH, Plan
from transformers import PreTrainedTokenizerFast

from modern_llm.config import InstructionDatasetConfig
from modern_llm.data.chat import ChatEncoder
from modern_llm.data.instruction_datasets import prepare_instructions
from modern_llm.data.tokenizer import load_tokenizer
from modern_llm.data.village import village_rows

Row = dict[str, str]
"""`prompt` and `completion` as text."""
Ids = tuple[tuple[int, ...], tuple[int, ...]]
"""Of the prompt, and of the answer with its end token."""

OPENING = "\n\n### Response:\n"
"""What stands between a prompt's last words and the answer."""


def in_alpaca_layout(instruction: str, given: str, answer: str) -> Row:
    given = f"\n\n### Input:\n{given}" if given else ""
    return {"prompt": f"### Instruction:\n{instruction}{given}{OPENING}", "completion": answer}


def gpteacher_rows(path: Path) -> Iterator[Row]:
    """Demonstrations with an answer, in the order of the file."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for row in json.load(file):
            if row["response"].strip():
                yield in_alpaca_layout(row["instruction"], row.get("input", ""), row["response"])


def village_demonstrations() -> Iterator[Row]:
    """Questions and answers of the built-in world."""
    for row in village_rows("instructions", "train"):
        *_, question, answer = row["messages"]
        yield in_alpaca_layout(question["content"], "", answer["content"])


def peer_ids(tokenizer: PreTrainedTokenizerFast, row: Row) -> Ids:
    """How TRL tokenizes a row: the answer is what follows the tokens that both texts begin with."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    whole = tokenizer(row["prompt"] + row["completion"] + str(tokenizer.eos_token))["input_ids"]
    kept = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    return tuple(whole[:kept]), tuple(whole[kept:])


def our_ids(encoder: ChatEncoder, row: Row) -> Ids:
    prompt, answer = encoder.prompt_and_answer(our_row(row)["messages"][:1], row["completion"])
    return tuple(prompt), tuple(answer)


def our_row(row: Row) -> dict[str, list[dict[str, str]]]:
    """As messages, so that nothing in the text is taken for turns."""
    return {
        "messages": [
            {"role": "user", "content": row["prompt"].removesuffix(OPENING)},
            {"role": "assistant", "content": row["completion"]},
        ]
    }


def usable(rows: Iterator[Row], count: int, tokenizer: PreTrainedTokenizerFast, left_out: dict[str, int]) -> dict[Ids, Row]:
    """The first `count` rows, each other than the ones before, that fit whole and have the same tokens on both sides."""
    encoder, found = ChatEncoder(tokenizer), {}
    for row in rows:
        if len(found) == count:
            return found
        ids = peer_ids(tokenizer, row)
        if sum(map(len, ids)) > MAX_LENGTH:
            reason = "too_long"
        elif ids != our_ids(encoder, row):
            reason = "other_tokens"
        elif ids in found:
            reason = "again"
        else:
            found[ids] = row
            continue
        left_out[reason] = left_out.get(reason, 0) + 1
    if len(found) < count:
        raise SystemExit(f"only {len(found)} rows are usable of the {count} that are needed: fewer --steps")
    return found


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def main() -> None:
    plan = Plan(**json.loads(sys.argv[1]))
    folder, left_out = Path(plan.folder), {}
    tokenizer = get_tokenizer(plan.tokenizer)
    model = make_folders(folder, plan.shape, tokenizer, OPENING)
    candidates = village_demonstrations() if plan.demonstrations is None else gpteacher_rows(Path(plan.demonstrations))
    found = usable(candidates, plan.micro_batch * plan.steps, tokenizer, left_out)
    config = InstructionDatasetConfig(
        dataset_name=str(write(folder / "ours.jsonl", [our_row(row) for row in found.values()])), max_length=MAX_LENGTH
    )
    data = prepare_instructions(config, ChatEncoder(load_tokenizer(folder / "ours")))
    drawn = ours.in_order(data, Job(plan.folder, micro_batch=plan.micro_batch, steps=plan.steps))
    rows = list(found.values())
    write(folder / "peer.jsonl", [rows[example.row] for example in drawn])
    lengths = [sum(len(ids[side]) for ids in found) / len(found) for side in (0, 1)]
    print(json.dumps({"model": model, "left_out": left_out, "prompt_tokens": lengths[0], "answer_tokens": lengths[1]}))


if __name__ == "__main__":
    main()
