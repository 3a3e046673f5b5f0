"""`python -m modern_llm`: the same as `modern-llm`."""

from modern_llm.cli import main

main()
