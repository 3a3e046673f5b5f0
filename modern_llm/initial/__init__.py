"""Initial checkpoints: what a folder or hub id is, and its weights, tokenizer and generation config."""
