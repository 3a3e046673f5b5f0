"""Text of any size: documents of words drawn by Zipf's law from 200,000 made-up ones, and a tokenizer for them."""

import json
from pathlib import Path

import numpy as np

NUM_WORDS = 200_000
TOKENIZER_WORDS = 32_000


def make_text(path: Path, megabytes: float, shortest: int = 50, longest: int = 1500) -> int:
    """Write a `.jsonl` file of documents with sentences and paragraphs; how many they are.

    Args:
        path: the file.
        megabytes: its size.
        shortest: words of a document.
        longest: words of a document, not reached.
    """
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwygpbvk"))
    words = np.array(["".join(rng.choice(letters[: 6 + n % 17], 2 + n % 9)) for n in range(NUM_WORDS)])
    shares = 1 / (np.arange(NUM_WORDS) + 10)
    edges = np.cumsum(shares / shares.sum())
    size = documents = 0
    with path.open("w", encoding="utf-8") as file:
        while size < megabytes * 1_000_000:
            count = int(rng.integers(shortest, longest))
            drawn = words[np.minimum(np.searchsorted(edges, rng.random(count)), len(words) - 1)].tolist()
            for at in range(0, len(drawn) - 12, 12):
                drawn[at] = drawn[at].capitalize()
                drawn[at + 11] += ".\n\n" if at % 96 == 84 else "."
            line = json.dumps({"text": " ".join(drawn).replace("\n ", "\n")}) + "\n"
            file.write(line)
            size, documents = size + len(line), documents + 1
    return documents


def make_tokenizer(folder: Path, text: Path, words: int = TOKENIZER_WORDS) -> None:
    """A byte-level BPE trained on the beginning of the text."""
    from modern_llm.data.tokenizer import train_tokenizer

    with text.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(5000), strict=False)]
    train_tokenizer(texts, words).save_pretrained(folder)
