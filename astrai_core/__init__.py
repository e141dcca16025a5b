"""The model, its tokenizer and its files: torch only, no trainer, no server."""
