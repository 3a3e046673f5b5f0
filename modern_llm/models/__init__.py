"""Models: build or load a `transformers` class, packed attention, the policy module."""
