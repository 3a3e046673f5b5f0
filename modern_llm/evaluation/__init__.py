"""What a checkpoint can do: perplexity, answers, preferences, distance from another model."""
