"""How was the bundled demo model made? Corpus, tokenizer, trainer and scorer are here."""
