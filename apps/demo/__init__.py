"""Training code of the bundled demo model: corpus, tokenizer, trainer and scorer."""
