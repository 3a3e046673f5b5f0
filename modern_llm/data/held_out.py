"""Held-out examples of several sources: a fair sample of all, and each source alone."""

import re
from collections.abc import Sequence

import numpy as np

from modern_llm.config.data import DatasetConfig
from modern_llm.data.local_files import FORMATS
from modern_llm.data.prepared import Example, InMemory, Mixture, Part, Referenced

SEED = 0
"""Decides which examples a sample takes."""
_ENDINGS = re.compile(f"({'|'.join(map(re.escape, [*FORMATS, '.gz', '.zst']))})+$")


def held_out_mixture(config: DatasetConfig, parts: Sequence[Part]) -> Mixture:
    """The evaluation part of a data set, each example once, under the names of its sources."""
    return Mixture(parts, [1.0] * len(parts), short_names([*(config.eval_sources() or config.sources())]))


def short_names(names: Sequence[str]) -> list[str]:
    """The end of each source's name, as long as it takes to tell it from the others, in characters that suit a metric."""
    places = [_ENDINGS.sub("", name.rstrip("/")).split("/") for name in names]
    for most in range(1, max(map(len, places), default=0) + 1):
        found = [re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(place[-most:])).strip("-.") for place in places]
        if all(found) and len(set(found)) == len(found):
            return found
    return [f"source-{number}" for number in range(len(names))]


def by_source(examples: Sequence[Example]) -> dict[str, Sequence[Example]]:
    """Each source's examples under its name; all examples under "" where they are not of several named sources."""
    mixture = examples.mixture if isinstance(examples, Referenced) else examples
    named = [*zip(mixture.names, mixture.parts, strict=False)] if isinstance(mixture, Mixture) else []
    if sum(len(part) > 0 for _, part in named) < 2:
        return {"": examples}
    found: dict[str, Sequence[Example]] = {}
    start = 0
    for name, part in named:
        if len(part):
            alone = Mixture((part,), (1.0,))
            rows = slice(start, start + len(part))
            found[name] = Referenced(alone, examples.table[rows]) if isinstance(examples, Referenced) else alone
        start += len(part)
    return found


def sample(examples: Sequence[Example], most: int) -> Mixture:
    """At most so many examples, of each source by its share; always the same ones, in whatever order the sources stand.

    Every source gives at least one while there is room, the largest first. A single source gives its first examples.
    """
    parts = by_source(examples)
    sizes = {name: len(part) for name, part in parts.items()}
    chosen: list[Part] = []
    for name, number in shares(sizes, most).items():
        order = np.arange(sizes[name]) if len(parts) == 1 else np.random.default_rng(SEED).permutation(sizes[name])
        chosen.append(InMemory([parts[name][int(i)] for i in np.sort(order[:number])]))
    return Mixture(chosen, [1.0] * len(chosen), [*parts])


def shares(sizes: dict[str, int], most: int) -> dict[str, int]:
    """Number of examples of each source in a sample: one each, then to whichever is furthest below its share; ties by name."""
    total, taken = sum(sizes.values()), dict.fromkeys(sizes, 0)

    def need(name: str) -> tuple[bool, bool, int, str]:
        return taken[name] < sizes[name], not taken[name], most * sizes[name] - taken[name] * total, name

    for _ in range(min(most, total)):
        taken[max(sizes, key=need)] += 1
    return taken
