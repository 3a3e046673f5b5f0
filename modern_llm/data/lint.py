"""Checks of preference pairs before training: what is doubtful is counted, and dropped, kept or refused as the config says."""

from collections.abc import Iterator
from typing import Any

from modern_llm.config import UserError
from modern_llm.config.data import LintConfig
from modern_llm.data.messages import Pair, prompt_text
from modern_llm.data.prepared import Report
from modern_llm.data.sources import prompt_hash


class Lint:
    """Looks at the pairs of one source one after the other; remembers 24 bytes of each."""

    def __init__(self, config: LintConfig, report: Report) -> None:
        self.config, self.report = config, report
        self.seen: set[tuple[int, int, int]] = set()

    def keeps(self, pair: Pair, prompts_differ: bool, place: str) -> bool:
        """Whether a pair is used.

        Raises:
            UserError: a finding that the config calls a failure.
        """
        verdicts = [self.verdict(finding, place) for finding in self._findings(pair, prompts_differ)]
        return all(verdicts)

    def verdict(self, finding: str, place: str) -> bool:
        """Count a finding; whether its row is used all the same.

        Raises:
            UserError: the config calls it a failure.
        """
        wanted: Any = getattr(self.config, finding)
        if wanted == "fail":
            raise UserError(f"{place}: {finding.replace('_', ' ')} (lint.{finding}: drop or keep goes on)")
        name = f"dropped_because_{finding}" if wanted == "drop" else f"found_{finding}"
        self.report[name] = self.report.get(name, 0) + 1
        return wanted == "keep"

    def _findings(self, pair: Pair, prompts_differ: bool) -> Iterator[str]:
        """The names of what is doubtful."""
        if prompts_differ:
            yield "prompts_differ"
        if not pair.chosen.strip() or not pair.rejected.strip():
            yield "empty_answer"
        if pair.chosen.strip() == pair.rejected.strip():
            yield "identical_answers"
            return
        prompt, chosen, rejected = prompt_hash(prompt_text(pair.prompt)), prompt_hash(pair.chosen), prompt_hash(pair.rejected)
        if (prompt, chosen, rejected) in self.seen:
            yield "duplicate"
        elif (prompt, rejected, chosen) in self.seen:
            yield "contradiction"
        self.seen.add((prompt, chosen, rejected))
