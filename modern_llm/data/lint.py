"""Checks before training: what is doubtful is counted, and for pairs dropped, kept or refused as the config says."""

import functools
import re
from collections.abc import Sequence
from typing import Any

from modern_llm.config import UserError
from modern_llm.config.data import LintConfig
from modern_llm.data.chat import ChatEncoder
from modern_llm.data.messages import Message, Pair, answer_text, has_words, prompt_hash
from modern_llm.data.prepared import Report, count


class Lint:
    """Looks at the pairs of one source one after the other; remembers three numbers of each that is kept, some 280 bytes."""

    def __init__(self, config: LintConfig, report: Report) -> None:
        self.config, self.report = config, report
        self.seen: set[tuple[int, int, int]] = set()

    def keeps(self, pair: Pair, doubts: Sequence[str], place: str) -> bool:
        """Return True if a pair is used. `doubts` are the findings of the layout that read the row.

        Raises:
            UserError: a finding that the config calls a failure.
        """
        prompt = pair.prompt_key
        chosen, rejected = (prompt_hash(answer_text(answer)) for answer in (pair.chosen, pair.rejected))
        findings = [*doubts]
        if not has_words(pair.chosen) or not has_words(pair.rejected):
            findings.append("empty_answer")
        if chosen == rejected:
            findings.append("identical_answers")
        elif (prompt, rejected, chosen) in self.seen:
            findings.append("contradiction")
        elif (prompt, chosen, rejected) in self.seen:
            findings.append("duplicate")
        if not all(self.verdict(finding, place) for finding in findings):  # a row is dropped for one reason
            return False
        self.seen.add((prompt, chosen, rejected))
        return True

    def verdict(self, finding: str, place: str) -> bool:
        """Count a finding; whether its row is used all the same.

        Raises:
            UserError: the config calls it a failure.
        """
        wanted: Any = getattr(self.config, finding)
        if wanted == "fail":
            raise UserError(f"{place}: {finding.replace('_', ' ')} (lint.{finding}: drop or keep goes on)")
        name = f"dropped_because_{finding}" if wanted == "drop" else f"found_{finding}"
        count(self.report, name)
        return wanted == "keep"


def check_words(messages: Sequence[Message], encoder: ChatEncoder, place: str, report: Report) -> None:
    """Count a row with control tokens of the tokenizer in its words: they stay text, so a prompt that was rendered already is
    rendered a second time. The report says where the first such row is.
    """
    pattern = _any_of(encoder.encoder.control_texts)
    if any(pattern.search(message["content"]) for message in messages):
        count(report, "found_control_tokens_in_text")
        report.setdefault("first_control_tokens_in_text", place)


@functools.lru_cache(maxsize=8)
def _any_of(texts: tuple[str, ...]) -> re.Pattern[str]:
    """Pattern that finds any of the texts; nothing, if there are none."""
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")
