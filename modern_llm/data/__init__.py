"""Data: sources, tokenizer and chat rendering, one file for each kind of data set, packing, the loader, the built-in world."""
