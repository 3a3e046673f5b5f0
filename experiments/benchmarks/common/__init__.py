"""What the benchmarks share. A benchmark's `run.py` puts the folder above on the path; its sides get it from `run_side`."""
