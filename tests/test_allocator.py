"""Memory that was freed is handed out again without the system clearing it anew."""

import subprocess
import sys

import pytest

CODE = """
import resource, sys
import modern_llm, torch
from modern_llm.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
torch.ones(2**26)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**26)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(way: str) -> int:
    """Pages that the system had to find for a second tensor of 256 MiB, where a first one was freed."""
    out = subprocess.run([sys.executable, "-c", CODE, way], capture_output=True, text=True, check=True).stdout
    return int(out)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems keep or return memory in their own way")
def test_a_second_tensor_gets_the_memory_of_the_first() -> None:
    assert faults("kept") < 20
    assert faults("returned") >= 100, "else this shows nothing"
