"""Checks of preference pairs before training: what is doubtful is counted, and dropped, kept or refused as the config says."""

from typing import Any

from modern_llm.config import UserError
from modern_llm.config.data import LintConfig
from modern_llm.data.messages import Pair, prompt_text
from modern_llm.data.prepared import Report, count
from modern_llm.data.sources import prompt_hash


class Lint:
    """Looks at the pairs of one source one after the other; remembers three numbers of each that is kept, some 280 bytes."""

    def __init__(self, config: LintConfig, report: Report) -> None:
        self.config, self.report = config, report
        self.seen: set[tuple[int, int, int]] = set()

    def keeps(self, pair: Pair, prompts_differ: bool, place: str) -> bool:
        """Whether a pair is used.

        Raises:
            UserError: a finding that the config calls a failure.
        """
        prompt, chosen, rejected = prompt_hash(prompt_text(pair.prompt)), prompt_hash(pair.chosen), prompt_hash(pair.rejected)
        findings = []
        if prompts_differ:
            findings.append("prompts_differ")
        if not pair.chosen.strip() or not pair.rejected.strip():
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
