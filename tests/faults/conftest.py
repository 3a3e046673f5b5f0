"""One fork server for all tests of this folder."""

from collections.abc import Iterator

import pytest
from harness import Bench


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The server, the scenarios and their undisturbed runs."""
    bench = Bench(tmp_path_factory.mktemp("faults"))
    yield bench
    bench.close()
