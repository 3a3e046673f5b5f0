"""Memory that was freed is handed out again without the system clearing it anew."""

import subprocess
import sys

import pytest

CODE = """
import resource
import torch
from modern_llm.allocator import keep_freed_memory

def faults():
    for _ in range(8):
        tensors = [torch.ones(2**24) for _ in range(4)]
        del tensors
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**24) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

returned = faults()
keep_freed_memory()
print(returned, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems keep or return memory in their own way")
def test_tensors_get_the_memory_of_those_before() -> None:
    """Pages that the system has to find for four tensors of 64 MiB, where as many were freed before."""
    out = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout
    returned, kept = map(int, out.split())
    assert returned >= 100, "else this shows nothing"
    assert kept < returned / 10
