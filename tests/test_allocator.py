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
for _ in range(8):
    tensors = [torch.ones(2**24) for _ in range(4)]
    del tensors
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
tensors = [torch.ones(2**24) for _ in range(4)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(way: str) -> int:
    """Pages that the system had to find for four tensors of 64 MiB, where as many were freed before."""
    out = subprocess.run([sys.executable, "-c", CODE, way], capture_output=True, text=True, check=True).stdout
    return int(out)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems keep or return memory in their own way")
def test_tensors_get_the_memory_of_those_before() -> None:
    returned = faults("returned")
    assert returned >= 100, "else this shows nothing"
    assert faults("kept") < returned / 10
